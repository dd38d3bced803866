"""Block-sparse attention with the same rule for every head (SparseVGGT)."""

from dataclasses import asdict, dataclass
from typing import ClassVar

from hess.attention.block_mask import BlockMask
from hess.attention.pooled_scores import PooledScores
from hess.attention.selection import baseline_counts, check_baseline, select_top
from hess.models.base import Model


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Keep in each row the most probable blocks, as many as :func:`baseline_counts` says.

    Args:
        sparse_ratio: share of blocks that may be dropped, in [0, 1], or None.
        cdf_threshold: probability mass to keep, in [0, 1], or None.
        cdf_rule: "sparsevggt" drops the block that crosses the threshold, "cover" keeps it.

    Raises:
        ConfigError: both parameters are None or one is out of range.
    """

    sparse_ratio: float | None = None
    cdf_threshold: float | None = None
    cdf_rule: str = "sparsevggt"
    name: ClassVar[str] = "uniform"
    needs_scores: ClassVar[bool] = True
    pool_parts: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_baseline(self.sparse_ratio, self.cdf_threshold, self.cdf_rule)

    def settings(self) -> dict[str, object]:
        return asdict(self)

    def check_model(self, model: Model) -> None:
        """Any model will do."""

    def block_mask(self, pooled: PooledScores, layer_idx: int) -> BlockMask:
        counts = baseline_counts(pooled, self.sparse_ratio, self.cdf_threshold, self.cdf_rule)
        return select_top(pooled, counts)
