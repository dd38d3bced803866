"""From pooled scores to a block mask: how many key blocks each row gets, and which.

The steps, each a pass over chunks of rows (see ``PooledScores.chunks``):

1. :func:`baseline_counts`: what uniform block-sparse attention keeps in each row. No pass if the
   ratio alone says so.
2. A policy turns the sums into a budget per head; budgets are on the CPU.
3. :func:`row_counts`: how a head divides its budget among its rows.
4. The most probable blocks of each row, as ascending lists.

The host waits for the device once where a CDF threshold is set, to learn the size of the lists,
and never where the ratio alone sets it (but for ``row_rule="proportional"`` with a threshold).
"""

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from hess.allocation import allocate
from hess.attention import native_selection, torch_selection
from hess.attention.block_mask import BlockMask
from hess.attention.native_library import why_no_library
from hess.attention.pooled_scores import PooledScores
from hess.errors import ConfigError, LayoutError

CDF_RULES = ("sparsevggt", "cover")


class RowFunctions(Protocol):
    """What ``torch_selection``, ``native_selection`` and ``triton_selection`` all offer."""

    ENTRIES_AT_ONCE: int

    def count_within(self, logits: Tensor, mass: float) -> Tensor: ...
    def probability_at(self, logits: Tensor, ranks: Tensor) -> Tensor: ...
    def write_lists(self, logits: Tensor, row_offsets: Tensor, indices: Tensor) -> None: ...


def row_functions(pooled: PooledScores) -> RowFunctions:
    """For fp32 scores: Triton on an NVIDIA GPU, C on a CPU, where there is one; else torch."""
    if pooled.q_mean.dtype != torch.float32:
        return torch_selection
    if pooled.device.type == "cpu" and why_no_library() is None:
        return native_selection
    nvidia = pooled.device.type == "cuda" and torch.version.hip is None
    if nvidia and find_spec("triton") is not None:
        from hess.attention import triton_selection

        return triton_selection
    return torch_selection


def check_baseline(
    sparse_ratio: float | None, cdf_threshold: float | None, cdf_rule: str = "sparsevggt"
) -> None:
    """Raise :class:`ConfigError` unless these parameters make a baseline."""
    if sparse_ratio is None and cdf_threshold is None:
        raise ConfigError("give sparse_ratio, cdf_threshold or both; found neither")
    for name, value in (("sparse_ratio", sparse_ratio), ("cdf_threshold", cdf_threshold)):
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"{name} must lie in [0, 1], found {value}")
    if cdf_rule not in CDF_RULES:
        raise ConfigError(f"cdf_rule must be one of {CDF_RULES}, found {cdf_rule!r}")


def baseline_counts(
    pooled: PooledScores,
    sparse_ratio: float | None,
    cdf_threshold: float | None,
    cdf_rule: str = "sparsevggt",
) -> Tensor:
    """Key blocks that uniform block-sparse attention keeps in each row (SparseVGGT).

    ``max(#{j : cumsum_j <= cdf_threshold + 1e-5}, floor(K * (1 - sparse_ratio)), 1)`` over the
    descending probabilities of a row of K blocks.

    Args:
        sparse_ratio: share of blocks that may be dropped, in [0, 1]; None: no such minimum.
        cdf_threshold: probability mass to keep, in [0, 1]; None: no such minimum.
        cdf_rule: "sparsevggt" drops the block that crosses the threshold, as its code does;
            "cover" keeps it, so that at least the threshold is covered, as the papers say.

    Returns:
        int64 [B, heads, q_blocks], in [1, K]; on the CPU if there is no threshold, since no
        score is looked at then.

    Raises:
        ConfigError: both parameters are None or one is out of range.
    """
    check_baseline(sparse_ratio, cdf_threshold, cdf_rule)
    num_kv_blocks = pooled.shape[-1]
    minimum = 1
    if sparse_ratio is not None:
        # 10 * (1 - 0.9) is 0.99999...: without the nudge a float error would cost a block.
        minimum = max(minimum, math.floor(num_kv_blocks * (1 - sparse_ratio) + 1e-9))
    if cdf_threshold is None:
        return torch.tensor(minimum).expand(pooled.shape[:3])
    run = row_functions(pooled)
    chunks = pooled.chunks(run.ENTRIES_AT_ONCE)
    counts = torch.cat([run.count_within(x, cdf_threshold + 1e-5) for _, x in chunks])
    if cdf_rule == "cover":
        counts = counts + 1
    return counts.clamp(minimum, num_kv_blocks).view(pooled.shape[:3])


