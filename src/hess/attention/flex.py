"""Backend on torch's FlexAttention: another implementation of the same lists, compiled by torch.

It is the second oracle, and what runs on GPUs that the Triton backend does not know. Its index is
as wide as the whole map and its compilation takes seconds for every new layout.
"""

import functools
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
from torch.nn.attention.flex_attention import flex_attention

from hess.attention.block_mask import BlockMask
from hess.attention.layout import TokenLayout
from hess.attention.pooling import num_blocks
from hess.errors import BackendUnavailableError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_HEAD_DIM = 16


def why_unavailable(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why this backend cannot compute these tensors [B, heads, S, d] here; None if it can."""
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"it needs q, k, v of one type in {DTYPES}, found {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[-1] < MIN_HEAD_DIM:
        return f"it needs a head dimension of at least {MIN_HEAD_DIM}, found {q.shape[-1]}"
    if q.is_cuda:
        return None if find_spec("triton") else "torch.compile needs the package triton"
    if q.device.type != "cpu":
        return f"it needs tensors on a CPU or a CUDA device, found {q.device}"
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, found no {compiler!r}; install g++ or set CXX"
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return "on a CPU it needs one with AVX2"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "on a CPU it has no backward pass; run under torch.no_grad()"
    return None


def flex_block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    layout: TokenLayout,
    block_size_q: int,
    block_size_kv: int,
) -> Tensor:
    """Block-sparse attention by FlexAttention; see ``reference`` for what it computes.

    Args:
        q, k, v: [B, heads, S, d] in the order of ``layout``.

    Returns:
        [B, heads, S, d].

    Raises:
        BackendUnavailableError: :func:`why_unavailable` gives a reason.
    """
    reason = why_unavailable(q, k, v)
    if reason is not None:
        raise BackendUnavailableError(f"the flex backend cannot run here: {reason}")
    places_q = _places(layout, block_size_q).to(q.device)
    places_kv = _places(layout, block_size_kv).to(q.device)
    lists = _flex_lists(mask, layout, places_q, places_kv, block_size_q, block_size_kv)
    queries, keys = _to_places(layout, places_q), _to_places(layout, places_kv)
    attend = _compiled(q.shape, lists.kv_indices.shape)
    packed = attend(queries(q), keys(k), keys(v), lists)
    out = torch.empty_like(q)
    is_token = places_q >= 0
    out[:, :, places_q[is_token]] = packed[:, :, is_token]
    return out


def _places(layout: TokenLayout, block_size: int) -> Tensor:
    """Tokens in the order of the kernel, patches and special tokens each padded with -1 to whole
    blocks: int64 [places], on the CPU."""
    kinds = (layout.patch_index, layout.special_index)
    return torch.cat([F.pad(tokens, (0, -len(tokens) % block_size), value=-1) for tokens in kinds])


def _to_places(layout: TokenLayout, places: Tensor) -> Callable[[Tensor], Tensor]:
    # Padding reads token 0; its keys are masked, its queries are dropped.
    return lambda x: x.index_select(-2, places.clamp_min(0))


def _flex_lists(
    mask: BlockMask,
    layout: TokenLayout,
    places_q: Tensor,
    places_kv: Tensor,
    block_size_q: int,
    block_size_kv: int,
) -> FlexBlockMask:
    """The lists of ``mask``, special blocks in every row and rows of special queries added."""
    special_q = num_blocks(layout.num_special_tokens, block_size_q)
    special_kv = num_blocks(layout.num_special_tokens, block_size_kv)
    sees = F.pad(mask.to_dense(), (0, special_kv, 0, special_q), value=True)
    is_key = places_kv >= 0
    is_whole = is_key.view(-1, block_size_kv).all(-1)
    whole, partial = sees & is_whole, sees & ~is_whole

    # FlexAttention's FLASH backend drops the lists if the function masks nothing
    # (pytorch issue 188322). This one does, wherever a block has padding.
    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return is_key[key]

    return FlexBlockMask.from_kv_blocks(
        *_counts_and_order(partial),
        *_counts_and_order(whole),
        BLOCK_SIZE=(block_size_q, block_size_kv),
        mask_mod=mask_mod,
        seq_lengths=(len(places_q), len(places_kv)),
    )


def _counts_and_order(selected: Tensor) -> tuple[Tensor, Tensor]:
    """From bool [B, heads, q_blocks, kv_blocks]: int32 counts, and indices with selected first."""
    order = selected.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
    return selected.sum(-1, dtype=torch.int32), order.to(torch.int32)


@functools.cache
def _compiled(shape: torch.Size, blocks: torch.Size) -> Callable[..., Tensor]:
    """Made for one shape, as compiled for variable shapes it is wrong C++ (torch 2.13)."""

    def attend(q: Tensor, k: Tensor, v: Tensor, block_mask: FlexBlockMask) -> Tensor:
        return flex_attention(q, k, v, block_mask=block_mask)

    # torch counts compilations per code object and allows eight.
    attend.__code__ = attend.__code__.replace()
    # Not compiled it would write out the whole map. With "fullgraph" it raises instead.
    return torch.compile(attend, fullgraph=True, dynamic=False)
