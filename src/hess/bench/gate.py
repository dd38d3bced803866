"""Nothing is timed that is wrong: backends and selection against float64 on a small case."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hess.attention.block_sparse import block_sparse_attention
from hess.attention.layout import TokenLayout
from hess.attention.reference import reference_attention, token_mask
from hess.bench.workload import Lists, Source, Workload
from hess.errors import BackendUnavailableError

FLOAT32_LIMIT = 1e-5
APPROXIMATE = {"sparge": 0.1}
"""Backends that compute with fewer bits by design, and the error they may make."""
LISTS_LIMIT = 0.02
"""Share of listed blocks that rounding may change: some are almost equally probable."""
SMALL = TokenLayout(num_views=3, grid_h=15, grid_w=21, num_special=5)
"""Odd in every way: blocks cross views, and the last block of queries and of keys is partial."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """How a backend did.

    Args:
        error: largest relative L2 error of a head; None if it cannot run here.
        limit: what is allowed: 1e-5 in float32, in half precision twice the error that torch's
            own masked attention makes.
        why_not: why it cannot run, if so.
    """

    error: float | None
    limit: float
    why_not: str | None = None

    @property
    def passed(self) -> bool:
        """Whether it ran and was right; NaN is not."""
        return self.error is not None and self.error <= self.limit

    def __str__(self) -> str:
        if self.error is None:
            return str(self.why_not)
        return f"relative error {self.error:.2e}, allowed {self.limit:.2e}"


def check_backends(
    work: Workload, source: Source, device: torch.device, backends: Sequence[str]
) -> dict[str, Check]:
    """Check ``backends`` on a small case of the kind of ``work``, with unequal heads."""
    small = replace(work, layout=SMALL, heads=4)
    q, k, v = small.inputs(device)
    mask = Lists(sparsity=0.5, budgets="hess", source=source).select(small, q, k)
    case = mask, SMALL, *small.block_sizes
    expected = reference_attention(q.double(), k.double(), v.double(), *case)
    limit = FLOAT32_LIMIT
    if work.dtype != torch.float32:
        torchs = F.scaled_dot_product_attention(q, k, v, attn_mask=token_mask(*case))
        limit = 2 * relative_error(torchs, expected)
    checks = {}
    for name in backends:
        try:
            out = block_sparse_attention(q, k, v, *case, backend=name)
        except BackendUnavailableError as reason:
            checks[name] = Check(error=None, limit=limit, why_not=str(reason))
        else:
            error = relative_error(out, expected)
            checks[name] = Check(error=error, limit=APPROXIMATE.get(name, limit))
    return checks


def check_lists(work: Workload, device: torch.device) -> float:
    """Share of listed blocks on which the selection on ``device`` and one in float64 differ."""
    small = replace(work, layout=SMALL, heads=4)
    q, k, _ = small.inputs(device)
    lists = Lists(sparsity=0.5, budgets="hess")
    found = lists.select(small, q, k).to_dense().cpu()
    expected = lists.select(small, q.double().cpu(), k.double().cpu()).to_dense()
    return float((found != expected).sum() / (2 * expected.sum()))


def what_is_wrong(work: Workload, device: torch.device, backend: str) -> list[str]:
    """Complaints about selection and ``backend`` on a small case of the kind of ``work``."""
    check = check_backends(work, "pooled", device, [backend])[backend]
    complaints = [] if check.passed else [f"{backend} in {work.precision}: {check}"]
    differ = check_lists(work, device)
    if differ > LISTS_LIMIT:
        complaints.append(f"{differ:.1%} of the selected blocks are not those of float64")
    return complaints


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest relative L2 error over heads of [1, heads, S, d]; NaN if anything is."""
    gap = (found.double() - expected).flatten(2).norm(dim=-1)
    return float((gap / expected.flatten(2).norm(dim=-1)).amax())
