"""How far a predicted point cloud is from the true one: accuracy, completeness, point error."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hess.errors import AlignmentError, ConfigError, LayoutError
from hess.geometry.alignment import align_points
from hess.geometry.nearest import NearestNeighbors
from hess.geometry.sim3 import Sim3, umeyama

PointAlignment = Literal["umeyama", "umeyama+icp"]


@dataclass(frozen=True, kw_only=True)
class CloudDistance:
    """Nearest-neighbour distances between two clouds, in their unit.

    Args:
        accuracy, accuracy_median: prediction to truth.
        completeness, completeness_median: truth to prediction.
    """

    accuracy: float
    accuracy_median: float
    completeness: float
    completeness_median: float

    @property
    def chamfer_mean(self) -> float:
        """Symmetric chamfer distance: the mean of accuracy and completeness."""
        return (self.accuracy + self.completeness) / 2


def cloud_distance(
    pred: Tensor, gt: Tensor, gt_neighbors: NearestNeighbors | None = None
) -> CloudDistance:
    """Distances between an aligned prediction [J, 3] and the truth [K, 3], J, K >= 1.

    ``gt_neighbors`` is the index over ``gt`` when the caller has it already.

    Raises:
        LayoutError: a cloud is not [M, 3].
        AlignmentError: a cloud is empty or not finite.
    """
    if len(pred) == 0:
        raise AlignmentError("the predicted cloud is empty, so it has no distance to the truth")
    to_gt, _ = (gt_neighbors or NearestNeighbors(gt)).query(pred)
    to_pred, _ = NearestNeighbors(pred).query(gt)
    return CloudDistance(
        accuracy=float(to_gt.mean()),
        accuracy_median=float(np.median(to_gt.cpu().numpy())),
        completeness=float(to_pred.mean()),
        completeness_median=float(np.median(to_pred.cpu().numpy())),
    )


class GroundTruthPoints:
    """The true points of a scene on every ``stride``-th pixel and row, with their k-d tree.

    Made once per scene and used for every prediction of it.

    Args:
        points: [N, H, W, 3].
        valid: bool [N, H, W], which points are known.
        stride: at least 1.

    Raises:
        LayoutError: shapes disagree.
        ConfigError: stride below 1.
        AlignmentError: no known point is left, or one is not finite.
    """

    def __init__(self, points: Tensor, valid: Tensor, stride: int) -> None:
        if points.ndim != 4 or points.shape[-1] != 3 or valid.shape != points.shape[:3]:
            raise LayoutError(
                "true points need shapes [N, H, W, 3] and [N, H, W], found "
                f"{tuple(points.shape)} and {tuple(valid.shape)}"
            )
        if stride < 1:
            raise ConfigError(f"the point stride must be at least 1, found {stride}")
        self._shape, self._stride = points.shape, stride
        self._valid = valid.cpu()[:, ::stride, ::stride]
        self.points = points.cpu()[:, ::stride, ::stride][self._valid].double()
        self.neighbors = NearestNeighbors(self.points)

    def pick(self, pred_points: Tensor) -> Tensor:
        """Predictions float64 [K, 3] of the pixels of :attr:`points`, from [N, H, W, 3].

        Raises:
            LayoutError: another image size or number of views.
        """
        if pred_points.shape != self._shape:
            raise LayoutError(
                f"predicted points must have shape {tuple(self._shape)} as the truth, "
                f"found {tuple(pred_points.shape)}"
            )
        strided = pred_points.detach().cpu()[:, :: self._stride, :: self._stride]
        return strided[self._valid].double()


@dataclass(frozen=True, kw_only=True)
class PointMetrics:
    """Result of :func:`point_metrics`; distances in the unit of the truth.

    Args:
        cloud: nearest-neighbour distances.
        point_error: mean distance of points that belong to the same pixel.
        world_from_pred: the alignment that was used.
    """

    cloud: CloudDistance
    point_error: float
    world_from_pred: Sim3


def point_metrics(
    pred_points: Tensor, truth: GroundTruthPoints, alignment: PointAlignment = "umeyama"
) -> PointMetrics:
    """Align a predicted point map [N, H, W, 3] to the truth, then measure the distances.

    The alignment is Umeyama's on pixel correspondences, optionally refined by ICP.

    Raises:
        LayoutError: the prediction has another shape than the truth.
        ConfigError: unknown alignment.
        AlignmentError: the prediction is degenerate or not finite.
    """
    pred = truth.pick(pred_points)
    if alignment == "umeyama":
        world_from_pred = umeyama(pred, truth.points)
    elif alignment == "umeyama+icp":
        world_from_pred = align_points(pred, truth.points, pred, truth.points).world_from_pred
    else:
        raise ConfigError(
            f"point alignment must be 'umeyama' or 'umeyama+icp', found {alignment!r}"
        )
    aligned = world_from_pred.apply(pred)
    distance = torch.linalg.vector_norm(aligned - truth.points, dim=-1)
    return PointMetrics(
        cloud=cloud_distance(aligned, truth.points, truth.neighbors),
        point_error=float(distance.mean()),
        world_from_pred=world_from_pred,
    )
