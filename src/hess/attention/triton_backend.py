"""Backend for NVIDIA GPUs: packs the keys, then one launch attends all heads over their lists.

How the kernel turns dropped blocks into saved time:

- Lists are used as the mask has them; special keys follow every list and special queries read a
  list of all blocks, so nothing is appended, padded or copied per row.
- The hardware starts programs in launch order, so that order balances the load: the dense rows
  of special queries first, then heads from most to fewest blocks. Rows of one head stay together
  and lists ascend, which keeps its keys in the L2 cache.
- Queries are read from token order and outputs written to it; keys are packed once (see
  ``packing``).
- Heads that keep every block go to the dense kernel, on a stream beside.
"""

import functools
import math
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hess.attention.block_mask import BlockMask
from hess.attention.dense import dense_attention
from hess.attention.layout import TokenLayout
from hess.attention.packing import PackedKeys
from hess.attention.pooling import num_blocks
from hess.attention.triton_packing import (
    layout_arguments,
    pack_keys,
    power_of_two,
    rows_in_one_piece,
)
from hess.errors import BackendUnavailableError

HEAD_DIMS = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIN_CAPABILITY = (8, 0)

Kernel = Any
"""A function under triton.jit or triton.autotune, which have no types."""


class LaunchConfig(NamedTuple):
    """How a kernel is cut: keys per tile, warps per program, stages of the load pipeline."""

    tile_kv: int
    num_warps: int
    num_stages: int


def launch_configs(
    capability: tuple[int, int], dtype: torch.dtype, dim: int
) -> list[LaunchConfig]:
    """The cuts worth trying with tiles of :func:`query_tile` queries on a GPU of a capability.

    All keep their state in registers and fit the shared memory; other cuts were found to spill.
    """
    if dtype == torch.float32:
        return [LaunchConfig(32, 8, 2)]
    hopper = capability[0] == 9
    if dim <= 32:
        cuts = [(64, 4), (128, 8)] if hopper else [(32, 4), (64, 4)]
    elif dim == 64:
        cuts = [(64, 4), (64, 8), (128, 8)] if hopper else [(32, 4), (64, 8)]
    else:
        cuts = [(64, 8), (128, 8)] if hopper else [(32, 8), (64, 8)]
    return [LaunchConfig(tile_kv, num_warps, 3) for tile_kv, num_warps in cuts]


def query_tile(block_size_q: int, dtype: torch.dtype, dim: int) -> int:
    """Queries that one program takes: a power of two, and no more than the registers hold."""
    largest = 128 if dtype != torch.float32 else 16 if dim == 128 else 64
    return min(max(16, power_of_two(block_size_q)), largest)


def why_unavailable(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why this backend cannot compute these tensors [B, heads, S, d] here; None if it can."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    interpreted = _kernels_are_interpreted()
    if not q.is_cuda and not interpreted:
        return f"it needs tensors on a CUDA device, found {q.device}"
    if q.is_cuda and torch.version.hip is not None:
        return "it needs an NVIDIA GPU, found a ROCm build of torch"
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < MIN_CAPABILITY:
        found = torch.cuda.get_device_capability(q.device)
        return f"it needs compute capability {MIN_CAPABILITY} or above, found {found}"
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"it needs q, k, v of one type in {DTYPES}, found {q.dtype}, {k.dtype}, {v.dtype}"
    if interpreted and q.dtype == torch.bfloat16:
        return "Triton's interpreter computes products in bfloat16 wrongly; use float16 or float32"
    if q.shape[-1] not in HEAD_DIMS:
        return f"it needs a head dimension in {HEAD_DIMS}, found {q.shape[-1]}"
    if q.shape[-2] * q.shape[-1] >= 2**31:
        return f"it counts the elements of a head in 31 bits, found {q.shape[-2]} tokens"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "it has no backward pass; run under torch.no_grad()"
    return None


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    layout: TokenLayout,
    block_size_q: int,
    block_size_kv: int,
) -> Tensor:
    """Block-sparse attention in Triton; see ``reference`` for what it computes.

    Waits for the device once, to learn how many heads are full, unless the mask knows the blocks
    of its heads, as it does if a ratio alone set the budgets.

    Args:
        q, k, v: [B, heads, S, d] in the order of ``layout``.

    Returns:
        [B, heads, S, d], a view of [B, S, heads, d]: merging the heads copies nothing.

    Raises:
        BackendUnavailableError: :func:`why_unavailable` gives a reason.
    """
    reason = why_unavailable(q, k, v)
    if reason is not None:
        raise BackendUnavailableError(f"the triton backend cannot run here: {reason}")
    num_full = int((mask.head_blocks == mask.num_q_blocks * mask.num_kv_blocks).sum())
    full, listed = mask.head_order.to(q.device, non_blocking=True).tensor_split([num_full])
    out = _empty_output(q)
    side = _side_stream(q.device) if q.is_cuda and num_full > 0 else None
    if side is not None:
        side.wait_stream(torch.cuda.current_stream(q.device))
    if num_full > 0:
        with nullcontext() if side is None else torch.cuda.stream(side):
            where = full // mask.num_heads, full % mask.num_heads
            out[where] = dense_attention(*(x[where][None] for x in (q, k, v)))[0]
    if len(listed) > 0:
        keys = pack_keys(k, v, layout, block_size_kv)
        attend_lists(q, keys, mask, layout, block_size_q, block_size_kv, heads=listed, out=out)
    if side is not None:
        torch.cuda.current_stream(q.device).wait_stream(side)
    return out


