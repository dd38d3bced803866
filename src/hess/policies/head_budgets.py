"""Policies that give every head a budget in proportion to its score (Sec. 3.3 of the paper)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hess.allocation import allocate
from hess.attention.block_mask import BlockMask
from hess.attention.pooled_scores import PooledScores
from hess.attention.selection import check_row_rule, select_blocks
from hess.errors import ConfigError
from hess.policies.scored import ScoredPolicy


@dataclass(frozen=True, eq=False)
class HeadBudgets(ScoredPolicy):
    """Spend what uniform block-sparse attention would spend, but by head score (Sec. 3.3).

    In each layer and for each batch element the budgets of the baseline are summed and divided
    anew in proportion to the score; full heads pass their surplus on. Every head then takes its
    most probable blocks. Subclasses change the scores or the division.

    Args:
        row_rule: how a head divides its budget among rows, see ``selection.row_counts``.
        min_row_blocks: blocks each row keeps at least; the paper has 0.
        others: as :class:`ScoredPolicy`.
    """

    pool_parts: ClassVar[int] = 1
    row_rule: str = "equal"
    min_row_blocks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_row_rule(self.row_rule)
        if self.min_row_blocks < 0:
            raise ConfigError(f"min_row_blocks must be at least 0, found {self.min_row_blocks}")

    def _divide(self, total: Tensor, weights: Tensor, upper: int, lower: int) -> Tensor:
        """Budgets int64 [B, heads] from totals [B] and weights [heads]."""
        return allocate(total, weights, upper, lower)

    def block_mask(self, pooled: PooledScores, layer_idx: int) -> BlockMask:
        baseline = self._baseline(pooled)
        num_q_blocks, num_kv_blocks = pooled.shape[-2:]
        budget = self._divide(
            baseline.sum((1, 2)).cpu(),
            self.scores[layer_idx],
            upper=num_q_blocks * num_kv_blocks,
            lower=self.min_row_blocks * num_q_blocks,
        )
        return select_blocks(pooled, budget, baseline, self.row_rule, self.min_row_blocks)
