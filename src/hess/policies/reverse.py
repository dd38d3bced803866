"""Control: the scores the wrong way round (Sec. 4.6)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hess.policies.head_budgets import HeadBudgets


@dataclass(frozen=True, eq=False)
class Reverse(HeadBudgets):
    """HeSS with the ranking of each layer inverted; arguments as :class:`HeadBudgets`.

    The highest score goes to the least sensitive head, the second highest to the second least
    sensitive, and so on: the same set of budgets, given to the wrong heads.
    """

    name: ClassVar[str] = "reverse"

    def _arrange(self, scores: Tensor) -> Tensor:
        values, order = torch.sort(scores, dim=-1, stable=True)
        return torch.empty_like(scores).scatter_(-1, order, values.flip(-1))
