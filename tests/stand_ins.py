"""Small stand-ins that several test files share."""

from torch import Tensor

from hess.errors import ProfileError
from hess.models.base import Model


class FixedScores:
    """A profile that gives one table [layers, heads], whatever view of it is asked for."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def scores(self, *view: object) -> Tensor:
        self.asked = view
        return self.table

    def layer_shares(self, camera_weight: float | None = None) -> Tensor:
        sums = self.table.double().sum(1)
        return sums / sums.sum()

    def check_model(self, model: Model) -> None:
        found = (len(model.global_attention_sites()), model.num_heads)
        if found != tuple(self.table.shape):
            raise ProfileError(f"scores of {tuple(self.table.shape)}, found a model of {found}")
