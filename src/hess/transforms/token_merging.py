"""Token merging as in FastVGGT (arXiv 2509.02560): similar tokens share one global attention."""

import math
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hess.attention.dense import dense_attention
from hess.attention.layout import TokenLayout
from hess.errors import ConfigError, LayoutError
from hess.models.base import Model
from hess.models.layers import Attention, Rope
from hess.models.swap import StandIn, dense_sites
from hess.sparsification import SparsityStats
from hess.transforms.base import TransformRun

SIMILARITIES_PER_CHUNK = 2**24
"""Entries of the similarity matrix that are held at a time."""


@dataclass(frozen=True, kw_only=True)
class TokenMerging:
    """Average the most similar patch tokens before each global attention, copy back after it.

    In every view but the reference, one random patch of each ``cell`` x ``cell`` square is a
    destination, and the ``protected`` share of patches that differ most from the mean of their
    view stay as they are; all other patches may be merged into the destination that is most
    similar. Those of highest similarity are. Special tokens are never merged.

    Features are the attention's input; queries, keys and values (rotated already) are averaged,
    each over all tokens that became one. Similarity is that of the cosine.

    Args:
        merge_ratio: share of all tokens to merge away, in [0, 1); fewer if there are no more
            that may be. 0 leaves the attention dense.
        first_layer: global layer, from 0, from which on tokens are merged.
        cell: side in patches of the squares that have one destination each, at least 1.
        protected: share of the patches of a view, in [0, 1].
        reference_view: whether all patches of the first view are destinations, as they are the
            world's frame in VGGT. In models where no view leads it is a choice.
        seed: of the random destinations; they differ between layers and views, and depend on
            nothing else.

    Raises:
        ConfigError: a parameter is out of range.
    """

    merge_ratio: float
    first_layer: int = 0
    cell: int = 2
    protected: float = 0.1
    reference_view: bool = True
    seed: int = 0
    name: ClassVar[str] = "token_merging"

    def __post_init__(self) -> None:
        if not 0 <= self.merge_ratio < 1:
            raise ConfigError(f"merge_ratio must lie in [0, 1), found {self.merge_ratio}")
        if self.first_layer < 0:
            raise ConfigError(f"first_layer must be at least 0, found {self.first_layer}")
        if self.cell < 1:
            raise ConfigError(f"cell must be at least 1 patch, found {self.cell}")
        if not 0 <= self.protected <= 1:
            raise ConfigError(f"protected must lie in [0, 1], found {self.protected}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must lie in [0, 2^32), found {self.seed}")

    def settings(self) -> dict[str, object]:
        return asdict(self)

    def check_model(self, model: Model) -> None:
        """Raise :class:`ConfigError` if ``first_layer`` is past the last global layer."""
        layers = len(model.global_attention_sites())
        if self.first_layer >= layers:
            raise ConfigError(
                f"first_layer must be one of the global layers 0 to {layers - 1}, found "
                f"{self.first_layer}"
            )

    def apply(self, model: Model) -> TransformRun:
        """Merge tokens in ``model`` until the context is left.

        In the statistics, the flop saving is the dropped share of all query-key products; the
        block sparsity that of the products of patch queries, as if blocks were single tokens.
        Finding the similar tokens is not counted.

        Raises:
            AlreadySparsifiedError: another method is at work in the model.
            ConfigError: ``first_layer`` is past the last global layer.
        """
        self.check_model(model)
        layers = range(self.first_layer, len(model.global_attention_sites()))
        stats = SparsityStats.of(model, layers)
        replacements = [
            (site, MergingAttention(dense, site.layer_idx, self, stats))
            for site, dense in dense_sites(model, layers)
        ]
        return TransformRun(replacements, stats)


class MergingAttention(StandIn):
    """A global attention over merged tokens."""

    def __init__(
        self, dense: Attention, layer_idx: int, settings: TokenMerging, stats: SparsityStats
    ) -> None:
        super().__init__(dense)
        self._layer_idx = layer_idx
        self._settings = settings
        self._stats = stats

    def forward(
        self, x: Tensor, rope: Rope | None = None, layout: TokenLayout | None = None
    ) -> Tensor:
        """Attention over ``x`` [B, S, dim] in the order of ``layout``.

        Raises:
            LayoutError: ``layout`` is missing or does not fit ``x``.
        """
        if layout is None:
            raise LayoutError("token merging needs the token layout, found None")
        layout.check(x)
        roles = token_roles(x, layout, self._settings, self._layer_idx)
        # In whole tokens, so that every scene of the batch has as many left.
        wanted = int(self._settings.merge_ratio * layout.num_tokens + 0.5)
        count = min(wanted, roles.sources.shape[1])
        self._record(x, layout, count)
        if count == 0:
            return self.dense(x, rope, layout)
        merge = most_similar(x, roles, count)
        q, k, v = (merge.average(t) for t in self.dense.project(x, rope))
        return merge.copy_back(self.dense.merge(dense_attention(q, k, v)))

    def _record(self, x: Tensor, layout: TokenLayout, count: int) -> None:
        tokens, patches = layout.num_tokens, layout.num_patch_tokens
        kept = tokens - count
        of_patches = 1 - (patches - count) * kept / (patches * tokens)
        of_all = 1 - kept**2 / tokens**2
        shape = len(x), self.dense.num_heads
        self._stats.record(
            self._layer_idx,
            x.new_full(shape, of_patches, dtype=torch.float64),
            x.new_full(shape, of_all, dtype=torch.float64),
            "dense",
        )


