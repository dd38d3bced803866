"""``hess demo``: the whole method on the embedded model, from calibration to pictures."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hess.cli.console import (
    Json,
    Output,
    command_line,
    console,
    prepare_folder,
    print_json,
    print_table,
    progress_bar,
    use_threads,
)
from hess.cli.inspect import print_profile, score_pair, write_heatmap
from hess.cli.policies import PolicyName, build_policies

if TYPE_CHECKING:
    from hess.evaluation.report import Report
    from hess.models.base import Model
    from hess.sensitivity.profile import HessProfile
    from hess.viz.picture import Picture

POLICIES: tuple[PolicyName, ...] = ("dense", "uniform", "hess", "reverse", "random")
SHOWN = (0.8, 0.4)
"""Setting of the sparse renderings."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """See the method work in a few minutes: calibrate, sparsify, measure, reconstruct.

    Runs on the embedded model and procedural scenes, plus one real capture; needs no download.
    Writes index.html, results.jsonl, profile.hess and point clouds.

    Example: hess demo -o out/demo
    """

    output: Output = Path("out/demo")
    """Folder to write."""
    calibration_scenes: int = 40
    """Scenes to measure the sensitivities on."""
    calibration_views: int = 8
    """More views change the scores little and cost time; `hess calibrate` takes 20."""
    scenes: int = 64
    """Held-out scenes to evaluate on."""
    json: Json = False

    def run(self) -> None:
        from hess.models.loading import load_model

        start = time.perf_counter()
        # So small a model gains nothing from more, and loses much on a busy machine.
        use_threads(1)
        prepare_folder(self.output)
        model = load_model("nano")
        console.rule("1. Calibrate: how sensitive is each head?")
        profile = self._calibrate(model)
        print_profile(profile)
        console.rule("2. Evaluate: who should get the attention?")
        report = self._evaluate(model, profile)
        console.rule("3. Reconstruct: a procedural scene and real photos")
        pictures = self._reconstruct(model, profile)
        self._write_page(profile, report, pictures)
        if self.json:
            print_json(report.rows)
            return
        print_table(report.table(), "Same scenes, same block budget, different heads")
        console.print(
            "± is one standard error over scenes. The embedded model is too small to gain time "
            "from skipped blocks: this shows accuracy at equal block budgets, not speed."
        )
        console.print(
            f"{time.perf_counter() - start:.0f} s. Open [bold]{self.output}/index.html[/]; "
            f"rows in {self.output}/results.jsonl"
        )

    def _calibrate(self, model: "Model") -> "HessProfile":
        from hess.calibration import calibrate
        from hess.datasets.procedural import Procedural

        scenes = Procedural(self.calibration_scenes, self.calibration_views, "calibration")
        with progress_bar("calibrate") as progress:
            # The little model fits without.
            profile = calibrate(model, scenes, recompute=False, progress=progress)
        profile.save(self.output / "profile.hess")
        write_heatmap(profile, self.output / "heatmap.png")
        return profile

    def _evaluate(self, model: "Model", profile: "HessProfile") -> "Report":
        from hess.datasets.procedural import Procedural
        from hess.evaluation.evaluate import evaluate

        with progress_bar("evaluate") as progress:
            report = evaluate(
                model,
                Procedural(self.scenes, 8, "test"),
                build_policies(POLICIES, profile),
                seed=0,
                progress=progress,
                command=command_line(),
            )
        report.save_jsonl(self.output / "results.jsonl")
        return report

    def _reconstruct(self, model: "Model", profile: "HessProfile") -> "list[Picture]":
        from hess.datasets.bundled import bundled_capture
        from hess.datasets.open import open_dataset
        from hess.datasets.procedural import Procedural
        from hess.reconstruction import reconstruct
        from hess.sparsification import sparsify
        from hess.viz.figure import image_png
        from hess.viz.picture import Picture
        from hess.viz.scene import preview

        fit = model.image_rule
        sources = {
            "procedural": (Procedural(1, 8, "test", seed=1)[0], "A procedural scene"),
            "office": (
                open_dataset(bundled_capture(), image_fit=fit)[0],
                "Real photos of an office; the model has seen procedural rooms only",
            ),
        }
        (hess,) = build_policies(["hess"], profile, [SHOWN])
        (dense,) = build_policies(["dense"], profile)
        pictures = []
        for name, (scene, title) in sources.items():
            for policy in (dense, hess):
                with sparsify(model, policy) as run:
                    reconstruction = reconstruct(model, scene)
                stem = f"{name}-{policy.name}"
                reconstruction.save(self.output / f"{stem}.ply")
                share = f"block sparsity {run.stats.block_sparsity:.2f}"
                pictures.append(
                    Picture(
                        title=f"{title}: {policy.name}.",
                        caption=f"Photos, predicted and true depth, and the point cloud with the "
                        f"predicted cameras ({share}). {stem}.ply holds the points.",
                        alt=f"Photos, depth maps and two renderings of a point cloud, {stem}.",
                        png=image_png(preview(reconstruction, scene.depth)),
                    )
                )
        return pictures

    def _write_page(
        self, profile: "HessProfile", report: "Report", pictures: "list[Picture]"
    ) -> None:
        from hess.viz.report import write_report

        camera, point = score_pair(profile)
        write_report(
            self.output / "index.html",
            title="HeSS on the embedded model",
            rows=report.rows,
            camera_score=camera,
            point_score=point,
            pictures=pictures,
        )
