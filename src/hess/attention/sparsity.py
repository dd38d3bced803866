"""Three measures of what a block mask drops. They differ; never call one just "sparsity"."""

import torch
from torch import Tensor

from hess.attention.block_mask import BlockMask
from hess.attention.layout import TokenLayout
from hess.attention.pooling import num_blocks


def block_sparsity(mask: BlockMask, layout: TokenLayout, block_size_kv: int) -> Tensor:
    """Dropped share of the block map of the patch queries, as the tables of the paper count.

    The special keys stand in the map as ``ceil(special tokens / block_size_kv)`` more key blocks,
    all kept. Partial blocks count as full.

    Returns:
        float64 [B, heads] in [0, 1).
    """
    special_blocks = num_blocks(layout.num_special_tokens, block_size_kv)
    total = mask.num_q_blocks * (mask.num_kv_blocks + special_blocks)
    dropped = mask.num_q_blocks * mask.num_kv_blocks - mask.counts.sum(-1)
    return dropped.double() / total


def flop_saving(
    mask: BlockMask, layout: TokenLayout, block_size_q: int, block_size_kv: int
) -> Tensor:
    """Dropped share of all query-key products of the attention, special tokens included.

    Partial blocks count with the tokens they have.

    Returns:
        float64 [B, heads] in [0, 1).
    """
    patches = layout.num_patch_tokens
    tail_gap = mask.num_kv_blocks * block_size_kv - patches
    kept_keys = mask.counts * block_size_kv - mask.selects_last * tail_gap
    queries = torch.full_like(mask.counts[0, 0], block_size_q)
    queries[-1] -= mask.num_q_blocks * block_size_q - patches
    dropped = ((patches - kept_keys) * queries).sum(-1)
    return dropped.double() / layout.num_tokens**2


def work_saving(
    mask: BlockMask, layout: TokenLayout, block_size_q: int, block_size_kv: int
) -> Tensor:
    """Dropped share of the tiles of the whole attention: what a kernel that works by tiles saves.

    Special tokens stand as ``ceil(special tokens / block size)`` more rows and columns of the map,
    all kept. Partial blocks count as full.

    Returns:
        float64 [B, heads] in [0, 1).
    """
    special = layout.num_special_tokens
    rows = mask.num_q_blocks + num_blocks(special, block_size_q)
    columns = mask.num_kv_blocks + num_blocks(special, block_size_kv)
    dropped = mask.num_q_blocks * mask.num_kv_blocks - mask.counts.sum(-1)
    return dropped.double() / (rows * columns)
