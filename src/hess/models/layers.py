"""Layers that every backbone shares: attention with rotary positions, MLP, LayerScale, block.

Module and parameter names equal those of the public VGGT, pi3 and DINOv2 checkpoints. Precision
follows the weights: matrix products run in the type of their weight, norms and the residual stream
in theirs. With half-precision weights in the linear layers only, that is the arithmetic of the
public models under autocast.
"""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hess.attention.dense import dense_attention
from hess.attention.layout import TokenLayout

VIEWS_PER_CHUNK = 8
"""Views that an encoder or a dense head works on at a time, as in the public VGGT."""

TOKENS_PER_CHUNK = 16384
"""Tokens that norms, projections and MLPs of a block work on at a time, without gradients."""

Rope = tuple[Tensor, Tensor]
"""Cosines and signed sines of the rotary angles, each [tokens, head_dim]."""


@overload
def over_views(run: Callable[..., Tensor], *inputs: Tensor, recompute: bool) -> Tensor: ...


@overload
def over_views(
    run: Callable[..., tuple[Tensor, ...]], *inputs: Tensor, recompute: bool
) -> tuple[Tensor, ...]: ...


def over_views(run: Callable[..., Any], *inputs: Tensor, recompute: bool) -> Any:
    """``run(*inputs)`` for ``VIEWS_PER_CHUNK`` views at a time, which bounds its memory.

    With gradients each chunk is made anew in the backward pass if ``recompute`` is set; if not,
    chunks would save nothing, and all views run at once.

    Args:
        run: gives a tensor or a tuple of tensors, with the views in dimension 0.
        inputs: tensors with the views in dimension 0.

    Returns:
        The results of all chunks, joined.
    """
    if torch.is_grad_enabled() and not recompute:
        return run(*inputs)
    results = []
    for chunk in zip(*(x.split(VIEWS_PER_CHUNK) for x in inputs), strict=True):
        if torch.is_grad_enabled():
            results.append(checkpoint(run, *chunk, use_reentrant=False))
        else:
            results.append(run(*chunk))
    if len(results) == 1:
        return results[0]
    if isinstance(results[0], Tensor):
        return torch.cat(results)
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def over_tokens(run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``run(*inputs)`` for ``TOKENS_PER_CHUNK`` tokens (dimension 1) at a time, then joined.

    With gradients all run at once: what a chunk makes would be held anyway.
    """
    if torch.is_grad_enabled() or inputs[0].shape[1] <= TOKENS_PER_CHUNK:
        return run(*inputs)
    chunks = zip(*(x.split(TOKENS_PER_CHUNK, dim=1) for x in inputs), strict=True)
    return torch.cat([run(*chunk) for chunk in chunks], dim=1)


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
        if torch.is_grad_enabled() or tokens <= TOKENS_PER_CHUNK:
            return self._project(x, rope)
        # At many tokens what lies between takes several times the room of the results.
        shape = batch, self.num_heads, tokens, self.head_dim
        q, k, v = (x.new_empty(shape, dtype=self.qkv.weight.dtype) for _ in range(3))
        for start in range(0, tokens, TOKENS_PER_CHUNK):
            part = slice(start, start + TOKENS_PER_CHUNK)
            rotation = None if rope is None else (rope[0][part], rope[1][part])
            results = self._project(x[:, part], rotation)
            for whole, result in zip((q, k, v), results, strict=True):
                whole[:, :, part] = result
        return q, k, v

    def _project(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
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

    Without gradients, norms, projections and MLP run over chunks of tokens, and the peak is inside
    the attention: the input, its normalised copy, queries, keys, values and the result. In units
    of the float32 input that is 1 + 0.5 + 1.5 + 0.5 = 3.5 with half-precision weights and 6
    without; 1,000 views of 1,374 tokens of width 1024 are 5.6 GB, so 20 GB in half precision.

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
        attended = self.attn(over_tokens(self._normalised, x), rope, layout)
        return over_tokens(self._residual, x, attended)

    def _normalised(self, x: Tensor) -> Tensor:
        # The projection would cast its input anyway.
        return self.norm1(x).to(self.attn.qkv.weight.dtype)

    def _residual(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.ls1(attended)
        return x + self.ls2(self.mlp(self.norm2(x)))


def run_block(
    block: nn.Module,
    x: Tensor,
    rope: Rope | None,
    layout: TokenLayout | None = None,
    *,
    recompute: bool,
) -> Tensor:
    """``block(x, rope, layout)``; with ``recompute`` its activations are made anew in backward.

    Of a block that is recomputed only the input is held, which is what lets calibration of a
    model with 48 blocks fit. Without gradients the rows of a batch, which do not see each other,
    take turns once they have more than ``TOKENS_PER_CHUNK`` tokens together.
    """
    if torch.is_grad_enabled():
        if recompute:
            return checkpoint(block, x, rope, layout, use_reentrant=False)
        return block(x, rope, layout)
    rows = max(1, TOKENS_PER_CHUNK // x.shape[1])
    if len(x) <= rows:
        return block(x, rope, layout)
    return torch.cat([block(part, rope, layout) for part in x.split(rows)])


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
