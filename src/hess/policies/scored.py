"""What all score-driven policies share: scores of the heads, and the budget of the baseline."""

import hashlib
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from hess.attention.pooled_scores import PooledScores
from hess.attention.selection import baseline_counts, check_baseline
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

    def layer_shares(self, camera_weight: float | None = None) -> Tensor:
        """Sensitivity of each layer beside the others: float64 [layers], sums to 1."""
        ...

    def check_model(self, model: Model) -> None:
        """Raise ``ProfileError`` unless the scores were measured on ``model``."""
        ...


@dataclass(frozen=True, eq=False)
class ScoredPolicy:
    """Spend what uniform block-sparse attention would spend, but by head score (Sec. 3.3).

    What uniform block-sparse attention would keep in a layer is divided anew. Subclasses say how.

    Args:
        profile: gives the scores.
        sparse_ratio, cdf_threshold, cdf_rule: the baseline, see ``Uniform``.
        camera_weight: share of the camera error in the score (lambda of Eq. 9), in [0, 1];
            None: what the profile holds to be right for its model.
        projection: whose Fisher trace is the score: "query", "key" or "value".
        normalization, aggregate, rows, scale_free: how the profile turns traces into scores, see
            ``HessProfile.scores``.
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
    blend: float = 0.0
    scores: Tensor = field(init=False, repr=False)
    name: ClassVar[str]
    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_baseline(self.sparse_ratio, self.cdf_threshold, self.cdf_rule)
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

    def settings(self) -> dict[str, object]:
        left_out = ("profile", "scores")
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        # Two profiles give policies of the same settings that act differently.
        digest = hashlib.sha256(self.scores.numpy().tobytes()).hexdigest()
        return plain | {"scores_sha256": digest}

    def check_model(self, model: Model) -> None:
        """Raise :class:`ProfileError` unless the profile was measured on ``model``."""
        self.profile.check_model(model)

    def _baseline(self, pooled: PooledScores) -> Tensor:
        """Blocks that the baseline keeps in each row: int64 [B, heads, q_blocks]."""
        return baseline_counts(pooled, self.sparse_ratio, self.cdf_threshold, self.cdf_rule)
