"""DINOv2 vision transformer with register tokens: the patch encoder of VGGT and pi3."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hess.models.layers import Block, LayerNorm


class PatchEmbed(nn.Module):
    """Cut images into patches and project each: [B, 3, H, W] -> [B, H/p * W/p, dim]."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        # A convolution whose stride is its kernel is one matrix product, and faster as such on
        # CPUs, where the backward pass of strided convolutions is slow.
        batch, _, height, width = images.shape
        p = self.proj.kernel_size[0]
        grid_h, grid_w = height // p, width // p
        patches = images.view(batch, 3, grid_h, p, grid_w, p).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(batch, grid_h * grid_w, 3 * p * p)
        return F.linear(
            patches.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias
        )


class DinoVisionTransformer(nn.Module):
    """ViT encoder; ``forward`` gives the normalised patch tokens.

    Args:
        image_size: side of the square images the position embedding was trained for, in pixels.
        patch_size: side of a patch in pixels.
        dim, depth, num_heads: width, blocks and heads.
        num_registers: register tokens beside the class token.
        layer_scale: initial LayerScale.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        num_registers: int = 4,
        layer_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.trained_grid = image_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.trained_grid**2, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, dim))
        # Only masked pre-training reads it; it is here because the public checkpoints carry it.
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, layer_scale=layer_scale, eps=1e-6) for _ in range(depth)
        )
        self.norm = LayerNorm(dim, eps=1e-6)
        for parameter in (self.pos_embed, self.cls_token, self.register_tokens):
            nn.init.trunc_normal_(parameter, std=0.02)

    def position_embedding(self, grid_h: int, grid_w: int) -> Tensor:
        """Class and patch positions for a grid, resampled bicubically: [1, 1 + h*w, dim]."""
        if grid_h == grid_w == self.trained_grid:
            return self.pos_embed
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        patches = self.pos_embed[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=(grid_h, grid_w), mode="bicubic", antialias=True)
        patches = patches.permute(0, 2, 3, 1).flatten(1, 2).to(self.pos_embed.dtype)
        return torch.cat([self.pos_embed[:, :1], patches], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Encode normalised ``images`` [B, 3, H, W]: patch tokens [B, H/p * W/p, dim]."""
        batch, _, height, width = images.shape
        x = torch.cat([self.cls_token.expand(batch, -1, -1), self.patch_embed(images)], dim=1)
        x = x + self.position_embedding(height // self.patch_size, width // self.patch_size)
        registers = self.register_tokens.expand(batch, -1, -1)
        x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1 + registers.shape[1] :]
