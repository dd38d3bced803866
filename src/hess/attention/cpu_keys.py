"""Keys and values of the CPU backend, laid out so that copying a block is one long read.

Packed order here: all special tokens, all patches, zeros up to a whole block. Special tokens come
first, so that a partial last block is the end of what a row copies and can be cut off.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hess.attention.layout import TokenLayout

KEYS_AT_ONCE = 2048
"""Keys whose scores products hold at once, so that they stay in the cache. As this is fixed,
products come in few shapes; oneDNN spends half a millisecond on each new one."""

Pair = tuple[Tensor, Tensor]
"""Keys and values, [keys, d] each."""


class HeadKeys(NamedTuple):
    """Packed keys and values of one head.

    Args:
        k, v: [special + blocks * block_size, d].
        num_special, num_tokens: special tokens, and all tokens that are no padding.
        block_size: patches of a block.
    """

    k: Tensor
    v: Tensor
    num_special: int
    num_tokens: int
    block_size: int

    @classmethod
    def of(cls, k: Tensor, v: Tensor, layout: TokenLayout, block_size: int) -> "HeadKeys":
        """From keys and values [S, d] in token order."""
        return cls(
            k=_pack(k, layout, block_size),
            v=_pack(v, layout, block_size),
            num_special=layout.num_special_tokens,
            num_tokens=layout.num_tokens,
            block_size=block_size,
        )

    def every_key(self) -> "Row":
        """The row that sees all keys."""
        num_patches = self.num_tokens - self.num_special
        return Row(self, None, num_patches)

    def copy(self, blocks: Tensor, num_patches: int, *, special: bool = True) -> Pair:
        """The special tokens and these blocks, cut off behind so many patches."""
        k, v = (self._copy(x, blocks, num_patches, special) for x in (self.k, self.v))
        return k, v

    def _copy(self, packed: Tensor, blocks: Tensor, num_patches: int, special: bool) -> Tensor:
        lead = self.num_special if special else 0
        out = packed.new_empty(lead + len(blocks) * self.block_size, packed.shape[1])
        out[:lead] = packed[:lead]
        if len(blocks) > 0:
            listed = out[lead:].view(len(blocks), -1)
            torch.index_select(self._by_block(packed), 0, blocks, out=listed)
        return out[: lead + num_patches]

    def copy_rows(self, blocks: Tensor, num_rows: int, num_patches: int) -> Pair:
        """Likewise for rows of equally many keys, whose lists follow each other:
        [num_rows, keys, d]."""
        k, v = (self._copy_rows(x, blocks, num_rows, num_patches) for x in (self.k, self.v))
        return k, v

    def _copy_rows(
        self, packed: Tensor, blocks: Tensor, num_rows: int, num_patches: int
    ) -> Tensor:
        special = packed[: self.num_special].expand(num_rows, -1, -1)
        listed = self._by_block(packed).index_select(0, blocks)
        listed = listed.view(num_rows, -1, packed.shape[1])
        return torch.cat([special, listed[:, :num_patches]], dim=1)

    def _by_block(self, packed: Tensor) -> Tensor:
        return packed[self.num_special :].view(-1, self.block_size * packed.shape[1])


class Row(NamedTuple):
    """What a row of queries attends to: the special tokens and some blocks of a head.

    Args:
        head: of which head.
        blocks: indices of the blocks, ascending; None: all.
        num_patches: patches in them; a partial last block has fewer than others.
    """

    head: HeadKeys
    blocks: Tensor | None
    num_patches: int

    def whole(self) -> Pair:
        """All keys and values at once."""
        head = self.head
        if self.blocks is None:
            return head.k[: head.num_tokens], head.v[: head.num_tokens]
        return head.copy(self.blocks, self.num_patches)

    def parts(self) -> Iterator[Pair]:
        """About ``KEYS_AT_ONCE`` at a time, so that what is copied is used while in the cache."""
        head, size = self.head, self.head.block_size
        if self.blocks is None:
            k, v = self.whole()
            yield from zip(k.split(KEYS_AT_ONCE), v.split(KEYS_AT_ONCE), strict=True)
            return
        special = head.num_special
        alone = special > KEYS_AT_ONCE // 2
        if alone:  # many views
            k, v = head.k[:special], head.v[:special]
            yield from zip(k.split(KEYS_AT_ONCE), v.split(KEYS_AT_ONCE), strict=True)
        at_once = max(1, KEYS_AT_ONCE // size)
        first = at_once if alone else max(1, (KEYS_AT_ONCE - special) // size)
        lists = [self.blocks[:first], *self.blocks[first:].split(at_once)]
        left = self.num_patches
        for i, blocks in enumerate(lists):
            if len(blocks) == 0 and (i > 0 or alone):
                continue
            patches = min(left, len(blocks) * size)
            yield head.copy(blocks, patches, special=i == 0 and not alone)
            left -= patches


def _pack(tokens: Tensor, layout: TokenLayout, block_size: int) -> Tensor:
    special, patches = layout.num_special_tokens, layout.num_patch_tokens
    padding = -patches % block_size
    packed = tokens.new_empty(layout.num_tokens + padding, tokens.shape[1])
    views = tokens.unflatten(0, (layout.num_views, layout.tokens_per_view))
    parts = packed.split([special, patches, padding])
    parts[0].unflatten(0, (layout.num_views, -1)).copy_(views[:, : layout.num_special])
    parts[1].unflatten(0, (layout.num_views, -1)).copy_(views[:, layout.num_special :])
    parts[2].zero_()
    return packed
