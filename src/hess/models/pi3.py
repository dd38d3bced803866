"""Pi3 (π³): photos in; cameras, and the points that each camera sees, out. No view leads."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hess.attention.layout import TokenLayout
from hess.errors import ConfigError
from hess.geometry.fit_rules import pixel_budget, square_crop
from hess.geometry.poses import nearest_rotation, pose_from
from hess.geometry.projection import intrinsics_from_points
from hess.models.aggregator import IMAGE_MEAN, IMAGE_STD
from hess.models.base import Anatomy, GlobalAttentionSite, Model, ModelConfig, Predictions
from hess.models.dinov2 import DinoVisionTransformer
from hess.models.layers import (
    Block,
    Linear,
    Rope,
    over_views,
    patch_positions,
    rope_tables,
    run_block,
)

MAX_PIXELS = 255_000
"""Most pixels per view in the public model's preprocessing."""


@dataclass(frozen=True, kw_only=True)
class Pi3Config(ModelConfig):
    """Sizes of a Pi3, beside those every model has. The defaults are the public model's.

    Args:
        encoder_depth, encoder_registers: blocks and register tokens of the DINOv2 encoder, whose
            width and heads are the decoder's.
        decoder_depth: blocks of the decoder, an even number: within a view and global in turns.
        num_registers: register tokens per view in the decoder.
        head_depth: blocks of the point, confidence and camera decoders.
        camera_dim: width of the camera head.
        image_rule: how photos are brought to size: "pixels" shows them whole, within a budget of
            pixels, as the public model does; "square" the largest centred square.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    encoder_depth: int = 24
    encoder_registers: int = 4
    decoder_depth: int = 36
    num_registers: int = 5
    head_depth: int = 5
    camera_dim: int = 512
    image_rule: Literal["pixels", "square"] = "pixels"

    may_be_zero: ClassVar[frozenset[str]] = frozenset(
        {"encoder_depth", "encoder_registers", "num_registers", "head_depth"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_depth % 2:
            raise ConfigError(
                "decoder_depth must be even, since blocks within a view and global blocks take "
                f"turns, found {self.decoder_depth}"
            )
        if self.image_rule not in ("pixels", "square"):
            raise ConfigError(
                f"image_rule must be 'pixels' or 'square', found {self.image_rule!r}"
            )


class Pi3(Model):
    """Permutation-equivariant visual geometry model (Wang et al. 2025, "π³").

    State-dict keys and shapes equal the public checkpoint's. Confidences are logits. Intrinsics
    are not predicted but estimated from the points (:func:`intrinsics_from_points`).
    """

    camera_weight: ClassVar[float] = 0.0
    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: Pi3Config, model_name: str = "pi3") -> None:
        super().__init__()
        self.config = config
        self.model_name = model_name
        self.image_rule = (
            square_crop(config.image_size)
            if config.image_rule == "square"
            else pixel_budget(MAX_PIXELS, config.patch_size)
        )
        self.cloud_from = "point_head"
        self.patch_size = config.patch_size
        self.num_special = config.num_registers
        self.num_heads = config.num_heads
        self.block_size_q = config.block_size_q
        self.block_size_kv = config.block_size_kv
        dim, heads = config.dim, config.num_heads
        for name, values in (("image_mean", IMAGE_MEAN), ("image_std", IMAGE_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))
        self.encoder = DinoVisionTransformer(
            image_size=config.image_size,
            patch_size=config.patch_size,
            dim=dim,
            depth=config.encoder_depth,
            num_heads=heads,
            num_registers=config.encoder_registers,
        )
        del self.encoder.mask_token  # this checkpoint does not carry it
        self.register_token = nn.Parameter(torch.randn(1, 1, config.num_registers, dim) * 0.02)
        self.decoder = nn.ModuleList(
            Block(dim, heads, qk_norm=True, layer_scale=config.layer_scale, eps=1e-6)
            for _ in range(config.decoder_depth)
        )
        self.point_decoder = HeadDecoder(dim, dim, config.head_depth, heads)
        self.point_head = PatchHead(dim, 3, config.patch_size)
        self.conf_decoder = HeadDecoder(dim, dim, config.head_depth, heads)
        self.conf_head = PatchHead(dim, 1, config.patch_size)
        self.camera_decoder = HeadDecoder(dim, config.camera_dim, config.head_depth, heads)
        self.camera_head = CameraHead(config.camera_dim)

    def global_attention_sites(self) -> list[GlobalAttentionSite]:
        return [
            GlobalAttentionSite(layer_idx=i, parent=block, attribute="attn")
            for i, block in enumerate(self.decoder[1::2])
        ]

    def certainty(self, confidence: Tensor) -> Tensor:
        return confidence.sigmoid()

    def backbone_parts(self) -> list[nn.Module]:
        decoders = [self.decoder, self.point_decoder, self.conf_decoder, self.camera_decoder]
        return [self.encoder, *decoders]

    def anatomy(self) -> Anatomy:
        return Anatomy(
            encoder_blocks=list(self.encoder.blocks),
            encoder_special=1 + self.config.encoder_registers,
            frame_blocks=list(self.decoder[::2]),
            kept=2,
            heads=[self.point_decoder, self.conf_decoder, self.camera_decoder],
            pixel_values=3 + 1 + 3,
        )

    def encode(self, images: Tensor) -> Tensor:
        """Patch tokens of ``images`` [views, 3, H, W] in [0, 1]: [views, patches, dim]."""
        return self.encoder((images - self.image_mean) / self.image_std)

    def tokens(
        self, images: Tensor, layout: TokenLayout, rope: Rope, kept: Collection[int]
    ) -> list[Tensor]:
        """Tokens after each of the decoder blocks ``kept``: [B*N, tokens, dim].

        Args:
            images: [B, N, 3, H, W] in [0, 1].
            layout: their token layout.
            rope: rotary angles of the tokens of one view.
            kept: indices of blocks.
        """
        patches = over_views(self.encode, images.flatten(0, 1), recompute=self.recompute)
        x = torch.cat([self.register_token[0].expand(len(patches), -1, -1), patches], dim=1)
        global_rope = rope[0].repeat(layout.num_views, 1), rope[1].repeat(layout.num_views, 1)
        found = []
        for i, block in enumerate(self.decoder):
            if i % 2 == 0:
                x = run_block(block, x, rope, recompute=self.recompute)
            else:
                x = x.view(-1, layout.num_tokens, x.shape[-1])
                x = run_block(block, x, global_rope, layout, recompute=self.recompute)
                x = x.view(-1, layout.tokens_per_view, x.shape[-1])
            if i in kept:
                found.append(x)
        return found

    def rope(self, layout: TokenLayout, device: torch.device) -> Rope:
        """Rotary angles of the tokens of one view."""
        positions = patch_positions(layout.grid_h, layout.grid_w, layout.num_special, device)
        return rope_tables(positions, self.config.dim // self.config.num_heads)

    def local_points(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """What each view sees, in its own camera's frame: [views, H, W, 3].

        Args:
            tokens: of the point decoder, [views, tokens, dim].
            layout: their token layout.
        """
        xy, log_z = self.point_head(tokens, layout).split((2, 1), dim=-1)
        return torch.cat([xy, torch.ones_like(log_z)], dim=-1) * log_z.exp()

    def forward(self, images: Tensor) -> Predictions:
        """Predict cameras and points for ``images`` [B, N, 3, H, W] in [0, 1].

        Raises:
            LayoutError: another shape, or H and W are not multiples of the patch.
        """
        layout = self.token_layout(images)
        rope = self.rope(layout, images.device)
        depth = len(self.decoder)
        tokens = self.tokens(images, layout, rope, kept=(depth - 2, depth - 1))

        def local_points(*tokens: Tensor) -> Tensor:
            return self.local_points(self.point_decoder(tokens, rope), layout)

        def confidence_logits(*tokens: Tensor) -> Tensor:
            return self.conf_head(self.conf_decoder(tokens, rope), layout).squeeze(-1)

        def poses(*tokens: Tensor) -> Tensor:
            return self.camera_head(self.camera_decoder(tokens, rope), layout)

        local, confidence, pose = (
            over_views(head, *tokens, recompute=self.recompute)
            for head in (local_points, confidence_logits, poses)
        )
        with torch.no_grad():
            weights = self.certainty(confidence)
            intrinsics = over_views(intrinsics_from_points, local, weights, recompute=False)
        world = local @ pose[:, None, :3, :3].mT + pose[:, None, None, :3, 3]

        views = images.shape[:2]
        confidence = confidence.unflatten(0, views)
        return Predictions(
            world_from_cam=pose.unflatten(0, views),
            intrinsics=intrinsics.unflatten(0, views),
            depth=local[..., 2].unflatten(0, views),
            depth_confidence=confidence,
            world_points=world.unflatten(0, views),
            point_confidence=confidence,
        )


class HeadDecoder(nn.Module):
    """Transformer within each view that turns the decoder's tokens into a head's input.

    Args:
        dim, out: width before and inside, and after.
        depth, num_heads: blocks and heads.
    """

    def __init__(self, dim: int, out: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.projects = Linear(2 * dim, dim)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, layer_scale=None, eps=1e-6) for _ in range(depth)
        )
        self.linear_out = Linear(dim, out)

    def forward(self, tokens: Sequence[Tensor], rope: Rope) -> Tensor:
        """Two tensors [views, tokens, dim], read side by side -> [views, tokens, out]."""
        x = self.projects(torch.cat(tuple(tokens), dim=-1))
        for block in self.blocks:
            x = block(x, rope)
        return self.linear_out(x)


class PatchHead(nn.Module):
    """A linear layer per patch token whose outputs are the values of the patch's pixels."""

    def __init__(self, dim: int, channels: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = Linear(dim, channels * patch_size**2)

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """[views, tokens, dim] -> [views, H, W, channels]."""
        values = self.proj(tokens[:, layout.num_special :]).mT
        values = values.unflatten(2, (layout.grid_h, layout.grid_w))
        return F.pixel_shuffle(values, self.patch_size).permute(0, 2, 3, 1)


class CameraHead(nn.Module):
    """The pose of each view from the mean of its patch tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.res_conv = nn.Sequential(ResidualMlp(dim), ResidualMlp(dim))
        self.more_mlps = nn.Sequential(Linear(dim, dim), nn.ReLU(), Linear(dim, dim), nn.ReLU())
        self.fc_t = Linear(dim, 3)
        self.fc_rot = Linear(dim, 9)

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """[views, tokens, dim] -> world_from_cam [views, 4, 4]."""
        x = self.res_conv(tokens[:, layout.num_special :])
        x = self.more_mlps(x.mean(dim=1))
        rows = F.normalize(self.fc_rot(x).unflatten(-1, (3, 3)), dim=-1)
        return pose_from(nearest_rotation(rows), self.fc_t(x))


class ResidualMlp(nn.Module):
    """Three linear layers with ReLU, beside a shortcut; called a convolution in checkpoints."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.res_conv1 = Linear(dim, dim)
        self.res_conv2 = Linear(dim, dim)
        self.res_conv3 = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.res_conv3(self.res_conv2(self.res_conv1(x).relu()).relu()).relu()
