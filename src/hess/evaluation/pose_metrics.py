"""How far predicted cameras are from the true ones: pair errors, AUC and trajectory error."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hess.errors import AlignmentError, ConfigError, LayoutError
from hess.geometry.poses import camera_centers, invert_pose, rotation_angle_deg
from hess.geometry.sim3 import umeyama

PairOrder = Literal["vggt", "pi3"]


def pair_errors(
    pred_world_from_cam: Tensor, gt_world_from_cam: Tensor, order: PairOrder = "vggt"
) -> tuple[Tensor, Tensor]:
    """Errors of the relative pose of all unordered pairs i < j of views.

    The relative pose is ``T_i T_j^-1`` (order "vggt", camera j seen from camera i) or
    ``T_j T_i^-1`` (order "pi3"), T = cam_from_world. The translation error is the angle between
    the directions of the two translations without their sign, as in VGGT's evaluation; the angle
    of a zero translation counts as 0 when both are zero and as 90 when only one is.

    Args:
        pred_world_from_cam: [..., N, 4, 4], N >= 2, any scale and world frame.
        gt_world_from_cam: [..., N, 4, 4].
        order: pair order.

    Returns:
        rotation error [..., N (N - 1) / 2] in degrees, 0 to 180, and translation-direction
        error, same shape, in degrees, 0 to 90; both float64.

    Raises:
        LayoutError: shapes differ, are not [..., N, 4, 4], or N < 2.
        ConfigError: unknown pair order.
    """
    pred, gt = pred_world_from_cam.double(), gt_world_from_cam.double()
    if pred.shape != gt.shape or pred.ndim < 3 or pred.shape[-3] < 2:
        raise LayoutError(
            "pair errors need two pose tensors of the same shape [..., N >= 2, 4, 4], found "
            f"{tuple(pred.shape)} and {tuple(gt.shape)}"
        )
    if order not in ("vggt", "pi3"):
        raise ConfigError(f"pair order must be 'vggt' or 'pi3', found {order!r}")
    first, second = torch.triu_indices(pred.shape[-3], pred.shape[-3], 1, device=pred.device)
    if order == "pi3":
        first, second = second, first

    def relative(world_from_cam: Tensor) -> Tensor:
        cam_from_world = invert_pose(world_from_cam)
        return cam_from_world[..., first, :, :] @ world_from_cam[..., second, :, :]

    pred_pair, gt_pair = relative(pred), relative(gt)
    rotation = rotation_angle_deg(gt_pair[..., :3, :3].mT @ pred_pair[..., :3, :3])
    translation = _direction_angle_deg(pred_pair[..., :3, 3], gt_pair[..., :3, 3])
    return rotation, torch.minimum(translation, 180 - translation)


def auc(errors_deg: Tensor, threshold: int) -> Tensor:
    """Area under the recall curve up to ``threshold`` degrees, VGGT's definition.

    One-degree histogram of the errors over [0, threshold], divided by the number of errors;
    mean of its cumulative sum. An error in bin b is counted by the ``threshold - b`` bins from b
    on, so the value is the mean of ``threshold - floor(error)`` over ``threshold`` (the last bin
    includes its right edge; larger errors count 0).

    Args:
        errors_deg: [..., P], P >= 1; for poses the larger of rotation and translation error.
        threshold: in whole degrees, at least 1.

    Returns:
        [...] float64 in [0, 1].

    Raises:
        ConfigError: threshold below 1.
        LayoutError: no errors, or one that is negative or not a number.
    """
    if threshold < 1:
        raise ConfigError(f"an AUC threshold must be at least 1 degree, found {threshold}")
    if errors_deg.ndim < 1 or errors_deg.shape[-1] < 1:
        raise LayoutError(f"AUC needs at least one error, found {tuple(errors_deg.shape)}")
    if not bool((errors_deg >= 0).all()):
        raise LayoutError("AUC needs errors of at least 0 degrees, found negative or NaN")
    errors = errors_deg.double()
    counted = threshold - errors.floor().clamp(max=threshold - 1)
    return torch.where(errors <= threshold, counted, 0.0).mean(-1) / threshold


@dataclass(frozen=True, kw_only=True)
class TrajectoryError:
    """Absolute trajectory error after Sim(3) alignment of the camera centres.

    Args:
        rmse: root mean square distance of the centres, in the unit of the true poses.
        relative: the same over the length of the true trajectory (views in their order).
    """

    rmse: float
    relative: float


def trajectory_error(pred_world_from_cam: Tensor, gt_world_from_cam: Tensor) -> TrajectoryError:
    """ATE of [N, 4, 4] predicted poses against [N, 4, 4] true ones, in float64.

    Raises:
        LayoutError: shapes differ or are not [N, 4, 4].
        AlignmentError: centres are fewer than three, on a line, or all in one place.
    """
    if pred_world_from_cam.shape != gt_world_from_cam.shape or pred_world_from_cam.ndim != 3:
        raise LayoutError(
            "the trajectory error needs two pose tensors of the same shape [N, 4, 4], found "
            f"{tuple(pred_world_from_cam.shape)} and {tuple(gt_world_from_cam.shape)}"
        )
    pred = camera_centers(pred_world_from_cam.double())
    gt = camera_centers(gt_world_from_cam.double())
    length = float((gt[1:] - gt[:-1]).norm(dim=-1).sum())
    if length == 0:
        raise AlignmentError("the true cameras never move, so there is no trajectory to compare")
    residual = umeyama(pred, gt).apply(pred) - gt
    rmse = float(residual.square().sum(-1).mean().sqrt())
    return TrajectoryError(rmse=rmse, relative=rmse / length)


def _direction_angle_deg(a: Tensor, b: Tensor) -> Tensor:
    # atan2(|a x b|, a . b) keeps its digits near 0 and 180 degrees, where the arc cosine does not.
    sine = torch.linalg.vector_norm(torch.linalg.cross(a, b), dim=-1)
    angle = torch.rad2deg(torch.atan2(sine, (a * b).sum(-1)))
    one_is_zero = (a == 0).all(-1) != (b == 0).all(-1)
    return torch.where(one_is_zero, 90.0, angle)
