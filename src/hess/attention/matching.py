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
from hess.attention.native_matching import can_match, match_rows
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
    row_offsets = torch.cat([counts.new_zeros(1), counts.flatten().cumsum(0)]).to(scores.device)
    head_blocks = counts.sum(-1).cpu()
    # Autocast would bring these products back to half precision.
    with torch.autocast(scores.device.type, enabled=False):
        write = match_rows if can_match(scores) else _match_rows
        indices = write(scores, row_offsets, rounds)
    return BlockMask(
        row_offsets=row_offsets,
        indices=indices,
        batch=batch,
        num_heads=heads,
        num_q_blocks=q_blocks,
        num_kv_blocks=kv_blocks,
        known_head_blocks=head_blocks,
    )


def _match_rows(scores: FineScores, row_offsets: Tensor, rounds: int) -> Tensor:
    """The lists of all rows, one behind the other: int32."""
    counts = row_offsets.diff().view(-1, scores.shape[2])
    pieces = scores.pieces(scores.entries_at_once)
    lists = [
        _matching(scores, heads, rows, counts[heads, rows], rounds).nonzero()[:, -1]
        for heads, rows in pieces
    ]
    return torch.cat(lists).int()


def _matching(
    scores: FineScores, heads: slice, q_blocks: slice, counts: Tensor, rounds: int
) -> Tensor:
    """The blocks of some rows: bool [heads, some q_blocks, kv_blocks].

    In comments u counts the parts of these query blocks, t those of all key blocks, j the blocks.
    """
    probs, special = scores.part_probs(heads, q_blocks)  # [h, u, t], [h, u, special]
    v, v_special = (x[heads] for x in scores.values)
    block_probs = scores.of_key_blocks(probs)  # [h, u, j]
    out = probs @ v + special @ v_special
    mass = special.sum(-1, keepdim=True)  # D
    residual = special @ v_special - mass * out  # M
    squares = _squares(scores, probs, block_probs, v, out)

    first = (counts * (counts / block_probs.shape[-1]).sqrt()).long()
    new = taken = are_largest(scores.of_query_blocks(block_probs, q_blocks), first)
    for i in range(1, rounds + 1):
        added = probs * new.to(probs).repeat(1, scores.split, scores.split)
        added_mass = added.sum(-1, keepdim=True)
        residual = residual + added @ v - added_mass * out
        mass = mass + added_mass

        along = scores.of_key_blocks(probs * (residual @ v.mT))
        along -= block_probs * (residual * out).sum(-1, keepdim=True)  # M · r_j
        error = along.mul_(2).add_(squares).add_(residual.square().sum(-1, keepdim=True))
        mass_with = mass + block_probs
        error = error.clamp_min_(0) / mass_with.square()
        error = error.masked_fill_(mass_with < LEAST_MASS, WORST).nan_to_num_(WORST, WORST)
        worth = -scores.of_query_blocks(error, q_blocks)
        more = first - (first - counts) * i // rounds - taken.sum(-1)
        new = are_largest(worth.masked_fill_(taken, -torch.inf), more)
        taken = taken | new
    return taken


def _squares(
    scores: FineScores, probs: Tensor, block_probs: Tensor, v: Tensor, out: Tensor
) -> Tensor:
    """``||r_j||²``: [h, u, j]."""
    by_part = probs.unflatten(-1, (scores.split, -1)).unbind(2)
    values = v.unflatten(1, (scores.split, -1)).unbind(1)
    squares = (block_probs * out.norm(dim=-1, keepdim=True)).square()
    squares -= 2 * block_probs * scores.of_key_blocks(probs * (out @ v.mT))
    for p, x in zip(by_part, values, strict=True):
        along = torch.zeros_like(p)
        for other, y in zip(by_part, values, strict=True):
            along.addcmul_(other, (x * y).sum(-1)[:, None])
        squares.addcmul_(p, along)
    return squares
