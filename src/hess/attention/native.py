"""Backend for CPUs: a kernel in C that attends to blocks of keys where they lie.

How dropped blocks become saved time:

- Nothing is copied, no score is written to memory; see ``native_attention.c``.
- Threads take tasks, a query block of one head each, from one list, heads with most blocks first.
  No head waits for another, and what is taken last is small. A task is computed in one thread, so
  the result does not depend on how many there are.
- In half precision, scores and sums are fp32. Processors that multiply bfloat16 do so, elsewhere
  half types are widened.
"""

import ctypes
import math

import torch
from torch import Tensor

from hess.attention.block_mask import BlockMask
from hess.attention.layout import TokenLayout
from hess.attention.native_library import load_library, why_no_library
from hess.attention.threads import in_threads
from hess.errors import BackendUnavailableError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHANNELS = 8
"""head_dim must be a multiple of this."""

COPIED_BYTES = 2**25
"""Heads that have to be copied are computed in groups of about this size, at least one head per
thread."""


class _Tensor(ctypes.Structure):
    _fields_ = (("heads", ctypes.POINTER(ctypes.c_void_p)), ("token", ctypes.c_int64))

    @classmethod
    def of(cls, heads: list[Tensor]) -> "_Tensor":
        """Of heads [S, d], each of which has the numbers of a token in a row."""
        starts = (ctypes.c_void_p * len(heads))(*(x.data_ptr() for x in heads))
        return cls(starts, heads[0].element_size() * heads[0].stride(0))


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, _Tensor) for name in ("queries", "keys", "values", "out")),
        *((name, ctypes.c_void_p) for name in ("mask_heads", "row_offsets", "blocks")),
        ("next_task", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_heads", "num_rows", "dim")),
        *((name, ctypes.c_int64) for name in ("block_size_q", "block_size_kv", "num_views")),
        *((name, ctypes.c_int64) for name in ("special_per_view", "patches_per_view")),
        ("has_pairs", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


def why_unavailable(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why this backend cannot compute these tensors [B, heads, S, d]; None if it can.

    Compiles the kernel if that was not done before.
    """
    if any(x.device.type != "cpu" for x in (q, k, v)):
        return f"it needs tensors on the CPU, found {q.device}"
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"it needs q, k, v of one type in {DTYPES}, found {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[-1] % CHANNELS != 0:
        return f"it needs a head_dim that is a multiple of {CHANNELS}, found {q.shape[-1]}"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "it has no backward pass; run under torch.no_grad()"
    return why_no_library()


def native_attention(
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
        MemoryError: there is none for the scores of a task.
    """
    reason = why_unavailable(q, k, v)
    if reason is not None:
        raise BackendUnavailableError(f"the native backend cannot run here: {reason}")
    batch, num_heads, tokens, dim = q.shape
    out = q.new_empty(batch, tokens, num_heads, dim).transpose(1, 2)
    has_pairs = q.dtype == torch.bfloat16 and bool(load_library().hess_multiplies_pairs())
    dtype = q.dtype if has_pairs else torch.float32
    copies = sum(x.dtype != dtype or not x[0, 0].is_contiguous() for x in (q, k, v))
    at_once = batch * num_heads
    if copies > 0:
        fit = COPIED_BYTES // (copies * tokens * dim * dtype.itemsize)
        at_once = max(torch.get_num_threads(), fit)
    for group in mask.head_order.split(at_once):
        places = [divmod(head, num_heads) for head in group.tolist()]
        # With all numbers of a head in a row: those of heads that lie between each other are too
        # far apart for the cache.
        inputs = [[x[place].to(dtype).contiguous() for place in places] for x in (q, k, v)]
        outputs = [out[place] for place in places]
        is_wide = out.dtype == torch.float32
        wide = outputs if is_wide else [torch.empty(tokens, dim) for _ in places]
        _attend(inputs, wide, group, mask, layout, block_size_q, block_size_kv)
        if not is_wide:
            for narrow, result in zip(outputs, wide, strict=True):
                narrow.copy_(result)
    return out


def _attend(
    inputs: list[list[Tensor]],
    out: list[Tensor],
    mask_heads: Tensor,
    mask: BlockMask,
    layout: TokenLayout,
    block_size_q: int,
    block_size_kv: int,
) -> None:
    """Queries, keys and values [S, d] of some heads, ``mask_heads`` of the mask, into ``out``."""
    attend = load_library().hess_attend
    row_offsets, blocks = mask.row_offsets.contiguous(), mask.indices.contiguous()
    next_task = torch.zeros(1, dtype=torch.int64)
    queries, keys, values = map(_Tensor.of, inputs)
    dim = out[0].shape[-1]
    work = _Attention(
        queries=queries,
        keys=keys,
        values=values,
        out=_Tensor.of(out),
        mask_heads=mask_heads.data_ptr(),
        row_offsets=row_offsets.data_ptr(),
        blocks=blocks.data_ptr(),
        next_task=next_task.data_ptr(),
        num_heads=len(out),
        num_rows=mask.num_q_blocks,
        dim=dim,
        block_size_q=block_size_q,
        block_size_kv=block_size_kv,
        num_views=layout.num_views,
        special_per_view=layout.num_special,
        patches_per_view=layout.grid_h * layout.grid_w,
        has_pairs=inputs[0][0].dtype == torch.bfloat16,
        scale=dim**-0.5 / math.log(2),
    )
    # Threads that go on after an interrupt still need all of it.
    work.kept = (inputs, out, mask_heads, row_offsets, blocks, next_task)

    def do_tasks() -> None:
        if attend(ctypes.byref(work)) != 0:
            raise MemoryError("no memory for the scores of a task")

    in_threads(do_tasks)
