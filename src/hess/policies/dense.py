"""The model as it is: nothing is dropped."""

from dataclasses import dataclass
from typing import ClassVar

from hess.attention.pooled_scores import PooledScores
from hess.models.base import Model


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Full attention in every layer; the reference of every comparison."""

    name: ClassVar[str] = "dense"
    needs_scores: ClassVar[bool] = False
    pool_parts: ClassVar[int] = 1

    def settings(self) -> dict[str, object]:
        return {}

    def check_model(self, model: Model) -> None:
        """Any model will do."""

    def block_mask(self, pooled: PooledScores, layer_idx: int) -> None:
        return None
