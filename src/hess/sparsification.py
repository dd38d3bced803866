"""Make the global attention of a model block-sparse, and dense again."""

import logging
from collections.abc import Collection

import torch
from torch import Tensor

from hess.attention.block_mask import BlockMask
from hess.attention.block_sparse import BackendChoice, block_sparse_attention, check_backend
from hess.attention.dense import dense_attention
from hess.attention.fine_scores import parts_of, pool_fine_scores
from hess.attention.layout import TokenLayout
from hess.attention.pooled_scores import PooledScores, pool_scores
from hess.attention.sparsity import block_sparsity, flop_saving
from hess.errors import ConfigError, HessError, LayoutError
from hess.models.base import GlobalAttentionSite, Model
from hess.models.layers import Attention, Rope
from hess.models.swap import StandIn, Swap, dense_sites
from hess.policies.base import Policy

_log = logging.getLogger(__name__)

BREAK_EVEN_TOKENS = {"cpu": 1024}
"""Per type of device, tokens from which on a sparse global attention, its choice of blocks
included, was measured to be quicker than a dense one. On GPUs it was not measured."""


class SparsityStats:
    """What was dropped, averaged over all scenes seen, per global layer and head.

    Layers that were left dense count with 0. All numbers raise :class:`HessError` until every
    sparsified layer has run once.

    Args:
        num_layers, num_heads: global layers of the model and heads in each.
        layers: the layers that are sparsified.
    """

    def __init__(self, num_layers: int, num_heads: int, layers: Collection[int]) -> None:
        self.layers = tuple(sorted(layers))
        self._size = num_layers, num_heads
        self.reset()

    @classmethod
    def of(cls, model: Model, layers: Collection[int]) -> "SparsityStats":
        """Statistics of ``model`` with the global layers ``layers`` made sparse."""
        return cls(len(model.global_attention_sites()), model.num_heads, layers)

    def reset(self) -> None:
        """Forget all scenes."""
        self._scenes = [0] * self._size[0]
        # Per layer, both measures [2, heads] summed over scenes, on the device that found them:
        # to fetch them after every layer would make the host wait.
        self._sums: dict[int, Tensor] = {}
        self._backends: set[str] = set()

    def record(
        self, layer_idx: int, block_sparsity: Tensor, flop_saving: Tensor, backend: str
    ) -> None:
        """Add one forward pass of a layer: two measures [B, heads] and the backend that ran.

        Never waits for the device.
        """
        added = torch.stack([block_sparsity, flop_saving]).sum(1)
        if layer_idx in self._sums:
            added = added + self._sums[layer_idx].to(added.device)
        self._sums[layer_idx] = added
        self._scenes[layer_idx] += len(block_sparsity)
        self._backends.add(backend)

    def _mean(self, measure: int) -> Tensor:
        if 0 in (self._scenes[i] for i in self.layers):
            raise HessError(
                "no sparsity has been measured: run the model inside sparsify() before asking"
            )
        means = torch.zeros(self._size, dtype=torch.float64)
        for layer_idx, sums in self._sums.items():
            means[layer_idx] = sums[measure].cpu() / self._scenes[layer_idx]
        return means

    @property
    def num_scenes(self) -> int:
        """Scenes (batch elements) seen so far."""
        return max(self._scenes)

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that ran, by name."""
        return tuple(sorted(self._backends))

    @property
    def block_sparsity_per_head(self) -> Tensor:
        """Mean dropped share of the block map: float64 [layers, heads]."""
        return self._mean(0)

    @property
    def flop_saving_per_head(self) -> Tensor:
        """Mean dropped share of all attention products: float64 [layers, heads]."""
        return self._mean(1)

    @property
    def block_sparsity(self) -> float:
        """Mean of :attr:`block_sparsity_per_head` over layers and heads."""
        return self.block_sparsity_per_head.mean().item()

    @property
    def flop_saving(self) -> float:
        """Mean of :attr:`flop_saving_per_head` over layers and heads."""
        return self.flop_saving_per_head.mean().item()

    def as_dict(self) -> dict[str, object]:
        """All of it as JSON values."""
        return {
            "num_scenes": self.num_scenes,
            "layers": list(self.layers),
            "backends": list(self.backends),
            "block_sparsity": self.block_sparsity,
            "flop_saving": self.flop_saving,
            "block_sparsity_per_head": self.block_sparsity_per_head.tolist(),
            "flop_saving_per_head": self.flop_saving_per_head.tolist(),
        }

    def __str__(self) -> str:
        lines = [
            f"block sparsity {self.block_sparsity:.1%}, flop saving {self.flop_saving:.1%} "
            f"over {self.num_scenes} scenes",
            "block sparsity / flop saving in %, a line per global layer, a column per head",
        ]
        pairs = zip(self.block_sparsity_per_head, self.flop_saving_per_head, strict=True)
        for layer_idx, (blocks, flops) in enumerate(pairs):
            cells = (f"{100 * b:3.0f}/{100 * f:<3.0f}" for b, f in zip(blocks, flops, strict=True))
            lines.append(f"{layer_idx + 1:3d}: {' '.join(cells)}")
        return "\n".join(lines)


class SparseAttention(StandIn):
    """A global attention that computes the blocks which a policy chooses."""

    def __init__(
        self,
        dense: Attention,
        layer_idx: int,
        policy: Policy,
        block_size_q: int,
        block_size_kv: int,
        backend: BackendChoice,
        dense_below: int,
        stats: SparsityStats,
    ) -> None:
        super().__init__(dense)
        self._layer_idx = layer_idx
        self._policy = policy
        self._block_sizes = block_size_q, block_size_kv
        self._backend = backend
        self._dense_below = dense_below
        self._stats = stats

    def forward(
        self, x: Tensor, rope: Rope | None = None, layout: TokenLayout | None = None
    ) -> Tensor:
        """Block-sparse attention over ``x`` [B, S, dim] in the order of ``layout``.

        Raises:
            LayoutError: ``layout`` is missing or does not fit ``x``.
        """
        if layout is None:
            raise LayoutError("a sparse global attention needs the token layout, found None")
        q, k, v = self.dense.project(x, rope)
        mask = self._block_mask(q, k, v, layout)
        if mask is None:
            nothing = q.new_zeros(q.shape[:2], dtype=torch.float64)
            self._stats.record(self._layer_idx, nothing, nothing, "dense")
            return self.dense.merge(dense_attention(q, k, v))
        backend = self._backend(layout, q, k, v)
        out = block_sparse_attention(q, k, v, mask, layout, *self._block_sizes, backend=backend)
        self._stats.record(
            self._layer_idx,
            block_sparsity(mask, layout, self._block_sizes[1]),
            flop_saving(mask, layout, *self._block_sizes),
            backend,
        )
        return self.dense.merge(out)

    def _block_mask(
        self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout
    ) -> BlockMask | None:
        if not self._policy.needs_scores or layout.num_tokens < self._dense_below:
            return None
        split = parts_of(*self._block_sizes, self._policy.pool_parts)
        if split > 1:
            pooled: PooledScores = pool_fine_scores(q, k, v, layout, *self._block_sizes, split)
        else:
            pooled = pool_scores(q, k, layout, *self._block_sizes)
        return self._policy.block_mask(pooled, self._layer_idx)


class SparseRun(Swap):
    """A sparsified model: dense again on leaving the ``with`` block or after :meth:`restore`.

    Attributes:
        stats: what was dropped so far.
        policy: the policy in force.
    """

    def __init__(
        self,
        replacements: Collection[tuple[GlobalAttentionSite, SparseAttention]],
        stats: SparsityStats,
        policy: Policy,
    ) -> None:
        super().__init__(replacements)
        self.stats = stats
        self.policy = policy


def sparsify(
    model: Model,
    policy: Policy,
    *,
    layers: Collection[int] | None = None,
    block_size_q: int | None = None,
    block_size_kv: int | None = None,
    backend: str = "auto",
    dense_below: int = 0,
) -> SparseRun:
    """Replace the global attentions of ``model`` by block-sparse ones, for inference.

    The change is a swap of modules: weights and state-dict keys stay, and restoring puts the very
    same modules back.

    Args:
        model: changed in place until restored.
        policy: says which blocks each head computes.
        layers: global layers to make sparse, from 0; None: all.
        block_size_q, block_size_kv: tokens per block; None: the model's default.
        backend: how masks are computed, see ``attention.block_sparse``.
        dense_below: sequences with fewer tokens are left dense, and the statistics say so. See
            :data:`BREAK_EVEN_TOKENS`; 0: none, so that results do not depend on speed.

    Returns:
        A handle with ``stats`` and ``restore()``, to be used in a ``with`` statement or as is.

    Raises:
        AlreadySparsifiedError: the model is sparsified already.
        ProfileError: the policy was made for another model.
        ConfigError: unknown layer or backend, a block size below 1, or ``dense_below`` below 0.
        BackendUnavailableError: the named backend cannot run on the model's device and type.
    """
    sites = dense_sites(model, layers)
    policy.check_model(model)
    choose_backend = BackendChoice(backend)
    if dense_below < 0:
        raise ConfigError(f"dense_below must be at least 0 tokens, found {dense_below}")
    size_q = model.block_size_q if block_size_q is None else block_size_q
    size_kv = model.block_size_kv if block_size_kv is None else block_size_kv
    if parts_of(size_q, size_kv, policy.pool_parts) == 1 < policy.pool_parts:
        _log.warning(
            "blocks of %d and %d tokens cannot be split: %s chooses by whole blocks, "
            "which is less accurate",
            size_q,
            size_kv,
            policy.name,
        )

    stats = SparsityStats.of(model, [site.layer_idx for site, _ in sites])
    replacements = []
    for site, dense in sites:
        check_backend(backend, dense.qkv.weight.new_empty(1, dense.num_heads, 0, dense.head_dim))
        sparse = SparseAttention(
            dense, site.layer_idx, policy, size_q, size_kv, choose_backend, dense_below, stats
        )
        replacements.append((site, sparse))
    return SparseRun(replacements, stats, policy)