def _equal_counts(
    pooled: PooledScores, budget: Tensor, baseline: Tensor, min_row_blocks: int
) -> Tensor:
    """The same number in every row; what is left goes where the next block is most probable."""
    num_q_blocks, num_kv_blocks = pooled.shape[-2:]
    base = budget // num_q_blocks
    leftover = budget - base * num_q_blocks
    if not leftover.any():
        return base[..., None].expand(pooled.shape[:3])
    base, leftover = (x.to(pooled.device, non_blocking=True)[..., None] for x in (base, leftover))
    base = base.expand(pooled.shape[:3])
    ranks = base.clamp(max=num_kv_blocks - 1).flatten()
    run = row_functions(pooled)
    chunks = pooled.chunks(run.ENTRIES_AT_ONCE)
    next_prob = torch.cat([run.probability_at(x, ranks[rows]) for rows, x in chunks])
    order = next_prob.view_as(base).sort(dim=-1, descending=True, stable=True).indices
    gets_one = torch.arange(num_q_blocks, device=pooled.device) < leftover
    return base + torch.zeros_like(base).scatter_(-1, order, gets_one.long())


def _proportional_counts(
    pooled: PooledScores, budget: Tensor, baseline: Tensor, min_row_blocks: int
) -> Tensor:
    """In proportion to what the baseline keeps in the row."""
    return allocate(budget, baseline.cpu(), upper=pooled.shape[-1], lower=min_row_blocks)


def _map_counts(
    pooled: PooledScores, budget: Tensor, baseline: Tensor, min_row_blocks: int
) -> Tensor:
    """What the most probable blocks of the whole head map leave in each row; may be nothing.

    The probability that is just good enough is found digit by digit: a pass over the map counts
    for each head how often each value of the next digit occurs behind the digits known so far.
    """
    heads, num_q_blocks = math.prod(pooled.shape[:2]), pooled.shape[2]
    wanted = (budget - min_row_blocks * num_q_blocks).flatten()
    wanted = wanted.to(pooled.device, non_blocking=True)
    known = torch.zeros_like(wanted)
    for shift in (20, 10, 0):  # 30 bits hold every fp32 number in [0, 1]
        occurs = wanted.new_zeros(heads, 1024)
        for rows, logits in pooled.chunks(torch_selection.ENTRIES_AT_ONCE):
            keys = _probability_keys(logits, min_row_blocks)
            head = torch.arange(rows.start, rows.stop, device=pooled.device) // num_q_blocks
            digit = (keys >> shift & 1023) + 1024 * head[:, None]
            fits = keys >> (shift + 10) == known[head, None]
            occurs.view(-1).scatter_add_(0, digit.flatten(), fits.flatten().long())
        at_least = occurs.flip(-1).cumsum(-1).flip(-1)
        digit = ((at_least >= wanted[:, None]).sum(-1, keepdim=True) - 1).clamp_min(0)
        wanted = wanted - (at_least - occurs).gather(-1, digit).squeeze(-1)
        known = known << 10 | digit.squeeze(-1)

    better, ties = [], []
    for rows, logits in pooled.chunks(torch_selection.ENTRIES_AT_ONCE):
        keys = _probability_keys(logits, min_row_blocks)
        head = torch.arange(rows.start, rows.stop, device=pooled.device) // num_q_blocks
        better.append((keys > known[head, None]).sum(-1))
        ties.append((keys == known[head, None]).sum(-1))
    tied = torch.cat(ties).view(heads, num_q_blocks)
    first_tied = wanted[:, None] - (tied.cumsum(-1) - tied)
    counts = min_row_blocks + torch.cat(better).view_as(tied) + first_tied.clamp_min(0).min(tied)
    return counts.view(pooled.shape[:3])


def _probability_keys(logits: Tensor, num_exempt: int) -> Tensor:
    """Probabilities as whole numbers in the same order, in [0, 2^30); -1 for the ``num_exempt``
    largest of each row."""
    probs = logits.softmax(-1).float()
    keys = probs.view(torch.int32)
    return keys.scatter(-1, probs.topk(num_exempt).indices, -1) if num_exempt else keys


ROW_RULES: dict[str, Callable[[PooledScores, Tensor, Tensor, int], Tensor]] = {
    "equal": _equal_counts,
    "proportional": _proportional_counts,
    "map": _map_counts,
}


