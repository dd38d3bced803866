"""Recorded sequences: frames on disk with whatever is known of them, cut into scenes.

What the readers of all file layouts share: choosing views, fitting images with their cameras and
depth, and the data set made of it.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hess.datasets.photos import load_images
from hess.datasets.scene import Scene
from hess.errors import ConfigError, DatasetError
from hess.geometry.fit_rules import FitRule
from hess.geometry.image_fit import ImageFit
from hess.geometry.poses import pose_from

logger = logging.getLogger(__name__)

_MAX_SHEAR = 0.05


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One photo of a sequence and what is known of it.

    Args:
        image_path: the photo.
        world_from_cam: float64 [4, 4], OpenCV axes, or None.
        intrinsics: float64 [3, 3] in pixels of the photo, top-left pixel centre at (0.5, 0.5),
            or None.
        image_size: (width, height) the photo must have for its intrinsics to hold; None if the
            layout does not say.
        read_depth: reads float32 [H, W], z-depth registered to the photo, 0 where unknown; None
            when the frame has none.
    """

    image_path: Path
    world_from_cam: Tensor | None = None
    intrinsics: Tensor | None = None
    image_size: tuple[int, int] | None = None
    read_depth: Callable[[], Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class FrameSequence:
    """Frames of one place in the order of recording; ``unit`` as in :class:`Scene`."""

    name: str
    frames: tuple[Frame, ...]
    unit: str = "arbitrary"


def rigid_pose(matrix: Tensor, source: Path) -> Tensor:
    """Pose [4, 4] with its rotation made exactly orthonormal (nearest rotation, by SVD).

    Raises:
        DatasetError: ``matrix`` has no rotation even roughly, or is not finite.
    """
    rotation, translation = matrix[:3, :3].double(), matrix[:3, 3].double()
    gram = rotation @ rotation.T
    orthogonal = torch.allclose(gram, torch.eye(3, dtype=torch.float64), rtol=0, atol=_MAX_SHEAR)
    if not matrix.isfinite().all() or not orthogonal or torch.linalg.det(rotation) < 0:
        raise DatasetError(
            f"{source}: expected a camera-to-world pose with a right-handed rotation, found "
            f"{matrix.tolist()}; remove frames without tracking"
        )
    u, _, vh = torch.linalg.svd(rotation)
    return pose_from(u @ vh, translation)


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
    name: str, frames: Sequence[Frame], *, unit: str, image_fit: FitRule, strict: bool = True
) -> Scene:
    """Read frames from disk into a scene at the size of ``image_fit``.

    The scene has poses (intrinsics) when all frames have them, and depth when any has; a frame
    without depth then counts as unknown everywhere.

    Raises:
        DatasetError: a file is unreadable, or a photo does not have the size that its intrinsics
            or its depth map were made for.
    """
    loaded = load_images([f.image_path for f in frames], image_fit=image_fit, strict=strict)
    frames = [frames[index] for index in loaded.kept]
    for frame, fit in zip(frames, loaded.fits, strict=True):
        size = (fit.original_width, fit.original_height)
        if frame.image_size is not None and frame.image_size != size:
            raise DatasetError(
                f"{frame.image_path}: its camera is calibrated for {frame.image_size} pixels "
                f"(width, height), found {size}; use the photos in their original size"
            )
    poses = [f.world_from_cam for f in frames if f.world_from_cam is not None]
    intrinsics = [
        fit.intrinsics_to_model(f.intrinsics)
        for f, fit in zip(frames, loaded.fits, strict=True)
        if f.intrinsics is not None
    ]
    depth = None
    if any(f.read_depth is not None for f in frames):
        fitted = [_fit_depth(f, fit) for f, fit in zip(frames, loaded.fits, strict=True)]
        depth = torch.stack(fitted).float()
    return Scene(
        name=name,
        images=loaded.images,
        world_from_cam=torch.stack(poses).float() if len(poses) == len(frames) else None,
        intrinsics=torch.stack(intrinsics).float() if len(intrinsics) == len(frames) else None,
        depth=depth,
        unit=unit,
        view_names=loaded.names,
        image_paths=loaded.paths,
        image_fits=loaded.fits,
    )


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
            image_fit=self.image_fit,
            strict=self.strict,
        )

    def __iter__(self) -> Iterator[Scene]:
        return (self[index] for index in range(len(self)))
