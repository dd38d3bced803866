"""Head pruning of Michel et al., "Are Sixteen Heads Really Better than One?" (NeurIPS 2019)."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from hess.transforms.pruned_heads import PrunedHeads, lowest


@dataclass(frozen=True, eq=False)
class HeadPruning(PrunedHeads):
    """Prune the heads of least importance over all layers; arguments as :class:`PrunedHeads`.

    The importance of a head is the mean over scenes of ``|d error / d gate|``, divided by its l2
    norm over the heads of the layer. Each of the two errors is normalised so before they are
    mixed, and the mixture again.
    """

    name: ClassVar[str] = "head_pruning"

    def _choose(self, count: int) -> Tensor:
        importance = self.importance.mixed(_of_unit_length, self.camera_weight)
        return lowest(F.normalize(importance, dim=-1), count)


def _of_unit_length(gradients: Tensor) -> Tensor:
    return F.normalize(gradients.abs().mean(0), dim=-1)
