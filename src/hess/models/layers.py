"""Layers that every backbone shares: attention with rotary positions, MLP, LayerScale, block.

Module and parameter names equal those of the public VGGT, pi3 and DINOv2 checkpoints. Precision
follows the weights: matrix products run in the type of their weight, norms and the residual stream
in theirs. With half-precision weights in the linear layers only, that is the arithmetic of the
public models under autocast.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hess.attention.dense import dense_attention
from hess.attention.layout import TokenLayout

Rope = tuple[Tensor, Tensor]
"""Cosines and signed sines of the rotary angles, each [tokens, head_dim]."""


def rope_tables(positions: Tensor, head_dim: int, base: float = 100.0) -> Rope:
    """Angles of a two-dimensional rotary embedding (RoPE2D as used by VGGT).

    The first half of a head's channels turns with the row, the second with the column; within a
    half, channel i pairs with channel i + head_dim/4 at frequency ``base^(-4i/head_dim)``.

    Args:
        positions: [tokens, 2] as (row, column); 0 leaves a token unrotated.
        head_dim: channels per head, a multiple of 4.
        base: longest wavelength / 2 pi, in patches.

    Returns:
        fp32 cosines and sines, [tokens, head_dim]; the sines carry the sign of the rotation.
    """
    quarter = head_dim // 4
    exponent = torch.arange(quarter, dtype=torch.float32, device=positions.device) / quarter
    angles = positions.float()[:, :, None] * base**-exponent
    cos = torch.cat([angles.cos(), angles.cos()], dim=-1)
    sin = torch.cat([-angles.sin(), angles.sin()], dim=-1)
    return cos.flatten(1), sin.flatten(1)


def patch_positions(grid_h: int, grid_w: int, num_special: int, device: torch.device) -> Tensor:
    """(row, column) of the tokens of one view, specials at 0 and patches from 1: [tokens, 2]."""
    rows = torch.arange(1, grid_h + 1, device=device)
    columns = torch.arange(1, grid_w + 1, device=device)
    patches = torch.cartesian_prod(rows, columns)
    return torch.cat([patches.new_zeros(num_special, 2), patches])


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate ``x`` [..., tokens, head_dim] by the angles of :func:`rope_tables`."""
    cos, sin = rope
    a, b, c, d = x.chunk(4, dim=-1)
    return x * cos + torch.cat([b, a, d, c], dim=-1) * sin


class Linear(nn.Linear):
    """A linear layer that computes in the precision of its weight, whatever it is fed."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """A layer norm that computes in the precision of its weight, whatever it is fed."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Attention(nn.Module):
    """Multi-head self-attention with optional QK-norm and rotary positions (Eq. 1).

    ``forward`` is ``merge(attend(*project(x)))``: a sparse replacement shares ``project`` and
    ``merge`` and changes only what lies between.
    """

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm: nn.Module = LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = Linear(dim, dim)

    def project(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values after norm and rotation, each [B, heads, S, head_dim]."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        return q.to(v.dtype), k.to(v.dtype), v

    def merge(self, out: Tensor) -> Tensor:
        """Join the heads of ``out`` [B, heads, S, head_dim] and project: [B, S, dim]."""
        return self.proj(out.transpose(1, 2).flatten(2))

    def forward(
        self, x: Tensor, rope: Rope | None = None, layout: TokenLayout | None = None
    ) -> Tensor:
        """Dense attention over ``x`` [B, S, dim]; ``layout`` serves sparse replacements only."""
        return self.merge(dense_attention(*self.project(x, rope)))


class LayerScale(nn.Module):
    """Multiply by a learned vector."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, dim: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, out or dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x + ls1(attn(norm1 x)), x + ls2(mlp(norm2 x)).

    ``layer_scale`` is the initial LayerScale; None leaves both out.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qk_norm: bool = False,
        layer_scale: float | None = 0.01,
        eps: float = 1e-5,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()

        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qk_norm=qk_norm)
        self.ls1 = scale()
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = scale()

    def forward(
        self, x: Tensor, rope: Rope | None = None, layout: TokenLayout | None = None
    ) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rope, layout))
        return x + self.ls2(self.mlp(self.norm2(x)))


def run_block(
    block: Block,
    x: Tensor,
    rope: Rope | None,
    layout: TokenLayout | None = None,
    *,
    recompute: bool,
) -> Tensor:
    """``block(x, rope, layout)``; with ``recompute`` its activations are made anew in backward.

    Of a block that is recomputed only the input is held, which is what lets calibration of a
    model with 48 blocks fit; without gradients there is no difference.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x, rope, layout, use_reentrant=False)
    return block(x, rope, layout)


def use_precision(model: nn.Module, parts: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Set the precision of ``model`` in place.

    A half precision goes to the linear layers (and patch projections) of ``parts`` only and
    leaves all else in float32, as autocast does; float32 and float64 go to the whole model.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        model.to(dtype)
        return
    model.to(torch.float32)
    for part in parts:
        for module in part.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)
