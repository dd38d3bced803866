"""A coloured point cloud, and two ways to make it smaller."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hess.errors import ConfigError, LayoutError

_LARGEST_KEY = 2**62


@dataclass(frozen=True, kw_only=True)
class PointCloud:
    """M points with colour and confidence.

    Args:
        points: [M, 3], finite.
        colors: [M, 3] in [0, 1].
        confidence: [M] in [0, 1].

    Raises:
        LayoutError: the shapes are not as above.
    """

    points: Tensor
    colors: Tensor
    confidence: Tensor

    def __post_init__(self) -> None:
        shapes = [tuple(x.shape) for x in (self.points, self.colors, self.confidence)]
        size = len(self.points)
        if shapes != [(size, 3), (size, 3), (size,)]:
            raise LayoutError(
                "a point cloud needs points [M, 3], colors [M, 3] and confidence [M], found "
                f"shapes {shapes}"
            )

    def __len__(self) -> int:
        return len(self.points)

    def one_per_voxel(self, size: float) -> "PointCloud":
        """One point for each cube of a grid that holds any: the mean of all it holds.

        Args:
            size: side of the cubes, in the unit of the points, above 0.

        Raises:
            ConfigError: the size is not above 0, or too small to number the cubes.
        """
        if not size > 0:
            raise ConfigError(f"voxel_size must be above 0, found {size}")
        keys = torch.zeros(len(self), dtype=torch.int64)
        num_cells = 1
        for coordinates in self.points.unbind(-1):
            low, high = coordinates.double().aminmax()
            cells = float((high / size).floor() - (low / size).floor()) + 1
            if num_cells * cells > _LARGEST_KEY or max(-low, high) / size > _LARGEST_KEY:
                raise ConfigError(
                    f"voxel_size {size} is too small for a scene that reaches from "
                    f"{self.points.amin(0).tolist()} to {self.points.amax(0).tolist()}"
                )
            index = (coordinates.double() / size).floor_().long()
            keys = keys * int(cells) + (index - index.min())
            num_cells *= int(cells)
        _, cell_of, counts = keys.unique(return_inverse=True, return_counts=True)

        def means(values: Tensor) -> Tensor:
            """Sums in double precision and in the order of the points, so always the same."""
            return (torch.bincount(cell_of, weights=values) / counts).to(values.dtype)

        return PointCloud(
            points=torch.stack([means(x) for x in self.points.unbind(-1)], dim=-1),
            colors=torch.stack([means(x) for x in self.colors.unbind(-1)], dim=-1),
            confidence=means(self.confidence),
        )

    def at_most(self, limit: int) -> "PointCloud":
        """Every point, or of more than ``limit`` about that many, spread evenly."""
        if len(self) <= limit:
            return self
        index = even_sample(len(self), limit)
        return PointCloud(
            points=self.points[index],
            colors=self.colors[index],
            confidence=self.confidence[index],
        )


def color_bytes(colors: Tensor) -> Tensor:
    """Colours in [0, 1] as uint8."""
    return (colors * 255).round().clamp(0, 255).byte()


def even_sample(count: int, limit: int) -> Tensor:
    """At most ``limit`` ascending indices below ``count``, evenly spread; always the same ones.

    Each is drawn within its own share of the range: a regular step could fall into step with the
    width of an image and take one of its columns only.
    """
    if count <= limit:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(0)
    jitter = torch.rand(limit, generator=generator, dtype=torch.float64)
    index = ((torch.arange(limit) + jitter) * (count / limit)).long().clamp(max=count - 1)
    return index.unique_consecutive()
