"""From estimated block probabilities to a block mask: how many key blocks per row, and which."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hess.allocation import allocate
from hess.attention.block_mask import BlockMask
from hess.errors import ConfigError, LayoutError

CDF_RULES = ("sparsevggt", "cover")


@dataclass(frozen=True, kw_only=True, eq=False)
class RankedBlocks:
    """The key blocks of every row from the most to the least probable; ties to the lowest index.

    Args:
        probs: [B, heads, q_blocks, kv_blocks], descending.
        order: int64, same shape; ``order[..., r]`` is the key block of rank r.
    """

    probs: Tensor
    order: Tensor


def rank_blocks(block_probs: Tensor) -> RankedBlocks:
    """Sort ``block_probs`` [B, heads, q_blocks, kv_blocks] once for all functions below.

    Raises:
        LayoutError: the tensor does not have four dimensions.
    """
    if block_probs.ndim != 4:
        raise LayoutError(
            "block probabilities must be [B, heads, q_blocks, kv_blocks], found shape "
            f"{list(block_probs.shape)}"
        )
    probs, order = torch.sort(block_probs, dim=-1, descending=True, stable=True)
    return RankedBlocks(probs=probs, order=order)


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
    ranked: RankedBlocks,
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
        int64 [B, heads, q_blocks], in [1, K].

    Raises:
        ConfigError: both parameters are None or one is out of range.
    """
    check_baseline(sparse_ratio, cdf_threshold, cdf_rule)
    num_kv_blocks = ranked.probs.shape[-1]
    minimum = 1
    if sparse_ratio is not None:
        # 10 * (1 - 0.9) is 0.99999...: without the nudge a float error would cost a block.
        minimum = max(minimum, math.floor(num_kv_blocks * (1 - sparse_ratio) + 1e-9))
    if cdf_threshold is None:
        return torch.full_like(ranked.order[..., 0], minimum)
    mass = ranked.probs.cumsum(-1, dtype=torch.float64)
    counts = (mass <= cdf_threshold + 1e-5).sum(-1)
    if cdf_rule == "cover":
        counts = counts + 1
    return counts.clamp(minimum, num_kv_blocks)


def select_top(ranked: RankedBlocks, counts: Tensor) -> BlockMask:
    """The ``counts`` [B, heads, q_blocks] most probable key blocks of each row.

    Raises:
        LayoutError: the shapes disagree, or a count is outside [0, kv_blocks].
    """
    num_kv_blocks = ranked.order.shape[-1]
    if counts.shape != ranked.order.shape[:-1]:
        raise LayoutError(
            f"row counts must have shape {list(ranked.order.shape[:-1])}, "
            f"found {list(counts.shape)}"
        )
    if counts.min() < 0 or counts.max() > num_kv_blocks:
        raise LayoutError(
            f"row counts must lie in [0, {num_kv_blocks}], found [{counts.min()}, {counts.max()}]"
        )
    rank = torch.arange(num_kv_blocks, device=counts.device)
    chosen = rank < counts[..., None]
    return BlockMask.from_dense(torch.zeros_like(chosen).scatter_(-1, ranked.order, chosen))


def _equal_counts(
    ranked: RankedBlocks, budget: Tensor, baseline: Tensor, min_row_blocks: int
) -> Tensor:
    """The same number in every row; what is left goes where the next block is most probable."""
    num_q_blocks, num_kv_blocks = ranked.probs.shape[-2:]
    base = budget // num_q_blocks
    leftover = budget - base * num_q_blocks
    next_rank = base.clamp(max=num_kv_blocks - 1)[..., None, None]
    next_prob = ranked.probs.gather(-1, next_rank.expand(*baseline.shape, 1)).squeeze(-1)
    order = torch.sort(next_prob, dim=-1, descending=True, stable=True).indices
    gets_one = torch.arange(num_q_blocks, device=budget.device) < leftover[..., None]
    extra = torch.zeros_like(baseline).scatter_(-1, order, gets_one.to(baseline.dtype))
    return base[..., None] + extra


def _proportional_counts(
    ranked: RankedBlocks, budget: Tensor, baseline: Tensor, min_row_blocks: int
) -> Tensor:
    """In proportion to what the baseline keeps in the row."""
    return allocate(budget, baseline, upper=ranked.probs.shape[-1], lower=min_row_blocks)


def _map_counts(
    ranked: RankedBlocks, budget: Tensor, baseline: Tensor, min_row_blocks: int
) -> Tensor:
    """What the most probable blocks of the whole head map leave in each row; may be nothing."""
    priority = ranked.probs.clone()
    priority[..., :min_row_blocks] += 2  # above any probability
    flat = priority.flatten(-2)
    order = torch.sort(flat, dim=-1, descending=True, stable=True).indices
    chosen = torch.arange(flat.shape[-1], device=budget.device) < budget[..., None]
    return torch.zeros_like(chosen).scatter_(-1, order, chosen).view_as(priority).sum(-1)


ROW_RULES: dict[str, Callable[[RankedBlocks, Tensor, Tensor, int], Tensor]] = {
    "equal": _equal_counts,
    "proportional": _proportional_counts,
    "map": _map_counts,
}


def check_row_rule(row_rule: str) -> None:
    """Raise :class:`ConfigError` unless ``row_rule`` is a key of ``ROW_RULES``."""
    if row_rule not in ROW_RULES:
        raise ConfigError(f"row_rule must be one of {tuple(ROW_RULES)}, found {row_rule!r}")


def row_counts(
    ranked: RankedBlocks,
    budget: Tensor,
    baseline: Tensor,
    row_rule: str = "equal",
    min_row_blocks: int = 0,
) -> Tensor:
    """Divide the budget of a head among its query-block rows.

    Args:
        budget: int64 [B, heads], each in [min_row_blocks * q_blocks, q_blocks * kv_blocks].
        baseline: int64 [B, heads, q_blocks], from :func:`baseline_counts`.
        row_rule: "equal" gives every row the same number and the remainder to the rows with the
            most probable next block; "proportional" follows the baseline; "map" takes the most
            probable blocks of the whole head map and can leave rows empty.
        min_row_blocks: blocks that every row keeps at least.

    Returns:
        int64 [B, heads, q_blocks]; rows of a head sum to its budget.

    Raises:
        ConfigError: unknown rule, or a budget outside its range.
    """
    check_row_rule(row_rule)
    num_q_blocks, num_kv_blocks = ranked.probs.shape[-2:]
    lower, upper = min_row_blocks * num_q_blocks, num_q_blocks * num_kv_blocks
    if budget.min() < lower or budget.max() > upper:
        raise ConfigError(
            f"the budget of a head must lie in [{lower}, {upper}] blocks, "
            f"found [{budget.min()}, {budget.max()}]"
        )
    return ROW_RULES[row_rule](ranked, budget, baseline, min_row_blocks)


def select_blocks(
    ranked: RankedBlocks,
    budget: Tensor,
    baseline: Tensor,
    row_rule: str = "equal",
    min_row_blocks: int = 0,
) -> BlockMask:
    """The most probable blocks within a budget per head; arguments as :func:`row_counts`.

    Returns:
        A mask with exactly ``budget[b, h]`` blocks in head h of batch element b.
    """
    return select_top(ranked, row_counts(ranked, budget, baseline, row_rule, min_row_blocks))
