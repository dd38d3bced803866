"""Global attention without some of its heads, and what all methods that prune heads share."""

import hashlib
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hess.attention.dense import dense_attention
from hess.attention.layout import TokenLayout
from hess.errors import ConfigError
from hess.models.base import Model
from hess.models.layers import Attention, Rope
from hess.models.swap import StandIn, dense_sites
from hess.sensitivity.head_importance import HeadImportance
from hess.sparsification import SparsityStats
from hess.transforms.base import TransformRun


class PrunedAttention(StandIn):
    """A global attention whose heads are scaled; those of scale 0 are not computed."""

    def __init__(
        self, dense: Attention, layer_idx: int, scales: Sequence[float], stats: SparsityStats
    ) -> None:
        super().__init__(dense)
        self._layer_idx = layer_idx
        self._kept = [head for head, scale in enumerate(scales) if scale != 0]
        self._scales = [scales[head] for head in self._kept]
        self._is_whole = all(scale == 1 for scale in scales)
        self._dropped = torch.tensor([float(scale == 0) for scale in scales], dtype=torch.float64)
        self._stats = stats

    def forward(
        self, x: Tensor, rope: Rope | None = None, layout: TokenLayout | None = None
    ) -> Tensor:
        """Attention of the kept heads over ``x`` [B, S, dim]; the others give zeros."""
        dropped = self._dropped.to(x.device).expand(len(x), -1)
        self._stats.record(self._layer_idx, dropped, dropped, "dense")
        if self._is_whole:
            return self.dense(x, rope, layout)
        q, k, v = self.dense.project(x, rope)
        out = torch.zeros_like(v, memory_format=torch.contiguous_format)
        if self._kept:
            scales = v.new_tensor(self._scales)[:, None, None]
            kept = dense_attention(q[:, self._kept], k[:, self._kept], v[:, self._kept])
            out[:, self._kept] = kept * scales
        return self.dense.merge(out)


def prune_heads(model: Model, scales: Tensor) -> TransformRun:
    """Scale the output of every head of every global layer, and leave out those of scale 0.

    In the statistics a pruned head has dropped all of its blocks, and no other head any.

    Args:
        model: changed in place until restored.
        scales: [global layers, heads].

    Raises:
        AlreadySparsifiedError: another method is at work in the model.
        ConfigError: ``scales`` is of another shape.
    """
    sites = dense_sites(model)
    if scales.shape != (len(sites), model.num_heads):
        raise ConfigError(
            f"scales must be [{len(sites)} global layers, {model.num_heads} heads], found "
            f"{list(scales.shape)}"
        )
    stats = SparsityStats.of(model, range(len(sites)))
    replacements = [
        (site, PrunedAttention(dense, site.layer_idx, row, stats))
        for (site, dense), row in zip(sites, scales.tolist(), strict=True)
    ]
    return TransformRun(replacements, stats)


@dataclass(frozen=True, eq=False)
class PrunedHeads:
    """Leave out the same heads in every scene. Subclasses say which.

    Args:
        importance: how the errors of the model react to gates on its heads.
        sparsity: share of all heads of all global layers to prune, in [0, 1]; rounded to whole
            heads.
        camera_weight: share of the camera error (lambda of Eq. 9), in [0, 1]; None: the model's
            default.

    Attributes:
        scales: float64 [layers, heads], 0 for pruned heads.

    Raises:
        ConfigError: a parameter is out of range.
        ProfileError: no calibration scene had an error that has a weight.
    """

    importance: HeadImportance
    _: KW_ONLY
    sparsity: float
    camera_weight: float | None = None
    scales: Tensor = field(init=False, repr=False)
    name: ClassVar[str]

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise ConfigError(f"sparsity must lie in [0, 1], found {self.sparsity}")
        size = self.importance.num_layers * self.importance.num_heads
        pruned = self._choose(int(self.sparsity * size + 0.5))
        object.__setattr__(self, "scales", (~pruned).double())

    def _choose(self, count: int) -> Tensor:
        """Which ``count`` heads to prune: bool [layers, heads]."""
        raise NotImplementedError

    def settings(self) -> dict[str, object]:
        # Two calibrations give transforms of the same settings that act differently.
        return {
            "sparsity": self.sparsity,
            "camera_weight": self.camera_weight,
            "pruned_heads": int((self.scales == 0).sum()),
            "scales_sha256": hashlib.sha256(self.scales.numpy().tobytes()).hexdigest(),
        }

    def check_model(self, model: Model) -> None:
        """Raise :class:`ProfileError` unless the importance was measured on ``model``."""
        self.importance.check_model(model)

    def apply(self, model: Model) -> TransformRun:
        """Prune ``model`` until the context is left.

        Raises:
            AlreadySparsifiedError: another method is at work in the model.
            ProfileError: the importance was measured on another model.
        """
        self.check_model(model)
        return prune_heads(model, self.scales)


def lowest(values: Tensor, count: int) -> Tensor:
    """Which ``count`` entries of ``values`` are lowest, the first of equal ones: bool, alike."""
    order = values.flatten().argsort(stable=True)
    chosen = torch.zeros_like(order, dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen.view(values.shape)
