"""``hess evaluate``: policies on a data set, side by side."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from hess.cli.console import (
    Device,
    Dtype,
    Json,
    ModelName,
    Output,
    command_line,
    console,
    prepare_file,
    print_json,
    print_table,
    progress_bar,
    use_threads,
)
from hess.cli.policies import SETTINGS, PolicyName, build_policies, find_profiles
from hess.errors import ConfigError

if TYPE_CHECKING:
    from hess.datasets.scene import Dataset
    from hess.evaluation.protocol import Protocol
    from hess.geometry.fit_rules import FitRule


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Run several sparsification policies on the same scenes; compare them pair by pair.

    A stopped run continues: type the same command again. On the CPU the same command gives the
    same numbers.

    Example: hess evaluate -o results.jsonl --data procedural:test --num-scenes 224
    """

    output: Output = field()
    """Results, one JSON line per policy and setting."""
    model: ModelName = "nano"
    profile: str | None = None
    """Bundled profile (nano, pi3-nano, or these with -label-free behind) or a .hess file; by
    default those bundled with the model."""
    data: Annotated[str, tyro.conf.arg(metavar="NAME|PATH")] = "procedural:test"
    """procedural:test, bundled, or a folder whose layout is recognised."""
    protocol: str | None = None
    """Named protocol, such as co3d-vggt-fast, co3d-pi3, dtu-official or paper-points: which
    frames of a capture, which metrics, which mean; a wrong name lists them all. By default the
    scenes that --views and --seed make, each counted alike."""
    truth: Path | None = None
    """Ground truth that is not in the data: for dtu-official and dtu-paper the folder that holds
    Points/stl/ and ObsMask/ of DTU."""
    num_scenes: int | None = None
    """Scenes at most; 224 by default, all those of a named protocol."""
    views: int | None = None
    """Views per scene, at least 3, 8 by default; a folder with fewer gives all it has. A named
    protocol may have its own."""
    seed: int = 0
    """Other procedural scenes; folders always spread their views evenly."""
    policies: tuple[PolicyName, ...] = ("dense", "uniform", "hess", "reverse", "random")
    """What to compare."""
    settings: tuple[tuple[float, float], ...] = SETTINGS
    """Pairs of sparse ratio and CDF threshold."""
    random_seeds: tuple[int, ...] = (0, 1, 2)
    """One random permutation of the scores per seed."""
    batch_size: int = 16
    """Scenes per forward pass."""
    threads: int = 1
    """CPU threads; a model as small as nano gains nothing from more."""
    device: Device = "cpu"
    dtype: Dtype = "float32"
    json: Json = False

    def run(self) -> None:
        from hess.evaluation.evaluate import evaluate
        from hess.models.loading import load_model

        use_threads(self.threads)
        protocol = self._named_protocol()
        model = load_model(self.model, device=self.device, dtype=self.dtype)
        profiles = find_profiles(self.profile, self.model)
        dataset = self._dataset(protocol, model.image_rule)
        policies = build_policies(self.policies, profiles, self.settings, self.random_seeds)
        with progress_bar("evaluate") as progress:
            report = evaluate(
                model,
                dataset,
                policies,
                protocol=protocol or _protocol(dataset),
                seed=self.seed,
                batch_size=self.batch_size,
                progress=progress,
                rows_path=prepare_file(self.output),
                command=command_line(),
            )
        if self.json:
            print_json(report.rows)
        else:
            print_table(report.table(), f"{model.model_name} on {len(dataset)} scenes")
            for line in [*report.notes(), f"wrote {self.output}"]:
                console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _named_protocol(self) -> "Protocol | None":
        from hess.evaluation.protocols import protocol_named

        if self.protocol is None:
            if self.truth is not None:
                raise ConfigError("--truth belongs to a named protocol; add --protocol")
            return None
        truth = None if self.truth is None else self.truth.expanduser()
        protocol = protocol_named(self.protocol).with_truth(truth)
        views, frames = protocol.views, protocol.frames
        if self.views not in (None, views) and (views is not None or frames is not None):
            takes = frames.describe() if frames is not None else f"scenes of {views} views"
            raise ConfigError(
                f"protocol {protocol.name!r} takes {takes}, found --views {self.views}; leave "
                "--views out"
            )
        return protocol

    def _dataset(self, protocol: "Protocol | None", image_fit: "FitRule") -> "Dataset":
        from hess.datasets.open import open_dataset
        from hess.evaluation.frame_choice import ChosenScenes

        if protocol is not None and protocol.frames is not None:
            return ChosenScenes(
                self.data, protocol.frames, image_fit=image_fit, num_scenes=self.num_scenes
            )
        views = self.views if self.views is not None else (protocol and protocol.views) or 8
        return open_dataset(
            self.data,
            image_fit=image_fit,
            views_per_scene=views,
            num_scenes=224 if self.num_scenes is None else self.num_scenes,
            seed=self.seed if self.data.startswith("procedural") else None,
        )


def _protocol(dataset: "Dataset") -> "Protocol":
    from hess.datasets.procedural import Procedural
    from hess.evaluation.protocols import PROCEDURAL_8, PROTOCOLS

    if isinstance(dataset, Procedural):
        views = dataset.num_views
        return replace(PROCEDURAL_8, name=f"procedural-{views}", views=views)
    return PROTOCOLS["any-views"]
