"""``packing`` in Triton: keys and values are read once, and their block means come with it."""

import torch
from torch import Tensor

from hess.attention.layout import TokenLayout
from hess.attention.packing import PackedKeys
from hess.attention.pooling import num_blocks


def pack_keys(k: Tensor, v: Tensor, layout: TokenLayout, block_size_kv: int) -> PackedKeys:
    """As :func:`hess.attention.packing.pack_keys`, reading ``k`` and ``v`` once; means in fp32."""
    layout.check(k)
    packed_k, packed_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    k_mean = _pack(k, layout, block_size_kv, packed=packed_k, average=True)
    _pack(v, layout, block_size_kv, packed=packed_v, average=False)
    return PackedKeys(k=packed_k, v=packed_v, k_mean=k_mean)


def pool_queries(q: Tensor, layout: TokenLayout, block_size_q: int) -> Tensor:
    """As :func:`hess.attention.packing.pool_queries`, reading ``q`` once; means in fp32."""
    layout.check(q)
    return _pack(q, layout, block_size_q, packed=None, average=True)


def _pack(
    x: Tensor, layout: TokenLayout, block_size: int, *, packed: Tensor | None, average: bool
) -> Tensor:
    """One launch of the packing kernel; returns the means, undefined unless ``average``."""
    from hess.attention.triton_kernels import pack_kernel

    x = rows_in_one_piece(x)
    batch, heads, _, dim = x.shape
    blocks = num_blocks(layout.num_patch_tokens, block_size)
    mean = torch.empty(batch, heads, blocks, dim, dtype=torch.float32, device=x.device)
    programs = blocks
    if packed is not None:
        programs += num_blocks(layout.num_special_tokens, block_size)
    with torch.cuda.device_of(x):
        pack_kernel[(programs, batch * heads)](
            x_ptr=x,
            packed_ptr=mean if packed is None else packed,
            mean_ptr=mean,
            x_stride_b=x.stride(0),
            x_stride_h=x.stride(1),
            x_stride_t=x.stride(2),
            num_heads=heads,
            **layout_arguments(layout),
            HEAD_DIM=dim,
            BLOCK=block_size,
            TILE=min(power_of_two(block_size), 128),
            COPY=packed is not None,
            AVERAGE=average,
        )
    return mean


def layout_arguments(layout: TokenLayout) -> dict[str, int]:
    """The sizes that every kernel takes."""
    return {
        "num_patches": layout.num_patch_tokens,
        "num_special": layout.num_special_tokens,
        "patches_per_view": layout.grid_h * layout.grid_w,
        "special_per_view": layout.num_special,
    }


def rows_in_one_piece(x: Tensor) -> Tensor:
    """``x`` with stride 1 in its last dimension, as the kernels ask for."""
    return x if x.stride(-1) == 1 else x.contiguous()


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()
