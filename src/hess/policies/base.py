"""What a sparsification policy is: estimated block probabilities in, block mask out."""

from typing import ClassVar, Protocol

from torch import Tensor

from hess.attention.block_mask import BlockMask
from hess.models.base import Model


class Policy(Protocol):
    """A rule that says which blocks each head of a global attention computes."""

    name: ClassVar[str]

    def settings(self) -> dict[str, object]:
        """All parameters that shape the mask, as JSON values for reports."""
        ...

    def check_model(self, model: Model) -> None:
        """Raise ``ProfileError`` if the policy was made for another model."""
        ...

    def block_mask(self, block_probs: Tensor, layer_idx: int) -> BlockMask | None:
        """Choose the blocks of one layer; None means dense attention.

        Args:
            block_probs: [B, heads, q_blocks, kv_blocks], rows sum to 1.
            layer_idx: global layer, from 0.
        """
        ...
