"""The method: budgets in proportion to the Head Sensitivity Score."""

from dataclasses import dataclass
from typing import ClassVar

from hess.policies.head_budgets import HeadBudgets


@dataclass(frozen=True, eq=False)
class HeSS(HeadBudgets):
    """HeSS-guided sparsification (Sec. 3.3); arguments as :class:`HeadBudgets`.

    Example:
        ``HeSS(profile, sparse_ratio=0.8, cdf_threshold=0.4)``
    """

    name: ClassVar[str] = "hess"
