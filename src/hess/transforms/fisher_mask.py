"""Fisher mask search, rearrangement and tuning of Kwon et al., "A Fast Post-Training Pruning
Framework for Transformers" (NeurIPS 2022), for the heads of the global attentions."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from hess.datasets.scene import Dataset, Scene
from hess.errors import ConfigError
from hess.models.base import Model
from hess.transforms.mask_tuning import tune_scales
from hess.transforms.pruned_heads import PrunedHeads, lowest


@dataclass(frozen=True, eq=False)
class FisherMask(PrunedHeads):
    """Prune the heads that the errors miss least in second order; see :class:`PrunedHeads`.

    1. Search: all heads cost the same, so the mask of least loss for a budget, by the diagonal
       Fisher ``E[(d error / d gate)^2]``, prunes the lowest heads over all layers.
    2. Rearrangement: within each layer as many heads as before, chosen by the full Fisher of the
       layer.
    3. Tuning, by :meth:`tuned`: the kept heads are scaled so that each layer's output comes close
       to the dense one.

    The Fisher of each error is divided by its trace over the model before the two are mixed, so
    that their units do not decide, and layers stay comparable.

    Args:
        tuned_scales: [layers, heads] to use in place of ones for kept heads; comes from
            :meth:`tuned`.

    Raises:
        ConfigError: a parameter is out of range, or ``tuned_scales`` keeps other heads.
    """

    tuned_scales: Tensor | None = field(default=None, kw_only=True, repr=False)
    name: ClassVar[str] = "fisher_mask"

    def __post_init__(self) -> None:
        super().__post_init__()
        tuned = self.tuned_scales
        if tuned is None:
            return
        if tuned.shape != self.scales.shape or bool((tuned[self.scales == 0] != 0).any()):
            raise ConfigError(
                "tuned_scales must come from tuned() at the same settings, found scales "
                f"{list(tuned.shape)} for a mask that prunes other heads"
            )
        object.__setattr__(self, "scales", tuned.double())

    def _choose(self, count: int) -> Tensor:
        fisher = self.importance.mixed(_fisher, self.camera_weight)
        pruned = lowest(fisher.diagonal(dim1=1, dim2=2), count)
        return torch.stack([rearrange(*layer) for layer in zip(fisher, pruned, strict=True)])

    def tuned(self, model: Model, scenes: Dataset | Sequence[Scene]) -> Self:
        """The same mask with the scales that :func:`tune_scales` finds.

        Args:
            model: the one to prune.
            scenes: images to tune on; no ground truth is used.

        Raises:
            ProfileError: the importance was measured on another model.
            ConfigError: no scene, or blocks of another kind than ours.
        """
        self.check_model(model)
        return replace(self, tuned_scales=tune_scales(model, scenes, self.scales != 0))

    def settings(self) -> dict[str, object]:
        return super().settings() | {"tuned": self.tuned_scales is not None}


def rearrange(fisher: Tensor, pruned: Tensor) -> Tensor:
    """A mask with as many pruned heads whose loss ``(1 - m)^T F (1 - m)`` is not larger.

    Every kept head in turn, from the least Fisher diagonal up, joins the pruned ones, and the
    head without which their loss is least leaves them.

    Args:
        fisher: [heads, heads], symmetric and positive semidefinite.
        pruned: bool [heads], where to start.

    Returns:
        bool [heads].
    """
    if not bool(pruned.any()):
        return pruned
    order = fisher.diagonal().argsort(stable=True).tolist()
    chosen = [head for head in order if pruned[head]]
    for head in (h for h in order if not pruned[h]):
        # The newcomer comes first, so that it leaves again if that is as good.
        chosen.insert(0, head)
        losses = [_loss(fisher, [h for h in chosen if h != left]) for left in chosen]
        del chosen[losses.index(min(losses))]
    arranged = torch.zeros_like(pruned)
    arranged[chosen] = True
    return arranged


def _loss(fisher: Tensor, heads: list[int]) -> float:
    return fisher[heads][:, heads].sum().item()


def _fisher(gradients: Tensor) -> Tensor:
    """Blocks of the Fisher matrix [layers, heads, heads], diagonal summing to 1 over the model."""
    fisher = (gradients[..., :, None] * gradients[..., None, :]).mean(0)
    trace = fisher.diagonal(dim1=1, dim2=2).sum()
    return fisher / trace if trace > 0 else fisher
