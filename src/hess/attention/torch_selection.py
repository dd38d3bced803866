"""What selection asks of the rows of a chunk, in plain torch; ``triton_selection`` is its twin.

All rows are ranked by their logits from the largest to the smallest, ties to the lowest index.
"""

import numpy as np
import torch
from torch import Tensor

ENTRIES_AT_ONCE = 2**20
"""Logits of a chunk. Sorting and summing them takes about 32 bytes for each."""


def count_within(logits: Tensor, mass: float) -> Tensor:
    """How many of the most probable blocks of each row weigh no more than ``mass`` together.

    Args:
        logits: [rows, kv_blocks].

    Returns:
        int64 [rows].
    """
    probs = largest(logits.softmax(-1), logits.shape[-1])
    return (probs.cumsum(-1, dtype=torch.float64) <= mass).sum(-1)


def probability_at(logits: Tensor, ranks: Tensor) -> Tensor:
    """The probability of the block of rank ``ranks`` [rows] (from 0) in each row.

    Returns:
        [rows], type of ``logits``.
    """
    best = largest(logits.softmax(-1), int(ranks.max()) + 1)
    return best.gather(-1, ranks[:, None]).squeeze(-1)


def write_lists(logits: Tensor, row_offsets: Tensor, indices: Tensor) -> None:
    """Write the most probable blocks of each row, in ascending order, where its list belongs.

    Args:
        logits: [rows, kv_blocks].
        row_offsets: int64 [rows + 1]; row r takes as many blocks as fit
            ``indices[row_offsets[r] : row_offsets[r + 1]]``.
        indices: int32, the lists of all rows.
    """
    begin, end = row_offsets[[0, -1]].tolist()
    indices[begin:end] = are_largest(logits, row_offsets.diff()).nonzero()[:, 1]


def are_largest(x: Tensor, counts: Tensor) -> Tensor:
    """Which are among the ``counts`` [...] largest of each row of ``x`` [..., n]; ties to the
    lowest index: bool [..., n]."""
    counts = counts[..., None]
    best = largest(x, int(counts.max()))
    last = best.gather(-1, (counts - 1).clamp_min(0))
    above, ties = x > last, x == last
    room = counts - above.sum(-1, keepdim=True)
    return above | (ties & (ties.cumsum(-1, dtype=torch.int32) <= room))


def largest(x: Tensor, number: int) -> Tensor:
    """At least so many (and one) of the largest in the last dimension, in descending order."""
    if x.device.type == "cpu":  # numpy sorts some twenty times as fast as torch
        return torch.from_numpy(np.sort(x.numpy(), axis=-1)).flip(-1)
    if 4 * number < x.shape[-1]:  # where that is quicker
        return x.topk(max(number, 1)).values
    return x.sort(-1, descending=True).values
