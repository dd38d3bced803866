"""Backend for short sequences: dense attention with the block mask expanded to tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hess.attention.block_mask import BlockMask
from hess.attention.layout import TokenLayout


def _block_of_token(layout: TokenLayout, block_size: int, special: int) -> Tensor:
    """Block of every token, ``special`` for special tokens: int64 [S]."""
    blocks = torch.full((layout.num_tokens,), special)
    blocks[layout.patch_index] = torch.arange(layout.num_patch_tokens) // block_size
    return blocks


def masked_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    layout: TokenLayout,
    block_size_q: int,
    block_size_kv: int,
) -> Tensor:
    """Block-sparse attention that skips no work but makes few calls; see ``reference``.

    Args:
        q, k, v: [B, heads, S, d] in the order of ``layout``.

    Returns:
        [B, heads, S, d].
    """
    # One more row and column stand for the special tokens. The mask is additive because torch
    # converts a bool mask on every call, which costs more than the attention of a small model.
    bias = torch.zeros(
        mask.batch,
        mask.num_heads,
        mask.num_q_blocks + 1,
        mask.num_kv_blocks + 1,
        dtype=q.dtype,
        device=q.device,
    )
    bias[..., :-1, :-1].masked_fill_(~mask.to_dense(), -torch.inf)
    q_block = _block_of_token(layout, block_size_q, mask.num_q_blocks).to(q.device)
    kv_block = _block_of_token(layout, block_size_kv, mask.num_kv_blocks).to(q.device)
    # Scene by scene: the expanded mask of one stays in the cache.
    outputs = []
    for scene in zip(q.split(1), k.split(1), v.split(1), bias.split(1), strict=True):
        expanded = scene[3].index_select(-1, kv_block).index_select(-2, q_block)
        outputs.append(F.scaled_dot_product_attention(*scene[:3], attn_mask=expanded))
    return torch.cat(outputs)
