"""Keep what gains most: the sensitivity of the head times the probability it would miss."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hess.allocation import allocate
from hess.attention.block_mask import BlockMask
from hess.attention.gains import gain_counts
from hess.attention.pooled_scores import PooledScores
from hess.attention.selection import select_top
from hess.errors import ConfigError
from hess.policies.scored import ScoredPolicy


@dataclass(frozen=True, eq=False)
class HessPlus(ScoredPolicy):
    """Keep the blocks of a layer that gain most, as many as the baseline keeps.

    HeSS looks at the sensitivity of a head only. This looks at what the head would miss, too: a
    sensitive head that already holds nearly all of its probability is given no more (see
    :mod:`hess.attention.gains`, and docs/beyond.md for how it was found).

    1. The blocks of all heads and rows of a layer are ranked by their gain, where a head weighs
       ``score^e`` (e is ``score_exponent``); the best, as many as the baseline keeps, say how many
       each head gets.
    2. A head divides its budget among its rows by how many of the best they have, and the more
       evenly the sparser the layer is: the fewer blocks are kept, the less can a row's own
       estimate be trusted.

    Args:
        score_exponent: e, from 0 (all heads alike) to 1 (in proportion to the score).
        others: as :class:`ScoredPolicy`.

    Raises:
        ConfigError, ProfileError: as :class:`ScoredPolicy`.

    Example:
        ``HessPlus(profile, sparse_ratio=0.8, cdf_threshold=0.4)``
    """

    score_exponent: float = 0.5
    name: ClassVar[str] = "hess+"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.score_exponent <= 1:
            raise ConfigError(f"score_exponent must lie in [0, 1], found {self.score_exponent}")

    def block_mask(self, pooled: PooledScores, layer_idx: int) -> BlockMask:
        batch, heads, num_q_blocks, num_kv_blocks = pooled.shape
        total = self._baseline(pooled).sum((1, 2)).cpu()
        weights = (self.scores[layer_idx] ** self.score_exponent).expand(batch, -1)
        wanted = gain_counts(pooled, weights, total).cpu()
        per_head = wanted.sum(-1)
        # Nearly this already: only ties and what was sampled have to be made up.
        head_blocks = allocate(total, per_head, upper=num_q_blocks * num_kv_blocks)
        sparsity = 1 - total / (heads * num_q_blocks * num_kv_blocks)
        even = (per_head / num_q_blocks)[..., None]
        rows = torch.lerp(wanted.double(), even.double(), sparsity.double()[:, None, None])
        return select_top(pooled, allocate(head_blocks, rows, upper=num_kv_blocks))
