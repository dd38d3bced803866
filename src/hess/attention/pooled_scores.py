"""The estimated attention between blocks, of which only a chunk is ever held."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hess.attention import packing, triton_packing
from hess.attention.layout import TokenLayout
from hess.attention.torch_selection import ENTRIES_AT_ONCE
from hess.attention.triton_backend import why_unavailable
from hess.errors import LayoutError

ENTRIES_ON_A_GPU = 2**25
"""Logits of a chunk there, in plain torch; ranking them takes about 40 bytes for each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PooledScores:
    """Block means of queries and keys, and the logits between them, computed when asked.

    The logits of row ``(b * heads + h) * q_blocks + i`` are ``scale * q_mean[b, h, i] @
    k_mean[b, h].T``; their softmax estimates how query block i attends (``pooling.block_probs``).
    All rows together grow with the square of the tokens, so they are handed out in chunks.

    Args:
        q_mean: [B, heads, q_blocks, d] in fp32 or fp64.
        k_mean: [B, heads, kv_blocks, d], likewise.
        scale: usually ``d ** -0.5``.

    Raises:
        LayoutError: the shapes do not fit each other, or a size is 0.
    """

    q_mean: Tensor
    k_mean: Tensor
    scale: float

    def __post_init__(self) -> None:
        q, k = self.q_mean, self.k_mean
        fit = q.ndim == k.ndim == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
        if not fit or not q.numel() or not k.numel():
            raise LayoutError(
                "block means must be [B, heads, q_blocks, d] and [B, heads, kv_blocks, d], found "
                f"{list(q.shape)} and {list(k.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, q_blocks, kv_blocks)."""
        batch, heads, q_blocks, _ = self.q_mean.shape
        return batch, heads, q_blocks, self.k_mean.shape[2]

    @property
    def device(self) -> torch.device:
        return self.q_mean.device

    @property
    def entries_per_logit(self) -> int:
        """Numbers that are held at once for each logit."""
        return 1

    @property
    def entries_at_once(self) -> int:
        """Logits of a chunk that plain torch works on."""
        return ENTRIES_AT_ONCE if self.device.type == "cpu" else ENTRIES_ON_A_GPU

    def chunks(self, max_entries: int) -> Iterator[tuple[slice, Tensor]]:
        """All rows in order, as pairs of a slice of rows and their logits [rows, kv_blocks].

        A chunk is some whole heads or, where one head is too large, some rows of a head. If
        everything fits one chunk it is computed once and kept; otherwise at every call again.

        Args:
            max_entries: logits that a chunk may have; a single row may have more.
        """
        batch, heads, q_blocks, kv_blocks = self.shape
        if batch * heads * q_blocks * kv_blocks * self.entries_per_logit <= max_entries:
            yield slice(0, batch * heads * q_blocks), self._whole
            return
        for some_heads, rows in self.pieces(max_entries):
            logits = self._logits(some_heads, rows)
            first = some_heads.start * q_blocks + rows.start
            yield slice(first, first + len(logits)), logits

    def pieces(self, max_entries: int) -> Iterator[tuple[slice, slice]]:
        """Which heads and which of their query blocks make up each of the :meth:`chunks`."""
        batch, heads, q_blocks, kv_blocks = self.shape
        max_entries //= self.entries_per_logit
        some_rows = min(q_blocks, max(1, max_entries // kv_blocks))
        some_heads = max(1, max_entries // (q_blocks * kv_blocks))
        for h in range(0, batch * heads, some_heads):
            for i in range(0, q_blocks, some_rows):
                yield slice(h, h + some_heads), slice(i, i + some_rows)

    def row_chunks(self, max_entries: int) -> Iterator[tuple[slice, Tensor]]:
        """All heads of some query blocks at a time: slices of them, and logits
        [B, heads, query blocks, kv_blocks].

        Args:
            max_entries: logits that a chunk may have; one query block of all heads may have more.
        """
        batch, heads, q_blocks, kv_blocks = self.shape
        max_entries //= self.entries_per_logit
        at_once = max(1, max_entries // (batch * heads * kv_blocks))
        for i in range(0, q_blocks, at_once):
            rows = slice(i, min(i + at_once, q_blocks))
            logits = self._logits(slice(None), rows)
            yield rows, logits.view(batch, heads, -1, kv_blocks)

    def sampled_rows(self, count: int, max_entries: int) -> Tensor:
        """Logits of at most ``count`` query blocks of every head, spread evenly:
        [B, heads, query blocks, kv_blocks].

        Args:
            max_entries: as for :meth:`row_chunks`, while they are made.
        """
        batch, heads, q_blocks, kv_blocks = self.shape
        count = min(count, q_blocks)
        at_once = max(1, max_entries // (self.entries_per_logit * batch * heads * kv_blocks))
        rows = (torch.arange(count, device=self.device) * 2 + 1) * q_blocks // (2 * count)
        logits = [self._logits(slice(None), part) for part in rows.split(at_once)]
        return torch.cat([x.view(batch, heads, -1, kv_blocks) for x in logits], dim=2)

    @cached_property
    def _whole(self) -> Tensor:
        return self._logits(slice(None), slice(None))

    def _logits(self, heads: slice, q_blocks: slice | Tensor) -> Tensor:
        """Logits [heads * q_blocks, kv_blocks] of some heads of all batch elements."""
        q, k = self._flat_means
        # Autocast would bring this product back to half precision.
        with torch.autocast(self.device.type, enabled=False):
            return (q[heads, q_blocks] @ k[heads].mT).flatten(0, 1)

    @cached_property
    def _flat_means(self) -> tuple[Tensor, Tensor]:
        """Means [B * heads, blocks, d]. A NaN in a token reaches the output by its attention;
        here it becomes 0, so that all rows can be put in order."""
        q, k = (x.flatten(0, 1).nan_to_num(0, 0, 0) for x in (self.q_mean, self.k_mean))
        return q * self.scale, k


def pool_scores(
    q: Tensor, k: Tensor, layout: TokenLayout, block_size_q: int, block_size_kv: int
) -> PooledScores:
    """Average queries and keys over their patch blocks; special tokens take no part.

    Args:
        q, k: [B, heads, S, d] in the order of ``layout``, after QK-norm and rotary positions.

    Raises:
        LayoutError: ``q`` or ``k`` does not fit ``layout``.
        ConfigError: a block size is below 1.
    """
    return PooledScores(
        q_mean=pool_tokens(q, layout, block_size_q),
        k_mean=pool_tokens(k, layout, block_size_kv),
        scale=q.shape[-1] ** -0.5,
    )


def pool_tokens(x: Tensor, layout: TokenLayout, block_size: int) -> Tensor:
    """Means over patch blocks: [B, heads, S, d] to [B, heads, blocks, d], in fp32 or fp64.

    Raises:
        LayoutError: ``x`` does not fit ``layout``.
        ConfigError: a block size is below 1.
    """
    on_gpu = x.is_cuda and why_unavailable(x, x, x) is None
    pool = triton_packing.pool_queries if on_gpu else packing.pool_queries
    return pool(x, layout, block_size)
