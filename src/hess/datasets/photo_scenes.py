"""Scenes of photos or of a video without any ground truth."""

from pathlib import Path

from hess.datasets.frames import Frame, FrameSequence
from hess.datasets.photo_files import find_images
from hess.datasets.photos import Progress
from hess.datasets.recordings import FrameDataset
from hess.datasets.video import extract_frames, is_video
from hess.geometry.fit_rules import FitRule


def photo_scenes(
    source: str | Path,
    *,
    image_fit: FitRule,
    frames_folder: Path,
    views_per_scene: int,
    num_scenes: int,
    progress: Progress | None = None,
) -> FrameDataset:
    """Photos cut into scenes, each spread evenly over all; what else the folder holds is not read.

    Args:
        source: a folder, pattern or photo, see :func:`find_images`, or a video.
        image_fit: brings photos to the model's size.
        frames_folder: gets the frames of a video, see :func:`extract_frames`.
        views_per_scene: fewer photos make one scene of all of them.
        num_scenes: at most so many scenes, disjoint.
        progress: called with frames done, frames in all and a name.

    Raises:
        ConfigError: a number is below 1.
        DatasetError: nothing usable is there.
    """
    if is_video(source):
        most = max(1, views_per_scene) * max(1, num_scenes)
        paths = extract_frames(source, frames_folder, max_views=most, progress=progress)
    else:
        paths = find_images(source)
    frames = tuple(Frame(image_path=path) for path in paths)
    return FrameDataset(
        name=f"photos:{source}",
        sequences=[FrameSequence(name=Path(source).resolve().stem, frames=frames)],
        image_fit=image_fit,
        views_per_scene=views_per_scene,
        num_scenes=num_scenes,
        provenance={"layout": "photos", "source": str(source)},
        strict=False,
    )
