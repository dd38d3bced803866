"""``hess reconstruct``: photos or a video in, cameras and points out."""

from dataclasses import dataclass, field, replace
from functools import partial
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
    check_folder,
    console,
    peak_memory,
    print_json,
    progress_bar,
)
from hess.cli.guarding import Goal
from hess.cli.inputs import Fit, Inputs, fit_rule
from hess.cli.policies import PolicyName, Profiles, build_policies, find_profiles
from hess.errors import AlignmentError, ConfigError, DatasetError, HessError, LayoutError

if TYPE_CHECKING:
    from hess.datasets.photos import LoadedImages
    from hess.datasets.scene import Scene
    from hess.policies.base import Policy
    from hess.reconstruction import Reconstruction

Format = Literal["npz", "ply", "glb", "colmap", "transforms", "preview"]
FILES: dict[Format, str] = {
    "npz": "scene.npz",  # first: whatever fails after it, the result is there
    "ply": "scene.ply",
    "glb": "scene.glb",
    "colmap": "colmap",
    "transforms": "transforms.json",
    "preview": "preview.png",
}
ERRORS = {
    "auc_30": "pose accuracy AUC@30, 0 to 1",
    "ate_rmse": "camera position error, RMSE",
    "ate_relative": "the same, over the length of the path",
    "chamfer_mean": "point error, chamfer mean",
}


@dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """Cameras and a point cloud from photos, a video, or a recorded data set.

    Of a data set with known cameras the first scene is taken and the errors are printed, too.

    Attention is sparse by HeSS+ if there is a profile of the model, else dense; `hess calibrate
    --images` makes one of any photos.

    Example: hess reconstruct photos/ -o out/ --max-drift 2%
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
    policy: PolicyName | None = None
    """Which attention blocks are computed; by default hess+ with a profile, dense without."""
    profile: str | None = None
    """Bundled profile (nano, pi3-nano, or these with -label-free behind) or a .hess file; by
    default those of the model."""
    sparse_ratio: float | None = None
    """Share of the blocks that may be dropped, 0 to 1; 0.8 by default."""
    cdf_threshold: float | None = None
    """Share of the attention probability to keep, 0 to 1; 0.4 by default."""
    max_drift: Annotated[str | None, tyro.conf.arg(metavar="PERCENT")] = None
    """Instead of a ratio: be as sparse as moves cameras and points by no more than this, such as
    1%, of the size of the scene. Found out on a few of the photos."""
    speedup: Annotated[str | None, tyro.conf.arg(metavar="FACTOR")] = None
    """Instead of a ratio: as sparse as it takes to be so many times as fast, such as 2x."""
    dense_below: int | None = None
    """Leave attention over fewer tokens dense. By default the number from which on sparsity was
    measured to save time on the device; 0: always sparse."""
    formats: tuple[Format, ...] = tuple(FILES)
    """What to write."""
    fit: Fit = "model"
    """How photos are brought to the model's size; "model" is the rule of the model."""
    points: Literal["model", "point_head", "depth"] = "model"
    """Where points come from: the point head, or depth maps and cameras."""
    drop_lowest: float = 0.2
    """Share of the least confident points to leave out of point clouds."""
    voxel_size: float | None = None
    """Keep one point per cube of this side, in the unit of the cloud."""
    max_views: int | None = None
    """At most so many views, spread evenly. By default all photos, 60 frames of a video, 20 views
    of a data set with known cameras."""
    fps: float | None = None
    """Frames to take per second of a video."""
    every: int | None = None
    """Take every n-th frame of a video instead."""
    strict: bool = False
    """Stop at an unreadable photo instead of skipping it."""
    device: Device = "cpu"
    dtype: Dtype = "float32"
    json: Json = False

    def run(self) -> None:
        from hess.models.catalog import BUNDLED
        from hess.models.loading import load_model
        from hess.policies import Dense
        from hess.reconstruction import reconstruct
        from hess.sparsification import BREAK_EVEN_TOKENS, sparsify

        inputs, goal = self._checked()
        profiles = find_profiles(self.profile, self.model)
        policy = self._policy(profiles, goal)
        watch = Stopwatch()
        with watch.stage("load model"):
            model = load_model(self.model, device=self.device, dtype=self.dtype)
        policy.check_model(model)
        if self.model in BUNDLED:
            console.print(
                f"{self.model} only knows made-up rooms at 48 pixels: on photos its cameras are "
                "wrong; --model facebook/VGGT-1B or yyfz233/Pi3 is for real work",
                highlight=False,
                soft_wrap=True,
            )
        with watch.stage("read photos"):
            source = inputs.read(fit_rule(model, self.fit))
        points = None if self.points == "model" else self.points
        dense_below = self.dense_below
        if dense_below is None:
            dense_below = BREAK_EVEN_TOKENS.get(self.device.partition(":")[0], 0)
        found: dict[str, Any] | None = None
        if goal and model.token_layout(source.images[None]).num_tokens >= dense_below:
            with watch.stage("choose sparsity"):
                ratio, found = goal.choose(model, source.images, partial(self._at, profiles))
            policy = Dense() if ratio is None else self._at(profiles, ratio)
        with (
            watch.stage("run model"),
            busy("running the model"),
            sparsify(model, policy, dense_below=dense_below) as run,
        ):
            reconstruction = reconstruct(model, source, points=points)
        reconstruction = replace(reconstruction, sparsification=run.stats.as_dict())
        with watch.stage("write"):
            failed = self._write(reconstruction, source)
        result = {
            "output": str(self.output),
            "files": [FILES[name] for name in FILES if name in {*self.formats} - failed.keys()],
            "model": model.model_name,
            "num_views": reconstruction.num_views,
            "skipped": [str(path) for path in getattr(source, "skipped", ())],
            "image_size": [reconstruction.images.shape[3], reconstruction.images.shape[2]],
            "block_sparsity": run.stats.block_sparsity,
            "backends": list(run.stats.backends),
            "dense_below": dense_below,
            "policy": policy.name,
            "guard": found,
            "seconds": watch.seconds,
            "peak_memory_bytes": peak_memory(self.device),
            "errors": _errors(reconstruction, source),
        }
        if policy.needs_scores and run.stats.backends == ("dense",):
            console.print(
                f"attention ran dense: over fewer than {dense_below:,} tokens sparsity saves no "
                "time here; --dense-below 0 makes it sparse all the same",
                highlight=False,
                soft_wrap=True,
            )
        if self.json:
            print_json(result)
        else:
            _print(result)
        if failed:
            reasons = "; ".join(f"{FILES[name]}: {reason}" for name, reason in failed.items())
            raise HessError(f"not everything could be written. {reasons}")

    def _policy(self, profiles: Profiles, goal: Goal) -> "Policy":
        """The policy at the settings given, or where ``goal`` chooses these, at some."""
        if self.policy is None and profiles.plus is None:
            _say(
                "attention is dense: there is no profile of this model; "
                f"`hess calibrate --model {self.model} --images PHOTOS -o FILE` makes one, and "
                "--profile FILE uses it"
            )
        name = self._policy_name(profiles)
        if goal and name == "dense":
            raise ConfigError(
                "--max-drift and --speedup choose how sparse attention is, and it is dense: give "
                "a profile, or --policy uniform, which needs none"
            )
        if goal:
            return self._at(profiles, 0.5)
        ratio = 0.8 if self.sparse_ratio is None else self.sparse_ratio
        threshold = 0.4 if self.cdf_threshold is None else self.cdf_threshold
        (policy,) = build_policies([name], profiles, [(ratio, threshold)])
        return policy

    def _policy_name(self, profiles: Profiles) -> PolicyName:
        return self.policy or ("dense" if profiles.plus is None else "hess+")

    def _at(self, profiles: Profiles, ratio: float) -> "Policy":
        """The policy that drops this share of the blocks."""
        (policy,) = build_policies([self._policy_name(profiles)], profiles, [(ratio, None)])
        return policy

    def _checked(self) -> tuple[Inputs, Goal]:
        """All that can be found out before the work."""
        check_folder(self.output)
        if not self.formats:
            raise ConfigError(f"--formats needs at least one of {', '.join(FILES)}")
        if not 0 <= self.drop_lowest < 1:
            raise ConfigError(f"--drop-lowest must be in [0, 1), found {self.drop_lowest}")
        if self.voxel_size is not None and not self.voxel_size > 0:
            raise ConfigError(f"--voxel-size must be above 0, found {self.voxel_size}")
        goal = Goal(max_drift=self.max_drift, speedup=self.speedup)
        if goal and (self.sparse_ratio is not None or self.cdf_threshold is not None):
            raise ConfigError(
                "--max-drift and --speedup choose the sparsity themselves; leave --sparse-ratio "
                "and --cdf-threshold out"
            )
        inputs = Inputs(
            given=self.input,
            folder=self.output,
            max_views=self.max_views,
            fps=self.fps,
            every=self.every,
            strict=self.strict,
        )
        return inputs, goal

    def _write(
        self, reconstruction: "Reconstruction", source: "LoadedImages | Scene"
    ) -> dict[Format, Exception]:
        """Every format that can be written; what went wrong with the others."""
        from hess.files import write_atomically
        from hess.viz.figure import image_png
        from hess.viz.scene import preview

        failed: dict[Format, Exception] = {}
        wanted = [name for name in FILES if name in self.formats]
        with progress_bar("files") as progress:
            for done, name in enumerate(wanted):
                progress(done, len(wanted), FILES[name])
                path = self.output / FILES[name]
                try:
                    if name == "preview":
                        depth = getattr(source, "depth", None)
                        picture = preview(reconstruction, depth, drop_lowest=self.drop_lowest)
                        write_atomically(path, image_png(picture))
                    else:
                        reconstruction.save(
                            path,
                            drop_lowest=self.drop_lowest,
                            voxel_size=self.voxel_size,
                            ply_file=FILES["ply"] if "ply" in self.formats else None,
                        )
                except (HessError, OSError) as error:
                    failed[name] = error
        return failed


def _errors(
    reconstruction: "Reconstruction", source: "LoadedImages | Scene"
) -> dict[str, float | str]:
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
    known = {name: value for name, value in metrics.items() if value is not None}
    return {"unit": source.unit, **known}


def _say(line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


def _print(result: dict[str, Any]) -> None:
    width, height = result["image_size"]
    skipped = f" ({len(result['skipped'])} skipped)" if result["skipped"] else ""
    stages = ", ".join(f"{name} {value:.1f} s" for name, value in result["seconds"].items())
    peak = result["peak_memory_bytes"]
    memory = "" if peak is None else f"; peak memory {peak / 2**30:.1f} GiB"
    lines = [
        f"views: {result['num_views']}{skipped} at {width}x{height} pixels, "
        f"block sparsity {result['block_sparsity']:.2f}",
        f"time: {stages}{memory}",
        f"wrote {result['output']}/: {', '.join(result['files'])}",
    ]
    errors = result["errors"]
    if errors:
        lines.append(f"against the known cameras and depth, lengths in unit {errors['unit']!r}:")
        lines += [f"  {ERRORS[n]}: {errors[n]:.4g}" for n in ERRORS if n in errors]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
