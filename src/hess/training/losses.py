"""Training losses of VGGT: cameras, depth, points; and an optional matching loss on all layers."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """

    encoding: Tensor
    depth: Tensor
    points: Tensor


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


class MatchingLoss(nn.Module):
    """Patches that see the same place should have similar descriptors, in every layer.

    Stands in for VGGT's tracking loss. One linear descriptor per block pair; InfoNCE over all
    patches of other views, with soft targets from the distance of the patches' mean points. It
    weighs all layers alike, so it does not choose where the model does its matching.

    Args:
        dim: width of the tokens.
        num_layers: block pairs.
        descriptor_dim: width of a descriptor.
        radius: distance (mean point distance is 1) over which matches fade.
    """

    def __init__(
        self, dim: int, num_layers: int, *, descriptor_dim: int = 32, radius: float = 0.1
    ) -> None:
        super().__init__()
        self.radius = radius
        self.describe = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, descriptor_dim))
            for _ in range(num_layers)
        )
        self.log_temperature = nn.Parameter(torch.full((num_layers,), 2.3))

    def forward(self, layers: list[Tensor], points: Tensor) -> Tensor:
        """Mean loss over the layers.

        Args:
            layers: patch tokens per block pair, [B, N, P, dim].
            points: mean world point per patch, [B, N, P, 3].
        """
        batch, num_views, patches, _ = points.shape
        flat = points.flatten(1, 2)
        squared = torch.cdist(flat, flat).square()
        view = torch.arange(num_views, device=points.device).repeat_interleave(patches)
        same_view = view[:, None] == view[None]
        target = (squared / (-2 * self.radius**2)).masked_fill(same_view, -1e4).softmax(-1)
        nearest = squared.masked_fill(same_view, torch.inf).amin(-1)
        has_match = (nearest < (2 * self.radius) ** 2).float()
        total = points.new_zeros(())
        for i, tokens in enumerate(layers):
            descriptor = self.describe[i](tokens).float().view(batch, num_views * patches, -1)
            descriptor = F.normalize(descriptor, dim=-1)
            logits = descriptor @ descriptor.mT * self.log_temperature[i].exp()
            log_prob = logits.masked_fill(same_view, -1e4).log_softmax(-1)
            entropy = -(target * log_prob).sum(-1)
            total = total + (entropy * has_match).sum() / has_match.sum().clamp_min(1)
        return total / len(layers)
