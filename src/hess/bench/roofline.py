"""The least time that attention can take on a GPU, by what it has to do."""

from dataclasses import dataclass
from functools import partial

import torch

from hess.bench.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Rates of a GPU, from the vendor's documents.

    Args:
        processors: streaming multiprocessors.
        clock: cycles per second under load.
        flops: operations in half precision, dense, per cycle and processor.
        exponentials: per cycle and processor.
        bandwidth: bytes per second of the device memory.
    """

    processors: int
    clock: float
    flops: int
    exponentials: int
    bandwidth: float


_HOPPER = partial(Chip, processors=132, clock=1.83e9, flops=4096, exponentials=16)
CHIPS = {
    "H200": _HOPPER(bandwidth=4.8e12),
    "H100": _HOPPER(bandwidth=3.35e12),
    "A100": Chip(processors=108, clock=1.41e9, flops=2048, exponentials=16, bandwidth=2.04e12),
}
"""By a part of the name that torch gives the device."""


def chip_of(device: torch.device) -> Chip | None:
    """The chip behind ``device``; None if its rates are not known here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((chip for key, chip in CHIPS.items() if key in name), None)


def roofline_ms(
    chip: Chip | None, work: Workload, sparsity: float, listed: int
) -> dict[str, float] | None:
    """Milliseconds that each part of the chip is busy at least; the largest is a lower bound.

    "matrix": both products of the query-key pairs that are kept. "exp": one exponential per pair.
    "memory": queries, keys and values read, keys and values packed and read again, the result
    written, the lists read; each key block comes from memory once per head, then from the cache.

    Args:
        sparsity: dropped share of the query-key pairs.
        listed: entries of all lists.

    Returns:
        None for an unknown chip or a precision other than half.
    """
    if chip is None or work.dtype not in (torch.bfloat16, torch.float16):
        return None
    tokens = work.layout.num_tokens
    pairs = (1 - sparsity) * work.heads * tokens**2
    moved = 8 * work.heads * tokens * work.head_dim * work.dtype.itemsize + 4 * listed
    cycles = 1000 / (chip.processors * chip.clock)
    return {
        "matrix": 4 * work.head_dim * pairs / chip.flops * cycles,
        "exp": pairs / chip.exponentials * cycles,
        "memory": 1000 * moved / chip.bandwidth,
    }
