"""VGGT's camera head and its nine numbers per view: translation, quaternion, field of view."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hess.geometry.poses import matrix_to_quaternion, pose_from, quaternion_to_matrix
from hess.models.layers import Block, Mlp

POSE_DIM = 9


def encode_cameras(cam_from_world: Tensor, intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Cameras to VGGT's pose encoding.

    Args:
        cam_from_world: [..., 3 or 4, 4], OpenCV axes.
        intrinsics: [..., 3, 3] in pixels; the principal point is taken as the image centre.
        height, width: image size in pixels.

    Returns:
        [..., 9]: translation, quaternion xyzw, vertical and horizontal field of view in radians.
    """
    fov_h = 2 * torch.atan(height / 2 / intrinsics[..., 1, 1])
    fov_w = 2 * torch.atan(width / 2 / intrinsics[..., 0, 0])
    quaternion = matrix_to_quaternion(cam_from_world[..., :3, :3])
    translation = cam_from_world[..., :3, 3]
    return torch.cat([translation, quaternion, fov_h[..., None], fov_w[..., None]], dim=-1)


def decode_cameras(encoding: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`encode_cameras`: cam_from_world [..., 4, 4], intrinsics [..., 3, 3]."""
    cam_from_world = pose_from(quaternion_to_matrix(encoding[..., 3:7]), encoding[..., :3])
    # A field of view of zero (the head's ReLU allows it) would mean an infinite focal length.
    fov = encoding[..., 7:].clamp_min(1e-3)
    focal_y = height / 2 / torch.tan(fov[..., 0] / 2)
    focal_x = width / 2 / torch.tan(fov[..., 1] / 2)
    zero, one = torch.zeros_like(focal_x), torch.ones_like(focal_x)
    rows = (focal_x, zero, one * (width / 2), zero, focal_y, one * (height / 2), zero, zero, one)
    return cam_from_world, torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


class CameraHead(nn.Module):
    """Refine a pose encoding per view in a few iterations over the camera tokens.

    Args:
        dim: width of the incoming tokens (twice the aggregator's).
        trunk_depth, num_heads: transformer blocks over the views and their heads.
        layer_scale: initial LayerScale of the trunk.
    """

    def __init__(
        self, dim: int, *, trunk_depth: int = 4, num_heads: int = 16, layer_scale: float = 0.01
    ) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(Block(dim, num_heads, layer_scale=layer_scale) for _ in range(trunk_depth))
        )
        self.token_norm = nn.LayerNorm(dim)
        self.trunk_norm = nn.LayerNorm(dim)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, POSE_DIM))
        self.embed_pose = nn.Linear(POSE_DIM, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.pose_branch = Mlp(dim, dim // 2, POSE_DIM)

    def forward(self, tokens: Tensor, iterations: int = 4) -> list[Tensor]:
        """Pose encodings after each iteration.

        Args:
            tokens: camera tokens of the last block pair, [B, N, dim].
            iterations: refinements; each starts from the detached result of the one before.

        Returns:
            ``iterations`` tensors [B, N, 9] (:func:`decode_cameras` reads them).
        """
        tokens = self.token_norm(tokens)
        normalised = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        estimate: Tensor | None = None
        encodings = []
        for _ in range(iterations):
            if estimate is None:
                start = self.empty_pose_tokens.expand(*tokens.shape[:2], -1)
            else:
                start = estimate.detach()
            modulation = self.poseLN_modulation(self.embed_pose(start.to(tokens.dtype)))
            shift, scale, gate = modulation.chunk(3, dim=-1)
            x = self.trunk(tokens + gate * (normalised * (1 + scale) + shift))
            delta = self.pose_branch(self.trunk_norm(x)).float()
            estimate = delta if estimate is None else estimate.detach() + delta
            # Focal lengths are positive: the field of view passes a ReLU, the rest is linear.
            encodings.append(torch.cat([estimate[..., :7], estimate[..., 7:].relu()], dim=-1))
        return encodings
