"""All heads of a query block compete for its blocks, by score times probability."""

from dataclasses import dataclass
from typing import ClassVar

from hess.attention.block_mask import BlockMask
from hess.attention.gains import joint_counts
from hess.attention.pooled_scores import PooledScores
from hess.attention.selection import select_top
from hess.policies.scored import ScoredPolicy


@dataclass(frozen=True, eq=False)
class JointRanking(ScoredPolicy):
    """Of each query block keep the blocks with the largest ``score * probability`` of all heads.

    As many as the baseline keeps for the query block in all heads together. Good while much is
    kept; at high sparsity, heads that look at many blocks a little are left with nothing.
    Arguments as :class:`ScoredPolicy`.
    """

    pool_parts: ClassVar[int] = 1
    name: ClassVar[str] = "joint_ranking"

    def block_mask(self, pooled: PooledScores, layer_idx: int) -> BlockMask:
        totals = self._baseline(pooled).sum(1)
        return select_top(pooled, joint_counts(pooled, self.scores[layer_idx], totals))
