"""HeSS with one budget for all layers instead of one for each."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hess.allocation import allocate
from hess.attention.block_mask import BlockMask
from hess.attention.pooled_scores import PooledScores
from hess.attention.selection import select_blocks
from hess.errors import ConfigError
from hess.policies.scored import ScoredPolicy


@dataclass(frozen=True, eq=False)
class LayerBudgets(ScoredPolicy):
    """Divide what the baseline keeps in all layers together among all heads of all layers.

    A head's weight is its score within the layer, times its layer's share of the sensitivity to
    the power of ``layer_exponent``. What is kept must be known before the first layer runs, so the
    baseline is a ratio alone.

    Args:
        layer_exponent: 0 makes all layers alike, as HeSS does; 1 goes by the raw traces.
        others: as :class:`ScoredPolicy`, but for ``cdf_threshold``.

    Raises:
        ConfigError: a threshold above 0, or no ratio.
        ConfigError, ProfileError: as :class:`ScoredPolicy`.
    """

    layer_exponent: float = 0.5
    pool_parts: ClassVar[int] = 1
    name: ClassVar[str] = "layer_budgets"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cdf_threshold or self.sparse_ratio is None:
            raise ConfigError(
                "budgets across layers need a sparse_ratio alone: what a cdf_threshold keeps is "
                f"not known before the last layer, found {self.cdf_threshold}"
            )
        if not 0 <= self.layer_exponent <= 1:
            raise ConfigError(f"layer_exponent must lie in [0, 1], found {self.layer_exponent}")

    def block_mask(self, pooled: PooledScores, layer_idx: int) -> BlockMask:
        batch, heads, num_q_blocks, num_kv_blocks = pooled.shape
        baseline = self._baseline(pooled)
        layers = len(self.scores)
        total = baseline[:1].sum() * layers
        budgets = allocate(total, self._weights().flatten(), upper=num_q_blocks * num_kv_blocks)
        budget = budgets.view(layers, heads)[layer_idx].expand(batch, -1)
        return select_blocks(pooled, budget, baseline)

    def _weights(self) -> Tensor:
        """[layers, heads]."""
        shares = self.profile.layer_shares(self.camera_weight)
        return self.scores * torch.as_tensor(shares)[:, None] ** self.layer_exponent
