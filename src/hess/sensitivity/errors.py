"""The two errors whose curvature HeSS measures: camera centres (Eq. 2) and points (Eq. 3-4)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hess.errors import AlignmentError, ConfigError, LayoutError
from hess.geometry.nearest import NearestNeighbors
from hess.geometry.sim3 import Sim3

INLIER_RULES = ("squared_distance", "distance")


@dataclass(frozen=True, kw_only=True)
class PointError:
    """Point error of one scene.

    Args:
        error: scalar, differentiable in the predicted points.
        inlier_mask: bool [J], which predicted points entered it.
    """

    error: Tensor
    inlier_mask: Tensor

    @property
    def inlier_share(self) -> float:
        return self.inlier_mask.float().mean().item()


def camera_error(pred_centers: Tensor, gt_centers: Tensor, world_from_pred: Sim3) -> Tensor:
    """``1/(2N) sum_i |sg(H) t_pred_i - t_i|^2`` over camera centres (Eq. 2).

    Centres, not extrinsic translations: a similarity moves points.

    Args:
        pred_centers: [N, 3] in the model's frame.
        gt_centers: [N, 3] in world coordinates.
        world_from_pred: the alignment H; a constant.

    Returns:
        scalar in the squared unit of ``gt_centers``, differentiable in ``pred_centers``.

    Raises:
        LayoutError: the shapes are not [N, 3] twice.
    """
    if pred_centers.ndim != 2 or pred_centers.shape != gt_centers.shape:
        raise LayoutError(
            "camera_error needs pred_centers and gt_centers of one shape [N, 3], found "
            f"{tuple(pred_centers.shape)} and {tuple(gt_centers.shape)}"
        )
    residual = world_from_pred.apply(pred_centers) - gt_centers.detach().to(pred_centers)
    return residual.square().sum() / (2 * len(residual))


def point_error(
    pred_points: Tensor,
    gt: NearestNeighbors,
    world_from_pred: Sim3,
    *,
    inlier_threshold: float = 0.05,
    inlier_on: str = "squared_distance",
    unit: str = "arbitrary",
) -> PointError:
    """``1/(2|I|) sum_{j in I} min_p |sg(H) p_pred_j - p|^2`` over inliers I (Eq. 3-4).

    The nearest ground-truth point and the inlier set are constants; the squared distance to it
    carries the gradient.

    Args:
        pred_points: [J, 3] in the model's frame.
        gt: index over the ground-truth cloud.
        world_from_pred: the alignment H; a constant.
        inlier_threshold: epsilon > 0, in the (squared) unit of the ground truth.
        inlier_on: what is compared with it: "squared_distance" (Eq. 3) or "distance" (App. B.2).
        unit: length unit of the ground truth, for the message when nothing is an inlier.

    Raises:
        AlignmentError: no predicted point is an inlier, or one is not finite.
        ConfigError: threshold or rule is out of range.
        LayoutError: ``pred_points`` does not have shape [J, 3].
    """
    check_inlier_rule(inlier_threshold, inlier_on)
    aligned = world_from_pred.apply(pred_points)
    _, index = gt.query(aligned.detach())
    nearest = gt.points.to(aligned)[index]
    squared_distance = (aligned - nearest).square().sum(-1)
    compared = squared_distance.detach()
    if inlier_on == "distance":
        compared = compared.sqrt()
    inlier_mask = compared < inlier_threshold
    if not bool(inlier_mask.any()):
        median = squared_distance.detach().sqrt().median().item()
        raise AlignmentError(
            f"no predicted point has a {inlier_on.replace('_', ' ')} to the ground truth below "
            f"{inlier_threshold} (unit of length: {unit}); the median distance is "
            f"{median:.3g}; raise inlier_threshold or check the scene's scale"
        )
    error = squared_distance[inlier_mask].sum() / (2 * inlier_mask.sum())
    return PointError(error=error, inlier_mask=inlier_mask)


def check_inlier_rule(inlier_threshold: float, inlier_on: str) -> None:
    """Raise :class:`ConfigError` unless the threshold is > 0 and the rule is known."""
    if not (math.isfinite(inlier_threshold) and inlier_threshold > 0):
        raise ConfigError(f"inlier_threshold must be > 0, found {inlier_threshold}")
    if inlier_on not in INLIER_RULES:
        raise ConfigError(f"inlier_on must be one of {INLIER_RULES}, found {inlier_on!r}")


@torch.no_grad()
def scene_scale(points: Tensor, first_center: Tensor) -> float:
    """Mean distance of ``points`` [M, 3] to the first camera's centre [3].

    Ground truth divided by it has the scale VGGT is trained in, in which the inlier threshold
    means the same for metres, millimetres and arbitrary units.

    Raises:
        AlignmentError: there is no point, or the distance is zero or not finite.
    """
    distance = (points - first_center).double().norm(dim=-1)
    scale = distance.mean().item() if distance.numel() else math.nan
    if not (math.isfinite(scale) and scale > 0):
        raise AlignmentError(
            f"the scale of a scene needs points away from its first camera, found {len(points)} "
            f"points at mean distance {scale}"
        )
    return scale
