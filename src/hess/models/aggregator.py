"""VGGT's aggregator: patch encoder, then frame attention and global attention in turns."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from hess.attention.layout import TokenLayout
from hess.models.layers import Block, over_views, patch_positions, rope_tables, run_block

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

PairTokens = tuple[Tensor, Tensor]
"""Tokens after the frame and after the global attention of one block pair, each [B, N, tokens,
dim]. Heads read both side by side; kept apart they are no copies."""


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

    def encode(self, images: Tensor) -> Tensor:
        """Patch tokens of ``images`` [views, 3, H, W] in [0, 1]: [views, patches, dim]."""
        mean, std = (images.new_tensor(x).view(3, 1, 1) for x in (IMAGE_MEAN, IMAGE_STD))
        return self.patch_embed((images - mean) / std)

    def special_tokens(self, batch: int, num_views: int) -> Tensor:
        """Camera and register tokens of all views: [B*N, num_special, dim]."""
        tokens = torch.cat([self.camera_token, self.register_token], dim=2)[0]
        tokens = torch.cat([tokens[:1], tokens[1:].expand(num_views - 1, -1, -1)])
        return tokens.repeat(batch, 1, 1)

    def forward(
        self, images: Tensor, layers: Collection[int], *, recompute: bool = False
    ) -> dict[int, PairTokens]:
        """Aggregate ``images`` [B, N, 3, H, W] in [0, 1]; H and W are multiples of the patch.

        Args:
            layers: block pairs whose output is wanted; others are not kept, which is most of the
                memory at many views.
            recompute: hold the inputs of the blocks only, see :func:`run_block`.

        Returns:
            The tokens of the wanted pairs.
        """
        batch, num_views, _, height, width = images.shape
        layout = TokenLayout(
            num_views=num_views,
            grid_h=height // self.patch_size,
            grid_w=width // self.patch_size,
            num_special=self.num_special,
        )
        patches = over_views(self.encode, images.flatten(0, 1), recompute=recompute)
        # The special tokens are float32, and with them the residual stream.
        x = torch.cat([self.special_tokens(batch, num_views), patches], dim=1)
        positions = patch_positions(layout.grid_h, layout.grid_w, self.num_special, x.device)
        rope = rope_tables(positions, self.head_dim)
        global_rope = rope[0].repeat(num_views, 1), rope[1].repeat(num_views, 1)

        kept = {}
        for i, (frame_block, global_block) in enumerate(
            zip(self.frame_blocks, self.global_blocks, strict=True)
        ):
            x = run_block(frame_block, x, rope, recompute=recompute)
            frame = x if i in layers else None  # else it would live through the next block
            x = x.view(batch, layout.num_tokens, -1)
            x = run_block(global_block, x, global_rope, layout, recompute=recompute)
            x = x.view(batch * num_views, layout.tokens_per_view, -1)
            if frame is not None:
                views = batch, num_views
                kept[i] = frame.unflatten(0, views), x.unflatten(0, views)
        return kept
