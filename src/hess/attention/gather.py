"""Backend for CPUs where ``native`` cannot run: torch's attention over copies of selected keys.

The work is cut into pieces, some query blocks of one head each, which see equally many keys and so
share one call. Threads take pieces from one list, heads with most blocks first, so that no head
waits for another and what is taken last is small. A piece is computed in one thread, so the result
does not depend on how many there are. In half precision, scores and sums are fp32.
"""

import functools
import itertools
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hess.attention.block_mask import BlockMask
from hess.attention.layout import TokenLayout
from hess.attention.threads import in_threads
from hess.errors import BackendUnavailableError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

DENSE_QUERIES = 256
"""Queries in a piece that see all keys."""

SPARSE_KEYS = 2**14
"""Keys from which on no query block is added to a piece: copies shall stay in the cache."""


class _Piece(NamedTuple):
    """Queries of one head, in ``num_rows`` equal rows.

    Args:
        head: ``b * num_heads + h``.
        queries: tokens of the queries, row after row: int64.
        blocks: key blocks of each row, row after row: int32; None: all keys.
        num_patches: in the blocks of a row; a partial last block has fewer than others.
    """

    head: int
    queries: Tensor
    num_rows: int
    blocks: Tensor | None
    num_patches: int


def why_unavailable(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why this backend cannot compute these tensors [B, heads, S, d]; None if it can."""
    if any(x.device.type != "cpu" for x in (q, k, v)):
        return f"it needs tensors on the CPU, found {q.device}"
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"it needs q, k, v of one type in {DTYPES}, found {q.dtype}, {k.dtype}, {v.dtype}"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "it has no backward pass; run under torch.no_grad()"
    return None


def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    layout: TokenLayout,
    block_size_q: int,
    block_size_kv: int,
) -> Tensor:
    """Block-sparse attention in ``torch.get_num_threads()`` threads; see ``reference``.

    Args:
        q, k, v: [B, heads, S, d] in the order of ``layout``.

    Returns:
        [B, heads, S, d], a view of [B, S, heads, d]: merging the heads copies nothing. The same
        bits for any number of threads.

    Raises:
        BackendUnavailableError: :func:`why_unavailable` gives a reason.
    """
    reason = why_unavailable(q, k, v)
    if reason is not None:
        raise BackendUnavailableError(f"the gather backend cannot run here: {reason}")
    batch, heads, tokens, dim = q.shape
    out = q.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    pieces = deque(_pieces(mask, layout, block_size_q, block_size_kv))

    # The copies of some heads only, for heads are taken one after the other.
    @functools.lru_cache(max(2, torch.get_num_threads()))
    def keys_and_values(head: int) -> tuple[Tensor, Tensor]:
        place = divmod(head, heads)
        return _pack(k[place], layout, block_size_kv), _pack(v[place], layout, block_size_kv)

    def compute_pieces() -> None:
        # Gradients are switched off per thread. ``out`` may be an inference tensor.
        with torch.inference_mode():
            while pieces:
                try:
                    piece = pieces.popleft()
                except IndexError:  # another thread was quicker
                    return
                place = divmod(piece.head, heads)
                queries = q[place].index_select(0, piece.queries)
                packed = keys_and_values(piece.head)
                keys, values = (_copy(x, piece, layout, block_size_kv) for x in packed)
                result = _attend(queries, keys, values, piece.num_rows)
                out[place].index_copy_(0, piece.queries, result.to(out.dtype))

    in_threads(compute_pieces)
    return out


def _pieces(
    mask: BlockMask, layout: TokenLayout, block_size_q: int, block_size_kv: int
) -> Iterator[_Piece]:
    """Heads with most blocks first, in a head the queries that see all keys first."""
    query_blocks = layout.patch_index.split(block_size_q)
    ends = list(itertools.pairwise(mask.row_offsets.tolist()))
    tail_gap = -layout.num_patch_tokens % block_size_kv
    patches = (mask.counts * block_size_kv - mask.selects_last * tail_gap).flatten(0, 1).tolist()
    for head in mask.head_order.tolist():
        first_row = head * mask.num_q_blocks
        dense = [layout.special_index]
        alike: dict[tuple[int, int], list[int]] = {}
        for i, (queries, num_patches) in enumerate(zip(query_blocks, patches[head], strict=True)):
            if num_patches == layout.num_patch_tokens:
                dense.append(queries)
            else:
                alike.setdefault((len(queries), num_patches), []).append(i)
        for queries in torch.cat(dense).split(DENSE_QUERIES):
            if len(queries) > 0:
                yield _Piece(head, queries, 1, None, layout.num_patch_tokens)
        for (_, num_patches), rows in alike.items():
            at_once = 1 + SPARSE_KEYS // (layout.num_special_tokens + num_patches)
            for some in (rows[i : i + at_once] for i in range(0, len(rows), at_once)):
                lists = [mask.indices[slice(*ends[first_row + i])] for i in some]
                queries = torch.cat([query_blocks[i] for i in some])
                yield _Piece(head, queries, len(some), torch.cat(lists), num_patches)


def _pack(tokens: Tensor, layout: TokenLayout, block_size: int) -> Tensor:
    """Keys or values [S, d] so that a block is one long read: special tokens, patches, zeros up to
    a whole block."""
    special, patches = layout.num_special_tokens, layout.num_patch_tokens
    padding = -patches % block_size
    packed = tokens.new_empty(layout.num_tokens + padding, tokens.shape[1])
    views = tokens.unflatten(0, (layout.num_views, layout.tokens_per_view))
    parts = packed.split([special, patches, padding])
    parts[0].unflatten(0, (layout.num_views, -1)).copy_(views[:, : layout.num_special])
    parts[1].unflatten(0, (layout.num_views, -1)).copy_(views[:, layout.num_special :])
    parts[2].zero_()
    return packed


def _copy(packed: Tensor, piece: _Piece, layout: TokenLayout, block_size: int) -> Tensor:
    """What the rows of a piece see of packed keys or values: [num_rows, keys, d]."""
    if piece.blocks is None:
        return packed[None, : layout.num_tokens]
    dim = packed.shape[1]
    special, patches = packed.tensor_split([layout.num_special_tokens])
    listed = patches.view(-1, block_size * dim).index_select(0, piece.blocks)
    # A partial last block is the end of what a row sees, so it can be cut off.
    listed = listed.view(piece.num_rows, -1, dim)[:, : piece.num_patches]
    return torch.cat([special.expand(piece.num_rows, -1, -1), listed], dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, num_rows: int) -> Tensor:
    """Each of the equal rows of ``q`` [queries, d] to its own of k, v [num_rows, keys, d]:
    [queries, d] in fp32 or fp64."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = q.view(num_rows, 1, -1, q.shape[1])
    rows, k, v = (x.to(dtype) for x in (rows, k[:, None], v[:, None]))
    return F.scaled_dot_product_attention(rows, k, v).flatten(0, 2)
