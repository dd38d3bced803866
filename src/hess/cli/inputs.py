"""What ``hess reconstruct`` is given: photos, a video, or the first scene of a data set."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hess.cli.console import console, progress_bar
from hess.errors import ConfigError

if TYPE_CHECKING:
    from hess.datasets.photos import LoadedImages, PhotoSource
    from hess.datasets.scene import Scene
    from hess.geometry.fit_rules import FitRule
    from hess.models.base import Model

Fit = Literal["model", "crop", "pad", "square"]
SCENE_VIEWS = 20
VIDEO_VIEWS = 60


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Where views come from and how many of them are taken.

    Args:
        given: what was typed: one folder, pattern, photo, video or name, or several photos.
        folder: for frames of a video, and for photos that other tools would see turned.
        max_views: at most so many; None: all photos, ``SCENE_VIEWS`` of a data set with known
            cameras, ``VIDEO_VIEWS`` of a video unless ``fps`` or ``every`` is given.
        fps, every: frames of a video per second, or every n-th.
        strict: an unreadable photo is an error.

    Raises:
        ConfigError: nothing was given, or a number does not fit what was.
    """

    given: tuple[str, ...]
    folder: Path
    max_views: int | None
    fps: float | None
    every: int | None
    strict: bool

    def __post_init__(self) -> None:
        from hess.datasets.video import is_video

        if not self.given:
            raise ConfigError("expected a folder, photos or a video to reconstruct, found nothing")
        if self.max_views is not None and self.max_views < 1:
            raise ConfigError(f"--max-views must be at least 1, found {self.max_views}")
        video = len(self.given) == 1 and is_video(self.given[0])
        if not video and (self.fps is not None or self.every is not None):
            raise ConfigError(
                f"--fps and --every choose frames of a video, found {' '.join(self.given)}"
            )
        if any(Path(item).resolve() == self.folder.resolve() for item in self.given):
            raise ConfigError(
                f"the output folder {self.folder} is the input as well, and what is written "
                "there would be read as photos next time; choose another -o"
            )

    def read(self, fit: "FitRule") -> "LoadedImages | Scene":
        """The views at the size that ``fit`` gives them.

        Raises:
            DatasetError: nothing usable is there.
        """
        from hess.datasets.open import open_dataset
        from hess.datasets.video import is_video

        if len(self.given) > 1:
            return self._photos(self.given, fit, self.max_views)
        (source,) = self.given
        if is_video(source):
            return self._photos(self._frames(source), fit, None)
        views = SCENE_VIEWS if self.max_views is None else self.max_views
        dataset = open_dataset(source, image_fit=fit, views_per_scene=views, num_scenes=1)
        if not dataset.name.startswith("photos:"):
            scene = dataset[0]
            if scene.has_poses:
                _say(f"{dataset.name}: first scene, {scene.num_views} views (--max-views chooses)")
                return scene
        return self._photos(source, fit, self.max_views)

    def _frames(self, video: str) -> list[Path]:
        from hess.datasets.video import extract_frames

        max_views = self.max_views
        if max_views is None and self.fps is None and self.every is None:
            max_views = VIDEO_VIEWS
            _say(f"{video}: at most {max_views} frames (--fps, --every, --max-views choose)")
        with progress_bar("frames") as progress:
            return extract_frames(
                video,
                self.folder / "frames",
                fps=self.fps,
                every=self.every,
                max_views=max_views,
                progress=progress,
            )

    def _photos(
        self, source: "PhotoSource", fit: "FitRule", max_views: int | None
    ) -> "LoadedImages":
        from hess.datasets.photos import find_images, load_images
        from hess.datasets.upright import upright_photos

        with progress_bar("photos") as progress:
            loaded = load_images(
                find_images(source),
                image_fit=fit,
                strict=self.strict,
                max_views=max_views,
                progress=progress,
            )
        with progress_bar("upright copies") as progress:
            return upright_photos(loaded, self.folder / "images", progress=progress)


def fit_rule(model: "Model", fit: Fit) -> "FitRule":
    """The rule that ``fit`` names, at the size the model was trained for."""
    from hess.geometry.fit_rules import square_crop, vggt_crop, vggt_pad

    # The side that the model's own rule gives a square photo.
    size = model.image_rule([(1024, 1024)])[0].width
    match fit:
        case "crop":
            return vggt_crop(size, model.patch_size)
        case "pad":
            return vggt_pad(size, model.patch_size)
        case "square":
            return square_crop(size)
    return model.image_rule


def _say(line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)
