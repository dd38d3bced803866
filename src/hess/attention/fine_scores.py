"""A closer estimate of the attention between blocks: each block is pooled in several parts.

The mean over a whole block hides what only some of its queries look for, or only some of its keys
offer. Here queries and keys are averaged over parts of a block, a softmax runs over all parts of
all blocks, and the probability of a block is what its parts get, mean over the parts of the
queries. With parts of one token that is the exact share of the block in the attention to patches.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from hess.attention.layout import TokenLayout
from hess.attention.pooled_scores import PooledScores, pool_scores, pool_tokens
from hess.attention.pooling import num_blocks
from hess.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class FineScores(PooledScores):
    """Pooled scores whose logits are logarithms of closer probabilities, in chunks as those.

    Args:
        q_mean, k_mean: means over parts: [B, heads, parts, d].
        v_mean: values, likewise.
        k_special, v_special: keys and values of special tokens, one by one: [B, heads, special, d].
        coarse: the scores by whole blocks.
        split: parts of a block.
        part_size_q, part_size_kv: tokens of a part.
        num_tokens: patch tokens; the last part may have fewer than the others.
    """

    v_mean: Tensor
    k_special: Tensor
    v_special: Tensor
    coarse: PooledScores
    split: int
    part_size_q: int
    part_size_kv: int
    num_tokens: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.coarse.shape

    @property
    def entries_per_logit(self) -> int:
        return self.split**2

    @cached_property
    def flat_values(self) -> tuple[Tensor, Tensor]:
        """Values of parts [B * heads, parts, d], and of special tokens; NaN is 0, as in keys."""
        v, special = (
            x.flatten(0, 1).nan_to_num(0, 0, 0).to(self.v_mean.dtype)
            for x in (self.v_mean, self.v_special)
        )
        return v, special

    def part_probs(self, heads: slice, q_blocks: slice | Tensor) -> tuple[Tensor, Tensor]:
        """How parts of queries attend, to parts of keys and to special tokens:
        [heads, parts of the query blocks, parts] and [heads, ..., special]."""
        logits, q = self._part_logits(heads, q_blocks)
        special = self.k_special.flatten(0, 1)[heads].nan_to_num(0, 0, 0).to(q.dtype)
        with torch.autocast(self.device.type, enabled=False):
            probs = torch.cat([logits, q @ special.mT], dim=-1).softmax(-1)
        return probs[..., : logits.shape[-1]], probs[..., logits.shape[-1] :]

    def by_key_block(self, x: Tensor) -> Tensor:
        """[..., parts of all keys] to [..., kv_blocks, split], with zeros for missing parts."""
        x = F.pad(x, (0, self.shape[3] * self.split - x.shape[-1]))
        return x.unflatten(-1, (-1, self.split))

    def mean_over_queries(self, x: Tensor, q_blocks: slice | Tensor) -> Tensor:
        """[heads, parts of the query blocks, n] to the mean over tokens [heads, blocks, n]."""
        weights = self._part_tokens[0][self._parts_in(q_blocks)]
        total = weights.view(-1, self.split).sum(1)[:, None]
        return (x * weights[:, None]).unflatten(1, (-1, self.split)).sum(2) / total

    def _logits(self, heads: slice, q_blocks: slice | Tensor) -> Tensor:
        logits, _ = self._part_logits(heads, q_blocks)
        by_key_block = self.by_key_block(logits.softmax(-1)).sum(-1)
        by_block = self.mean_over_queries(by_key_block, q_blocks)
        return by_block.clamp_min(torch.finfo(by_block.dtype).tiny).log().flatten(0, 1)

    def _part_logits(self, heads: slice, q_blocks: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Logits of all tokens of a part together, and the scaled queries behind them. A part
        beyond the last query repeats that one."""
        q, k = self._flat_means
        parts = self._parts_in(q_blocks).clamp(max=q.shape[1] - 1)
        queries = q[heads, parts]
        with torch.autocast(self.device.type, enabled=False):
            return queries @ k[heads].mT + self._part_tokens[1].log(), queries

    def _parts_in(self, q_blocks: slice | Tensor) -> Tensor:
        blocks = torch.arange(self.shape[2], device=self.device)[q_blocks]
        parts = blocks[:, None] * self.split + torch.arange(self.split, device=self.device)
        return parts.flatten()

    @cached_property
    def _part_tokens(self) -> tuple[Tensor, Tensor]:
        """Tokens of each part, as weights: of queries up to whole blocks, of keys."""
        sizes = []
        for mean, size in ((self.q_mean, self.part_size_q), (self.k_mean, self.part_size_kv)):
            tokens = torch.full((mean.shape[2],), float(size), dtype=mean.dtype)
            tokens[-1] = self.num_tokens - size * (mean.shape[2] - 1)
            sizes.append(tokens.to(mean.device))
        q_parts, k_parts = sizes
        return F.pad(q_parts, (0, self.shape[2] * self.split - len(q_parts))), k_parts


def pool_fine_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    block_size_q: int,
    block_size_kv: int,
    split: int,
) -> FineScores:
    """As :func:`pool_scores`, with each block pooled in ``split`` parts, and values.

    Raises:
        LayoutError: ``q``, ``k`` or ``v`` does not fit ``layout``.
        ConfigError: a block size is below 1 or cannot be split into equal parts.
    """
    if split < 1 or block_size_q % split or block_size_kv % split:
        raise ConfigError(
            f"blocks of {block_size_q} and {block_size_kv} tokens cannot be pooled in {split} "
            "equal parts; take a divisor of both"
        )
    size_q, size_kv = block_size_q // split, block_size_kv // split
    fine = pool_scores(q, k, layout, size_q, size_kv)
    special = layout.special_index.to(k.device)
    return FineScores(
        q_mean=fine.q_mean,
        k_mean=fine.k_mean,
        scale=fine.scale,
        v_mean=pool_tokens(v, layout, size_kv),
        k_special=k[:, :, special],
        v_special=v[:, :, special],
        coarse=pool_scores(q, k, layout, block_size_q, block_size_kv),
        split=split,
        part_size_q=size_q,
        part_size_kv=size_kv,
        num_tokens=layout.num_patch_tokens,
    )


def parts_of(block_size_q: int, block_size_kv: int, at_most: int) -> int:
    """Into how many equal parts blocks of both sizes can be split, up to ``at_most``.

    Raises:
        ConfigError: a block size is below 1.
    """
    for size in (block_size_q, block_size_kv):
        num_blocks(0, size)
    divisors = [d for d in range(1, at_most + 1) if not block_size_q % d and not block_size_kv % d]
    return divisors[-1]
