"""Divide a budget of blocks among heads in proportion to a score, under a cap (HeSS Sec. 3.3)."""

import torch
from torch import Tensor

from hess.errors import ConfigError


def _check(total: Tensor, weights: Tensor, upper: int, lower: int) -> None:
    heads = weights.shape[-1]
    if not torch.isfinite(weights).all() or (weights < 0).any():
        raise ConfigError(f"weights must be finite and not negative, found {weights.tolist()}")
    if (total < heads * lower).any() or (total > heads * upper).any():
        raise ConfigError(
            f"{heads} heads of {lower} to {upper} blocks hold {heads * lower} to "
            f"{heads * upper}, found totals from {total.min()} to {total.max()}"
        )


def water_fill(total: Tensor, weights: Tensor, upper: int, lower: int = 0) -> Tensor:
    """Budgets in proportion to ``weights``, none above ``upper``, that add up to ``total``.

    Iterative capping of the paper: heads above ``upper`` are capped and their surplus goes to the
    others in proportion to their weights, until nothing is left over. With a floor the result is
    ``clip(t * weights, lower, upper)`` for the one level t that conserves the total. Heads of
    weight 0 get more than the floor only when all others are full, and then share equally; so do
    all heads if all weights are 0.

    Args:
        total: blocks to give away, [...].
        weights: [..., heads], at least 0; only ratios matter.
        upper: most blocks a head can take.
        lower: least blocks a head must get.

    Returns:
        float64 [..., heads], shapes broadcast.

    Raises:
        ConfigError: a weight is negative or not finite, or ``total`` is outside
            [heads * lower, heads * upper].
    """
    _check(total, weights, upper, lower)
    goal = total.double()[..., None]
    weights = weights.double()
    weights = weights / weights.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.double).tiny)
    weights = weights.expand(torch.broadcast_shapes(weights.shape, (*total.shape, 1)))

    ideal = torch.zeros_like(weights)
    settled = torch.zeros_like(weights, dtype=torch.bool)
    for _ in range(weights.shape[-1]):
        open_weights = weights.masked_fill(settled, 0)
        only_zeros = open_weights.sum(-1, keepdim=True) == 0
        open_weights = torch.where(only_zeros, (~settled).double(), open_weights)
        rest = goal - ideal.masked_fill(~settled, 0).sum(-1, keepdim=True)
        share = rest * open_weights / open_weights.sum(-1, keepdim=True)
        ideal = torch.where(settled, ideal, share)

        over = (ideal - upper).clamp_min(0)
        under = (lower - ideal).clamp_min(0)
        # If the caps cut off more than the floors add, the level can only rise from here, so
        # what is over stays over; otherwise it can only sink, so what is under stays under.
        rises = over.sum(-1, keepdim=True) >= under.sum(-1, keepdim=True)
        clipped = torch.where(rises, over > 0, under > 0)
        if not clipped.any():
            break
        ideal = torch.where(clipped, ideal.clamp(lower, upper), ideal)
        settled |= clipped
    return ideal.clamp(lower, upper)


def round_budgets(ideal: Tensor, total: Tensor, upper: int) -> Tensor:
    """Whole budgets close to ``ideal`` that add up to ``total``: largest remainder.

    Args:
        ideal: float64 [..., heads] in [0, upper].
        total: int64 [...], the sum of ``ideal`` (a fraction is rounded either way).

    Returns:
        int64 [..., heads], each ``ideal`` rounded down or up and at most ``upper``. Equal
        remainders are served by head index.

    Raises:
        ConfigError: ``ideal`` does not add up to ``total`` or is outside its range.
    """
    gap = (ideal.sum(-1) - total).abs().max()
    if gap >= 1 or ideal.min() < 0 or ideal.max() > upper:
        raise ConfigError(
            f"ideal budgets must lie in [0, {upper}] and add up to their total, found "
            f"[{ideal.min()}, {ideal.max()}] and a gap of {gap}"
        )
    # Far below a block: equal shares must tie, and 2.9999999999 is 3.
    ideal = ideal.round(decimals=6)
    budget = ideal.floor().long()
    leftover = (total - budget.sum(-1))[..., None]
    order = torch.sort(ideal - budget, dim=-1, descending=True, stable=True).indices
    gets_one = torch.arange(ideal.shape[-1], device=ideal.device) < leftover
    return budget + torch.zeros_like(budget).scatter_(-1, order, gets_one.long())


def allocate(total: Tensor, weights: Tensor, upper: int, lower: int = 0) -> Tensor:
    """Whole budgets: :func:`water_fill`, then :func:`round_budgets`.

    Returns:
        int64 [..., heads], each in [lower, upper], adding up to ``total`` exactly.

    Raises:
        ConfigError: as :func:`water_fill`.
    """
    return round_budgets(water_fill(total, weights, upper, lower), total, upper)