def attend_lists(
    q: Tensor,
    keys: PackedKeys,
    mask: BlockMask,
    layout: TokenLayout,
    block_size_q: int,
    block_size_kv: int,
    *,
    heads: Tensor | None = None,
    out: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend the heads in one launch, full ones too.

    Args:
        q: [B, heads, S, d] in token order.
        keys: from :func:`pack_keys`.
        heads: int64 [n], which heads ``b * num_heads + h`` to compute, in order of launch; None:
            all, those with most blocks first.
        out: [B, heads, S, d] to write into; None: a new tensor, a view of [B, S, heads, d].
        config: how to cut the work; None: the quickest of :func:`launch_configs`, measured on
            the first call with new types and block sizes (seconds) and kept on disk by Triton.

    Returns:
        ``out``, and the log-sum-exp of the scores, fp32 [B, heads, S] in token order; of the
        heads that were not asked for, both are as they were, or undefined.
    """
    if heads is None:
        heads = mask.head_order.to(q.device, non_blocking=True)
    q = rows_in_one_piece(q)
    out = _empty_output(q) if out is None else out
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    tile_q = query_tile(block_size_q, q.dtype, q.shape[-1])
    tiles = num_blocks(layout.num_special_tokens, tile_q)
    tiles += mask.num_q_blocks * num_blocks(block_size_q, tile_q)
    configs = (config,) if config is not None else _configs_here(q)
    with torch.cuda.device_of(q):
        _attention_kernel(configs)[(len(heads) * tiles,)](
            q_ptr=q,
            k_ptr=keys.k,
            v_ptr=keys.v,
            out_ptr=out,
            lse_ptr=lse,
            row_offsets_ptr=mask.row_offsets,
            indices_ptr=mask.indices,
            every_block_ptr=torch.arange(mask.num_kv_blocks, dtype=torch.int32, device=q.device),
            heads_ptr=heads,
            q_stride_b=q.stride(0),
            q_stride_h=q.stride(1),
            q_stride_t=q.stride(2),
            out_stride_b=out.stride(0),
            out_stride_h=out.stride(1),
            out_stride_t=out.stride(2),
            qk_scale=q.shape[-1] ** -0.5 / math.log(2),
            num_heads=mask.num_heads,
            num_launched_heads=len(heads),
            num_q_blocks=mask.num_q_blocks,
            num_kv_blocks=mask.num_kv_blocks,
            **layout_arguments(layout),
            HEAD_DIM=q.shape[-1],
            BLOCK_Q=block_size_q,
            BLOCK_KV=block_size_kv,
            TILE_Q=tile_q,
        )
    return out, lse


def _empty_output(q: Tensor) -> Tensor:
    batch, heads, tokens, dim = q.shape
    return q.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _kernels_are_interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when the kernels were made."""
    from triton.runtime.interpreter import InterpretedFunction

    from hess.attention.triton_kernels import attention_kernel

    return isinstance(attention_kernel, InterpretedFunction)


def _configs_here(q: Tensor) -> tuple[LaunchConfig, ...]:
    if not q.is_cuda:  # interpreted: one is as good as another
        return (LaunchConfig(64, 4, 2),)
    capability = torch.cuda.get_device_capability(q.device)
    return tuple(launch_configs(capability, q.dtype, q.shape[-1]))


@functools.cache
def _attention_kernel(configs: tuple[LaunchConfig, ...]) -> Kernel:
    """The kernel that picks the quickest of ``configs``; a single one is not measured."""
    import triton

    from hess.attention.triton_kernels import attention_kernel

    choices = [
        triton.Config({"TILE_KV": tile_kv}, num_warps=num_warps, num_stages=num_stages)
        for tile_kv, num_warps, num_stages in configs
    ]
    tune = triton.autotune(choices, key=["HEAD_DIM", "BLOCK_Q", "BLOCK_KV"], cache_results=True)
    return tune(attention_kernel)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device: memory that the allocator keeps for a stream serves no other."""
    return torch.cuda.Stream(device)
