"""Which blocks of a row bring its output nearest to what all blocks together would give.

The most probable blocks are not the best ones to keep: often they hold much the same values, and
the output over them alone leans their way. What counts is the output. Over the special tokens and
the blocks K that are kept it is ``(N + sum_K c_j) / (D + sum_K p_j)``, with p_j the probability of
block j, c_j its values weighted by theirs, and N and D the same of the special tokens. Its error
against the whole output o is

    ||M||² / D_K²,  M = N - D o + sum_K r_j,  r_j = c_j - p_j o,  D_K = D + sum_K p_j

and blocks are kept that make it small. All of it is estimated by parts of blocks (see
``fine_scores``), and errors are averaged over the parts of the queries: the blocks of a row must
suit all of them.

The estimate does not see how values differ within a part. That matters where many blocks are kept
and little is missed; so of a row that keeps the share x of all blocks, the first √x of these are
the most probable ones. The rest is filled in rounds: one block at a time would take too long.
"""

import torch
from torch import Tensor

from hess.attention.block_mask import BlockMask
from hess.attention.fine_scores import FineScores
from hess.attention.torch_selection import are_largest

LEAST_MASS = 1e-12
"""Probability of all that is kept, below which the output is not known."""

WORST = 1e30
"""Error of an output that is not known; a number, so that no block is chosen twice for want of
better ones."""


def select_matching(scores: FineScores, counts: Tensor, rounds: int) -> BlockMask:
    """The ``counts`` [B, heads, q_blocks] key blocks of each row that match its output.

    Args:
        rounds: in which the rest of a row is filled, at least 1. In each, blocks are chosen as if
            every one were the only one to be added.
    """
    batch, heads, q_blocks, kv_blocks = scores.shape
    row_offsets = torch.cat([counts.new_zeros(1), counts.flatten().cumsum(0)])
    head_blocks = counts.sum(-1).cpu()
    counts = counts.to(scores.device).flatten(0, 1)
    lists = [
        _matching(scores, some_heads, rows, counts[some_heads, rows], rounds).nonzero()[:, -1]
        for some_heads, rows in scores.pieces(scores.entries_at_once)
    ]
    return BlockMask(
        row_offsets=row_offsets.to(scores.device),
        indices=torch.cat(lists).int(),
        batch=batch,
        num_heads=heads,
        num_q_blocks=q_blocks,
        num_kv_blocks=kv_blocks,
        known_head_blocks=head_blocks,
    )


def _matching(
    scores: FineScores, heads: slice, q_blocks: slice, counts: Tensor, rounds: int
) -> Tensor:
    """The blocks of some rows: bool [heads, q_blocks, kv_blocks]. Comments: u counts the parts of
    the query blocks, t those of all keys, j key blocks."""
    probs, special = scores.part_probs(heads, q_blocks)  # [h, u, t], [h, u, special]
    v, v_special = (x[heads] for x in scores.flat_values)
    blocks = scores.by_key_block
    out = probs @ v + special @ v_special
    mass = special.sum(-1, keepdim=True)  # D
    residual = special @ v_special - mass * out  # M

    block_probs = blocks(probs).sum(-1)  # [h, u, j]
    values = blocks(v.mT).movedim(1, -1)  # [h, j, split, d]
    by_part = blocks(probs).movedim(2, 1)  # [h, j, u, split]
    squares = (by_part @ (values @ values.mT) * by_part).sum(-1).mT  # of r_j
    squares -= 2 * block_probs * blocks(probs * (out @ v.mT)).sum(-1)
    squares += (block_probs * out.norm(dim=-1, keepdim=True)).square()

    first = (counts * (counts / block_probs.shape[-1]).sqrt()).long()
    new = are_largest(scores.mean_over_queries(block_probs, q_blocks), first)
    taken = new
    for i in range(1, rounds + 1):
        shares = new.repeat_interleave(scores.split, 1)  # [h, u, j]
        added = probs * shares.repeat_interleave(scores.split, -1)[..., : probs.shape[-1]]
        added_mass = added.sum(-1, keepdim=True)
        residual = residual + added @ v - added_mass * out
        mass = mass + added_mass

        along = blocks(probs * (residual @ v.mT)).sum(-1)
        along -= block_probs * (residual * out).sum(-1, keepdim=True)  # M · r_j
        error = (residual.square().sum(-1, keepdim=True) + 2 * along + squares).clamp_min(0)
        mass_with = mass + block_probs
        known = mass_with > LEAST_MASS
        error = torch.where(known, error / mass_with.square(), WORST).nan_to_num(WORST, WORST)
        worth = -scores.mean_over_queries(error, q_blocks)
        more = first - (first - counts) * i // rounds - taken.sum(-1)
        new = are_largest(worth.masked_fill_(taken, -torch.inf), more)
        taken = taken | new
    return taken
