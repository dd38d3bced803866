"""How fast this machine does the three kinds of work that a forward pass consists of."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hess.attention.dense import dense_attention
from hess.models.layers import Block, use_precision

_WIDTH, _HEADS, _CHANNELS = 1024, 16, 256


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Floating-point operations per second; a multiplication and an addition are two.

    Args:
        blocks: linear layers of transformer blocks. The norms, activations and sums between them
            are in the time but not in the count.
        attention: products of queries, keys and values.
        convolutions: of 3 x 3 pixels.
    """

    blocks: float
    attention: float
    convolutions: float


def measure_throughput(
    device: torch.device | str, dtype: torch.dtype, *, seconds: float = 0.4
) -> Throughput:
    """Run each kind of work for about ``seconds``, at sizes as in VGGT-1B.

    Args:
        device: where to run.
        dtype: precision of the weights of linear layers, queries and images.
    """
    device = torch.device(device)
    scale = 8 if device.type == "cuda" else 1  # a GPU needs more at a time to be busy
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = Block(_WIDTH, _HEADS).eval().requires_grad_(False)
        # Short sequences: linear layers and what lies between them, hardly any attention.
        tokens = torch.randn(16 * scale, 64, _WIDTH)
        heads = torch.randn(1, _HEADS, 1024 * scale, _WIDTH // _HEADS)
        image = torch.randn(1, _CHANNELS, 74 * scale, 74)
        kernel = torch.randn(_CHANNELS, _CHANNELS, 3, 3) / 48
    use_precision(block.to(device), [block], dtype)
    tokens = tokens.to(device)
    heads, image, kernel = (x.to(device, dtype) for x in (heads, image, kernel))
    linear = sum(p.numel() for p in block.parameters() if p.ndim == 2) * tokens[..., 0].numel()
    with torch.inference_mode():
        return Throughput(
            blocks=_rate(2 * linear, lambda: block(tokens), device, seconds),
            attention=_rate(
                4 * heads.shape[2] ** 2 * _WIDTH,
                lambda: dense_attention(heads, heads, heads),
                device,
                seconds,
            ),
            convolutions=_rate(
                2 * kernel.numel() * image[0, 0].numel(),
                lambda: F.conv2d(image, kernel, padding=1),
                device,
                seconds,
            ),
        )


def _rate(flops: int, run: Callable[[], object], device: torch.device, seconds: float) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    run()  # libraries choose their kernels on the first call
    start = end = now()
    runs = 0
    while end - start < seconds:
        run()
        runs += 1
        end = now()
    return runs * flops / (end - start)
