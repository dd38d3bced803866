"""``hess calibrate``: measure head sensitivities, write a profile."""

from dataclasses import dataclass, field
from typing import Annotated

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


@dataclass(frozen=True, kw_only=True)
class Calibrate:
    """Measure once, on scenes with known cameras and depth, how sensitive each attention head is.

    Stopped runs continue: type the same command again.

    Example: hess calibrate --model nano --data procedural -o nano.hess
    """

    output: Output = field()
    """Profile to write (.hess)."""
    model: ModelName = "nano"
    data: Annotated[str, tyro.conf.arg(metavar="NAME|PATH")] = "procedural"
    """procedural, bundled, or a folder whose layout is recognised (see docs/datasets.md)."""
    num_scenes: int = 40
    """Scenes at most."""
    views: int = 20
    """Views per scene."""
    inlier_threshold: float = 0.05
    """Epsilon of Eq. 3, on the squared distance in units of the mean point distance."""
    recompute: bool = True
    """Make activations anew in the backward pass: far less memory, a third more time."""
    device: Device = "cpu"
    json: Json = False

    def run(self) -> None:
        from hess.calibration import CalibrationConfig, calibrate
        from hess.datasets.open import open_dataset
        from hess.models.loading import load_model

        model = load_model(self.model, device=self.device)
        dataset = open_dataset(
            self.data,
            image_fit=model.image_rule,
            views_per_scene=self.views,
            num_scenes=self.num_scenes,
        )
        checkpoint = prepare_file(self.output).with_name(f".{self.output.name}.partial")
        if checkpoint.exists():
            console.print(f"continuing {checkpoint}", highlight=False, soft_wrap=True)
        with progress_bar("calibrate") as progress:
            profile = calibrate(
                model,
                dataset,
                CalibrationConfig(inlier_threshold=self.inlier_threshold),
                checkpoint=checkpoint,
                recompute=self.recompute,
                progress=progress,
            )
        profile.save(self.output)
        checkpoint.unlink(missing_ok=True)
        if self.json:
            print_json({"profile": str(self.output), **profile_summary(profile)})
        else:
            print_profile(profile)
            console.print(f"wrote {self.output}", highlight=False, soft_wrap=True)
