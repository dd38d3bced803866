"""VGGT: photos in, cameras, depth and a point map out, all in the first camera's frame."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from hess.errors import ConfigError
from hess.geometry.fit_rules import square_crop, vggt_crop
from hess.geometry.poses import invert_pose
from hess.models.aggregator import Aggregator, PairTokens
from hess.models.base import Anatomy, GlobalAttentionSite, Model, ModelConfig, Predictions
from hess.models.camera_head import CameraHead, decode_cameras
from hess.models.dense_heads import Activation, DPTHead, LinearHead
from hess.models.dinov2 import DinoVisionTransformer, PatchEmbed


@dataclass(frozen=True, kw_only=True)
class VGGTConfig(ModelConfig):
    """Sizes of a VGGT, beside those every model has. :data:`VGGT_1B` is the public one's.

    Args:
        depth: frame/global block pairs of the aggregator.
        num_registers: register tokens per view.
        patch_embed: "vit" (DINOv2) or "conv" (a single strided convolution).
        vit_depth, vit_registers: blocks and register tokens of the DINOv2 encoder, whose width
            and heads are the aggregator's.
        camera_trunk_depth, camera_heads, camera_iterations: the camera head.
        dense_head: "dpt" or "linear".
        dense_layers: block pairs that the dense heads read (four for "dpt").
        dpt_features, dpt_out_channels: widths of the DPT head.
        image_rule: how photos are brought to size: "square" shows the largest centred square,
            "crop" the full width and at most as much height, as the public model does.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    depth: int = 24
    num_registers: int = 4
    patch_embed: Literal["vit", "conv"] = "vit"
    vit_depth: int = 24
    vit_registers: int = 4
    camera_trunk_depth: int = 4
    camera_heads: int = 16
    camera_iterations: int = 4
    dense_head: Literal["dpt", "linear"] = "dpt"
    dense_layers: tuple[int, ...] = (4, 11, 17, 23)
    dpt_features: int = 256
    dpt_out_channels: tuple[int, int, int, int] = (256, 512, 1024, 1024)
    image_rule: Literal["square", "crop"] = "square"

    may_be_zero: ClassVar[frozenset[str]] = frozenset(
        {"vit_depth", "vit_registers", "num_registers", "dense_layers"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (
            ("patch_embed", ("vit", "conv")),
            ("dense_head", ("dpt", "linear")),
            ("image_rule", ("square", "crop")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {known}, found {getattr(self, name)!r}")
        if 2 * self.dim % self.camera_heads:
            raise ConfigError(
                f"twice dim ({2 * self.dim}) must be a multiple of camera_heads "
                f"({self.camera_heads})"
            )
        if not self.dense_layers or max(self.dense_layers) >= self.depth:
            raise ConfigError(
                f"dense_layers must name block pairs below depth {self.depth}, "
                f"found {self.dense_layers}"
            )
        if self.dense_head == "dpt" and len(self.dense_layers) != 4:
            raise ConfigError(f"a DPT head reads four layers, found {self.dense_layers}")


VGGT_1B = VGGTConfig(image_rule="crop")
"""The public checkpoint."""


class VGGT(Model):
    """Visual Geometry Grounded Transformer (Wang et al. 2025).

    State-dict keys and shapes equal the public checkpoint's, without its tracking head.
    Confidences are greater than 1 (1 + e^x).
    """

    camera_weight: ClassVar[float] = 0.5

    def __init__(self, config: VGGTConfig, model_name: str = "vggt") -> None:
        super().__init__()
        self.config = config
        self.model_name = model_name
        self.image_rule = (
            square_crop(config.image_size)
            if config.image_rule == "square"
            else vggt_crop(config.image_size, config.patch_size)
        )
        # The VGGT paper finds these clouds better, and they agree with the predicted cameras.
        self.cloud_from = "depth"
        self.patch_size = config.patch_size
        self.num_special = 1 + config.num_registers
        self.num_heads = config.num_heads
        self.block_size_q = config.block_size_q
        self.block_size_kv = config.block_size_kv
        self.aggregator = Aggregator(
            _patch_embed(config),
            patch_size=config.patch_size,
            dim=config.dim,
            depth=config.depth,
            num_heads=config.num_heads,
            num_registers=config.num_registers,
            layer_scale=config.layer_scale,
        )
        self.camera_head = CameraHead(
            2 * config.dim,
            trunk_depth=config.camera_trunk_depth,
            num_heads=config.camera_heads,
            layer_scale=config.layer_scale,
        )
        self.point_head = _dense_head(config, channels=3, activation="inv_log")
        self.depth_head = _dense_head(config, channels=1, activation="exp")

    def global_attention_sites(self) -> list[GlobalAttentionSite]:
        return [
            GlobalAttentionSite(layer_idx=i, parent=block, attribute="attn")
            for i, block in enumerate(self.aggregator.global_blocks)
        ]

    def certainty(self, confidence: Tensor) -> Tensor:
        return 1 - 1 / confidence  # the sigmoid of the raw output, since confidence is 1 + e^raw

    def backbone_parts(self) -> list[nn.Module]:
        return [self.aggregator]

    def anatomy(self) -> Anatomy:
        encoder = self.aggregator.patch_embed
        blocks = list(encoder.blocks) if isinstance(encoder, DinoVisionTransformer) else []
        return Anatomy(
            encoder_blocks=blocks,
            encoder_special=1 + self.config.vit_registers if blocks else 0,
            frame_blocks=list(self.aggregator.frame_blocks),
            kept=2 * len({*self.config.dense_layers, self.config.depth - 1}),
            heads=[self.depth_head, self.point_head],
            pixel_values=1 + 1 + 3 + 1,
        )

    def tokens(self, images: Tensor) -> dict[int, PairTokens]:
        """Aggregated tokens of the block pairs that the heads read.

        Raises:
            LayoutError: images are not [B, N, 3, H, W] with H and W multiples of the patch.
        """
        self.token_layout(images)  # refuses what does not fit
        wanted = {*self.config.dense_layers, self.config.depth - 1}
        return self.aggregator(images, wanted, recompute=self.recompute)

    def camera_encodings(self, tokens: dict[int, PairTokens]) -> list[Tensor]:
        """Pose encodings [B, N, 9] after each iteration of the camera head."""
        last = tokens[self.config.depth - 1]
        camera_tokens = torch.cat([x[:, :, 0] for x in last], dim=-1)
        return self.camera_head(camera_tokens, self.config.camera_iterations)

    def forward(self, images: Tensor) -> Predictions:
        tokens = self.tokens(images)
        height, width = images.shape[-2:]
        encoding = self.camera_encodings(tokens)[-1]
        cam_from_world, intrinsics = decode_cameras(encoding, height, width)
        inputs = tokens, self.num_special, height, width
        depth, depth_confidence = self.depth_head(*inputs, recompute=self.recompute)
        points, point_confidence = self.point_head(*inputs, recompute=self.recompute)
        return Predictions(
            world_from_cam=invert_pose(cam_from_world),
            intrinsics=intrinsics,
            depth=depth.squeeze(-1),
            depth_confidence=depth_confidence,
            world_points=points,
            point_confidence=point_confidence,
        )


def _patch_embed(config: VGGTConfig) -> nn.Module:
    if config.patch_embed == "conv":
        return PatchEmbed(config.patch_size, config.dim)
    return DinoVisionTransformer(
        image_size=config.image_size,
        patch_size=config.patch_size,
        dim=config.dim,
        depth=config.vit_depth,
        num_heads=config.num_heads,
        num_registers=config.vit_registers,
    )


def _dense_head(config: VGGTConfig, *, channels: int, activation: Activation) -> nn.Module:
    if config.dense_head == "linear":
        return LinearHead(
            2 * config.dim,
            layers=config.dense_layers,
            channels=channels,
            patch_size=config.patch_size,
            activation=activation,
        )
    return DPTHead(
        2 * config.dim,
        layers=config.dense_layers,
        channels=channels,
        patch_size=config.patch_size,
        activation=activation,
        features=config.dpt_features,
        out_channels=config.dpt_out_channels,
    )
