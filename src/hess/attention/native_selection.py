"""What selection asks of the rows of a chunk, on CPUs: twin of ``torch_selection`` without a sort,
see ``native_selection.c``."""

import ctypes

import torch
from torch import Tensor

from hess.attention.native_library import run

ENTRIES_AT_ONCE = 2**20

ENTRIES_OF_A_THREAD = 2**18
"""For fewer it takes longer to start one."""


class _Rows(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_rows", "length")),
        ("next", ctypes.c_void_p),
    )


def count_within(logits: Tensor, mass: float) -> Tensor:
    """See ``torch_selection``, for fp32 logits."""
    counts = torch.empty(len(logits), dtype=torch.int64)
    _rank("hess_count_within", logits.softmax(-1), ctypes.c_double(mass), counts)
    return counts


def probability_at(logits: Tensor, ranks: Tensor) -> Tensor:
    """Likewise."""
    found = torch.empty(len(logits))
    _rank("hess_at_ranks", logits.softmax(-1), ranks.contiguous(), found)
    return found


def write_lists(logits: Tensor, row_offsets: Tensor, indices: Tensor) -> None:
    """Likewise."""
    lists = indices[int(row_offsets[0]) :]
    _rank("hess_write_lists", logits, row_offsets.contiguous(), lists)


def _rank(function: str, rows: Tensor, *arguments: Tensor | ctypes.c_double) -> None:
    """Call ``function`` on fp32 rows in as many threads as pay."""
    rows = rows.contiguous()
    work = _Rows(rows.data_ptr(), *rows.shape)
    values = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments]
    few = rows.numel() < ENTRIES_OF_A_THREAD
    run(function, work, *values, kept=(rows, arguments), in_one_thread=few)
