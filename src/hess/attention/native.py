"""Backend for CPUs: a kernel in C that attends to blocks of keys where they lie.

How dropped blocks become saved time:

- Nothing is copied, no score is written to memory; see ``native_attention.c``.
- Threads take tasks, a query block of one head each, from one list, heads with most blocks first.
  No head waits for another, and what is taken last is small. A task is computed in one thread, so
  the result does not depend on how many there are.
- In half precision, scores and sums are fp32. Processors that multiply bfloat16 do so, elsewhere
  half types are widened, some heads at a time.
"""

import ctypes
import math

import torch
from torch import Tensor

from hess.attention.block_mask import BlockMask
from hess.attention.layout import TokenLayout
from hess.attention.native_library import load_library, run, why_no_library
from hess.errors import BackendUnavailableError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHANNELS = 8
"""head_dim must be a multiple of this."""

COPIED_BYTES = 2**26
"""Heads that have to be copied are computed in groups of about this size."""

Place = tuple[int, int]
"""Batch element and head."""

Heads = tuple[Tensor, list[Place]]
"""Some heads of a tensor [B, heads, S, d]."""


class _Tensor(ctypes.Structure):
    _fields_ = (("heads", ctypes.POINTER(ctypes.c_void_p)), ("token", ctypes.c_int64))

    @classmethod
    def of(cls, x: Tensor, places: list[Place]) -> "_Tensor":
        """Some heads of [B, heads, S, d], in which the numbers of a token lie in a row."""
        batch, head, token = (x.element_size() * stride for stride in x.stride()[:3])
        starts = [x.data_ptr() + b * batch + h * head for b, h in places]
        return cls((ctypes.c_void_p * len(starts))(*starts), token)


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, _Tensor) for name in ("queries", "keys", "values", "out")),
        *((name, ctypes.c_void_p) for name in ("mask_heads", "row_offsets", "blocks")),
        ("next", ctypes.c_void_p),
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
    if any(type(x) is not Tensor for x in (q, k, v)) or torch.compiler.is_compiling():
        return f"it needs plain tensors, found {type(q).__name__}, or is being traced"
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
    row_offsets, blocks = mask.row_offsets.contiguous(), mask.indices.contiguous()
    lists = {
        "row_offsets": row_offsets.data_ptr(),
        "blocks": blocks.data_ptr(),
        "num_rows": mask.num_q_blocks,
        "block_size_q": block_size_q,
        "block_size_kv": block_size_kv,
        "num_views": layout.num_views,
        "special_per_view": layout.num_special,
        "patches_per_view": layout.grid_h * layout.grid_w,
    }
    return _attend(q, k, v, mask.head_order, lists, kept=(row_offsets, blocks))


def native_dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same kernel where every query sees every key: all tokens are special then.

    Args, returns and raises as :func:`native_attention`.
    """
    lists = {"num_views": 1, "special_per_view": q.shape[2]}
    return _attend(q, k, v, torch.arange(q.shape[0] * q.shape[1]), lists)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_order: Tensor,
    lists: dict[str, int],
    kept: tuple[Tensor, ...] = (),
) -> Tensor:
    """Attention in the order of heads, with ``lists`` for the kernel that point into ``kept``."""
    reason = why_unavailable(q, k, v)
    if reason is not None:
        raise BackendUnavailableError(f"the native backend cannot run here: {reason}")
    batch, num_heads, tokens, dim = q.shape
    out = q.new_empty(batch, tokens, num_heads, dim).transpose(1, 2)
    has_pairs = q.dtype == torch.bfloat16 and bool(load_library().hess_multiplies_pairs())
    dtype = q.dtype if has_pairs else torch.float32
    copies = sum(not _is_readable(x, dtype) for x in (q, k, v)) + (out.dtype != dtype)
    at_once = batch * num_heads
    if copies > 0:
        at_once = max(1, COPIED_BYTES // (copies * tokens * dim * dtype.itemsize))
    for group in head_order.split(at_once):
        places = [divmod(head, num_heads) for head in group.tolist()]
        heads = [_readable(x, places, dtype) for x in (q, k, v)]
        is_direct = out.dtype == dtype
        heads.append((out, places) if is_direct else _alone(torch.empty(len(places), tokens, dim)))
        queries, keys, values, results = (_Tensor.of(*some) for some in heads)
        work = _Attention(
            queries=queries,
            keys=keys,
            values=values,
            out=results,
            mask_heads=group.data_ptr(),
            num_heads=len(places),
            dim=dim,
            has_pairs=has_pairs,
            scale=dim**-0.5 / math.log(2),
            **lists,
        )
        run("hess_attend", work, kept=(heads, group, kept))
        if not is_direct:
            for place, result in zip(places, heads[-1][0][0], strict=True):
                out[place].copy_(result)
    return out


def _is_readable(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel may read [B, heads, S, d] where it is: in this type, with all numbers of
    a head in a row. Those of heads that lie between each other are too far apart for the cache."""
    return x.dtype == dtype and x.stride()[2:] == (x.shape[3], 1)


def _readable(x: Tensor, places: list[Place], dtype: torch.dtype) -> Heads:
    """Some heads of [B, heads, S, d] where they are, or a copy of them."""
    if _is_readable(x, dtype):
        return x, places
    return _alone(torch.stack([x[place].to(dtype) for place in places]))


def _alone(x: Tensor) -> Heads:
    """All heads of [heads, S, d]."""
    return x[None], [(0, i) for i in range(len(x))]
