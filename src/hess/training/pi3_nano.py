"""``pi3-nano``: the small π³ that ships with the package. No view leads."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hess.datasets.procedural import SceneBatch
from hess.geometry.poses import invert_pose, rotation_angle_deg
from hess.geometry.projection import unproject_depth
from hess.models.base import Predictions
from hess.models.pi3 import Pi3, Pi3Config
from hess.training.losses import make_targets
from hess.training.recipe import Recipe

PI3_NANO = Pi3Config(
    image_size=48,
    patch_size=8,
    dim=128,
    num_heads=8,
    layer_scale=0.25,
    block_size_q=6,
    block_size_kv=6,
    encoder_depth=1,
    encoder_registers=1,
    decoder_depth=12,
    num_registers=3,
    head_depth=1,
    camera_dim=128,
    image_rule="square",
)

NEAR = 0.05
"""Error, as a share of the depth, up to which a point counts as right."""


class Pi3NanoRecipe(Recipe):
    """π³'s losses (Wang et al. 2025): points in each camera's frame up to one scale per scene,
    poses between all pairs of views at that scale, and whether each point is right.

    Its loss on normals is left out; the scale is that of the weighted L1 error, as in MoGe.
    """

    matrices: ClassVar = ("blocks.", "decoder.")
    weights: ClassVar = {"points": 1.0, "rotation": 1.0, "translation": 1.0, "confidence": 0.05}
    model: Pi3

    def __init__(self) -> None:
        self.model = Pi3(PI3_NANO, model_name="pi3-nano")
        self.dim = PI3_NANO.dim
        _initialise(self.model)

    def losses(
        self, batch: SceneBatch, *, with_layers: bool
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        model, views = self.model, batch.images.shape[:2]
        layout = model.token_layout(batch.images)
        rope = model.rope(layout, batch.images.device)
        global_blocks = range(1, PI3_NANO.decoder_depth, 2)
        last_two = PI3_NANO.decoder_depth - 2, PI3_NANO.decoder_depth - 1
        with torch.autocast(batch.images.device.type, torch.bfloat16):
            kept = sorted({*global_blocks, *last_two})
            found = dict(zip(kept, model.tokens(batch.images, layout, rope, kept), strict=True))
            tokens = [found[i] for i in last_two]
            decoders = model.point_decoder, model.conf_decoder, model.camera_decoder
            points, confidence, camera = (decode(tokens, rope).float() for decode in decoders)
        local = model.local_points(points, layout).unflatten(0, views)
        logits = model.conf_head(confidence, layout).squeeze(-1).unflatten(0, views)
        poses = model.camera_head(camera, layout).unflatten(0, views)

        target, depth, world_from_cam = _targets(batch)
        scale = best_scale(local, target, depth)
        error = (scale[:, None, None, None, None] * local - target).abs().sum(-1) / depth
        is_right = (error.detach() < NEAR).float()
        rotation, translation = pose_errors(poses, world_from_cam, scale)
        losses = {
            "points": error.mean(),
            "rotation": rotation,
            "translation": translation,
            "confidence": F.binary_cross_entropy_with_logits(logits, is_right),
        }
        special = model.num_special
        layers = [found[i].unflatten(0, views)[:, :, special:] for i in global_blocks]
        return losses, layers if with_layers else []

    def point_errors(self, out: Predictions, batch: SceneBatch) -> Tensor:
        cam_from_world = invert_pose(out.world_from_cam)
        scale = best_scale(_transformed(out.world_points, cam_from_world), *_targets(batch)[:2])
        points = _transformed(out.world_points, cam_from_world[:, :1])
        return (scale[:, None, None, None, None] * points - make_targets(batch).points).norm(
            dim=-1
        )


@torch.no_grad()
def best_scale(points: Tensor, target: Tensor, depth: Tensor) -> Tensor:
    """The factor on ``points`` that brings them nearest to ``target`` in L1 over depth: [B].

    It is a weighted median of the ratios of coordinates; of every fourth row and column, which is
    enough.

    Args:
        points, target: [B, N, S, S, 3].
        depth: of ``target``, positive, [B, N, S, S].
    """
    points, target = (x[:, :, ::4, ::4].flatten(1) for x in (points, target))
    weights = points.abs() / depth[:, :, ::4, ::4, None].expand(-1, -1, -1, -1, 3).flatten(1)
    ratios, order = (target / points.where(points != 0, torch.nan)).nan_to_num(0).sort(dim=1)
    mass = weights.gather(1, order).cumsum(dim=1)
    middle = torch.searchsorted(mass, mass[:, -1:] / 2)
    return ratios.gather(1, middle.clamp_max(ratios.shape[1] - 1)).squeeze(1)


def pose_errors(poses: Tensor, target: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Mean angle in radians and Huber error of the translation between all pairs of views.

    Args:
        poses, target: world_from_cam [B, N, 4, 4].
        scale: factor on the translations of ``poses``, [B].
    """
    num_views = poses.shape[1]
    is_pair = ~torch.eye(num_views, dtype=torch.bool, device=poses.device)
    found, wanted = (
        (invert_pose(x)[:, :, None] @ x[:, None])[:, is_pair] for x in (poses, target)
    )
    angle = rotation_angle_deg(found[..., :3, :3].mT @ wanted[..., :3, :3]).deg2rad()
    moved = scale[:, None, None] * found[..., :3, 3]
    translation = F.smooth_l1_loss(moved, wanted[..., :3, 3], beta=0.05, reduction="none")
    return angle.mean(), translation.sum(-1).mean()


def _targets(batch: SceneBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Points in each camera's frame, their depth, and cameras, at mean point distance 1."""
    targets = make_targets(batch)
    own = torch.eye(4, device=batch.depth.device).expand_as(batch.world_from_cam)
    world_from_cam = batch.world_from_cam.clone()
    world_from_cam[..., :3, 3] /= targets.unit[:, None, None]
    return unproject_depth(targets.depth, batch.intrinsics, own), targets.depth, world_from_cam


def _transformed(points: Tensor, pose: Tensor) -> Tensor:
    """``points`` [B, N, S, S, 3] by ``pose`` [B, N or 1, 4, 4]."""
    return points @ pose[:, :, None, :3, :3].mT + pose[:, :, None, None, :3, 3]


def _initialise(model: Pi3) -> None:
    """Small outputs of every residual branch; points ahead, cameras at the origin."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and name.endswith(("fc2.weight", "attn.proj.weight")):
            nn.init.normal_(parameter, std=0.02)
    head = model.camera_head
    for layer in (head.fc_t, head.fc_rot, model.point_head.proj):
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        head.fc_rot.bias.copy_(torch.eye(3).flatten())