def check_row_rule(row_rule: str) -> None:
    """Raise :class:`ConfigError` unless ``row_rule`` is a key of ``ROW_RULES``."""
    if row_rule not in ROW_RULES:
        raise ConfigError(f"row_rule must be one of {tuple(ROW_RULES)}, found {row_rule!r}")


def row_counts(
    pooled: PooledScores,
    budget: Tensor,
    baseline: Tensor,
    row_rule: str = "equal",
    min_row_blocks: int = 0,
) -> Tensor:
    """Divide the budget of a head among its query-block rows.

    Args:
        budget: int64 [B, heads] on the CPU, each in
            [min_row_blocks * q_blocks, q_blocks * kv_blocks].
        baseline: int64 [B, heads, q_blocks], from :func:`baseline_counts`.
        row_rule: "equal" gives every row the same number and the remainder to the rows with the
            most probable next block; "proportional" follows the baseline; "map" takes the most
            probable blocks of the whole head map and can leave rows empty.
        min_row_blocks: blocks that every row keeps at least.

    Returns:
        int64 [B, heads, q_blocks]; rows of a head sum to its budget. On the CPU if no score had
        to be looked at.

    Raises:
        ConfigError: unknown rule, or a budget outside its range.
    """
    check_row_rule(row_rule)
    num_q_blocks, num_kv_blocks = pooled.shape[-2:]
    lower, upper = min_row_blocks * num_q_blocks, num_q_blocks * num_kv_blocks
    if budget.min() < lower or budget.max() > upper:
        raise ConfigError(
            f"the budget of a head must lie in [{lower}, {upper}] blocks, "
            f"found [{budget.min()}, {budget.max()}]"
        )
    return ROW_RULES[row_rule](pooled, budget, baseline, min_row_blocks)


def select_top(pooled: PooledScores, counts: Tensor) -> BlockMask:
    """The ``counts`` [B, heads, q_blocks] most probable key blocks of each row; ties to the
    lowest index. Waits for the device unless the counts are on the CPU.

    Raises:
        LayoutError: the shapes disagree, or a count is outside [0, kv_blocks].
    """
    if counts.shape != pooled.shape[:3]:
        raise LayoutError(
            f"row counts must have shape {list(pooled.shape[:3])}, found {list(counts.shape)}"
        )
    extremes = torch.stack([counts.min(), counts.max()])
    # All that the host must know in one transfer.
    *blocks, low, high = torch.cat([counts.sum(-1).flatten(), extremes]).tolist()
    if low < 0 or high > pooled.shape[-1]:
        raise LayoutError(f"row counts must lie in [0, {pooled.shape[-1]}], found [{low}, {high}]")
    return _write_mask(pooled, counts, torch.tensor(blocks).view(pooled.shape[:2]))


def select_blocks(
    pooled: PooledScores,
    budget: Tensor,
    baseline: Tensor,
    row_rule: str = "equal",
    min_row_blocks: int = 0,
) -> BlockMask:
    """The most probable blocks within a budget per head; arguments as :func:`row_counts`.

    Returns:
        A mask with exactly ``budget[b, h]`` blocks in head h of batch element b.
    """
    budget = budget.cpu()
    counts = row_counts(pooled, budget, baseline, row_rule, min_row_blocks)
    return _write_mask(pooled, counts, budget)


def _write_mask(pooled: PooledScores, counts: Tensor, head_blocks: Tensor) -> BlockMask:
    """The mask of these counts, whose sums per head are known on the CPU."""
    ends = counts.to(pooled.device, non_blocking=True).flatten().cumsum(0)
    row_offsets = torch.cat([ends.new_zeros(1), ends])
    indices = row_offsets.new_empty(int(head_blocks.sum()), dtype=torch.int32)
    run = row_functions(pooled)
    for rows, logits in pooled.chunks(run.ENTRIES_AT_ONCE):
        run.write_lists(logits, row_offsets[rows.start : rows.stop + 1], indices)
    batch, num_heads, num_q_blocks, num_kv_blocks = pooled.shape
    return BlockMask(
        row_offsets=row_offsets,
        indices=indices,
        batch=batch,
        num_heads=num_heads,
        num_q_blocks=num_q_blocks,
        num_kv_blocks=num_kv_blocks,
        known_head_blocks=head_blocks,
    )
