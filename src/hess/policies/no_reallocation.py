"""Ablation: a full head's surplus is lost instead of passed on (Fig. 10)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hess.allocation import round_budgets, water_fill
from hess.policies.head_budgets import HeadBudgets


@dataclass(frozen=True, eq=False)
class NoReallocation(HeadBudgets):
    """HeSS without its second step; arguments as :class:`HeadBudgets`.

    Realised sparsity is higher than that of HeSS wherever a head is full.
    """

    name: ClassVar[str] = "no_reallocation"

    def _divide(self, total: Tensor, weights: Tensor, upper: int, lower: int) -> Tensor:
        uncapped = water_fill(total, weights, upper=len(weights) * upper, lower=lower)
        capped = uncapped.clamp(max=upper)
        return round_budgets(capped, (capped.sum(-1) + 1e-6).long(), upper)
