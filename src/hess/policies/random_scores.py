"""Control: the scores of each layer dealt to its heads at random."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hess.policies.head_budgets import HeadBudgets


@dataclass(frozen=True, eq=False)
class RandomScores(HeadBudgets):
    """HeSS with the scores of each layer permuted; other arguments as :class:`HeadBudgets`.

    Args:
        seed: says which permutations; the same seed gives the same ones.
    """

    seed: int = field(kw_only=True)
    name: ClassVar[str] = "random"

    def _arrange(self, scores: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        heads = scores.shape[-1]
        order = torch.stack([torch.randperm(heads, generator=generator) for _ in scores])
        return scores.gather(-1, order)
