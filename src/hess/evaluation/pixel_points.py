"""Points measured against the depth of the same pixels, as data: the measure of most protocols."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import get_args

from torch import Tensor

from hess.datasets.scene import Scene
from hess.errors import ConfigError
from hess.evaluation.point_metrics import (
    CLOUD_METRICS,
    GroundTruthPoints,
    PointAlignment,
    PointMetrics,
    point_metrics,
)

_ALIGNMENTS = {
    "umeyama": "Umeyama on pixel correspondences",
    "umeyama+icp": "Umeyama on pixel correspondences and point-to-plane ICP",
}


@dataclass(frozen=True, kw_only=True)
class PixelPoints:
    """How points are measured pixel by pixel.

    Args:
        alignment: see :data:`hess.evaluation.point_metrics.PointAlignment`.
        stride: every how many pixels and rows a point is compared.
        normals: whether normal consistency is measured too.

    Raises:
        ConfigError: a field is out of its range.
    """

    alignment: PointAlignment = "umeyama"
    stride: int = 2
    normals: bool = False

    def __post_init__(self) -> None:
        if self.alignment not in get_args(PointAlignment):
            raise ConfigError(
                f"alignment of points must be one of {get_args(PointAlignment)}, found "
                f"{self.alignment!r}"
            )
        if self.stride < 1:
            raise ConfigError(f"stride of points must be at least 1, found {self.stride}")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, in the order of a results row."""
        return pixel_metric_names(self.normals)

    def as_dict(self) -> dict[str, object]:
        """JSON values of all fields."""
        return asdict(self)

    def describe(self) -> str:
        """In words, such as "points of all pixels after Umeyama on pixel correspondences"."""
        apart = "all pixels" if self.stride == 1 else f"pixels {self.stride} apart"
        text = f"points of {apart} after {_ALIGNMENTS[self.alignment]}"
        return text + (", with normals" if self.normals else "")

    def truth(self, scene: Scene) -> "PixelTruth | None":
        """The true points of a scene; None when it has no depth or none of it is known.

        Raises:
            AlignmentError: a true point is not finite.
        """
        if not scene.has_points:
            return None
        points, valid = scene.point_map()
        if not bool(valid[:, :: self.stride, :: self.stride].any()):
            return None
        return PixelTruth(
            GroundTruthPoints(points, valid, self.stride, normals=self.normals),
            partial(point_metrics, alignment=self.alignment, normals=self.normals),
            self.normals,
        )


class PixelTruth:
    """True points of one scene, and how a point map is compared with them."""

    def __init__(
        self,
        points: GroundTruthPoints,
        compare: Callable[[Tensor, GroundTruthPoints], PointMetrics],
        normals: bool,
    ) -> None:
        self._points, self._compare, self._normals = points, compare, normals

    def measure(self, world_from_cam: Tensor, world_points: Tensor) -> dict[str, float | None]:
        """Metrics of a predicted point map [N, H, W, 3]; its poses [N, 4, 4] are not used.

        Raises:
            AlignmentError: the prediction is degenerate or not finite.
            LayoutError: another shape than the truth's.
        """
        found = self._compare(world_points, self._points)
        metrics: dict[str, float | None] = {
            **found.cloud.as_dict(),
            "point_error": found.point_error,
        }
        return metrics | (
            {"normal_consistency": found.normal_consistency} if self._normals else {}
        )


def pixel_metric_names(normals: bool) -> tuple[str, ...]:
    """Names of what a :class:`PixelTruth` measures."""
    return (*CLOUD_METRICS, "point_error", *(("normal_consistency",) if normals else ()))
