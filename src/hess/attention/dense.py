"""Dense attention with the fastest exact kernel at hand."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hess.attention import native

NATIVE_TOKENS = 256
"""From so many tokens on the native kernel is quicker than torch's on a CPU."""


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v (Eq. 1) over [B, heads, S, head_dim]."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        # PyTorch's fused CPU kernel has a bfloat16 backward that is several times slower than
        # the plain products.
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1) @ v
    is_long = q.device.type == "cpu" and q.shape[2] >= NATIVE_TOKENS
    if is_long and q.shape == k.shape and native.why_unavailable(q, k, v) is None:
        return native.native_dense_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)
