"""Memory of a forward pass or a calibration, as formulas of views, size and precision.

Nothing is run and no weight is read: a model on the meta device will do. The formulas follow the
code that allocates; :mod:`hess.footprint.live_bytes` counts what that code really does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from hess.errors import ConfigError
from hess.footprint.blocks import (
    backward_bytes,
    forward_bytes,
    run_block_bytes,
    saved_bytes,
    sparse_bytes,
)
from hess.footprint.case import Case
from hess.footprint.throughput import Throughput
from hess.footprint.work import Work, calibration_work, forward_work
from hess.models.base import Model

Mode = Literal["forward", "calibration"]

ALIGNMENT_BYTES = 200
"""Per pixel, while calibration aligns prediction and ground truth: the ground truth as a map and
as a cloud, the pairs, and the products of their fit, mostly as three float64 each."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a model needs for one scene of N views of H x W pixels; all sizes in bytes.

    What an allocator or a kernel takes for itself comes on top.

    Args:
        weights, images: the model and its input, which are there all the time.
        kept_tokens: token tensors that the blocks leave to the heads.
        block_results: results of all blocks, which calibration holds for the backward pass.
        predictions: the result.
        stages: most bytes beside weights and images in each of the stages "encoder", "blocks",
            "heads" and, in calibration, "alignment"; what it takes over and what it hands on
            included.
        work: the operations that count.
    """

    weights: int
    images: int
    kept_tokens: int
    block_results: int
    predictions: int
    stages: Mapping[str, int]
    work: tuple[Work, ...]

    @property
    def peak(self) -> int:
        """Most bytes alive at once."""
        return self.weights + self.images + max(self.stages.values())

    @property
    def flops(self) -> dict[str, float]:
        """Operations by stage, the attention over all views apart."""
        sums: dict[str, float] = {}
        for work in self.work:
            sums[work.stage] = sums.get(work.stage, 0) + work.flops
        return sums

    def seconds(self, throughput: Mapping[torch.dtype, Throughput]) -> float:
        """Time of all work, given how fast a machine is in each precision.

        Raises:
            ConfigError: a precision that occurs is missing.
        """
        missing = {str(work.dtype) for work in self.work} - {str(dtype) for dtype in throughput}
        if missing:
            raise ConfigError(f"the throughput of {sorted(missing)} is needed; measure it first")
        return sum(work.flops / getattr(throughput[work.dtype], work.kind) for work in self.work)


def estimate_footprint(
    model: Model,
    *,
    num_views: int,
    height: int,
    width: int,
    mode: Mode = "forward",
    block_sparsity: float | None = None,
) -> Footprint:
    """Memory and work of ``model`` for one scene, in the precision that its weights have.

    Left out as too small: VGGT's camera head, and all that is not in proportion to tokens, pixels
    or blocks of the attention map.

    Args:
        model: on any device, "meta" included.
        num_views, height, width: the input; height and width are multiples of the patch.
        mode: one "forward" pass without gradients, or one scene of "calibration": float32,
            activations made anew in the backward passes of both errors.
        block_sparsity: dropped share of the attention map, in [0, 1]; None: dense attention. For
            "forward" only. Time follows as if sparse attention were as fast per operation.

    Raises:
        ConfigError: a parameter out of range, or a model that does not describe its anatomy.
        LayoutError: a size that is no multiple of the patch.
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"mode must be one of {get_args(Mode)}, found {mode!r}")
    if block_sparsity is not None and not 0 <= block_sparsity <= 1:
        raise ConfigError(f"block_sparsity must lie in [0, 1], found {block_sparsity}")
    if block_sparsity is not None and mode == "calibration":
        raise ConfigError("calibration runs the dense model; leave block_sparsity out")
    case = Case(
        model=model,
        layout=model.token_layout(torch.empty(1, num_views, 3, height, width, device="meta")),
        calibrating=mode == "calibration",
        block_sparsity=block_sparsity,
    )
    return Footprint(
        weights=case.weights,
        images=case.images,
        kept_tokens=case.kept,
        block_results=_block_results(case) if case.calibrating else 0,
        predictions=case.predictions,
        stages=_calibration_stages(case) if case.calibrating else _forward_stages(case),
        work=tuple(calibration_work(case) if case.calibrating else forward_work(case)),
    )


