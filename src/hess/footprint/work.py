"""Floating-point operations of a forward pass or of the calibration on one scene."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from hess.footprint.blocks import attention_flops, linear_flops
from hess.footprint.case import Case

Kind = Literal["blocks", "attention", "convolutions"]
_PRECISIONS = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations of one kind in one stage.

    Args:
        stage: "encoder", "frame", "global", "global attention" or "heads".
        kind: the field of ``Throughput`` that says how fast they go.
        dtype: precision of the matrices; bfloat16 stands for both half precisions.
        flops: their number; a multiplication and an addition are two.
    """

    stage: str
    kind: Kind
    dtype: torch.dtype
    flops: float


def forward_work(case: Case) -> Iterator[Work]:
    """Operations of a forward pass, stage by stage."""
    layout, frame, whole = case.layout, case.frame, case.globals
    views, per_view = layout.num_views, layout.tokens_per_view
    if case.encoder is not None:
        count = len(case.anatomy.encoder_blocks)
        seen = layout.grid_h * layout.grid_w + case.anatomy.encoder_special
        linear = count * linear_flops(case.encoder, views * seen)
        attention = count * attention_flops(case.encoder, views, seen)
        yield _work("encoder", "blocks", case.encoder.matrix, linear)
        yield _work("encoder", "attention", case.encoder.matrix, attention)

    count = case.num_frame_blocks
    linear = count * linear_flops(frame, layout.num_tokens)
    attention = count * attention_flops(frame, views, per_view)
    yield _work("frame", "blocks", frame.matrix, linear)
    yield _work("frame", "attention", frame.matrix, attention)

    count = case.num_global_blocks
    linear = count * linear_flops(whole, layout.num_tokens)
    attention = count * attention_flops(whole, 1, layout.num_tokens)
    # Special queries and special keys are never dropped.
    dropped = (case.block_sparsity or 0) * layout.num_patch_tokens / layout.num_tokens
    yield _work("global", "blocks", whole.matrix, linear)
    yield _work("global attention", "attention", whole.matrix, attention * (1 - dropped))

    chunks = views / case.chunk.num_views
    for head in case.heads:
        yield _work("heads", "blocks", head.itemsize, chunks * head.blocks)
        yield _work("heads", "attention", head.itemsize, chunks * head.attention)
        yield _work("heads", "convolutions", head.itemsize, chunks * head.convolutions)


def calibration_work(case: Case) -> Iterator[Work]:
    """Operations of one forward and two backward passes that make activations anew.

    Weights have no gradients, so a backward pass costs a matrix product as much as the forward
    pass, and attention five products instead of two. The point error goes through about half of
    the heads, the camera error through next to nothing of them.
    """
    for work in forward_work(case):
        if work.stage == "encoder":
            passes = 1.0
        elif work.stage == "heads":
            passes = 1 + (1 + 1) / 2
        elif work.kind == "attention":
            passes = 1 + 2 * (1 + 5 / 2)
        else:
            passes = 1 + 2 * (1 + 1)
        yield _work(work.stage, work.kind, work.dtype.itemsize, passes * work.flops)
    # Gradients of the joint projection, and of the queries from patches alone, for both errors.
    products = 2 * (3 + 1) * 2 * case.layout.num_tokens * case.globals.width**2
    measured = case.num_global_blocks * products
    yield _work("global", "blocks", case.globals.matrix, measured)


def _work(stage: str, kind: Kind, itemsize: int, flops: float) -> Work:
    return Work(stage=stage, kind=kind, dtype=_PRECISIONS[itemsize], flops=flops)
