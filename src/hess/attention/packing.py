"""Keys and values with each block in one run of memory, and the block means, in plain torch.

In the order of a model a key block is broken by the special tokens of every view it crosses. An
attention kernel reads each selected block once per query block that selects it, so one copy to
*packed order* (all patches, view after view, then all special tokens) pays for itself. Queries
and outputs are read and written once; they stay in token order, and no copy is made of them.

Nothing needs padding: a query sees its blocks and then the special tokens as one sequence of
keys, in which a partial last block is simply shorter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hess.attention.layout import TokenLayout
from hess.attention.pooling import pool_blocks
from hess.errors import LayoutError

POOLED_AT_ONCE = 2**20
"""Numbers that pooling copies at once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedKeys:
    """Keys and values in packed order.

    Args:
        k, v: [B, heads, S, d], contiguous.
        k_mean: [B, heads, kv_blocks, d], means over the patch blocks of the keys in fp32 (fp64 if
            the keys are).

    Raises:
        LayoutError: shapes disagree, or ``k`` or ``v`` is not contiguous.
    """

    k: Tensor
    v: Tensor
    k_mean: Tensor

    def __post_init__(self) -> None:
        one_layout = self.k.is_contiguous() and self.v.is_contiguous()
        if self.k.ndim != 4 or self.k.shape != self.v.shape or not one_layout:
            raise LayoutError(
                "packed keys and values must be contiguous and share one shape [B, heads, S, d], "
                f"found {list(self.k.shape)} and {list(self.v.shape)}"
            )
        heads, dim = self.k.shape[:2], self.k.shape[3:]
        if self.k_mean.shape[:2] != heads or self.k_mean.shape[3:] != dim:
            raise LayoutError(
                f"block means of keys {list(self.k.shape)} must be [B, heads, kv_blocks, d], "
                f"found {list(self.k_mean.shape)}"
            )


def pack_tokens(tokens: Tensor, layout: TokenLayout) -> Tensor:
    """From token order to packed order: [..., S, d] to the same shape, contiguous.

    Raises:
        LayoutError: ``tokens`` does not fit ``layout``.
    """
    layout.check(tokens)
    views = tokens.unflatten(-2, (layout.num_views, layout.tokens_per_view))
    special, patches = views.tensor_split([layout.num_special], dim=-2)
    return torch.cat([patches.flatten(-3, -2), special.flatten(-3, -2)], dim=-2)


def pack_keys(k: Tensor, v: Tensor, layout: TokenLayout, block_size_kv: int) -> PackedKeys:
    """Pack keys and values and average the keys of every patch block.

    Args:
        k, v: [B, heads, S, d] in token order.

    Raises:
        LayoutError: a shape does not fit.
        ConfigError: ``block_size_kv`` is below 1.
    """
    packed = pack_tokens(k, layout)
    return PackedKeys(
        k=packed,
        v=pack_tokens(v, layout),
        k_mean=pool_blocks(packed[..., : layout.num_patch_tokens, :], block_size_kv),
    )


def pool_queries(q: Tensor, layout: TokenLayout, block_size_q: int) -> Tensor:
    """Means over the patch blocks of ``q`` [B, heads, S, d]: [B, heads, q_blocks, d], fp32 or 64.

    Raises:
        LayoutError: ``q`` does not fit ``layout``.
        ConfigError: ``block_size_q`` is below 1.
    """
    layout.check(q)
    patches = layout.num_patch_tokens
    # Some heads at a time: a copy of all would be too large for memory that is used again.
    at_once = max(1, POOLED_AT_ONCE // (len(q) * q.shape[2] * q.shape[3]))
    packed = (pack_tokens(heads, layout)[..., :patches, :] for heads in q.split(at_once, dim=1))
    return torch.cat([pool_blocks(heads, block_size_q) for heads in packed], dim=1)
