"""What a trainer must know about the kind of model it trains."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from hess.datasets.procedural import SceneBatch
from hess.models.base import Model, Predictions
from hess.training.losses import make_targets


class Recipe(ABC):
    """A model with its first weights, and its losses.

    Attributes:
        model: to be trained.
        dim: width of its tokens.
        matrices: parts of the names of modules whose matrices Muon trains.
        weights: of the losses in their sum.
    """

    model: Model
    dim: int
    matrices: ClassVar[tuple[str, ...]]
    weights: ClassVar[dict[str, float]]

    @abstractmethod
    def losses(
        self, batch: SceneBatch, *, with_layers: bool
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Losses by name; if asked for, patch tokens [B, N, P, dim] after each global block."""

    @abstractmethod
    def point_errors(self, out: Predictions, batch: SceneBatch) -> Tensor:
        """Distances [B, N, S, S] to the true points, of which the mean distance to the first
        camera is 1, in whichever frame and scale the model predicts them."""

    def patch_points(self, batch: SceneBatch) -> Tensor:
        """Mean point of each patch in the frame of the first view: [B, N, P, 3]."""
        points = make_targets(batch).points
        grid = points.shape[2] // self.model.patch_size
        cells = points.unflatten(3, (grid, -1)).unflatten(2, (grid, -1))
        return cells.mean(dim=(3, 5)).flatten(2, 3)
