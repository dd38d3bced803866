"""Backend that skips the work: dense attention over gathered key blocks, in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hess.attention.block_mask import BlockMask
from hess.attention.layout import TokenLayout

MAX_GATHERED_KEYS = 16384
"""Keys gathered at once: rows with equally many keys share a call as long as this is not passed,
so that a copy stays in the cache until it is used."""


def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    layout: TokenLayout,
    block_size_q: int,
    block_size_kv: int,
) -> Tensor:
    """Block-sparse attention whose cost follows the selected blocks; see ``reference``.

    Head by head: a head that selects everything is one dense call. In the others the special
    queries are one dense call, and query blocks with equally many keys are attended to together,
    each over a copy of its own keys.

    Args:
        q, k, v: [B, heads, S, d] in the order of ``layout``.

    Returns:
        [B, heads, S, d].
    """
    patches = layout.patch_index.to(q.device)
    special = layout.special_index.to(q.device)
    keeps_all = (mask.counts == mask.num_kv_blocks).flatten(2).all(-1)
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=v.dtype, device=v.device)
    for b in range(mask.batch):
        for h in range(mask.num_heads):
            head = q[b, h], k[b, h], v[b, h]
            if keeps_all[b, h]:
                out[b, h] = _attend(*head)
                continue
            out[b, h, special] = _attend(head[0][special], head[1], head[2])
            for rows, keys in _row_groups(mask, b, h, patches, special, block_size_kv):
                place = rows[:, None] * block_size_q + torch.arange(block_size_q, device=q.device)
                real = place < len(patches)
                queries = patches[place.clamp(max=len(patches) - 1)]
                result = _attend(head[0][queries], *(_take(x, keys) for x in head[1:]))
                out[b, h, queries[real]] = result[real]
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention of one head: [..., Sq, d], [..., Sk, d], [..., Sk, d] to [..., Sq, d]."""
    shape = q.shape[:-1]
    q, k, v = (x.reshape(-1, 1, *x.shape[-2:]) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).reshape(*shape, v.shape[-1])


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """``tokens[index]`` for [S, d] and [rows, n]; index_select copies whole rows at a time."""
    return tokens.index_select(0, index.flatten()).view(*index.shape, -1)


def _row_groups(
    mask: BlockMask, b: int, h: int, patches: Tensor, special: Tensor, block_size_kv: int
) -> list[tuple[Tensor, Tensor]]:
    """Query blocks of one head, grouped so that all in a group see equally many keys.

    Returns:
        Pairs of query blocks, int64 [rows], and the positions of the keys they see, special
        tokens last, int64 [rows, keys].
    """
    device = patches.device
    counts, selects_last = mask.counts[b, h], mask.selects_last[b, h]
    starts = mask.row_offsets[:-1].view(mask.shape[:3])[b, h]
    tail_gap = mask.num_kv_blocks * block_size_kv - len(patches)
    in_block = torch.arange(block_size_kv, device=device)
    groups = []
    # A partial last block makes a row shorter; being last in the list, it is cut off at the end.
    kind = 2 * counts + selects_last
    for value in kind.unique().tolist():
        count, last = divmod(value, 2)
        num_keys = count * block_size_kv - last * tail_gap
        rows_at_once = max(1, MAX_GATHERED_KEYS // max(1, num_keys + len(special)))
        for rows in (kind == value).nonzero()[:, 0].split(rows_at_once):
            entries = starts[rows, None] + torch.arange(count, device=device)
            places = mask.indices[entries][..., None].long() * block_size_kv + in_block
            keys = patches[places.flatten(1)[:, :num_keys]]
            groups.append((rows, torch.cat([keys, special.expand(len(rows), -1)], dim=1)))
    return groups
