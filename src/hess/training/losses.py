"""Training losses of VGGT: cameras, depth and points."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hess.datasets.procedural import SceneBatch
from hess.geometry.poses import invert_pose
from hess.geometry.projection import unproject_depth
from hess.models.camera_head import encode_cameras


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Ground truth in the frame of the first view, scaled to mean point distance 1.

    Args:
        encoding: pose encoding [B, N, 9].
        depth: [B, N, S, S].
        points: [B, N, S, S, 3].
        unit: [B], the mean point distance in the units of the scene, here 1.
    """

    encoding: Tensor
    depth: Tensor
    points: Tensor
    unit: Tensor


def make_targets(batch: SceneBatch) -> Targets:
    """Express a batch as VGGT is trained to predict it."""
    cam0_from_world = invert_pose(batch.world_from_cam[:, :1])
    cam0_from_cam = cam0_from_world @ batch.world_from_cam
    points = unproject_depth(batch.depth, batch.intrinsics, cam0_from_cam)
    scale = points.norm(dim=-1).mean(dim=(1, 2, 3))
    cam_from_cam0 = invert_pose(cam0_from_cam).clone()
    cam_from_cam0[..., :3, 3] /= scale[:, None, None]
    size = batch.depth.shape[-1]
    return Targets(
        encoding=encode_cameras(cam_from_cam0, batch.intrinsics, size, size),
        depth=batch.depth / scale[:, None, None, None],
        points=points / scale[:, None, None, None, None],
        unit=scale,
    )


def camera_loss(encodings: list[Tensor], target: Tensor, discount: float = 0.6) -> Tensor:
    """Huber loss on the pose encodings of all iterations, the last one weighing most.

    The quaternion's sign is free; fields of view count half.
    """
    weights = [discount ** (len(encodings) - 1 - i) for i in range(len(encodings))]
    total = target.new_zeros(())
    for weight, encoding in zip(weights, encodings, strict=True):
        quaternion = encoding[..., 3:7]
        dot = (quaternion * target[..., 3:7]).sum(-1, keepdim=True).detach()
        sign = torch.where(dot < 0, -1.0, 1.0)
        total = total + weight * (
            F.smooth_l1_loss(encoding[..., :3], target[..., :3], beta=0.05)
            + F.smooth_l1_loss(quaternion, sign * target[..., 3:7], beta=0.05)
            + 0.5 * F.smooth_l1_loss(encoding[..., 7:], target[..., 7:], beta=0.05)
        )
    return total / sum(weights)


def confident_loss(error: Tensor, confidence: Tensor, alpha: float = 0.2) -> Tensor:
    """Mean of c e - alpha log c: errors may be owned up to, at a price (Kendall & Gal 2017)."""
    return (confidence * error - alpha * confidence.log()).mean()
