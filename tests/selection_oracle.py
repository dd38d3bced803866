"""Selection written out: one stable sort of the whole map, in fp64. The specification."""

import torch
from torch import Tensor

from hess.allocation import allocate
from hess.attention.pooled_scores import PooledScores


def scores_of(logits: Tensor) -> PooledScores:
    """Pooled scores whose logits [B, heads, q_blocks, kv_blocks] are exactly these."""
    blocks = logits.shape[-1]
    keys = torch.eye(blocks, dtype=logits.dtype).expand(*logits.shape[:2], blocks, blocks)
    return PooledScores(q_mean=logits, k_mean=keys, scale=1.0)


class Ranked:
    """Probabilities of each row in descending order of the logits, ties to the lowest index."""

    def __init__(self, logits: Tensor) -> None:
        self.order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
        self.probs = logits.double().softmax(-1).gather(-1, self.order)

    def baseline(self, minimum: int, cdf_threshold: float | None, cdf_rule: str) -> Tensor:
        counts = torch.full_like(self.order[..., 0], minimum)
        if cdf_threshold is not None:
            inside = (self.probs.cumsum(-1) <= cdf_threshold + 1e-5).sum(-1)
            counts = counts.maximum(inside + (cdf_rule == "cover"))
        return counts.clamp(1, self.order.shape[-1])

    def row_counts(self, budget: Tensor, baseline: Tensor, rule: str, floor: int) -> Tensor:
        q_blocks, kv_blocks = self.order.shape[-2:]
        if rule == "proportional":
            return allocate(budget, baseline, upper=kv_blocks, lower=floor)
        probs = self.probs.float()  # two rows tie if they do in fp32
        if rule == "equal":
            base = budget // q_blocks
            rank = base.clamp(max=kv_blocks - 1)[..., None, None].expand(*baseline.shape, 1)
            next_prob = probs.gather(-1, rank).squeeze(-1)
            order = torch.sort(next_prob, dim=-1, descending=True, stable=True).indices
            first = torch.arange(q_blocks) < (budget - base * q_blocks)[..., None]
            return base[..., None] + torch.zeros_like(baseline).scatter_(-1, order, first.long())
        probs[..., :floor] = 2
        flat = probs.flatten(-2)
        order = torch.sort(flat, dim=-1, descending=True, stable=True).indices
        chosen = torch.arange(flat.shape[-1]) < budget[..., None]
        return torch.zeros_like(chosen).scatter_(-1, order, chosen).view_as(probs).sum(-1)

    def mask(self, counts: Tensor) -> Tensor:
        """bool [B, heads, q_blocks, kv_blocks]."""
        chosen = torch.arange(self.order.shape[-1]) < counts[..., None]
        return torch.zeros_like(chosen).scatter_(-1, self.order, chosen)
