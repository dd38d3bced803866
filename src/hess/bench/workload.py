"""What attention is timed on: token layouts, inputs and block lists, all from a seed."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from hess.allocation import allocate
from hess.attention.block_mask import BlockMask
from hess.attention.layout import TokenLayout
from hess.attention.pooled_scores import PooledScores, pool_scores
from hess.attention.pooling import num_blocks
from hess.attention.selection import baseline_counts, select_blocks
from hess.errors import ConfigError

Budgets = Literal["equal", "hess", "reversed"]
Source = Literal["random", "pooled"]

VGGT_GRID = (37, 37)
"""Patches of a view of 518 x 518 pixels, the size VGGT was trained for: 1,369."""
VGGT_SPECIAL = 5

_NOISE = 1.0
_SHARPNESS = 1.5


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One attention: its tokens, heads and precision. Defaults are VGGT's.

    Args:
        layout: token order.
        dtype: of queries, keys and values.
        heads, head_dim: of the attention.
        block_size_q, block_size_kv: tile of the block map.
        seed: of the inputs.
    """

    layout: TokenLayout
    dtype: torch.dtype
    heads: int = 16
    head_dim: int = 64
    block_size_q: int = 128
    block_size_kv: int = 64
    seed: int = 0

    @staticmethod
    def views(num_views: int, **sizes: object) -> "Workload":
        """VGGT's attention over so many views."""
        grid_h, grid_w = VGGT_GRID
        layout = TokenLayout(
            num_views=num_views, grid_h=grid_h, grid_w=grid_w, num_special=VGGT_SPECIAL
        )
        return Workload(layout=layout, **sizes)  # type: ignore[arg-type]

    @staticmethod
    def tokens(num_tokens: int, **sizes: object) -> "Workload":
        """Attention over so many tokens, at least 2, of which one is special: budgets may leave
        rows without a block, which then see that."""
        layout = TokenLayout(num_views=1, grid_h=1, grid_w=num_tokens - 1, num_special=1)
        return Workload(layout=layout, **sizes)  # type: ignore[arg-type]

    @property
    def block_sizes(self) -> tuple[int, int]:
        return self.block_size_q, self.block_size_kv

    @property
    def precision(self) -> str:
        """The type in words."""
        return str(self.dtype).removeprefix("torch.")

    def as_dict(self) -> dict[str, object]:
        """What rows say about it."""
        return {
            "dtype": self.precision,
            "views": self.layout.num_views,
            "tokens": self.layout.num_tokens,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "seed": self.seed,
        }

    @cached_property
    def map_size(self) -> tuple[int, int]:
        """Query blocks and key blocks of one head."""
        patches = self.layout.num_patch_tokens
        return num_blocks(patches, self.block_size_q), num_blocks(patches, self.block_size_kv)

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [1, heads, S, head_dim].

        Queries and keys describe places: a query matches its own place in every view, under a
        camera that drifts from view to view, as in a photographed scene. Heads differ in how
        closely they look. All is blurred by noise.
        """
        generator = torch.Generator(device).manual_seed(self.seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        places = self._places(randn(self.layout.num_views, 2) * 0.1)
        reach = torch.logspace(-1, 0.5, self.heads, device=device)  # in widths of a view
        waves = randn(self.heads, 2, self.head_dim // 2) / reach[:, None, None]
        angles = places @ waves
        features = _SHARPNESS * torch.cat([angles.cos(), angles.sin()], dim=-1)[None]
        shape = features.shape
        q, k = ((features + _NOISE * randn(*shape)).to(self.dtype) for _ in range(2))
        return q, k, randn(*shape).to(self.dtype)

    def _places(self, drifts: Tensor) -> Tensor:
        """Where every token looks, in widths of a view: [S, 2]; special tokens at the corner."""
        layout, device = self.layout, drifts.device
        rows = torch.arange(layout.grid_h, device=device) / layout.grid_w
        columns = torch.arange(layout.grid_w, device=device) / layout.grid_w
        patches = torch.cartesian_prod(rows, columns)
        view = torch.cat([patches.new_zeros(layout.num_special, 2), patches])
        return (view + drifts.cumsum(0)[:, None]).flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class Lists:
    """Which blocks are kept.

    Args:
        sparsity: dropped share of all query-key products, in [0, 1). Special tokens are never
            dropped, as queries or as keys.
        budgets: "equal" for all heads; "hess": 3 of 16 heads nearly dense and 13 sparse, with
            as many blocks in all; "reversed": the same lists, heads launched shortest first.
        source: "pooled" lists hold the most probable blocks of the pooled attention map, "random"
            ones any.

    Raises:
        ConfigError: a parameter is out of range.
    """

    sparsity: float
    budgets: Budgets = "equal"
    source: Source = "pooled"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"sparsity must lie in [0, 1), found {self.sparsity}")
        for value, known in ((self.budgets, Budgets), (self.source, Source)):
            if value not in get_args(known):
                raise ConfigError(f"expected one of {get_args(known)}, found {value!r}")

    def head_budgets(self, work: Workload) -> Tensor:
        """Blocks of every head: int64 [heads].

        Raises:
            ConfigError: special tokens alone are more than may be kept.
        """
        patches, tokens = work.layout.num_patch_tokens, work.layout.num_tokens
        density = 1 - self.sparsity * (tokens / patches) ** 2
        if density <= 0:
            raise ConfigError(
                f"sparsity {self.sparsity} drops more than the patches of {work.layout}"
            )
        size = work.map_size[0] * work.map_size[1]
        total = torch.tensor(round(work.heads * size * density))
        if self.budgets == "equal" or self.sparsity == 0:
            return allocate(total, torch.ones(work.heads), size)
        # Three heads in sixteen share 70 % of the blocks, but none has more than 95 % of its map.
        favoured = max(1, 3 * work.heads // 16)
        weights = torch.full((work.heads,), 0.3 / max(1, work.heads - favoured))
        generator = torch.Generator().manual_seed(work.seed)
        chosen = torch.randperm(work.heads, generator=generator)[:favoured]
        weights[chosen] = 0.7 / favoured
        return allocate(total, weights, max(round(0.95 * size), -(-int(total) // work.heads)))

    def scores(self, work: Workload, q: Tensor, k: Tensor) -> PooledScores:
        """What the blocks are chosen by: the pooled map of ``q`` and ``k``, or a random one."""
        if self.source == "pooled":
            return pool_scores(q, k, work.layout, *work.block_sizes)
        generator = torch.Generator(q.device).manual_seed(work.seed)
        q_mean, k_mean = (
            torch.randn(
                *(1, work.heads, blocks, work.head_dim), generator=generator, device=q.device
            )
            for blocks in work.map_size
        )
        # Keys of one length: none is everybody's choice.
        return PooledScores(q_mean=q_mean, k_mean=F.normalize(k_mean, dim=-1), scale=1.0)

    def select(self, work: Workload, q: Tensor, k: Tensor) -> BlockMask:
        """Pool, and choose blocks within the budgets of the heads, all rows of a head alike."""
        pooled = self.scores(work, q, k)
        baseline = baseline_counts(pooled, self.sparsity, None)
        return select_blocks(pooled, self.head_budgets(work)[None], baseline, "equal")
