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
        k_special, v_special: keys and values of special tokens: [B, heads, special, d].
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
    def values(self) -> tuple[Tensor, Tensor]:
        """Values of parts, in the order of :meth:`part_probs`, and of special tokens:
        [B * heads, split * kv_blocks, d] and [B * heads, special, d]."""
        return self._by_part(self.v_mean, self.shape[3]).flatten(1, 2), self._plain(self.v_special)

    def part_probs(self, heads: slice, q_blocks: slice | Tensor) -> tuple[Tensor, Tensor]:
        """How parts of queries attend to parts of keys, and to special tokens.

        Parts of one place within their blocks lie together, block after block, so that what
        belongs to a block is added up in long strides.

        Returns:
            [heads, split * some q_blocks, split * kv_blocks] and [heads, ..., special].
        """
        logits, q = self._part_logits(heads, q_blocks)
        with torch.autocast(self.device.type, enabled=False):
            special = q @ self.special_keys[heads].mT
        probs = torch.cat([logits, special], dim=-1).softmax(-1)
        return probs[..., : logits.shape[-1]], probs[..., logits.shape[-1] :]

    def of_key_blocks(self, x: Tensor) -> Tensor:
        """Sums over the parts of each key block: [..., split * kv_blocks] to [..., kv_blocks]."""
        return x.unflatten(-1, (self.split, -1)).sum(-2)

    def of_query_blocks(self, x: Tensor, q_blocks: slice | Tensor) -> Tensor:
        """Means over the queries of each block: [heads, split * some q_blocks, n] to
        [heads, some q_blocks, n]."""
        shares = self.query_shares[:, q_blocks, None]
        return (x.unflatten(1, (self.split, -1)) * shares).sum(1)

    def _logits(self, heads: slice, q_blocks: slice | Tensor) -> Tensor:
        logits, _ = self._part_logits(heads, q_blocks)
        probs = self.of_query_blocks(self.of_key_blocks(logits.softmax(-1)), q_blocks)
        return probs.clamp_min(torch.finfo(probs.dtype).tiny).log().flatten(0, 1)

    def _part_logits(self, heads: slice, q_blocks: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Logits of all tokens of a part together, and the scaled queries behind them."""
        queries, keys, log_tokens = self.queries_and_keys
        q = queries[heads][:, :, q_blocks].flatten(1, 2)
        with torch.autocast(self.device.type, enabled=False):
            return torch.baddbmm(log_tokens, q, keys[heads].mT), q

    @cached_property
    def queries_and_keys(self) -> tuple[Tensor, Tensor, Tensor]:
        """[B * heads, split, q_blocks, d], scaled; [B * heads, split * kv_blocks, d]; and the
        logarithm of the tokens in each part of the keys, which is -inf for none."""
        _, _, q_blocks, kv_blocks = self.shape
        queries = self._by_part(self.q_mean, q_blocks) * self.scale
        keys = self._by_part(self.k_mean, kv_blocks).flatten(1, 2)
        return queries, keys, self._tokens_of(self.part_size_kv, kv_blocks).flatten().log()

    @cached_property
    def special_keys(self) -> Tensor:
        """[B * heads, special, d]."""
        return self._plain(self.k_special)

    @cached_property
    def query_shares(self) -> Tensor:
        """Share of each part in the queries of its block: [split, q_blocks]."""
        tokens = self._tokens_of(self.part_size_q, self.shape[2])
        return tokens / tokens.sum(0)

    def _tokens_of(self, part_size: int, blocks: int) -> Tensor:
        """Tokens in each part: [split, blocks]."""
        starts = part_size * torch.arange(blocks * self.split).view(blocks, self.split).mT
        return (self.num_tokens - starts).clamp(0, part_size).to(self.q_mean)

    def _by_part(self, means: Tensor, blocks: int) -> Tensor:
        """[B, heads, parts, d] to [B * heads, split, blocks, d], with zeros for missing parts."""
        means = F.pad(self._plain(means), (0, 0, 0, blocks * self.split - means.shape[2]))
        return means.unflatten(1, (blocks, self.split)).transpose(1, 2).contiguous()

    def _plain(self, x: Tensor) -> Tensor:
        """[B, heads, n, d] to [B * heads, n, d], in the type of the means; NaN is 0, as ever."""
        return x.flatten(0, 1).to(self.q_mean).nan_to_num(0, 0, 0)


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
