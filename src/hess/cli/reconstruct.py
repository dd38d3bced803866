"""``hess reconstruct``: photos or a video in, cameras and points out."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from hess.cli.console import (
    Device,
    Dtype,
    Json,
    ModelName,
    Output,
    Stopwatch,
    busy,
    console,
    load_named_model,
    peak_memory,
    prepare_folder,
    print_json,
    progress_bar,
)
from hess.cli.policies import build_policies
from hess.errors import AlignmentError, ConfigError, DatasetError, LayoutError

if TYPE_CHECKING:
    from hess.datasets.photos import LoadedImages, PhotoSource
    from hess.datasets.scene import Scene
    from hess.geometry.fit_rules import FitRule
    from hess.models.base import Model
    from hess.reconstruction import Reconstruction

Format = Literal["ply", "glb", "npz", "colmap", "transforms", "preview"]
FILES: dict[Format, str] = {
    "ply": "scene.ply",
    "glb": "scene.glb",
    "npz": "scene.npz",
    "colmap": "colmap",
    "transforms": "transforms.json",
    "preview": "preview.png",
}
SCENE_VIEWS = 20


@dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """Cameras and a point cloud from photos, a video, or a recorded data set.

    Of a data set with known cameras the first scene is taken and the errors are printed, too.

    Example: hess reconstruct photos/ -o out/ --policy hess --sparse-ratio 0.8
    """

    input: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(
            metavar="INPUT",
            help='A folder, a pattern, photos, a video, or "bundled" (an office capture).',
        ),
    ]
    output: Output = field()
    """Folder to write."""
    model: ModelName = "nano"
    policy: str = "dense"
    """dense, uniform, hess, reverse, random or no_reallocation."""
    profile: str | None = None
    """Bundled profile (nano) or a .hess file; by default the profile bundled with the model."""
    sparse_ratio: float = 0.8
    """Share of the blocks that may be dropped, 0 to 1; dense drops none."""
    cdf_threshold: float = 0.4
    """Share of the attention probability to keep, 0 to 1."""
    formats: tuple[Format, ...] = tuple(FILES)
    """What to write."""
    fit: Literal["model", "crop", "pad", "square"] = "model"
    """How photos are brought to the model's size; "model" is the rule of the model."""
    points: Literal["model", "point_head", "depth"] = "model"
    """Where points come from: the point head, or depth maps and cameras."""
    drop_lowest: float = 0.2
    """Share of the least confident points to leave out of point clouds."""
    voxel_size: float | None = None
    """Keep one point per cube of this side, in the unit of the cloud."""
    max_views: int | None = None
    """At most so many views, spread evenly; of a data set with known cameras 20 by default."""
    fps: float | None = None
    """Frames to take per second of a video; by default all, or as many as --max-views."""
    every: int | None = None
    """Take every n-th frame of a video instead."""
    strict: bool = False
    """Stop at an unreadable photo instead of skipping it."""
    device: Device = "cpu"
    dtype: Dtype = "float32"
    json: Json = False

    def run(self) -> None:
        from hess.reconstruction import reconstruct
        from hess.sparsification import sparsify

        watch = Stopwatch()
        prepare_folder(self.output)
        with watch.stage("load model"):
            model = load_named_model(self.model, self.device, self.dtype)
        policy = self._policy(model)
        with watch.stage("read photos"):
            source = self._read(model)
        points = None if self.points == "model" else self.points
        with (
            watch.stage("run model"),
            busy("running the model"),
            sparsify(model, policy) as run,
        ):
            reconstruction = reconstruct(model, source, points=points)
        reconstruction = replace(reconstruction, sparsification=run.stats.as_dict())
        with watch.stage("write"):
            self._write(reconstruction, source)
        result = {
            "output": str(self.output),
            "files": [FILES[name] for name in self.formats],
            "model": model.model_name,
            "num_views": reconstruction.num_views,
            "image_size": [reconstruction.images.shape[3], reconstruction.images.shape[2]],
            "block_sparsity": run.stats.block_sparsity,
            "backends": list(run.stats.backends),
            "seconds": watch.seconds,
            "peak_memory_bytes": peak_memory(self.device),
            "errors": self._errors(reconstruction, source),
        }
        if self.json:
            print_json(result)
        else:
            _print(result)

    def _policy(self, model: "Model") -> Any:
        from hess.sensitivity.profile import BUNDLED, load_profile

        profile = self.profile
        if profile is None and model.model_name in BUNDLED:
            profile = model.model_name
        (policy,) = build_policies(
            [self.policy],
            None if profile is None else load_profile(profile),
            [(self.sparse_ratio, self.cdf_threshold)],
        )
        return policy

    def _fit(self, model: "Model") -> "FitRule":
        from hess.geometry.fit_rules import square_crop, vggt_crop, vggt_pad

        # The longest side that the model's own rule gives a square photo.
        size = model.image_rule([(1024, 1024)])[0].width
        match self.fit:
            case "crop":
                return vggt_crop(size, model.patch_size)
            case "pad":
                return vggt_pad(size, model.patch_size)
            case "square":
                return square_crop(size)
        return model.image_rule

    def _read(self, model: "Model") -> "LoadedImages | Scene":
        """Photos, frames of a video, or the first scene of a data set that knows more."""
        from hess.datasets.open import open_dataset
        from hess.datasets.photos import find_images, load_images
        from hess.datasets.video import extract_frames, is_video

        if not self.input:
            raise ConfigError("expected a folder, photos or a video to reconstruct, found nothing")
        fit = self._fit(model)
        photos: PhotoSource = self.input if len(self.input) > 1 else self.input[0]
        max_views = self.max_views
        if isinstance(photos, str) and is_video(photos):
            with progress_bar("frames") as progress:
                photos = extract_frames(
                    photos,
                    self.output / "frames",
                    fps=self.fps,
                    every=self.every,
                    max_views=self.max_views,
                    progress=progress,
                )
            max_views = None
        elif self.fps is not None or self.every is not None:
            raise ConfigError(f"--fps and --every choose frames of a video, {photos} is none")
        elif isinstance(photos, str):
            dataset = open_dataset(
                photos,
                image_fit=fit,
                views_per_scene=SCENE_VIEWS if max_views is None else max_views,
                num_scenes=1,
            )
            if not dataset.name.startswith("photos:"):
                scene = dataset[0]
                if scene.has_poses:
                    console.print(
                        f"{dataset.name}: first scene, {scene.num_views} views "
                        "(--max-views chooses)",
                        highlight=False,
                    )
                    return scene
        with progress_bar("photos") as progress:
            return load_images(
                find_images(photos),
                image_fit=fit,
                strict=self.strict,
                max_views=max_views,
                progress=progress,
            )

    def _write(self, reconstruction: "Reconstruction", source: "LoadedImages | Scene") -> None:
        from hess.files import write_atomically
        from hess.viz.figure import image_png
        from hess.viz.scene import preview

        with progress_bar("files") as progress:
            for done, name in enumerate(self.formats):
                progress(done, len(self.formats), FILES[name])
                path = self.output / FILES[name]
                if name == "preview":
                    picture = preview(reconstruction, getattr(source, "depth", None))
                    write_atomically(path, image_png(picture))
                else:
                    reconstruction.save(
                        path, drop_lowest=self.drop_lowest, voxel_size=self.voxel_size
                    )

    def _errors(
        self, reconstruction: "Reconstruction", source: "LoadedImages | Scene"
    ) -> dict[str, float]:
        """What can be measured against known cameras and depth; nothing if they are few."""
        from hess.datasets.scene import Scene
        from hess.evaluation.protocol import Protocol
        from hess.evaluation.scene_metrics import SceneTruth, scene_metrics

        if not isinstance(source, Scene):
            return {}
        protocol = Protocol(name="any-views")
        try:
            metrics = scene_metrics(
                reconstruction.world_from_cam,
                reconstruction.world_points,
                SceneTruth(source, protocol),
                protocol,
            )
        except (AlignmentError, DatasetError, LayoutError) as error:
            console.print(f"errors cannot be measured: {error}", highlight=False, soft_wrap=True)
            return {}
        return {name: value for name, value in metrics.items() if value is not None}


def _print(result: dict[str, Any]) -> None:
    width, height = result["image_size"]
    stages = ", ".join(f"{name} {value:.1f} s" for name, value in result["seconds"].items())
    lines = [
        f"views: {result['num_views']} at {width}x{height} pixels, "
        f"block sparsity {result['block_sparsity']:.2f}",
        f"time: {stages}; peak memory {result['peak_memory_bytes'] / 2**30:.1f} GiB",
        f"wrote {result['output']}/: {', '.join(result['files'])}",
        *(f"  {name}: {value:.4g}" for name, value in result["errors"].items()),
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
