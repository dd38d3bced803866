"""What all score-driven policies share: the baseline's budget, divided among heads by a score."""

import hashlib
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from hess.allocation import allocate
from hess.attention.block_mask import BlockMask
from hess.attention.pooled_scores import PooledScores
from hess.attention.selection import (
    baseline_counts,
    check_baseline,
    check_row_rule,
    select_blocks,
)
from hess.errors import ConfigError, ProfileError
from hess.models.base import Model


class ScoreSource(Protocol):
    """Something that gives a score per head; ``HessProfile`` is one."""

    def scores(
        self,
        camera_weight: float | None = None,
        projection: str = "query",
        normalization: str = "trace",
        aggregate: str = "mean",
        rows: str = "all",
        scale_free: bool = False,
    ) -> Tensor:
        """Scores [layers, heads], at least 0; None is the default weight of the model."""
        ...

    def check_model(self, model: Model) -> None:
        """Raise ``ProfileError`` unless the scores were measured on ``model``."""
        ...


@dataclass(frozen=True, eq=False)
class ScoredPolicy:
    """Spend what uniform block-sparse attention would spend, but by head score (Sec. 3.3).

    In each layer and for each batch element the budgets of the baseline are summed and divided
    anew in proportion to the score; full heads pass their surplus on. Every head then takes its
    most probable blocks. Subclasses change the scores or the division.

    Args:
        profile: gives the scores.
        sparse_ratio, cdf_threshold, cdf_rule: the baseline, see ``Uniform``.
        camera_weight: share of the camera error in the score (lambda of Eq. 9), in [0, 1];
            None: what the profile holds to be right for its model.
        projection: whose Fisher trace is the score: "query", "key" or "value".
        normalization, aggregate, rows, scale_free: how the profile turns traces into scores, see
            ``HessProfile.scores``.
        row_rule: how a head divides its budget among rows, see ``selection.row_counts``.
        min_row_blocks: blocks each row keeps at least; the paper has 0.
        blend: share of a uniform score mixed in, from 0 (the paper) to 1 (equal budgets).

    Attributes:
        scores: float64 [layers, heads], rows sum to 1 (or are 0 throughout: equal budgets).

    Raises:
        ConfigError: a parameter is out of range.
        ProfileError: the scores are not a finite, non-negative [layers, heads] table.
    """

    profile: ScoreSource
    _: KW_ONLY
    sparse_ratio: float | None = None
    cdf_threshold: float | None = None
    cdf_rule: str = "sparsevggt"
    camera_weight: float | None = None
    projection: str = "query"
    normalization: str = "trace"
    aggregate: str = "mean"
    rows: str = "all"
    scale_free: bool = False
    row_rule: str = "equal"
    min_row_blocks: int = 0
    blend: float = 0.0
    scores: Tensor = field(init=False, repr=False)
    name: ClassVar[str]
    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_baseline(self.sparse_ratio, self.cdf_threshold, self.cdf_rule)
        check_row_rule(self.row_rule)
        if self.min_row_blocks < 0:
            raise ConfigError(f"min_row_blocks must be at least 0, found {self.min_row_blocks}")
        if not 0 <= self.blend <= 1:
            raise ConfigError(f"blend must lie in [0, 1], found {self.blend}")
        if self.camera_weight is not None and not 0 <= self.camera_weight <= 1:
            raise ConfigError(f"camera_weight must lie in [0, 1], found {self.camera_weight}")
        scores = self.profile.scores(
            self.camera_weight,
            self.projection,
            self.normalization,
            self.aggregate,
            self.rows,
            self.scale_free,
        )
        if scores.ndim != 2 or not torch.isfinite(scores).all() or (scores < 0).any():
            raise ProfileError(
                "a profile must give finite scores >= 0 of shape [layers, heads], found shape "
                f"{list(scores.shape)}: {scores.tolist()}"
            )
        scores = self._arrange(scores.detach().cpu().double())
        row_sums = scores.sum(-1, keepdim=True)
        scores = scores / torch.where(row_sums > 0, row_sums, 1)
        scores = (1 - self.blend) * scores + self.blend / scores.shape[-1]
        object.__setattr__(self, "scores", scores)

    def _arrange(self, scores: Tensor) -> Tensor:
        """The scores to go by: float64 [layers, heads]."""
        return scores

    def _divide(self, total: Tensor, weights: Tensor, upper: int, lower: int) -> Tensor:
        """Budgets int64 [B, heads] from totals [B] and weights [heads]."""
        return allocate(total, weights, upper, lower)

    def settings(self) -> dict[str, object]:
        left_out = ("profile", "scores")
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        # Two profiles give policies of the same settings that act differently.
        digest = hashlib.sha256(self.scores.numpy().tobytes()).hexdigest()
        return plain | {"scores_sha256": digest}

    def check_model(self, model: Model) -> None:
        """Raise :class:`ProfileError` unless the profile was measured on ``model``."""
        self.profile.check_model(model)

    def block_mask(self, pooled: PooledScores, layer_idx: int) -> BlockMask:
        baseline = baseline_counts(pooled, self.sparse_ratio, self.cdf_threshold, self.cdf_rule)
        num_q_blocks, num_kv_blocks = pooled.shape[-2:]
        budget = self._divide(
            baseline.sum((1, 2)).cpu(),
            self.scores[layer_idx],
            upper=num_q_blocks * num_kv_blocks,
            lower=self.min_row_blocks * num_q_blocks,
        )
        return select_blocks(pooled, budget, baseline, self.row_rule, self.min_row_blocks)
