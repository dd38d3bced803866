"""Aligns a predicted point cloud to the ground truth: Umeyama, then point-to-plane ICP."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hess.errors import ConfigError
from hess.geometry.nearest import NearestNeighbors
from hess.geometry.sim3 import Sim3, umeyama

ICP_MAX_POINTS = 20_000
"""ICP sees at most this many evenly spaced points of either cloud."""

_NUM_NORMAL_NEIGHBORS = 20
_MAX_ITERATIONS = 50
_ROTATION_EPSILON = math.radians(0.01)
_TRANSLATION_EPSILON = 1e-5  # of the radius of the ground truth


@dataclass(frozen=True, kw_only=True)
class AlignmentResult:
    """How a prediction was aligned.

    Args:
        world_from_pred: maps predicted to ground-truth coordinates.
        icp_used: whether ICP improved on Umeyama and is part of ``world_from_pred``.
        rmse_before: after Umeyama alone; root of the mean squared nearest-neighbour distance
            from prediction to ground truth, each distance capped at ICP's maximum correspondence
            distance, so that gaining or losing an outlier does not jump. In the unit of the
            ground truth.
        rmse_after: the same after ICP; equals ``rmse_before`` when ICP was not used.
    """

    world_from_pred: Sim3
    icp_used: bool
    rmse_before: float
    rmse_after: float


@torch.no_grad()
def align_points(
    pred: Tensor,
    gt: Tensor,
    pred_pairs: Tensor,
    gt_pairs: Tensor,
    *,
    icp: bool = True,
    max_correspondence: float = 0.1,
) -> AlignmentResult:
    """Similarity from the predicted cloud to the ground truth, without gradient.

    Umeyama on the pixel correspondences gives scale and a start; point-to-plane ICP over the
    clouds refines rotation and translation. ICP's result is dropped when it does not converge
    or does not lower the capped RMSE (see :class:`AlignmentResult`). One thread, so the result
    does not depend on the machine's core count.

    Args:
        pred: predicted cloud [J, 3].
        gt: ground-truth cloud [K, 3].
        pred_pairs, gt_pairs: corresponding points [M, 3], M >= 3.
        icp: whether to refine by ICP.
        max_correspondence: largest distance ICP pairs points at, as a share of the radius of
            the ground truth (root of the mean squared distance to its centroid).

    Raises:
        AlignmentError: the pairs do not determine a similarity, or a cloud is empty or not
            finite.
        ConfigError: ``max_correspondence`` is not positive.
        LayoutError: a tensor does not have its shape.
    """
    if not max_correspondence > 0:
        raise ConfigError(f"max_correspondence must be > 0, found {max_correspondence}")
    start = umeyama(pred_pairs, gt_pairs)
    source = _thin(start.apply(pred.detach().cpu().double()))
    target = _thin(gt.detach().cpu().double())
    neighbors = NearestNeighbors(target)
    center = target.mean(0)
    radius = (target - center).square().sum(-1).mean().sqrt().item()
    limit = max_correspondence * radius
    before = _capped_rmse(source, neighbors, limit)
    refinement = _icp(source, target, center, radius, max_correspondence) if icp else None
    if refinement is not None:
        after = _capped_rmse(refinement.apply(source), neighbors, limit)
        if after < before:
            return AlignmentResult(
                world_from_pred=refinement.compose(start),
                icp_used=True,
                rmse_before=before,
                rmse_after=after,
            )
    return AlignmentResult(
        world_from_pred=start, icp_used=False, rmse_before=before, rmse_after=before
    )


def most_confident(confidence: Tensor, keep: float) -> Tensor:
    """Mask of the ``keep`` share of entries with the highest confidence, ties by position.

    Args:
        confidence: any shape, finite.
        keep: in (0, 1]; at least one entry of a non-empty tensor is kept.

    Returns:
        bool mask of the same shape.

    Raises:
        ConfigError: ``keep`` is out of range.
    """
    if not 0.0 < keep <= 1.0:
        raise ConfigError(f"the share of confident points must be in (0, 1], found {keep}")
    flat = confidence.detach().flatten()
    count = max(1, math.ceil(keep * len(flat) - 1e-9))
    mask = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    mask[flat.argsort(descending=True, stable=True)[:count]] = True
    return mask.view_as(confidence)


def _icp(
    source: Tensor, target: Tensor, center: Tensor, radius: float, max_correspondence: float
) -> Sim3 | None:
    """Rigid refinement of ``source`` on ``target``; None when it does not converge."""
    import small_gicp

    # In units of the target's radius the convergence thresholds mean the same in every scene.
    if radius == 0.0:
        return None
    clouds = [small_gicp.PointCloud(((x - center) / radius).numpy()) for x in (source, target)]
    small_gicp.estimate_normals(clouds[1], num_neighbors=_NUM_NORMAL_NEIGHBORS, num_threads=1)
    result = small_gicp.align(
        target=clouds[1],
        source=clouds[0],
        target_tree=small_gicp.KdTree(clouds[1], num_threads=1),
        registration_type="PLANE_ICP",
        max_correspondence_distance=max_correspondence,
        num_threads=1,
        max_iterations=_MAX_ITERATIONS,
        rotation_epsilon=_ROTATION_EPSILON,
        translation_epsilon=_TRANSLATION_EPSILON,
    )
    matrix = torch.from_numpy(np.array(result.T_target_source))
    if not result.converged or not bool(torch.isfinite(matrix).all()):
        return None
    rotation, shift = matrix[:3, :3], matrix[:3, 3]
    return Sim3(
        scale=1.0, rotation=rotation, translation=radius * shift + center - rotation @ center
    )


def _capped_rmse(points: Tensor, neighbors: NearestNeighbors, limit: float) -> float:
    distance, _ = neighbors.query(points)
    return distance.clamp(max=limit).square().mean().sqrt().item()


def _thin(points: Tensor) -> Tensor:
    if len(points) <= ICP_MAX_POINTS:
        return points
    # In float64: float32 would round the last index of a cloud of 20 million points up to its end.
    index = torch.linspace(0, len(points) - 1, ICP_MAX_POINTS, dtype=torch.float64)
    return points[index.round().long()]
