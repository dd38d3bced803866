"""What a sparsification policy is: pooled scores in, block mask out."""

from typing import ClassVar, Protocol

from hess.attention.block_mask import BlockMask
from hess.attention.pooled_scores import PooledScores
from hess.models.base import Model


class Policy(Protocol):
    """A rule that says which blocks each head of a global attention computes."""

    name: ClassVar[str]

    needs_scores: ClassVar[bool]
    """False: attention is dense in every layer, and :meth:`block_mask` is not called."""

    @property
    def pool_parts(self) -> int:
        """Parts in which a block is pooled at most, see :func:`attention.fine_scores.parts_of`.
        With more than one, :meth:`block_mask` is given :class:`FineScores`."""
        ...

    def settings(self) -> dict[str, object]:
        """All parameters that shape the mask, as JSON values for reports."""
        ...

    def check_model(self, model: Model) -> None:
        """Raise ``ProfileError`` if the policy was made for another model."""
        ...

    def block_mask(self, pooled: PooledScores, layer_idx: int) -> BlockMask | None:
        """Choose the blocks of one layer; None means dense attention.

        Args:
            pooled: the estimated attention between blocks.
            layer_idx: global layer, from 0.
        """
        ...
