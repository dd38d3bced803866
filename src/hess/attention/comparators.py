"""Block-sparse kernels of others, to compare with: cuDNN's and SpargeAttn's.

Written against nvidia-cudnn-frontend 1.32 and SpargeAttn's sources of 2025 and never run, as no
suitable GPU was at hand. They are optional, and "auto" never means them.

Both take whole blocks of one list of keys, so the special keys become blocks behind the patches:

- cuDNN knows how many keys of a block are real; it computes what the reference does.
- SpargeAttn can cut off the last block only. Its patches and special tokens are not padded: the
  key block in which the ones end and the others begin is always selected, and the query block in
  which they do sees all. Its products are int8 and fp8. So it is near the reference, not equal.
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from hess.attention.block_mask import BlockMask
from hess.attention.layout import TokenLayout
from hess.attention.packing import pack_tokens
from hess.attention.pooling import num_blocks
from hess.errors import BackendUnavailableError, ConfigError

HALF = (torch.bfloat16, torch.float16)
CUDNN_BLOCK = 64
SPARGE_BLOCKS = (128, 64)


def why_no_cudnn(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why cuDNN's kernel cannot compute these tensors [B, heads, S, d] here; None if it can."""
    if find_spec("cudnn") is None or find_spec("cutlass") is None:
        return "it is not installed; pip install nvidia-cudnn-frontend 'nvidia-cutlass-dsl[cu13]'"
    return _why_no_gpu(q, k, v, (64, 128), (9,))


def why_no_sparge(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why SpargeAttn cannot compute these tensors [B, heads, S, d] here; None if it can."""
    if find_spec("spas_sage_attn") is None:
        return (
            "it is not installed, and there are no wheels; with CUDA's compiler at hand: "
            "pip install --no-build-isolation git+https://github.com/thu-ml/SpargeAttn"
        )
    return _why_no_gpu(q, k, v, (64, 128), (8,))


def _why_no_gpu(
    q: Tensor, k: Tensor, v: Tensor, dims: tuple[int, ...], majors: tuple[int, ...]
) -> str | None:
    if not q.is_cuda:
        return f"it needs tensors on a CUDA device, found {q.device}"
    major = torch.cuda.get_device_capability(q.device)[0]
    if major not in majors:
        return f"with these blocks it needs compute capability {majors}.x, found {major}.x"
    if q.dtype not in HALF or not q.dtype == k.dtype == v.dtype:
        return f"it needs q, k, v of one type in {HALF}, found {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[-1] not in dims:
        return f"it needs a head dimension in {dims}, found {q.shape[-1]}"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "it has no backward pass here; run under torch.no_grad()"
    return None


def cudnn_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    layout: TokenLayout,
    block_size_q: int,
    block_size_kv: int,
) -> Tensor:
    """Block-sparse attention by cuDNN, in blocks of 64 x 64; see ``reference``.

    Raises:
        BackendUnavailableError: :func:`why_no_cudnn` gives a reason.
        ConfigError: ``block_size_q`` is no multiple of 64, or ``block_size_kv`` is not 64.
    """
    _check("cudnn", why_no_cudnn(q, k, v))
    if block_size_q % CUDNN_BLOCK or block_size_kv != CUDNN_BLOCK:
        raise ConfigError(
            f"the cudnn backend needs query blocks of a multiple of {CUDNN_BLOCK} tokens and key "
            f"blocks of {CUDNN_BLOCK}, found {block_size_q} x {block_size_kv}"
        )
    from cudnn import BSA

    patches, special = layout.num_patch_tokens, layout.num_special_tokens
    places, sizes = [], []
    for first, count in ((0, patches), (patches, special)):
        blocks = num_blocks(count, CUDNN_BLOCK)
        index = torch.arange(blocks * CUDNN_BLOCK, device=q.device)
        places.append(torch.where(index < count, first + index, -1))
        sizes.append((count - index[::CUDNN_BLOCK]).clamp_max(CUDNN_BLOCK))
    place = torch.cat(places)
    rows = mask.to_dense().repeat_interleave(block_size_q // CUDNN_BLOCK, dim=2)
    rows = rows[:, :, : len(sizes[0])]
    selected = F.pad(rows, (0, len(sizes[1]), 0, len(sizes[1])), value=True)
    order = selected.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
    out = BSA.block_sparse_attention_forward(
        *(pack_tokens(x, layout)[:, :, place.clamp_min(0)] for x in (q, k, v)),
        order.to(torch.int32),
        q2k_block_nums=selected.sum(-1, dtype=torch.int32),
        block_sizes=torch.cat(sizes).to(torch.int32),
        sparse_block_size=CUDNN_BLOCK,
    )["o_tensor"]
    return _to_token_order(out[:, :, place >= 0], layout)


def sparge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    layout: TokenLayout,
    block_size_q: int,
    block_size_kv: int,
) -> Tensor:
    """Block-sparse attention by SpargeAttn in low precision; near ``reference``, see above.

    Raises:
        BackendUnavailableError: :func:`why_no_sparge` gives a reason.
        ConfigError: the blocks are not 128 x 64.
    """
    _check("sparge", why_no_sparge(q, k, v))
    if (block_size_q, block_size_kv) != SPARGE_BLOCKS:
        raise ConfigError(
            f"the sparge backend needs blocks of {SPARGE_BLOCKS}, found "
            f"{(block_size_q, block_size_kv)}"
        )
    from spas_sage_attn import block_sparse_sage2_attn_cuda

    whole_q = layout.num_patch_tokens // block_size_q
    whole_kv = layout.num_patch_tokens // block_size_kv
    more_q = num_blocks(layout.num_tokens, block_size_q) - whole_q
    more_kv = num_blocks(layout.num_tokens, block_size_kv) - whole_kv
    sees = mask.to_dense()[:, :, :whole_q, :whole_kv]
    sees = F.pad(sees, (0, more_kv, 0, more_q), value=True)
    packed = (pack_tokens(x, layout) for x in (q, k, v))
    return _to_token_order(block_sparse_sage2_attn_cuda(*packed, mask_id=sees), layout)


def _check(name: str, reason: str | None) -> None:
    if reason is not None:
        raise BackendUnavailableError(f"the {name} backend cannot run here: {reason}")


def _to_token_order(packed: Tensor, layout: TokenLayout) -> Tensor:
    """The inverse of :func:`pack_tokens`."""
    order = torch.cat([layout.patch_index, layout.special_index]).to(packed.device)
    return torch.empty_like(packed).index_copy_(-2, order, packed)
