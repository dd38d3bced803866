"""How far a predicted point cloud is from the true one: accuracy, completeness, point error."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from hess.errors import AlignmentError, ConfigError, LayoutError
from hess.geometry.alignment import align_points
from hess.geometry.nearest import NearestNeighbors
from hess.geometry.normals import point_map_normals
from hess.geometry.sim3 import Sim3, umeyama

PointAlignment = Literal["umeyama", "umeyama+icp"]
"""How a prediction is aligned: by Umeyama's similarity on pixel correspondences, and then by
point-to-plane ICP, the paper's refinement (Sec. 3.2, App. B.1), or not."""


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

    def as_dict(self) -> dict[str, float]:
        """All of them by name."""
        return {name: getattr(self, name) for name in CLOUD_METRICS}


CLOUD_METRICS = (
    "accuracy",
    "accuracy_median",
    "completeness",
    "completeness_median",
    "chamfer_mean",
)
"""Names of the numbers of a :class:`CloudDistance`, in the order of a results row."""


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


def normal_consistency(
    pred_points: Tensor, pred_normals: Tensor, gt_points: Tensor, gt_normals: Tensor
) -> float | None:
    """How well the normals of an aligned prediction and of the truth agree, without their sign.

    Every point is compared with the nearest one of the other cloud: mean of |cos| of the angle
    between their normals, from prediction to truth and from truth to prediction, then the mean of
    the two.

    Args:
        pred_points, pred_normals: [J, 3], J >= 1; normals of any length but 0.
        gt_points, gt_normals: [K, 3].

    Returns:
        in [0, 1], 1 for equal surfaces; None when the truth has no normals (K = 0).

    Raises:
        LayoutError: points and normals of a cloud differ in shape.
        AlignmentError: the prediction has no normals, or a cloud is not finite.
    """
    if pred_points.shape != pred_normals.shape or gt_points.shape != gt_normals.shape:
        raise LayoutError(
            "points and normals of a cloud must have one shape [M, 3], found "
            f"{tuple(pred_points.shape)} and {tuple(pred_normals.shape)} (prediction), "
            f"{tuple(gt_points.shape)} and {tuple(gt_normals.shape)} (truth)"
        )
    if len(gt_points) == 0:
        return None
    if len(pred_points) == 0:
        raise AlignmentError("the predicted surface has no normals: its points lie on lines")
    unit_pred, unit_gt = (
        normals / torch.linalg.vector_norm(normals, dim=-1, keepdim=True)
        for normals in (pred_normals, gt_normals)
    )
    _, in_gt = NearestNeighbors(gt_points).query(pred_points)
    _, in_pred = NearestNeighbors(pred_points).query(gt_points)
    to_gt = (unit_pred * unit_gt[in_gt]).sum(-1).abs().mean()
    to_pred = (unit_gt * unit_pred[in_pred]).sum(-1).abs().mean()
    return float(to_gt + to_pred) / 2


class GroundTruthPoints:
    """The true points of a scene on every ``stride``-th pixel and row, with their k-d tree.

    Made once per scene and used for every prediction of it.

    Args:
        points: [N, H, W, 3].
        valid: bool [N, H, W], which points are known.
        stride: at least 1.
        normals: whether :meth:`normal_consistency` will be asked for.

    Raises:
        LayoutError: shapes disagree.
        ConfigError: stride below 1.
        AlignmentError: no known point is left, or one is not finite.
    """

    def __init__(
        self, points: Tensor, valid: Tensor, stride: int, *, normals: bool = False
    ) -> None:
        if points.ndim != 4 or points.shape[-1] != 3 or valid.shape != points.shape[:3]:
            raise LayoutError(
                "true points need shapes [N, H, W, 3] and [N, H, W], found "
                f"{tuple(points.shape)} and {tuple(valid.shape)}"
            )
        if stride < 1:
            raise ConfigError(f"the point stride must be at least 1, found {stride}")
        self._shape, self._stride = points.shape, stride
        self._all_valid = valid.cpu()
        self._valid = self._all_valid[:, ::stride, ::stride]
        self.points = points.cpu()[:, ::stride, ::stride][self._valid].double()
        self.neighbors = NearestNeighbors(self.points)
        self._surface = self._strided_surface(points) if normals else None

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

    def normal_consistency(self, pred_points: Tensor, world_from_pred: Sim3) -> float | None:
        """:func:`normal_consistency` of a prediction [N, H, W, 3] under an alignment.

        Normals come from the neighbouring pixels, before the stride; both clouds have them where
        the truth of a pixel and of its neighbours is known. None when that is nowhere.

        Raises:
            ConfigError: made without ``normals``.
            AlignmentError: the prediction has no normals.
        """
        if self._surface is None:
            raise ConfigError("normal consistency needs true points made with normals=True")
        if len(self._surface[0]) == 0:
            return None
        pred = self._strided_surface(world_from_pred.apply(pred_points.detach().cpu().double()))
        return normal_consistency(*pred, *self._surface)

    def _strided_surface(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Points and normals [M, 3] of the strided pixels that have a normal."""
        points = points.detach().cpu().double()
        normals, known = point_map_normals(points, self._all_valid)
        points, normals, known = (
            x[:, :: self._stride, :: self._stride] for x in (points, normals, known)
        )
        return points[known], normals[known]


@dataclass(frozen=True, kw_only=True)
class PointMetrics:
    """Result of :func:`point_metrics`; distances in the unit of the truth.

    Args:
        cloud: nearest-neighbour distances.
        point_error: mean distance of points that belong to the same pixel.
        world_from_pred: the alignment that was used.
        normal_consistency: in [0, 1]; None when not asked for or the truth has no normals.
    """

    cloud: CloudDistance
    point_error: float
    world_from_pred: Sim3
    normal_consistency: float | None = None


def point_metrics(
    pred_points: Tensor,
    truth: GroundTruthPoints,
    alignment: PointAlignment = "umeyama",
    *,
    normals: bool = False,
) -> PointMetrics:
    """Align a predicted point map [N, H, W, 3] to the truth, then measure the distances.

    Args:
        alignment: see :data:`PointAlignment`.
        normals: whether to measure normal consistency too; ``truth`` must be made for it.

    Raises:
        LayoutError: the prediction has another shape than the truth.
        ConfigError: unknown alignment, or a truth made without normals.
        AlignmentError: the prediction is degenerate or not finite.
    """
    if alignment not in get_args(PointAlignment):
        raise ConfigError(
            f"point alignment must be one of {get_args(PointAlignment)}, found {alignment!r}"
        )
    pred = truth.pick(pred_points)
    if alignment == "umeyama":
        world_from_pred = umeyama(pred, truth.points)
    else:
        world_from_pred = align_points(pred, truth.points, pred, truth.points).world_from_pred
    aligned = world_from_pred.apply(pred)
    distance = torch.linalg.vector_norm(aligned - truth.points, dim=-1)
    return PointMetrics(
        cloud=cloud_distance(aligned, truth.points, truth.neighbors),
        point_error=float(distance.mean()),
        world_from_pred=world_from_pred,
        normal_consistency=(
            truth.normal_consistency(pred_points, world_from_pred) if normals else None
        ),
    )