def _forward_stages(case: Case) -> dict[str, int]:
    return {"encoder": _encoder(case), "blocks": _blocks(case), "heads": _heads(case)}


def _calibration_stages(case: Case) -> dict[str, int]:
    return {
        "encoder": _encoder(case),
        "blocks": _blocks_backward(case),
        "heads": _heads_backward(case),
        "alignment": _held_by_graph(case) + ALIGNMENT_BYTES * case.pixels,
    }


def _patches(case: Case) -> int:
    """The encoder's result: of one chunk a view of all its tokens, else a copy of the patches."""
    special = case.anatomy.encoder_special if case.layout == case.chunk else 0
    per_view = case.layout.grid_h * case.layout.grid_w + special
    return case.frame.stream_bytes * case.layout.num_views * per_view


def _encoder(case: Case) -> int:
    """Chunks of views in turns (over_views); of those before, the results are there."""
    views = case.chunk.num_views
    normalised = case.images * views // case.layout.num_views
    if case.encoder is None:
        return 2 * normalised + _patches(case)
    seen = case.layout.grid_h * case.layout.grid_w + case.anatomy.encoder_special
    tokens = case.encoder.stream_bytes * seen
    inside = tokens * views + forward_bytes(case.encoder, views, seen)
    before = tokens * (case.layout.num_views - views)
    joining = tokens * case.layout.num_views + _patches(case) if before else 0
    return max(before + normalised + inside, joining)


def _blocks(case: Case) -> int:
    """The last block: all tokens are kept but those it is about to make."""
    layout = case.layout
    frame = run_block_bytes(case.frame, layout.num_views, layout.tokens_per_view)
    if case.block_sparsity is None:
        whole = run_block_bytes(case.globals, 1, layout.num_tokens)
    else:
        whole = sparse_bytes(case.globals, layout.num_tokens, case.block_map, case.block_sparsity)
    return _patches(case) + case.rope + case.kept - case.tokens + max(frame, whole)


def _heads(case: Case) -> int:
    """Chunks of views in turns, beside the tokens they read and the predictions so far."""
    return case.kept + case.predictions + max(h.shared + h.forward for h in case.heads)


def _block_results(case: Case) -> int:
    return case.tokens * (case.num_frame_blocks + case.num_global_blocks)


def _held_by_graph(case: Case) -> int:
    """Between forward and backward: inputs of blocks and heads, and what their closures hold."""
    shared = sum(head.shared for head in case.heads)
    return _block_results(case) + case.rope + case.predictions + shared


def _blocks_backward(case: Case) -> int:
    """The last global block made anew, with its gradient and those of all kept tokens.

    Beside what autograd saves in any block there is the input of the joint projection, which the
    Fisher traces need. The block's own input is held already.
    """
    tokens = case.layout.num_tokens
    tapped = case.globals.matrix * case.globals.width * tokens
    block = saved_bytes(case.globals, tokens) - case.tokens + tapped
    return _held_by_graph(case) + case.kept + block + backward_bytes(case.globals, tokens)


def _heads_backward(case: Case) -> int:
    """The last chunk of a head made anew, with the gradients that the other chunks have left."""
    done = 1 - case.chunk.num_views / case.layout.num_views
    return _held_by_graph(case) + round(case.kept * done) + max(h.backward for h in case.heads)


def most_views(
    model: Model,
    free: int,
    *,
    height: int,
    width: int,
    mode: Mode = "forward",
    block_sparsity: float | None = None,
) -> int:
    """The most views of this size whose peak is at most ``free`` bytes; 0 if not even one fits."""

    def fits(num_views: int) -> bool:
        footprint = estimate_footprint(
            model,
            num_views=num_views,
            height=height,
            width=width,
            mode=mode,
            block_sparsity=block_sparsity,
        )
        return footprint.peak <= free

    too_many = 1
    while fits(too_many):
        too_many *= 2
    most = too_many // 2
    while too_many - most > 1:
        middle = (most + too_many) // 2
        most, too_many = (middle, too_many) if fits(middle) else (most, middle)
    return most
