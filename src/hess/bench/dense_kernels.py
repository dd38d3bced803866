"""The dense attention kernels to beat."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hess.bench.timing import Run, failing

_ON_CUDA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def dense_kernels(q: Tensor, k: Tensor, v: Tensor) -> tuple[dict[str, Run], dict[str, str]]:
    """The dense kernels that run on these tensors [B, heads, S, d], and why others do not.

    On a GPU cuDNN's and FlashAttention-2's as torch calls them (in float32 the memory-efficient
    one instead) and FlexAttention without a mask; on a CPU torch's own.
    """
    if not q.is_cuda:
        return {"sdpa": lambda: F.scaled_dot_product_attention(q, k, v)}, {}
    names = ("efficient",) if q.dtype == torch.float32 else ("cudnn", "flash")
    runs: dict[str, Run] = {name: functools.partial(_sdpa, name, q, k, v) for name in names}
    runs["flex"] = lambda: _flex()(q, k, v)
    missing = failing(runs, q.device)
    return {name: run for name, run in runs.items() if name not in missing}, missing


def _sdpa(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(_ON_CUDA[name]):
        return F.scaled_dot_product_attention(q, k, v)


@functools.cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