@dataclass(frozen=True, kw_only=True)
class TokenRoles:
    """Tokens that may be merged and those they may be merged into; all others stay.

    Args:
        sources: int64 [B, number of sources], ascending.
        destinations: int64 [number of destinations], ascending.
    """

    sources: Tensor
    destinations: Tensor


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Which tokens become one.

    Args:
        place: int64 [B, S], where each token is among the kept ones.
        num_kept: tokens left.
    """

    place: Tensor
    num_kept: int

    def average(self, x: Tensor) -> Tensor:
        """Means of the tokens that become one: [B, heads, S, d] -> [B, heads, num_kept, d]."""
        accurate = x.to(torch.promote_types(x.dtype, torch.float32))
        sums = accurate.new_zeros(*x.shape[:2], self.num_kept, x.shape[-1])
        sums.scatter_add_(2, self.place[:, None, :, None].expand_as(x), accurate)
        sizes = accurate.new_zeros(len(x), self.num_kept)
        sizes.scatter_add_(1, self.place, torch.ones_like(self.place, dtype=sizes.dtype))
        return (sums / sizes[:, None, :, None]).to(x.dtype)

    def copy_back(self, x: Tensor) -> Tensor:
        """Every token gets what became of it: [B, num_kept, dim] -> [B, S, dim]."""
        return x.gather(1, self.place[..., None].expand(-1, -1, x.shape[-1]))


def token_roles(
    x: Tensor, layout: TokenLayout, settings: TokenMerging, layer_idx: int
) -> TokenRoles:
    """Who may be merged into whom, from the features ``x`` [B, S, dim]."""
    is_destination = _random_per_cell(layout, settings, layer_idx)
    if settings.reference_view:
        is_destination[0] = True
    is_destination = is_destination.to(x.device)

    patches = F.normalize(x[:, layout.patch_index.to(x.device)].float(), dim=-1)
    patches = patches.unflatten(1, (layout.num_views, -1))  # [B, views, patches, dim]
    means = F.normalize(patches.mean(2, keepdim=True), dim=-1)
    likeness = (patches * means).sum(-1).masked_fill(is_destination, math.inf)
    count = int(settings.protected * likeness.shape[-1] + 0.5)
    salient = torch.zeros_like(likeness, dtype=torch.bool)
    salient.scatter_(2, likeness.argsort(dim=-1, stable=True)[..., :count], True)

    is_source = ~(salient | is_destination).flatten(1)
    patch_index = layout.patch_index.to(x.device).expand(len(x), -1)
    return TokenRoles(
        sources=patch_index[is_source].view(len(x), -1),
        destinations=patch_index[0][is_destination.flatten()],
    )


def most_similar(x: Tensor, roles: TokenRoles, count: int) -> Merge:
    """Merge the ``count`` sources that are most similar to a destination into it.

    Args:
        x: features [B, S, dim].
        roles: which tokens are sources and destinations.
        count: at most the number of sources; of equals the first tokens are taken.
    """
    features = F.normalize(x.float(), dim=-1)
    targets = features[:, roles.destinations].mT
    sources = features.gather(1, roles.sources[..., None].expand(-1, -1, x.shape[-1]))
    rows = max(1, SIMILARITIES_PER_CHUNK // (len(x) * targets.shape[-1]))
    best = [(chunk @ targets).max(-1) for chunk in sources.split(rows, dim=1)]
    similarity = torch.cat([b.values for b in best], dim=1)
    nearest = roles.destinations[torch.cat([b.indices for b in best], dim=1)]

    chosen = similarity.argsort(dim=1, descending=True, stable=True)[:, :count]
    merged, into = roles.sources.gather(1, chosen), nearest.gather(1, chosen)
    is_kept = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    is_kept.scatter_(1, merged, False)
    place = is_kept.cumsum(1) - 1
    place.scatter_(1, merged, place.gather(1, into))
    return Merge(place=place, num_kept=x.shape[1] - count)


def _random_per_cell(layout: TokenLayout, settings: TokenMerging, layer_idx: int) -> Tensor:
    """One patch of every cell of every view: bool [views, patches of a view], on the CPU."""
    cells_per_row = -(-layout.grid_w // settings.cell)
    rows = torch.arange(layout.grid_h) // settings.cell
    columns = torch.arange(layout.grid_w) // settings.cell
    cell = (rows[:, None] * cells_per_row + columns).flatten()
    generator = torch.Generator().manual_seed(settings.seed)
    seeds = torch.randint(2**32, (layer_idx + 1,), generator=generator)
    generator.manual_seed(int(seeds[-1]))
    lot = torch.rand(layout.num_views, len(cell), generator=generator, dtype=torch.float64)
    cell = cell.expand(layout.num_views, -1)
    highest = torch.zeros_like(lot).scatter_reduce_(1, cell, lot, "amax")
    return lot == highest.gather(1, cell)
