"""The blocks that match the output of a row, on CPUs: twin of ``matching``, see
``native_matching.c``."""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from hess.attention.fine_scores import FineScores
from hess.attention.native_library import run, why_no_library

MOST_PARTS = 4
LANES = 16
"""Channels, blocks and special tokens are taken as many at a time, or fewer."""


class _Matching(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("queries", "query_shares", "keys", "biases")),
        *((name, ctypes.c_void_p) for name in ("values", "values_t", "products")),
        *((name, ctypes.c_void_p) for name in ("offsets", "lists", "next")),
        *((name, ctypes.c_int64) for name in ("num_heads", "q_blocks", "kv_blocks")),
        *((name, ctypes.c_int64) for name in ("padded_blocks", "columns", "dim", "parts")),
        ("rounds", ctypes.c_int64),
    )


def can_match(scores: FineScores) -> bool:
    """Whether :func:`match_rows` takes these scores here."""
    is_fp32 = scores.device.type == "cpu" and scores.q_mean.dtype == torch.float32
    fits = scores.split <= MOST_PARTS and scores.q_mean.shape[-1] % LANES == 0
    return is_fp32 and fits and why_no_library() is None


def match_rows(scores: FineScores, row_offsets: Tensor, rounds: int) -> Tensor:
    """The lists of all rows, one behind the other: int32; see ``matching.select_matching``.

    Args:
        row_offsets: int64 [rows + 1], where the list of each row begins.

    Raises:
        MemoryError: there is none for the numbers of a row.
    """
    _, _, q_blocks, kv_blocks = scores.shape
    queries, keys, biases = scores.queries_and_keys
    values, special_values = scores.values
    padded_blocks = kv_blocks + -kv_blocks % LANES

    def columns(of_blocks: Tensor, of_special: Tensor, fill: float = 0.0) -> Tensor:
        """Parts of blocks [..., split * kv_blocks, n] and special tokens [..., special, n]."""
        by_part = of_blocks.unflatten(-2, (scores.split, kv_blocks))
        by_part = F.pad(by_part, (0, 0, 0, padded_blocks - kv_blocks), value=fill)
        together = torch.cat([by_part.flatten(-3, -2), of_special], dim=-2)
        return F.pad(together, (0, 0, 0, -together.shape[-2] % (2 * LANES)), value=fill)

    values = columns(values, special_values)
    no_bias = biases.new_zeros(special_values.shape[1], 1)
    by_part = values[:, : scores.split * padded_blocks].unflatten(1, (scores.split, -1))
    tensors = {
        "queries": queries,
        "query_shares": scores.query_shares,
        "keys": columns(keys, scores.special_keys).mT,
        "biases": columns(biases[:, None], no_bias, fill=-torch.inf),
        "values": values,
        "values_t": values.mT,
        "products": (by_part[:, :, None] * by_part[:, None]).sum(-1),
        "offsets": row_offsets,
    }
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    lists = torch.empty(int(row_offsets[-1]), dtype=torch.int32)
    work = _Matching(
        **{name: x.data_ptr() for name, x in tensors.items()},
        lists=lists.data_ptr(),
        num_heads=len(values),
        q_blocks=q_blocks,
        kv_blocks=kv_blocks,
        padded_blocks=padded_blocks,
        columns=values.shape[1],
        dim=values.shape[2],
        parts=scores.split,
        rounds=rounds,
    )
    run("hess_match", work, kept=(tensors, lists))
    return lists
