"""The specification of block-sparse attention: an explicit mask over all pairs of tokens."""

import torch
from torch import Tensor

from hess.attention.block_mask import BlockMask
from hess.attention.layout import TokenLayout


def token_mask(
    mask: BlockMask, layout: TokenLayout, block_size_q: int, block_size_kv: int
) -> Tensor:
    """Which key every query sees: bool [B, heads, S, S] in the order of ``layout``.

    Special queries see every key and special keys are seen by every query. The patch at place p
    of the patch sequence belongs to query block ``p // block_size_q`` and to key block
    ``p // block_size_kv``; it sees the keys of the blocks that its query block selects.
    """
    patches = layout.patch_index.to(mask.indices.device)
    place = torch.arange(layout.num_patch_tokens, device=patches.device)
    blocks = mask.to_dense()
    sees = blocks[:, :, place // block_size_q][..., place // block_size_kv]
    tokens = layout.num_tokens
    visible = torch.ones(
        mask.batch, mask.num_heads, tokens, tokens, dtype=torch.bool, device=patches.device
    )
    visible[:, :, patches[:, None], patches] = sees
    return visible


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    layout: TokenLayout,
    block_size_q: int,
    block_size_kv: int,
) -> Tensor:
    """Masked softmax attention, computed in fp32 (fp64 for fp64 input).

    Args:
        q, k, v: [B, heads, S, d] in the order of ``layout``.

    Returns:
        [B, heads, S, d] in the type of ``q``.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    visible = token_mask(mask, layout, block_size_q, block_size_kv)
    with torch.autocast(q.device.type, enabled=False):
        scores = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return (weights @ v.to(dtype)).to(q.dtype)
