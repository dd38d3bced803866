"""How the CPU backend cuts its work into pieces, which threads compute one by one."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hess.attention.block_mask import BlockMask
from hess.attention.layout import TokenLayout

DENSE_QUERIES = 256
"""Dense queries in one piece."""

LARGE_ROW = 2**21
"""Multiplications for the scores of a query block from which on it counts as large, on processors
with products of their own (see ``products``); elsewhere none does."""

LARGE_PIECE = 2**19
"""Scores from which on no large query block is added to a piece."""

SMALL_PIECE = 2**14
"""Keys from which on no small query block is added to a piece: copies shall stay in the cache."""


class Piece(NamedTuple):
    """Query blocks of one head, or some of its dense queries.

    Args:
        head: ``b * num_heads + h``.
        queries: tokens of the queries, block after block, int64.
        sizes: queries of each block.
        rows: the row of the mask that lists the keys of each block; none: one block, all keys.
        is_large: whether each block gets products of its own. If not, all of them have equally
            many queries and see equally many keys.
    """

    head: int
    queries: Tensor
    sizes: list[int]
    rows: list[int]
    is_large: bool


class Work:
    """All pieces of an attention, and the keys of each.

    Args:
        head_dim: numbers per query.
        has_large: whether large query blocks are told apart.
        others: as for a backend.
    """

    def __init__(
        self,
        mask: BlockMask,
        layout: TokenLayout,
        block_size_q: int,
        block_size_kv: int,
        head_dim: int,
        *,
        has_large: bool,
    ) -> None:
        self._mask = mask
        self._has_large = has_large
        self._layout = layout
        self._head_dim = head_dim
        self._query_blocks = layout.patch_index.split(block_size_q)
        tail_gap = -layout.num_patch_tokens % block_size_kv
        self._starts = mask.row_offsets.tolist()
        patches = mask.counts * block_size_kv - mask.selects_last * tail_gap
        self._patches_of_row: list[int] = patches.flatten().tolist()

    def num_keys(self, row: int) -> int:
        """Keys that a row of the mask sees, special tokens included."""
        return self._patches_of_row[row] + self._layout.num_special_tokens

    def num_patches(self, row: int) -> int:
        """Patches among them."""
        return self._patches_of_row[row]

    def blocks(self, row: int) -> Tensor:
        """Key blocks that a row of the mask lists: int32, ascending."""
        return self._mask.indices[self._starts[row] : self._starts[row + 1]]

    def pieces(self) -> Iterator[Piece]:
        """Heads with most blocks first, in a head the dense queries first."""
        for head in self._mask.head_order.tolist():
            yield from self._pieces_of_head(head)

    def _pieces_of_head(self, head: int) -> Iterator[Piece]:
        first_row = head * self._mask.num_q_blocks
        sizes = {row: len(block) for row, block in enumerate(self._query_blocks, first_row)}
        dense, large = [self._layout.special_index], []
        alike: dict[tuple[int, int], list[int]] = {}
        for row, size in sizes.items():
            if self._patches_of_row[row] == self._layout.num_patch_tokens:
                dense.append(self._query_blocks[row - first_row])
            elif self._is_large(size, self.num_keys(row)):
                large.append(row)
            else:
                alike.setdefault((size, self.num_keys(row)), []).append(row)

        for queries in torch.cat(dense).split(DENSE_QUERIES):
            is_large = self._is_large(len(queries), self._layout.num_tokens)
            if len(queries) > 0:
                yield Piece(head, queries, [len(queries)], [], is_large)
        groups = _cut(large, lambda row: sizes[row] * self.num_keys(row), LARGE_PIECE)
        for rows in alike.values():
            groups += _cut(rows, self.num_keys, SMALL_PIECE)
        for rows in groups:
            queries = torch.cat([self._query_blocks[row - first_row] for row in rows])
            is_large = self._is_large(sizes[rows[0]], self.num_keys(rows[0]))
            yield Piece(head, queries, [sizes[row] for row in rows], rows, is_large)

    def _is_large(self, num_queries: int, num_keys: int) -> bool:
        return self._has_large and num_queries * num_keys * self._head_dim >= LARGE_ROW


def _cut(rows: list[int], size: Callable[[int], int], enough: int) -> list[list[int]]:
    """``rows`` in runs, each ended by the row that brings its size to ``enough``."""
    runs: list[list[int]] = []
    total = enough
    for row in rows:
        if total >= enough:
            runs.append([])
            total = 0
        runs[-1].append(row)
        total += size(row)
    return runs
