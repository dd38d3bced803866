"""Budgets by what a head would miss, and blocks that match what a row would have given."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hess.allocation import allocate, round_budgets
from hess.attention.block_mask import BlockMask
from hess.attention.fine_scores import FineScores
from hess.attention.gains import gain_counts
from hess.attention.matching import select_matching
from hess.attention.pooled_scores import PooledScores
from hess.attention.selection import row_counts, select_top
from hess.errors import ConfigError
from hess.policies.scored import ScoredPolicy


@dataclass(frozen=True, eq=False)
class HessPlus(ScoredPolicy):
    """Divide what the baseline keeps by gains, and keep the blocks that match the output.

    HeSS looks at the sensitivity of a head only. This looks at what the head would miss, too: a
    sensitive head that already holds nearly all of its probability is given no more (see
    :mod:`hess.attention.gains`, and docs/beyond.md for how it was found). And the blocks of a row
    are chosen for the output they give together (:mod:`hess.attention.matching`).

    1. Blocks are pooled in parts, so that probabilities are closer to the truth
       (:mod:`hess.attention.fine_scores`). The baseline is that of whole blocks, as ever.
    2. The blocks of all heads and rows of a layer are ranked by their gain, where a head weighs
       ``score^e`` (e is ``score_exponent``); the best, as many as the baseline keeps, say how many
       each head and row would get.
    3. The sparser the layer, the less an estimate from so few blocks can be trusted. With s the
       share that is dropped, ``s^p`` (p is ``score_power``) of a head's budget goes by its score
       alone, as in HeSS; and s of how it is divided is the same for all rows.
    4. Of each row, blocks are kept over which the output is nearest to the whole one. Blocks that
       cannot be split leave too little to see that by: then the most probable ones.

    Args:
        score_exponent: e, from 0 (all heads alike) to 1 (in proportion to the score).
        score_power: p, at least 0; 0 divides among heads as HeSS does.
        pool_parts: parts in which blocks are pooled at most, at least 1; they must be equal, so
            blocks of 6 tokens have 3 of at most 4.
        match_rounds: rounds in which a row is filled; 0 keeps the most probable blocks.
        others: as :class:`ScoredPolicy`.

    Raises:
        ConfigError, ProfileError: as :class:`ScoredPolicy`.

    Example:
        ``HessPlus(profile, sparse_ratio=0.8, cdf_threshold=0.4)``
    """

    score_exponent: float = 0.6
    score_power: float = 8.0
    pool_parts: int = 4
    match_rounds: int = 4
    name: ClassVar[str] = "hess+"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.score_exponent <= 1:
            raise ConfigError(f"score_exponent must lie in [0, 1], found {self.score_exponent}")
        if self.score_power < 0:
            raise ConfigError(f"score_power must be at least 0, found {self.score_power}")
        if self.pool_parts < 1:
            raise ConfigError(f"pool_parts must be at least 1, found {self.pool_parts}")
        if self.match_rounds < 0:
            raise ConfigError(f"match_rounds must be at least 0, found {self.match_rounds}")

    def block_mask(self, pooled: PooledScores, layer_idx: int) -> BlockMask:
        batch, heads, num_q_blocks, num_kv_blocks = pooled.shape
        whole_blocks = pooled.coarse if isinstance(pooled, FineScores) else pooled
        baseline = self._baseline(whole_blocks)
        total = baseline.sum((1, 2)).cpu()
        sparsity = 1 - total.double() / (heads * num_q_blocks * num_kv_blocks)

        scores = self.scores[layer_idx].expand(batch, -1)
        wanted = gain_counts(pooled, scores**self.score_exponent, total).cpu()
        upper = num_q_blocks * num_kv_blocks
        by_gain = allocate(total, wanted.sum(-1), upper)
        by_score = allocate(total, scores, upper)
        mixed = _mix(by_gain, by_score, sparsity[:, None] ** self.score_power)
        budget = round_budgets(mixed, total, upper)

        rows_by_gain = allocate(budget, wanted, num_kv_blocks)
        rows_alike = row_counts(pooled, budget, baseline).cpu()
        counts = _mix(rows_by_gain, rows_alike, sparsity[:, None, None])
        counts = round_budgets(counts, budget, num_kv_blocks)
        if isinstance(pooled, FineScores) and self.match_rounds:
            return select_matching(pooled, counts, self.match_rounds)
        return select_top(pooled, counts)


def _mix(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """``share`` of the other."""
    return torch.lerp(one.double(), other.double(), share.expand(one.shape))
