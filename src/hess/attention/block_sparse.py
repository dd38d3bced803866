"""The entry to block-sparse attention: checks shapes, then calls one named backend."""

from typing import Protocol

from torch import Tensor

from hess.attention.block_mask import BlockMask
from hess.attention.gather import gather_attention
from hess.attention.layout import TokenLayout
from hess.attention.masked import masked_sdpa
from hess.attention.pooling import num_blocks
from hess.attention.reference import reference_attention
from hess.attention.triton_backend import triton_attention, why_unavailable
from hess.errors import ConfigError, LayoutError


class Backend(Protocol):
    """A way to compute the same attention."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: BlockMask,
        layout: TokenLayout,
        block_size_q: int,
        block_size_kv: int,
    ) -> Tensor: ...


BACKENDS: dict[str, Backend] = {
    "reference": reference_attention,
    "masked": masked_sdpa,
    "gather": gather_attention,
    "triton": triton_attention,
}

AUTO_GATHER_TOKENS = 1024
"""From this many tokens on, "auto" on a CPU means "gather"; below, one masked call is quicker."""


def check_backend(backend: str) -> None:
    """Raise :class:`ConfigError` unless ``backend`` is "auto" or a key of ``BACKENDS``."""
    if backend not in ("auto", *BACKENDS):
        raise ConfigError(f"backend must be one of {('auto', *BACKENDS)}, found {backend!r}")


def resolve_backend(backend: str, layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor) -> str:
    """The backend that ``backend`` stands for with these tensors.

    "auto" is "triton" on a CUDA device where it runs; elsewhere, "gather" from
    ``AUTO_GATHER_TOKENS`` tokens on and "masked" below.

    Raises:
        ConfigError: no such backend.
    """
    check_backend(backend)
    if backend != "auto":
        return backend
    if q.is_cuda and why_unavailable(q, k, v) is None:
        return "triton"
    return "gather" if layout.num_tokens >= AUTO_GATHER_TOKENS else "masked"


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    layout: TokenLayout,
    block_size_q: int,
    block_size_kv: int,
    *,
    backend: str = "auto",
) -> Tensor:
    """Attention in which patch queries see the key blocks of ``mask`` and all special tokens.

    Special queries see every key. No other backend takes over when the chosen one fails.

    Args:
        q, k, v: [B, heads, S, d] in the order of ``layout``.
        mask: for ``ceil(patches / block_size_q)`` query blocks and
            ``ceil(patches / block_size_kv)`` key blocks.
        backend: "reference", "masked", "gather", "triton", or "auto"; see
            :func:`resolve_backend`.

    Returns:
        [B, heads, S, d].

    Raises:
        LayoutError: shapes disagree, or a query would see no key at all.
        ConfigError: unknown backend or a block size below 1.
        BackendUnavailableError: the named backend cannot run here.
    """
    run = BACKENDS[resolve_backend(backend, layout, q, k, v)]
    if q.ndim != 4 or not q.shape == k.shape == v.shape:
        raise LayoutError(
            "q, k and v must share one shape [B, heads, S, d], found "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    layout.check(q)
    patches = layout.num_patch_tokens
    expected = (
        *q.shape[:2],
        num_blocks(patches, block_size_q),
        num_blocks(patches, block_size_kv),
    )
    if mask.shape != expected:
        raise LayoutError(
            f"{patches} patches in blocks of {block_size_q} x {block_size_kv} need a mask of "
            f"shape {expected}, found {mask.shape}"
        )
    if layout.num_special == 0 and (mask.counts == 0).any():
        raise LayoutError(
            "a query block selects no key block and the layout has no special tokens, so its "
            "attention is undefined; set min_row_blocks=1 in the policy"
        )
    return run(q, k, v, mask, layout, block_size_q, block_size_kv)
