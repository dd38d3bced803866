"""Backend for CPUs: every query block attends densely to a copy of the keys it selects.

How dropped blocks become saved time:

- The work is cut into pieces, some query blocks of one head each. Threads take pieces from one
  list, heads with most blocks first, so that no head waits for another and what is taken last is
  small. A piece is computed in one thread, so the result does not depend on how many there are.
- Large query blocks are attended to by matrix products where these are quicker (see
  ``products``); others with equally many keys share one call of torch's attention.
- Only one thread can run Python at a time. So there are few calls to torch, and each takes long.
- In half precision, scores and sums are fp32.
"""

import functools
from collections import deque

import torch
import torch.nn.functional as F
from torch import Tensor

from hess.attention.block_mask import BlockMask
from hess.attention.cpu_keys import HeadKeys, Row
from hess.attention.cpu_pieces import Piece, Work
from hess.attention.layout import TokenLayout
from hess.attention.products import attend_by_products, has_products
from hess.attention.threads import in_threads
from hess.errors import BackendUnavailableError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def why_unavailable(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why this backend cannot compute these tensors [B, heads, S, d]; None if it can."""
    if any(x.device.type != "cpu" for x in (q, k, v)):
        return f"it needs tensors on the CPU, found {q.device}"
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"it needs q, k, v of one type in {DTYPES}, found {q.dtype}, {k.dtype}, {v.dtype}"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "it has no backward pass; run under torch.no_grad()"
    return None


def cpu_attention(
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
        raise BackendUnavailableError(f"the cpu backend cannot run here: {reason}")
    batch, heads, tokens, dim = q.shape
    out = q.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    q_heads = q.flatten(0, 1)
    out_heads = [out[b, h] for b in range(batch) for h in range(heads)]
    sizes = block_size_q, block_size_kv, dim
    work = Work(mask, layout, *sizes, has_large=has_products(q.dtype))
    pieces = deque(work.pieces())
    k_heads, v_heads = k.flatten(0, 1), v.flatten(0, 1)

    # The copies of some heads only, for heads are taken one after the other.
    @functools.lru_cache(max(2, torch.get_num_threads()))
    def keys_of(head: int) -> HeadKeys:
        return HeadKeys.of(k_heads[head], v_heads[head], layout, block_size_kv)

    def compute_pieces() -> None:
        # Gradients are switched off per thread. ``out`` may be an inference tensor.
        with torch.inference_mode():
            while pieces:
                try:
                    piece = pieces.popleft()
                except IndexError:  # another thread was quicker
                    return
                i = piece.head
                result = _attend(piece, work, q_heads[i], keys_of(i))
                out_heads[i].index_copy_(0, piece.queries, result.to(out.dtype))

    in_threads(compute_pieces)
    return out


def _attend(piece: Piece, work: Work, q: Tensor, keys: HeadKeys) -> Tensor:
    """Outputs of a piece, [queries, d] in fp32 or fp64, of one head with queries [S, d]."""
    q = q.index_select(0, piece.queries)
    if piece.is_large:
        rows = [Row(keys, work.blocks(row), work.num_patches(row)) for row in piece.rows]
        return attend_by_products(q, piece.sizes, rows or [keys.every_key()])
    if not piece.rows:
        return _attend_by_torch(q, *keys.every_key().whole(), num_rows=1)
    blocks = torch.cat([work.blocks(row) for row in piece.rows])
    num_rows = len(piece.rows)
    copies = keys.copy_rows(blocks, num_rows, work.num_patches(piece.rows[0]))
    return _attend_by_torch(q, *copies, num_rows=num_rows)


def _attend_by_torch(q: Tensor, k: Tensor, v: Tensor, *, num_rows: int) -> Tensor:
    """Dense attention within each of ``num_rows`` equal parts of [queries, d] and [keys, d]."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.view(num_rows, 1, -1, x.shape[-1]).to(dtype) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).flatten(0, 2)
