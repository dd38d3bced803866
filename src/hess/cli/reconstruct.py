"""``hess reconstruct``: photos in, cameras and points out."""

import json as json_module
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from hess.cli.console import (
    Device,
    Json,
    ModelName,
    Output,
    ProfileName,
    console,
    prepare_folder,
    print_json,
)
from hess.cli.policies import build_policies
from hess.errors import AlignmentError, DatasetError, LayoutError

if TYPE_CHECKING:
    from hess.datasets.scene import Scene
    from hess.models.base import Model
    from hess.reconstruction import Reconstruction


@dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """Cameras and a point cloud from a folder of photos (or an RGB-D folder).

    Writes points.ply, reconstruction.npz, cameras.json and preview.png into the output folder.
    For a folder with known cameras the errors are printed, too.

    Example: hess reconstruct photos/ -o out/ --policy hess --sparse-ratio 0.8
    """

    input: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER|GLOB|bundled")]
    output: Output = field()
    """Folder to write."""
    model: ModelName = "nano"
    policy: str = "dense"
    """dense, uniform, hess, reverse, random or no_reallocation."""
    profile: ProfileName = "nano"
    sparse_ratio: float = 0.8
    """Share of the blocks that may be dropped, 0 to 1; dense drops none."""
    cdf_threshold: float = 0.4
    """Share of the attention probability to keep, 0 to 1."""
    max_views: int = 20
    """Of a longer sequence with known cameras, this many views spread evenly."""
    strict: bool = False
    """Stop at an unreadable photo instead of skipping it."""
    device: Device = "cpu"
    json: Json = False

    def run(self) -> None:
        from hess.models.loading import load_model
        from hess.reconstruction import reconstruct
        from hess.sensitivity.profile import load_profile
        from hess.sparsification import sparsify

        model = load_model(self.model, device=self.device)
        source = self._source(model)
        (policy,) = build_policies(
            [self.policy],
            load_profile(self.profile),
            [(self.sparse_ratio, self.cdf_threshold)],
        )
        prepare_folder(self.output)
        with sparsify(model, policy) as run:
            reconstruction = reconstruct(model, source, strict=self.strict)
        reconstruction = replace(reconstruction, sparsification=run.stats.as_dict())
        scene = None if isinstance(source, str) else source
        result = self._write(reconstruction, scene)
        if self.json:
            print_json(result)
            return
        console.print(
            f"views: {reconstruction.num_views}, block sparsity {run.stats.block_sparsity:.2f}; "
            f"wrote {self.output}/: points.ply, reconstruction.npz, cameras.json, preview.png",
            highlight=False,
        )
        for name, value in result["errors"].items():
            console.print(f"  {name}: {value:.4g}", highlight=False)

    def _source(self, model: "Model") -> "str | Scene":
        """The photos themselves, or the first scene of a data set that knows more."""
        from hess.datasets.open import open_dataset

        dataset = open_dataset(
            self.input,
            image_fit=model.image_rule,
            views_per_scene=self.max_views,
            num_scenes=1,
        )
        if dataset.name.startswith("photos:"):
            return self.input
        scene = dataset[0]
        if not scene.has_poses:
            return self.input
        console.print(
            f"{dataset.name}: first scene, {scene.num_views} views (--max-views chooses)",
            highlight=False,
        )
        return scene

    def _write(self, reconstruction: "Reconstruction", scene: "Scene | None") -> dict[str, Any]:
        from hess.files import write_atomically
        from hess.viz.figure import image_png
        from hess.viz.scene import preview

        reconstruction.save(self.output / "points.ply")
        reconstruction.save(self.output / "reconstruction.npz")
        cameras = [
            {"image": name, "world_from_cam": pose.tolist(), "intrinsics": intrinsics.tolist()}
            for name, pose, intrinsics in zip(
                reconstruction.view_names,
                reconstruction.world_from_cam,
                reconstruction.original_intrinsics,
                strict=True,
            )
        ]
        text = json_module.dumps(cameras, indent=1)
        write_atomically(self.output / "cameras.json", text.encode())
        depth = None if scene is None else scene.depth
        picture = image_png(preview(reconstruction, depth))
        write_atomically(self.output / "preview.png", picture)
        return {
            "output": str(self.output),
            "num_views": reconstruction.num_views,
            "block_sparsity": (reconstruction.sparsification or {}).get("block_sparsity"),
            "errors": {} if scene is None else _errors(reconstruction, scene),
        }


def _errors(reconstruction: "Reconstruction", scene: "Scene") -> dict[str, float]:
    """What can be measured against the scene's own cameras and depth; nothing if they are few."""
    from hess.evaluation.protocol import Protocol
    from hess.evaluation.scene_metrics import SceneTruth, scene_metrics

    protocol = Protocol(name="any-views")
    try:
        metrics = scene_metrics(
            reconstruction.world_from_cam,
            reconstruction.world_points,
            SceneTruth(scene, protocol),
            protocol,
        )
    except (AlignmentError, DatasetError, LayoutError) as error:
        console.print(f"errors cannot be measured: {error}", highlight=False, soft_wrap=True)
        return {}
    return {name: value for name, value in metrics.items() if value is not None}
