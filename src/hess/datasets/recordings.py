"""Recorded sequences cut into scenes.

What all file layouts share: choosing views, fitting photos with their cameras and depth, and the
data set made of it.
"""

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hess.datasets.frames import Frame, FrameSequence
from hess.datasets.photos import load_images
from hess.datasets.scene import Scene
from hess.errors import ConfigError, DatasetError
from hess.geometry.fit_rules import FitRule
from hess.geometry.image_fit import ImageFit
from hess.geometry.poses import invert_pose
from hess.geometry.projection import project

logger = logging.getLogger(__name__)

_PLAIN_SUFFIXES = (".jpg", ".jpeg", ".png")


def split_views(
    num_frames: int, views_per_scene: int, generator: torch.Generator | None = None
) -> list[list[int]]:
    """Cut a sequence into as many disjoint scenes as it has frames for, each in ascending order.

    Args:
        num_frames: frames of the sequence.
        views_per_scene: views of each scene; a shorter sequence gives one scene of all its frames.
        generator: draws the views at random; without it each scene is spread evenly over the
            whole sequence.
    """
    if num_frames <= views_per_scene:
        return [list(range(num_frames))]
    order = list(range(num_frames))
    if generator is not None:
        order = torch.randperm(num_frames, generator=generator).tolist()
    # Neighbouring starts are at least num_frames // views_per_scene apart, hence disjoint scenes.
    starts = [view * num_frames // views_per_scene for view in range(views_per_scene)]
    num_scenes = num_frames // views_per_scene
    return [sorted(order[start + scene] for start in starts) for scene in range(num_scenes)]


def load_scene(
    name: str,
    frames: Sequence[Frame],
    *,
    unit: str,
    image_fit: FitRule,
    category: str | None = None,
    strict: bool = True,
) -> Scene:
    """Read frames from disk into a scene at the size of ``image_fit``.

    The scene has poses (intrinsics) when all frames have them, and depth when any has depth or
    points; a frame without then counts as unknown everywhere.

    Raises:
        DatasetError: a file is missing or unreadable, or a photo does not have the size or
            orientation that its intrinsics or its depth map were made for.
    """
    missing = [frame.image_path for frame in frames if not frame.image_path.is_file()]
    if strict and missing:
        raise DatasetError(
            f"{missing[0]}: expected a photo, found no such file ({len(missing)} of {len(frames)} "
            f"photos of scene {name!r} are missing); copy or download the data set again"
        )
    loaded = load_images([f.image_path for f in frames], image_fit=image_fit, strict=strict)
    frames = [frames[index] for index in loaded.kept]
    poses = [f.world_from_cam for f in frames if f.world_from_cam is not None]
    intrinsics = [
        fit.intrinsics_to_model(_photo_intrinsics(frame, frame.intrinsics, fit, as_stored))
        for frame, fit, as_stored in zip(frames, loaded.fits, loaded.as_stored, strict=True)
        if frame.intrinsics is not None
    ]
    has_cameras = len(poses) == len(intrinsics) == len(frames)
    depth = None
    if any(f.read_depth is not None for f in frames):
        depth = [_fit_depth(f, fit) for f, fit in zip(frames, loaded.fits, strict=True)]
    elif has_cameras and any(f.points is not None for f in frames):
        depth = [
            _sparse_depth(*view)
            for view in zip(frames, poses, intrinsics, loaded.fits, strict=True)
        ]
    return Scene(
        name=name,
        images=loaded.images,
        world_from_cam=torch.stack(poses).float() if len(poses) == len(frames) else None,
        intrinsics=torch.stack(intrinsics).float() if len(intrinsics) == len(frames) else None,
        depth=None if depth is None else torch.stack(depth).float(),
        unit=unit,
        category=category,
        view_names=loaded.names,
        image_paths=loaded.paths,
        image_fits=loaded.fits,
    )


def _photo_intrinsics(frame: Frame, intrinsics: Tensor, fit: ImageFit, as_stored: bool) -> Tensor:
    """Intrinsics in pixels of the photo as it is now, upright."""
    # Programs disagree on EXIF orientation, so which way a camera is meant cannot be known.
    if not as_stored and frame.image_path.suffix.lower() in _PLAIN_SUFFIXES:
        raise DatasetError(
            f"{frame.image_path}: expected a photo with known camera to be stored upright, found "
            "one that EXIF turns (or no JPEG or PNG inside); calibrate upright copies"
        )
    size = (fit.original_width, fit.original_height)
    if frame.image_size in (None, size):
        return intrinsics
    (width, height), (original_width, original_height) = size, frame.image_size
    # Of the same shape, but for rounding to whole pixels.
    alike = abs(width * original_height - height * original_width) <= original_width
    if not (frame.resizable and alike):
        allowed = " or whole copies of the same shape" if frame.resizable else ""
        raise DatasetError(
            f"{frame.image_path}: its camera is calibrated for {frame.image_size} pixels "
            f"(width, height), found {size}; use the photos in their original size{allowed}"
        )
    scale = torch.tensor([width / original_width, height / original_height, 1.0]).double()
    return scale[:, None] * intrinsics


def nearest_surface(pixels: Tensor, z: Tensor, *, width: int, height: int) -> Tensor:
    """Depth map of points that fall on ``pixels`` [M, 2] (column, row) at depth ``z`` [M].

    The nearest wins where several fall on one pixel. Those outside the image or behind the camera
    are left out.

    Returns:
        float32 [height, width], 0 where no point falls.
    """
    column, row = pixels.floor().unbind(-1)
    seen = (z > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    index = (row * width + column)[seen].long()
    nearest = torch.full((height * width,), torch.inf, dtype=torch.float64)
    nearest.scatter_reduce_(0, index, z[seen], "amin")
    return nearest.nan_to_num(posinf=0.0).float().reshape(height, width)


def _sparse_depth(
    frame: Frame, world_from_cam: Tensor, intrinsics: Tensor, fit: ImageFit
) -> Tensor:
    if frame.points is None:
        return torch.zeros(fit.height, fit.width)
    pixels, z = project(frame.points, intrinsics, invert_pose(world_from_cam))
    return nearest_surface(pixels, z, width=fit.width, height=fit.height)


def _fit_depth(frame: Frame, fit: ImageFit) -> Tensor:
    if frame.read_depth is None:
        return torch.zeros(fit.height, fit.width)
    depth = frame.read_depth()
    if tuple(depth.shape) != (fit.original_height, fit.original_width):
        raise DatasetError(
            f"{frame.image_path}: expected a depth map of the photo's size "
            f"{fit.original_width}x{fit.original_height}, found "
            f"{depth.shape[1]}x{depth.shape[0]}; register depth to the photos first"
        )
    return fit.depth_to_model(depth)


class FrameDataset:
    """Scenes cut from recorded sequences, read from disk when asked for.

    The first scene of every sequence comes first, then every second one, and so on, so that the
    first scenes differ as much as possible.

    Args:
        name: the layout and where it was found.
        sequences: at least one, none of them empty.
        image_fit: brings photos, cameras and depth to the model's size.
        views_per_scene: at least 1; see :func:`split_views`.
        seed: draws the views of each scene at random; None spreads them evenly.
        num_scenes: keeps the first so many scenes; None keeps all.
        provenance: further settings to record.
        strict: False skips unreadable photos with a warning instead of raising.

    Raises:
        ConfigError: ``views_per_scene`` or ``num_scenes`` is below 1.
        DatasetError: there is no frame.
    """

    def __init__(
        self,
        *,
        name: str,
        sequences: Sequence[FrameSequence],
        image_fit: FitRule,
        views_per_scene: int = 20,
        seed: int | None = None,
        num_scenes: int | None = None,
        provenance: dict[str, object],
        strict: bool = True,
    ) -> None:
        if views_per_scene < 1 or (num_scenes is not None and num_scenes < 1):
            raise ConfigError(
                "views_per_scene and num_scenes must be at least 1, found "
                f"{views_per_scene} and {num_scenes}"
            )
        if not sequences or not all(sequence.frames for sequence in sequences):
            raise DatasetError(f"{name}: expected sequences with at least one frame each")
        self.name = name
        self.sequences = tuple(sequences)
        self.image_fit = image_fit
        self.strict = strict
        self._provenance = {
            **provenance,
            "image_fit": image_fit.name,
            "views_per_scene": views_per_scene,
            "seed": seed,
            "num_scenes": num_scenes,
        }
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        scenes: list[tuple[int, FrameSequence, list[int]]] = []
        for sequence in self.sequences:
            if len(sequence.frames) < views_per_scene:
                logger.info(
                    "%s has %d frames for the %d views per scene asked for: all are used",
                    sequence.name,
                    len(sequence.frames),
                    views_per_scene,
                )
            split = split_views(len(sequence.frames), views_per_scene, generator)
            scenes += [(part, sequence, index) for part, index in enumerate(split)]
        scenes.sort(key=lambda scene: scene[0])
        self._scenes = scenes[:num_scenes]

    @property
    def provenance(self) -> dict[str, object]:
        """All that is needed to get the same scenes again; JSON values only."""
        return dict(self._provenance)

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Scene:
        part, sequence, views = self._scenes[index]
        return load_scene(
            f"{sequence.name}/{part}",
            [sequence.frames[view] for view in views],
            unit=sequence.unit,
            category=sequence.category,
            image_fit=self.image_fit,
            strict=self.strict,
        )

    def __iter__(self) -> Iterator[Scene]:
        return (self[index] for index in range(len(self)))
