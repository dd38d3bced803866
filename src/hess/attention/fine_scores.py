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
from hess.attention.pooled_scores import PooledScores, pool_scores
from hess.attention.pooling import num_blocks
from hess.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class FineScores(PooledScores):
    """Pooled scores whose logits are logarithms of closer probabilities, in chunks as those.

    Args:
        q_mean, k_mean: means over parts: [B, heads, parts, d].
        coarse: the scores by whole blocks.
        split: parts of a block.
        part_size_q, part_size_kv: tokens of a part.
        num_tokens: patch tokens; the last part may have fewer than the others.
    """

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

    def _logits(self, heads: slice, q_blocks: slice | Tensor) -> Tensor:
        q, k = self._flat_means
        q_parts, k_parts = self._part_tokens
        blocks = torch.arange(self.shape[2], device=q.device)[q_blocks]
        parts = blocks[:, None] * self.split + torch.arange(self.split, device=q.device)
        weights = q_parts[parts.flatten()]
        parts = parts.flatten().clamp(max=q.shape[1] - 1)
        with torch.autocast(self.device.type, enabled=False):
            fine = (q[heads, parts] @ k[heads].mT + k_parts.log()).softmax(-1)
        fine = F.pad(fine, (0, self.shape[3] * self.split - fine.shape[-1]))
        by_key_block = fine.unflatten(-1, (-1, self.split)).sum(-1) * weights[:, None]
        by_block = by_key_block.unflatten(1, (-1, self.split)).sum(2)
        total = weights.view(-1, self.split).sum(1)[:, None]
        return (by_block / total).clamp_min(torch.finfo(q.dtype).tiny).log().flatten(0, 1)

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
    q: Tensor, k: Tensor, layout: TokenLayout, block_size_q: int, block_size_kv: int, split: int
) -> FineScores:
    """As :func:`pool_scores`, with each block pooled in ``split`` parts.

    Raises:
        LayoutError: ``q`` or ``k`` does not fit ``layout``.
        ConfigError: a block size is below 1 or cannot be split into equal parts.
    """
    if split < 1 or block_size_q % split or block_size_kv % split:
        raise ConfigError(
            f"blocks of {block_size_q} and {block_size_kv} tokens cannot be pooled in {split} "
            "equal parts; take a divisor of both"
        )
    parts = block_size_q // split, block_size_kv // split
    fine = pool_scores(q, k, layout, *parts)
    return FineScores(
        q_mean=fine.q_mean,
        k_mean=fine.k_mean,
        scale=fine.scale,
        coarse=pool_scores(q, k, layout, block_size_q, block_size_kv),
        split=split,
        part_size_q=parts[0],
        part_size_kv=parts[1],
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
