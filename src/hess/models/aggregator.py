"""VGGT's aggregator: patch encoder, then frame attention and global attention in turns."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from hess.attention.layout import TokenLayout
from hess.models.layers import Block, patch_positions, rope_tables

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


class Aggregator(nn.Module):
    """Tokens of N views that have seen each other.

    Each view carries one camera token and the register tokens, with one learned set for the first
    view (the reference frame) and another for all others.

    Args:
        patch_embed: maps normalised images [B*N, 3, H, W] to patch tokens [B*N, P, dim].
        patch_size: side of a patch in pixels.
        dim, depth, num_heads: width, number of block pairs, heads.
        num_registers: register tokens per view.
        layer_scale: initial LayerScale of the blocks.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        patch_embed: nn.Module,
        *,
        patch_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        num_registers: int = 4,
        layer_scale: float = 0.01,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.num_special = 1 + num_registers
        self.head_dim = dim // num_heads
        self.patch_embed = patch_embed
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, dim) * 0.02)
        self.register_token = nn.Parameter(torch.randn(1, 2, num_registers, dim) * 0.02)

        def blocks() -> nn.ModuleList:
            return nn.ModuleList(
                Block(dim, num_heads, qk_norm=True, layer_scale=layer_scale) for _ in range(depth)
            )

        self.frame_blocks = blocks()
        self.global_blocks = blocks()
        for name, values in (("image_mean", IMAGE_MEAN), ("image_std", IMAGE_STD)):
            buffer = torch.tensor(values).view(1, 1, 3, 1, 1)
            self.register_buffer(name, buffer, persistent=False)

    def special_tokens(self, batch: int, num_views: int) -> Tensor:
        """Camera and register tokens of all views: [B*N, num_special, dim]."""
        tokens = torch.cat([self.camera_token, self.register_token], dim=2)[0]
        tokens = torch.cat([tokens[:1], tokens[1:].expand(num_views - 1, -1, -1)])
        return tokens.repeat(batch, 1, 1)

    def forward(self, images: Tensor, layers: Collection[int]) -> dict[int, Tensor]:
        """Aggregate ``images`` [B, N, 3, H, W] in [0, 1]; H and W are multiples of the patch.

        Args:
            layers: block pairs whose output is wanted; others are not kept, which is most of the
                memory at many views.

        Returns:
            Per wanted pair, its frame and global tokens side by side: [B, N, tokens, 2*dim].
        """
        batch, num_views, _, height, width = images.shape
        layout = TokenLayout(
            num_views=num_views,
            grid_h=height // self.patch_size,
            grid_w=width // self.patch_size,
            num_special=self.num_special,
        )
        images = ((images - self.image_mean) / self.image_std).to(self.camera_token.dtype)
        patches = self.patch_embed(images.flatten(0, 1))
        special = self.special_tokens(batch, num_views)
        x = torch.cat([special.to(patches.dtype), patches], dim=1)

        positions = patch_positions(layout.grid_h, layout.grid_w, self.num_special, x.device)
        cos, sin = rope_tables(positions, self.head_dim)
        frame_rope = cos.to(x.dtype), sin.to(x.dtype)
        global_rope = frame_rope[0].repeat(num_views, 1), frame_rope[1].repeat(num_views, 1)

        kept = {}
        for i, (frame_block, global_block) in enumerate(
            zip(self.frame_blocks, self.global_blocks, strict=True)
        ):
            frame = frame_block(x, frame_rope)
            x = global_block(frame.view(batch, layout.num_tokens, -1), global_rope, layout)
            x = x.view_as(frame)
            if i in layers:
                kept[i] = torch.cat([frame, x], dim=-1).unflatten(0, (batch, num_views))
        return kept
