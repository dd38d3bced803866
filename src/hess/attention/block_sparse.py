"""The entry to block-sparse attention: checks shapes, then calls one named backend."""

import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hess.attention import comparators, flex, gather, native, triton_backend
from hess.attention.block_mask import BlockMask
from hess.attention.layout import TokenLayout
from hess.attention.masked import masked_sdpa
from hess.attention.pooling import num_blocks
from hess.attention.reference import reference_attention
from hess.errors import BackendUnavailableError, ConfigError, LayoutError

_log = logging.getLogger("hess")


class Attend(Protocol):
    """A way to compute the same attention; see ``reference``."""

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


class Backend(NamedTuple):
    """A way to compute, and why it cannot do so with some tensors [B, heads, S, d], or None."""

    attend: Attend
    why_unavailable: Callable[[Tensor, Tensor, Tensor], str | None]


def _runs_everywhere(q: Tensor, k: Tensor, v: Tensor) -> None:
    return None


BACKENDS: dict[str, Backend] = {
    "reference": Backend(reference_attention, _runs_everywhere),
    "masked": Backend(masked_sdpa, _runs_everywhere),
    "native": Backend(native.native_attention, native.why_unavailable),
    "gather": Backend(gather.gather_attention, gather.why_unavailable),
    "triton": Backend(triton_backend.triton_attention, triton_backend.why_unavailable),
    "flex": Backend(flex.flex_block_sparse_attention, flex.why_unavailable),
    "cudnn": Backend(comparators.cudnn_attention, comparators.why_no_cudnn),
    "sparge": Backend(comparators.sparge_attention, comparators.why_no_sparge),
}

AUTO = {"cuda": ("triton", "flex", "masked"), "cpu": ("native", "gather", "masked")}
"""What "auto" tries per type of device, in this order; elsewhere it means "masked"."""

GATHER_TOKENS = 768
"""Below this many tokens "auto" does not choose "gather": one call is quicker than many."""


def check_backend(backend: str, example: Tensor | None = None) -> None:
    """Refuse a backend before any work is done.

    Args:
        backend: "auto" or a key of ``BACKENDS``.
        example: [B, heads, S, d] of the device, type and head dimension in question, any S.

    Raises:
        ConfigError: no such backend.
        BackendUnavailableError: it cannot compute tensors like ``example`` here.
    """
    if backend not in ("auto", *BACKENDS):
        raise ConfigError(f"backend must be one of {('auto', *BACKENDS)}, found {backend!r}")
    if backend != "auto" and example is not None:
        reason = BACKENDS[backend].why_unavailable(example, example, example)
        if reason is not None:
            raise BackendUnavailableError(f"the {backend} backend cannot run here: {reason}")


def resolve_backend(backend: str, layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor) -> str:
    """The backend that ``backend`` stands for with these tensors.

    "auto" is the first of ``AUTO`` that can compute them.

    Raises:
        ConfigError: no such backend.
    """
    check_backend(backend)
    if backend != "auto":
        return backend
    for name in AUTO.get(q.device.type, ()):
        is_too_short = name == "gather" and layout.num_tokens < GATHER_TOKENS
        if not is_too_short and BACKENDS[name].why_unavailable(q, k, v) is None:
            return name
    return "masked"


class BackendChoice:
    """Resolves a backend once per kind of input, and logs what it chose.

    Args:
        backend: as for :func:`resolve_backend`.

    Raises:
        ConfigError: no such backend.
    """

    def __init__(self, backend: str) -> None:
        check_backend(backend)
        self._backend = backend
        self._chosen: dict[tuple[object, ...], str] = {}

    def __call__(self, layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor) -> str:
        """The name of the backend for these tensors."""
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        kind = (layout.num_tokens, q.shape[-1], q.dtype, q.device, needs_grad)
        if kind not in self._chosen:
            self._chosen[kind] = resolve_backend(self._backend, layout, q, k, v)
            _log.info(
                "sparse attention over %d tokens in %s on %s runs on the %s backend (asked: %s)",
                layout.num_tokens,
                q.dtype,
                q.device,
                self._chosen[kind],
                self._backend,
            )
        return self._chosen[kind]


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
        backend: a key of ``BACKENDS``, or "auto"; see :func:`resolve_backend`.

    Returns:
        [B, heads, S, d].

    Raises:
        LayoutError: shapes disagree, or a query would see no key at all.
        ConfigError: unknown backend or a block size below 1.
        BackendUnavailableError: the named backend cannot run here.
    """
    attend = BACKENDS[resolve_backend(backend, layout, q, k, v)].attend
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
    return attend(q, k, v, mask, layout, block_size_q, block_size_kv)
