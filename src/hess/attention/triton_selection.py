# mypy: allow-untyped-defs
"""``torch_selection`` in Triton, without a sort. Import this only where triton is installed.

One program per row. It finds a threshold by bisection on *keys*, whole numbers in the order of
the fp32 logits, and stops as soon as the threshold parts the row as it should; only ties are
followed down to two neighbouring keys. The row, at most some 100 KiB, is read again in each step,
from the L1 cache, so its length is not limited.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES_AT_ONCE = 2**28
"""Logits of a chunk: 1 GiB, the whole map of some 250 views. Nothing else is kept for each."""

MAX_TILE = 2048
"""Logits that a program reads at once: 16 per thread."""


def count_within(logits: Tensor, mass: float) -> Tensor:
    """As :func:`hess.attention.torch_selection.count_within`, summing in fp32."""
    counts = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    _launch(count_within_kernel, logits, counts_ptr=counts, mass=mass)
    return counts


def probability_at(logits: Tensor, ranks: Tensor) -> Tensor:
    """As :func:`hess.attention.torch_selection.probability_at`."""
    probs = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _launch(probability_at_kernel, logits, ranks_ptr=ranks.contiguous(), probs_ptr=probs)
    return probs


def write_lists(logits: Tensor, row_offsets: Tensor, indices: Tensor) -> None:
    """As :func:`hess.attention.torch_selection.write_lists`; never waits for the device."""
    _launch(write_lists_kernel, logits, row_offsets_ptr=row_offsets, indices_ptr=indices)


def _launch(kernel, logits: Tensor, **arguments: object) -> None:
    rows, num_blocks = logits.shape
    with torch.cuda.device_of(logits):
        kernel[(rows,)](
            logits_ptr=logits.contiguous(),
            num_blocks=num_blocks,
            **arguments,
            TILE=min(triton.next_power_of_2(num_blocks), MAX_TILE),
            num_warps=4,
        )


@triton.jit
def _key_of(x):
    """Keys are the bits of a float as sign and magnitude, so 0.0 and -0.0 share one."""
    bits = x.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -(2**31) - bits, bits)


@triton.jit
def _value_of(key):
    bits = tl.where(key < 0, -(2**31) - key, key)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _load(row_ptr, start, num_blocks, outside, TILE: tl.constexpr):
    block = start + tl.arange(0, TILE)
    return tl.load(row_ptr + block, mask=block < num_blocks, other=outside)


@triton.jit
def _extremes(row_ptr, num_blocks, TILE: tl.constexpr):
    """The smallest and the largest logit."""
    low = tl.full([TILE], float("inf"), tl.float32)
    high = tl.full([TILE], float("-inf"), tl.float32)
    for start in tl.range(0, num_blocks, TILE):
        low = tl.minimum(low, _load(row_ptr, start, num_blocks, float("inf"), TILE))
        high = tl.maximum(high, _load(row_ptr, start, num_blocks, float("-inf"), TILE))
    return tl.min(low, 0), tl.max(high, 0)


@triton.jit
def _count_above(row_ptr, num_blocks, threshold, TILE: tl.constexpr):
    count = tl.zeros([TILE], tl.int32)
    for start in tl.range(0, num_blocks, TILE):
        x = _load(row_ptr, start, num_blocks, float("-inf"), TILE)
        count += (x > threshold).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _mass_above(row_ptr, num_blocks, threshold, largest, TILE: tl.constexpr):
    """Count and sum of exp(logit - largest) of the logits above the threshold."""
    count = tl.zeros([TILE], tl.int32)
    mass = tl.zeros([TILE], tl.float32)
    for start in tl.range(0, num_blocks, TILE):
        x = _load(row_ptr, start, num_blocks, float("-inf"), TILE)
        count += (x > threshold).to(tl.int32)
        mass += tl.where(x > threshold, tl.exp(x - largest), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _cut(row_ptr, num_blocks, wanted, smallest, largest, TILE: tl.constexpr):
    """A threshold with at most ``wanted`` logits above it, and how many these are.

    If they are fewer, then so many equal the threshold that not all can be taken.
    """
    low = _key_of(smallest) - 1  # more than wanted above
    high = _key_of(largest)  # at most wanted above
    above = num_blocks * 0
    if wanted >= num_blocks:
        high = low
        above = num_blocks
    while (high - low > 1) & (above != wanted):
        middle = (low + high) >> 1
        count = _count_above(row_ptr, num_blocks, _value_of(middle), TILE)
        fits = count <= wanted
        high = tl.where(fits, middle, high)
        above = tl.where(fits, count, above)
        low = tl.where(fits, low, middle)
    return _value_of(high), above


@triton.jit(do_not_specialize=["num_blocks", "mass"])
def count_within_kernel(
    logits_ptr,  # fp32 [rows, num_blocks], contiguous
    counts_ptr,  # int64 [rows]
    num_blocks,
    mass,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * num_blocks
    smallest, largest = _extremes(row_ptr, num_blocks, TILE)
    low = _key_of(smallest) - 1
    high = _key_of(largest)
    low_count, total = _mass_above(row_ptr, num_blocks, float("-inf"), largest, TILE)
    limit = mass * total
    high_count = num_blocks * 0
    high_mass = total * 0
    if total <= limit:
        high = low
        high_count = low_count
    # What is above `high` fits the limit, what is above `low` does not.
    while (high - low > 1) & (low_count - high_count > 1):
        middle = (low + high) >> 1
        count, sum_above = _mass_above(row_ptr, num_blocks, _value_of(middle), largest, TILE)
        fits = sum_above <= limit
        high = tl.where(fits, middle, high)
        high_count = tl.where(fits, count, high_count)
        high_mass = tl.where(fits, sum_above, high_mass)
        low = tl.where(fits, low, middle)
        low_count = tl.where(fits, low_count, count)
    if low_count - high_count > 1:  # ties, of which some fit
        weight = tl.exp(_value_of(high) - largest)
        fitting = tl.floor((limit - high_mass) / weight).to(tl.int32)
        high_count += tl.minimum(fitting, low_count - high_count)
    tl.store(counts_ptr + row, high_count.to(tl.int64))


@triton.jit(do_not_specialize=["num_blocks"])
def probability_at_kernel(
    logits_ptr,  # fp32 [rows, num_blocks], contiguous
    ranks_ptr,  # int64 [rows], below num_blocks
    probs_ptr,  # fp32 [rows]
    num_blocks,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * num_blocks
    rank = tl.load(ranks_ptr + row).to(tl.int32)
    smallest, largest = _extremes(row_ptr, num_blocks, TILE)
    threshold, _ = _cut(row_ptr, num_blocks, rank, smallest, largest, TILE)
    below = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for start in tl.range(0, num_blocks, TILE):
        x = _load(row_ptr, start, num_blocks, float("-inf"), TILE)
        below = tl.maximum(below, tl.where(x <= threshold, x, float("-inf")))
        total += tl.exp(x - largest)
    tl.store(probs_ptr + row, tl.exp(tl.max(below, 0) - largest) / tl.sum(total, 0))


@triton.jit(do_not_specialize=["num_blocks", "row_offsets_ptr"])
def write_lists_kernel(
    logits_ptr,  # fp32 [rows, num_blocks], contiguous
    row_offsets_ptr,  # int64 [rows + 1], from anywhere
    indices_ptr,  # int32, the lists of all rows
    num_blocks,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(row_offsets_ptr + row)
    wanted = (tl.load(row_offsets_ptr + row + 1) - begin).to(tl.int32)
    if wanted > 0:
        row_ptr = logits_ptr + row * num_blocks
        smallest, largest = _extremes(row_ptr, num_blocks, TILE)
        threshold, above = _cut(row_ptr, num_blocks, wanted, smallest, largest, TILE)
        room = wanted - above
        ties_before = wanted * 0
        for start in tl.range(0, num_blocks, TILE):
            block = start + tl.arange(0, TILE)
            x = _load(row_ptr, start, num_blocks, float("-inf"), TILE)
            tie = (x == threshold).to(tl.int32)
            in_room = ties_before + tl.cumsum(tie, 0) <= room
            taken = ((x > threshold) | ((tie > 0) & in_room)).to(tl.int32)
            target = begin + tl.cumsum(taken, 0) - 1
            tl.store(indices_ptr + target, block, mask=taken > 0)
            begin += tl.sum(taken, 0)
            ties_before += tl.sum(tie, 0)
