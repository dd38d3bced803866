"""The one thing every data set gives: a scene of N photos, with whatever ground truth it has."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from hess.errors import DatasetError
from hess.geometry.image_fit import ImageFit
from hess.geometry.projection import unproject_depth

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """N views of one scene at one image size.

    Cameras follow OpenCV axes (x right, y down, z forward); ``world_from_cam`` maps camera to
    world coordinates; the centre of the top-left pixel is at (0.5, 0.5).

    Args:
        name: identifies the scene within its data set.
        images: float32 [N, 3, H, W] in [0, 1].
        world_from_cam: float32 [N, 4, 4], or None when the data has no poses.
        intrinsics: float32 [N, 3, 3] in pixels of ``images``, or None.
        depth: float32 [N, H, W], z-depth in ``unit``, 0 where unknown, or None.
        unit: length unit of poses and depth: "m", "mm" or "arbitrary".
        category: what kind of thing it shows, where the data set says so (CO3D), or None.
        view_names: one name per view (file name, frame number).
        image_paths, image_fits: of recorded views, where each photo is and how it was brought to
            this size; empty for made ones.

    Raises:
        DatasetError: shapes disagree, or an image is outside [0, 1] or not finite.
    """

    name: str
    images: Tensor
    world_from_cam: Tensor | None = None
    intrinsics: Tensor | None = None
    depth: Tensor | None = None
    unit: str = "arbitrary"
    category: str | None = None
    view_names: tuple[str, ...] = ()
    image_paths: tuple[Path, ...] = ()
    image_fits: tuple[ImageFit, ...] = ()

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[1] != 3 or len(self.images) < 1:
            raise DatasetError(
                f"scene {self.name!r}: images must have shape [N >= 1, 3, H, W], "
                f"found {tuple(self.images.shape)}"
            )
        n, _, h, w = self.images.shape
        expected = {"world_from_cam": (n, 4, 4), "intrinsics": (n, 3, 3), "depth": (n, h, w)}
        for field, shape in expected.items():
            value = getattr(self, field)
            if value is not None and tuple(value.shape) != shape:
                raise DatasetError(
                    f"scene {self.name!r}: {field} must have shape {shape}, "
                    f"found {tuple(value.shape)}"
                )
        for field in ("view_names", "image_paths", "image_fits"):
            if len(getattr(self, field)) not in (0, n):
                raise DatasetError(
                    f"scene {self.name!r}: {len(getattr(self, field))} {field} for {n} views"
                )

    @property
    def num_views(self) -> int:
        return len(self.images)

    @property
    def has_poses(self) -> bool:
        return self.world_from_cam is not None

    @property
    def has_points(self) -> bool:
        return None not in (self.world_from_cam, self.intrinsics, self.depth)

    def point_map(self) -> tuple[Tensor, Tensor]:
        """World points of every pixel and which of them are known.

        Returns:
            points [N, H, W, 3] in ``unit`` and valid bool [N, H, W].

        Raises:
            DatasetError: the scene lacks depth, intrinsics or poses.
        """
        if self.depth is None or self.intrinsics is None or self.world_from_cam is None:
            raise DatasetError(
                f"scene {self.name!r} has no depth with cameras, so it gives no points; "
                "use a data set with depth (RGB-D folder, procedural)"
            )
        points = unproject_depth(self.depth, self.intrinsics, self.world_from_cam)
        return points, self.depth > 0

    def take_views(self, index: list[int]) -> "Scene":
        """The same scene with only the views ``index``, in that order."""
        pick = torch.tensor(index)
        return replace(
            self,
            images=self.images[pick],
            world_from_cam=None if self.world_from_cam is None else self.world_from_cam[pick],
            intrinsics=None if self.intrinsics is None else self.intrinsics[pick],
            depth=None if self.depth is None else self.depth[pick],
            view_names=_pick(self.view_names, index),
            image_paths=_pick(self.image_paths, index),
            image_fits=_pick(self.image_fits, index),
        )


def _pick(items: tuple[_T, ...], index: list[int]) -> tuple[_T, ...]:
    """Chosen items of what may have been left empty."""
    return tuple(items[i] for i in index) if items else ()


@runtime_checkable
class Dataset(Protocol):
    """A sequence of scenes that are made or read only when asked for.

    ``name`` says what it is and ``provenance`` holds all that is needed to get the same scenes
    again (path or generator settings, seed, views per scene): JSON values only.
    """

    @property
    def name(self) -> str: ...

    @property
    def provenance(self) -> dict[str, object]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Scene: ...

    def __iter__(self) -> Iterator[Scene]: ...
