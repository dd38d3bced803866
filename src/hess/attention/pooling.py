"""A cheap estimate of the attention map: softmax over block-averaged queries and keys."""

import torch
from torch import Tensor

from hess.attention.layout import TokenLayout
from hess.errors import ConfigError


def num_blocks(num_tokens: int, block_size: int) -> int:
    """Blocks that cover ``num_tokens``; the last one may be partial.

    Raises:
        ConfigError: ``block_size`` is below 1.
    """
    if block_size < 1:
        raise ConfigError(f"a block size must be at least 1 token, found {block_size}")
    return -(-num_tokens // block_size)


def pool_blocks(tokens: Tensor, block_size: int) -> Tensor:
    """Average every ``block_size`` consecutive tokens; the last block averages what it has.

    Args:
        tokens: [..., T, d].

    Returns:
        [..., ceil(T / block_size), d] in fp32, or fp64 if the input is.
    """
    blocks = num_blocks(tokens.shape[-2], block_size)
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    full = tokens.shape[-2] // block_size
    head, tail = tokens.tensor_split([full * block_size], dim=-2)
    pooled = head.unflatten(-2, (full, block_size)).mean(-2, dtype=dtype)
    if blocks > full:
        pooled = torch.cat([pooled, tail.mean(-2, keepdim=True, dtype=dtype)], dim=-2)
    return pooled


def block_probs(
    q: Tensor, k: Tensor, layout: TokenLayout, block_size_q: int, block_size_kv: int
) -> Tensor:
    """Estimated attention between blocks of patch tokens, as SparseVGGT does (arXiv 2509.07120).

    ``softmax(mean(q) mean(k)^T / sqrt(d))``, means over blocks of consecutive patches in view
    order, row-major. Blocks do not stop at view borders. Special tokens take no part.

    Args:
        q, k: [B, heads, S, d] in the order of ``layout``, after QK-norm and rotary positions.

    Returns:
        [B, heads, q_blocks, kv_blocks], rows sum to 1, in fp32, or fp64 if the input is.

    Raises:
        LayoutError: ``q`` or ``k`` does not fit ``layout``.
        ConfigError: a block size is below 1.
    """
    layout.check(q)
    layout.check(k)
    patches = layout.patch_index.to(q.device)
    q_mean = pool_blocks(q.index_select(-2, patches), block_size_q)
    k_mean = pool_blocks(k.index_select(-2, patches), block_size_kv)
    # Autocast would bring this product back to half precision.
    with torch.autocast(q.device.type, enabled=False):
        scores = q_mean @ k_mean.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.softmax(-1)
