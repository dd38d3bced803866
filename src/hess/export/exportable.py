"""What the writers need to know of a reconstruction."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from hess.export.point_cloud import PointCloud
from hess.geometry.image_fit import ImageFit


class Exportable(Protocol):
    """N views of H x W pixels; :class:`hess.Reconstruction` says what each part means."""

    @property
    def view_names(self) -> Sequence[str]: ...

    @property
    def image_paths(self) -> Sequence[Path | None]: ...

    @property
    def image_fits(self) -> Sequence[ImageFit]: ...

    @property
    def images(self) -> Tensor: ...

    @property
    def world_from_cam(self) -> Tensor: ...

    @property
    def original_intrinsics(self) -> Tensor: ...

    @property
    def depth(self) -> Tensor: ...

    @property
    def world_points(self) -> Tensor: ...

    def confident_pixels(self, *, drop_lowest: float) -> Tensor:
        """Which pixels' world points are to be used: bool [N, H, W]."""

    def point_cloud(self, *, drop_lowest: float, voxel_size: float | None) -> PointCloud:
        """The points of those pixels."""

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All of it as named arrays."""
