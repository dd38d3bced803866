"""``nano``: the small VGGT that ships with the package."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from hess.datasets.procedural import SceneBatch
from hess.models.base import Predictions
from hess.models.vggt import VGGT, VGGTConfig
from hess.training.losses import camera_loss, confident_loss, make_targets
from hess.training.recipe import Recipe

NANO = VGGTConfig(
    image_size=48,
    patch_size=8,
    dim=128,
    depth=6,
    num_heads=8,
    num_registers=2,
    layer_scale=0.25,
    patch_embed="vit",
    vit_depth=1,
    vit_registers=1,
    camera_trunk_depth=2,
    camera_heads=8,
    dense_head="linear",
    dense_layers=(2, 5),
    block_size_q=6,
    block_size_kv=6,
)


class NanoRecipe(Recipe):
    """VGGT's losses: cameras and points in the frame of the first view, and depth."""

    matrices: ClassVar = ("blocks.", "point_head.mlp", "depth_head.mlp")
    weights: ClassVar = {"camera": 5.0, "points": 1.0, "depth": 1.0}
    model: VGGT

    def __init__(self) -> None:
        self.model = VGGT(NANO, model_name="nano")
        self.dim = NANO.dim
        _initialise(self.model)

    def losses(
        self, batch: SceneBatch, *, with_layers: bool
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        model, special = self.model, self.model.num_special
        targets = make_targets(batch)
        size = batch.images.shape[-1]
        with torch.autocast(batch.images.device.type, torch.bfloat16):
            kept = range(NANO.depth) if with_layers else NANO.dense_layers
            tokens = model.aggregator(batch.images, kept)
            encodings = model.camera_encodings(tokens)
            depth, depth_confidence = model.depth_head(tokens, special, size, size)
            points, point_confidence = model.point_head(tokens, special, size, size)
        distance = (points - targets.points).square().sum(-1).add(1e-8).sqrt()
        losses = {
            "camera": camera_loss(encodings, targets.encoding),
            "points": confident_loss(distance, point_confidence),
            "depth": confident_loss((depth[..., 0] - targets.depth).abs(), depth_confidence),
        }
        return losses, [tokens[i][1][:, :, special:] for i in kept]

    def point_errors(self, out: Predictions, batch: SceneBatch) -> Tensor:
        return (out.world_points - make_targets(batch).points).norm(dim=-1)


def _initialise(model: VGGT) -> None:
    """Small outputs of every residual branch, and cameras that start near a plausible one."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and name.endswith(("fc2.weight", "attn.proj.weight")):
            nn.init.normal_(parameter, std=0.02)
    last = model.camera_head.pose_branch.fc2
    nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)
    with torch.no_grad():
        # Four iterations add up to quaternion w = 1 and about 65 degrees of view; the field of
        # view passes a ReLU and would never learn from a negative start.
        last.bias[6:] = torch.tensor([1.0, 1.1, 1.1]) / model.config.camera_iterations
