"""Dense attention of a few queries on a CPU, as matrix products in one thread.

On CPUs with AVX-512, torch's own attention is slower for two reasons. On AMD's, its fp32 products
run at half speed, as MKL computes them; oneDNN does not have that trouble. And in bfloat16 it
widens everything, though these processors multiply bfloat16 several times as fast. Where there is
AVX2 only, neither holds, and torch's attention is quicker.

Two plain products and a softmax would not do in bfloat16: scores rounded to it, as by
``torch.mm``, make an error that grows with the scores and is soon ten times that of torch's
attention. Here no score is rounded.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hess.attention.cpu_keys import Row

SHIFT, MIN_TOTAL, MAX_TOTAL = 56.0, 1e-30, 1e-5
"""See :func:`_attend_in_bfloat16`. The log-sum-exp of the scores may lie between -13 and 44."""


def has_products(dtype: torch.dtype) -> bool:
    """Whether :func:`attend_by_products` runs on this processor, with this torch and type."""
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    can_multiply = has_avx512 and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return can_multiply and dtype in (torch.float32, torch.bfloat16, torch.float16)


def attend_by_products(q: Tensor, num_queries: list[int], rows: Sequence[Row]) -> Tensor:
    """Dense attention of rows of queries that lie one behind the other.

    Args:
        q: [sum of num_queries, d], in fp32, bf16 or fp16.
        num_queries: of each row.
        rows: what each attends to, in the type of ``q``.

    Returns:
        fp32 [sum of num_queries, d].
    """
    has_bfloat16 = q.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    if has_bfloat16:
        out = _attend_in_bfloat16(q, num_queries, rows)
        if out is not None:
            return out
    # Powers of two are quicker than those of e.
    q = q.float() * (q.shape[-1] ** -0.5 / math.log(2))
    sums = [
        _weighted_sum(queries, row, has_bfloat16)
        for queries, row in zip(q.split(num_queries), rows, strict=True)
    ]
    outs, totals = zip(*sums, strict=True)
    return torch.cat(outs) / torch.cat(totals)


def _weighted_sum(q: Tensor, row: Row, has_bfloat16: bool) -> tuple[Tensor, Tensor]:
    """Values summed with weights 2^(q kᵀ) over a common factor; sums of the weights [Sq, 1].

    Parts of the keys, each relative to the highest score in it, are joined as in flash attention.
    """
    (out, total, top), *more = (_part_sum(q, *part, has_bfloat16) for part in row.parts())
    for part_out, part_total, part_top in more:
        top, before = torch.maximum(top, part_top), top
        kept, added = torch.exp2(before - top), torch.exp2(part_top - top)
        out = out * kept + part_out * added
        total = total * kept + part_total * added
    return out, total


def _part_sum(
    q: Tensor, k: Tensor, v: Tensor, has_bfloat16: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Values summed with weights 2^(q kᵀ - top), sums of the weights and tops, both [Sq, 1]."""
    weights = _product(q, k.float())
    top = weights.amax(-1, keepdim=True)
    weights.sub_(top).exp2_()
    total = weights.sum(-1, keepdim=True)
    if has_bfloat16:
        return weights.bfloat16() @ v, total, top
    return _product(weights, v.float().mT), total, top


def _attend_in_bfloat16(q: Tensor, num_queries: list[int], rows: Sequence[Row]) -> Tensor | None:
    """Attention with weights straight from the product, for scores in an ordinary range.

    sigmoid(score - SHIFT) is e^(score - SHIFT) as long as it is small. That one shift suits all
    keys is seen from the sums of the weights: no weight is above MAX_TOTAL, and those that were
    too small for the type do not count.

    Returns:
        fp32 [queries, d], or None if the range does not suit.
    """
    scale = q.shape[-1] ** -0.5
    if math.frexp(scale)[0] != 0.5:  # scaling would round
        return None
    outs, totals = [], []
    for queries, row in zip((q * scale).split(num_queries), rows, strict=True):
        sums = []
        for k, v in row.parts():
            weights = _product(queries, k, q.new_full((len(k),), -SHIFT), "sigmoid")
            sums.append((weights @ v, weights.float().sum(-1)))
        (out, total), *more = sums
        for part_out, part_total in more:
            out, total = out.float() + part_out, total + part_total
        outs.append(out)
        totals.append(total)
    total = torch.cat(totals)[:, None]
    lowest, highest = total.aminmax()
    if lowest >= MIN_TOTAL and highest <= MAX_TOTAL:
        return torch.cat(outs) / total
    return None


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    """``then(a bᵀ + bias)`` by oneDNN, in the type of ``a`` and ``b``, rounded once at the end."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, then, [], "")
