"""What keeping one more block is worth, over all heads and rows of a layer.

Leaving blocks out of a row and normalising the rest moves the output by about the probability m
that is missed. If the harm grows with the square of the move, weighted by how sensitive the head
is, the harm of a layer is ``sum over heads and rows of weight * m²``. The **gain** of the next
block, of probability p, is what it takes off: ``weight * (m² - (m - p)²)``, which is
``weight * p * (2m - p)``. In a row both p and m fall from block to block, and so do the gains:
taking the blocks of a layer in their order makes the harm as small as it can be, whatever the
budget.
"""

import torch
from torch import Tensor

from hess.attention.pooled_scores import PooledScores
from hess.attention.torch_selection import largest

SAMPLED_ENTRIES = 2**22
"""Gains that are sorted to find how much a block must gain; smaller layers are sorted whole."""


def ranked_gains(logits: Tensor, weights: Tensor) -> Tensor:
    """Gains of the blocks of each row, from the most probable to the least.

    Args:
        logits: [..., rows, kv_blocks].
        weights: [...], not negative, of each row's head.

    Returns:
        [..., rows, kv_blocks], descending within a row.
    """
    probs = largest(logits.softmax(-1), logits.shape[-1])
    missed = (1 - probs.cumsum(-1)).clamp_min(0)
    return probs * (probs + 2 * missed) * weights[..., None, None]


def gain_counts(pooled: PooledScores, weights: Tensor, total: Tensor) -> Tensor:
    """How many blocks of each row are among the ``total`` of a layer that gain most.

    The least gain that still counts is found on all rows, or on rows spread evenly where there
    are more than :data:`SAMPLED_ENTRIES` gains; so the counts add up to ``total`` but for ties
    and, in large layers, about one per cent.

    Args:
        weights: float64 [B, heads], not negative.
        total: int64 [B], blocks to keep in the layer.

    Returns:
        int64 [B, heads, q_blocks].
    """
    batch, heads, q_blocks, kv_blocks = pooled.shape
    weights = weights.to(pooled.device, pooled.q_mean.dtype)
    entries = pooled.entries_at_once
    sample = pooled.sampled_rows(max(8, SAMPLED_ENTRIES // (batch * heads * kv_blocks)), entries)
    share = sample.shape[2] / q_blocks
    gains = ranked_gains(sample, weights).flatten(1)
    gains = largest(gains, gains.shape[1])
    rank = (total.to(pooled.device) * share).round().long().clamp(1, gains.shape[1]) - 1
    least = gains.gather(1, rank[:, None])[:, :, None, None]
    counts = [
        (ranked_gains(logits, weights) >= least).sum(-1)
        for _, logits in pooled.row_chunks(entries)
    ]
    return torch.cat(counts, dim=2)


def joint_counts(pooled: PooledScores, weights: Tensor, totals: Tensor) -> Tensor:
    """How many blocks of each head are among the ``totals`` of a query block that have the
    largest ``weight * p`` over all heads; ties to the lower head, then the lower rank.

    Args:
        weights: float64 [heads], not negative.
        totals: int64 [B, q_blocks], blocks that all heads together keep for a query block.

    Returns:
        int64 [B, heads, q_blocks].
    """
    weights = weights.to(pooled.device, pooled.q_mean.dtype)[:, None, None]
    totals = totals.to(pooled.device)
    counts = []
    for rows, logits in pooled.row_chunks(pooled.entries_at_once):
        worth = largest(logits.softmax(-1), logits.shape[-1]) * weights
        batch, heads, _, kv_blocks = worth.shape
        flat = worth.transpose(1, 2).flatten(2)
        order = flat.sort(dim=-1, descending=True, stable=True).indices
        taken = torch.arange(flat.shape[-1], device=flat.device) < totals[:, rows, None]
        kept = torch.zeros_like(taken).scatter_(-1, order, taken)
        counts.append(kept.view(batch, -1, heads, kv_blocks).sum(-1).transpose(1, 2))
    return torch.cat(counts, dim=2)
