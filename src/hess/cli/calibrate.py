"""``hess calibrate``: measure head sensitivities, write a profile."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from hess.cli.console import (
    Device,
    Json,
    ModelName,
    Output,
    console,
    prepare_file,
    print_json,
    progress_bar,
)
from hess.cli.inspect import print_profile, profile_summary
from hess.errors import ConfigError

if TYPE_CHECKING:
    from hess.calibration import CalibrationConfig, ProbeConfig
    from hess.datasets.scene import Dataset
    from hess.models.base import Model

NUM_SCENES = {"data": 40, "images": 16}
"""By default: of scenes with ground truth as in the paper, of photos by the measured convergence
(docs/beyond.md)."""


@dataclass(frozen=True, kw_only=True)
class Calibrate:
    """Measure once how sensitive each attention head is: on photos, or on data with ground truth.

    --images needs photos or a video and nothing else; --data is the paper's way and needs ground
    truth. Stopped runs continue: type the same command again.

    Example: hess calibrate --model facebook/VGGT-1B --images photos/ -o vggt.hess
    """

    output: Output = field()
    """Profile to write (.hess)."""
    model: ModelName = "nano"
    images: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Folder, pattern or video: calibrate without ground truth."""
    data: Annotated[str | None, tyro.conf.arg(metavar="NAME|PATH")] = None
    """procedural (by default), bundled, or a folder whose layout is recognised (see
    docs/datasets.md)."""
    label_free: bool = False
    """Do not look at the ground truth of --data either."""
    num_scenes: int | None = None
    """Scenes at most; by default 40 of --data, 16 of --images."""
    views: int = 20
    """Views per scene."""
    probes: int = 1
    """Draws of noise per scene without ground truth; more than one hardly helps."""
    inlier_threshold: float = 0.05
    """Epsilon of Eq. 3, on the squared distance in units of the mean point distance."""
    recompute: bool = True
    """Make activations anew in the backward pass: far less memory, a third more time."""
    device: Device = "cpu"
    json: Json = False

    def run(self) -> None:
        from hess.calibration import calibrate
        from hess.models.loading import load_model

        if self.images is not None and self.data is not None:
            raise ConfigError(
                "--images calibrates without ground truth and --data with it; give one of them"
            )
        model = load_model(self.model, device=self.device)
        frames = prepare_file(self.output).with_name(f".{self.output.name}.frames")
        dataset, config = self._source(model, frames)
        checkpoint = self.output.with_name(f".{self.output.name}.partial")
        if checkpoint.exists():
            console.print(f"continuing {checkpoint}", highlight=False, soft_wrap=True)
        with progress_bar("calibrate") as progress:
            profile = calibrate(
                model,
                dataset,
                config,
                checkpoint=checkpoint,
                recompute=self.recompute,
                progress=progress,
            )
        profile.save(self.output)
        checkpoint.unlink(missing_ok=True)
        shutil.rmtree(frames, ignore_errors=True)
        if self.json:
            print_json({"profile": str(self.output), **profile_summary(profile)})
        else:
            print_profile(profile)
            console.print(f"wrote {self.output}", highlight=False, soft_wrap=True)

    def _source(
        self, model: "Model", frames: Path
    ) -> "tuple[Dataset, CalibrationConfig | ProbeConfig]":
        """Scenes to calibrate on, and how."""
        from hess.calibration import CalibrationConfig, ProbeConfig
        from hess.datasets.open import open_dataset
        from hess.datasets.photo_scenes import photo_scenes

        num_scenes = self.num_scenes
        if num_scenes is None:
            num_scenes = NUM_SCENES["data" if self.images is None else "images"]
        config: CalibrationConfig | ProbeConfig = ProbeConfig(num_probes=self.probes)
        if self.images is None:
            dataset = open_dataset(
                self.data or "procedural",
                image_fit=model.image_rule,
                views_per_scene=self.views,
                num_scenes=num_scenes,
            )
            if not self.label_free:
                config = CalibrationConfig(inlier_threshold=self.inlier_threshold)
            return dataset, config
        with progress_bar("frames") as progress:
            photos = photo_scenes(
                self.images,
                image_fit=model.image_rule,
                frames_folder=frames,
                views_per_scene=self.views,
                num_scenes=num_scenes,
                progress=progress,
            )
        return photos, config
