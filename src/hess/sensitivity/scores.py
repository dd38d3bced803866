"""From Fisher traces to head sensitivity scores (Eq. 7-9) and their variants (Table 1)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hess.errors import ConfigError, LayoutError

NORMALIZATIONS = ("trace", "raw", "softmax", "log")
AGGREGATES = ("mean", "median")


@dataclass(frozen=True, kw_only=True)
class SceneConcentration:
    """How much of a trace comes from few scenes.

    Args:
        effective_scenes: ``(sum x)^2 / sum x^2`` of the per-scene totals x; equals the number of
            scenes when all weigh alike, 1 when one scene is everything.
        largest_share: share of the heaviest scene, in (0, 1].
        largest_scene: its index.
        num_scenes: scenes that have the error at all.
    """

    effective_scenes: float
    largest_share: float
    largest_scene: int
    num_scenes: int


def head_scores(
    camera_traces: Tensor | None,
    point_traces: Tensor | None,
    *,
    camera_weight: float,
    normalization: str = "trace",
    exponent: float = 1.0,
) -> Tensor:
    """HeSS per head (Eq. 9): ``lambda * camera_score + (1 - lambda) * point_score``.

    ``normalization`` says how traces become comparable within a layer:

    - "trace": divided by the layer's sum (Eq. 7-8; "Ours" of Table 1).
    - "raw": not at all ("Linear" of Table 1): the raw traces of both errors are mixed, then the
      layer is divided by its sum, so the error with the larger gradients decides.
    - "softmax": softmax over the heads of trace / layer mean.
    - "log": ``log(1 + trace / layer mean)``, divided by its sum.

    The paper does not spell out the last two; dividing by the mean frees them of the unit. An
    error that no head of a layer influences says nothing about that layer: the other error then
    decides alone, and if there is none either, all heads score 1 / heads.

    Args:
        camera_traces, point_traces: [layers, heads], not negative; None when absent.
        camera_weight: lambda, in [0, 1].
        normalization: one of ``NORMALIZATIONS``.
        exponent: power to which the mixed scores are raised, > 0; 1 in the paper.

    Returns:
        [layers, heads], not negative, every row sums to 1.

    Raises:
        ConfigError: a parameter is out of range.
        LayoutError: traces are missing for an error with positive weight, or shapes differ.
    """
    if not 0.0 <= camera_weight <= 1.0:
        raise ConfigError(f"camera_weight must be in [0, 1], found {camera_weight}")
    if normalization not in NORMALIZATIONS:
        raise ConfigError(
            f"normalization must be one of {NORMALIZATIONS}, found {normalization!r}"
        )
    if not (math.isfinite(exponent) and exponent > 0):
        raise ConfigError(f"the exponent of scores must be > 0, found {exponent}")
    weighted = [(camera_weight, camera_traces), (1.0 - camera_weight, point_traces)]
    parts = [(weight, traces) for weight, traces in weighted if weight > 0]
    present = [(weight, traces) for weight, traces in parts if traces is not None]
    if len(present) < len(parts):
        raise LayoutError("traces are missing for an error whose weight is > 0")
    if len({tuple(traces.shape) for _, traces in present}) > 1:
        raise LayoutError(
            f"traces must have one shape, found {[tuple(t.shape) for _, t in present]}"
        )
    score = torch.zeros_like(present[0][1])
    for weight, traces in present:
        score = score + weight * _comparable(traces, normalization)
    return _rows_to_one(_rows_to_one(score) ** exponent)


def aggregate_scenes(traces: Tensor, aggregate: str = "mean") -> Tensor | None:
    """Mean or median over the scenes of [scenes, ...] that have the error (are not NaN).

    The mean is the paper's; the median resists the heavy tail of the camera trace.

    Returns:
        [...], or None when no scene has the error.

    Raises:
        ConfigError: unknown ``aggregate``.
    """
    if aggregate not in AGGREGATES:
        raise ConfigError(f"aggregate must be one of {AGGREGATES}, found {aggregate!r}")
    known = traces[~traces.flatten(1).isnan().any(1)]
    if len(known) == 0:
        return None
    return known.mean(0) if aggregate == "mean" else known.quantile(0.5, dim=0)


def scene_concentration(traces: Tensor) -> SceneConcentration | None:
    """Concentration of per-scene totals of ``traces`` [scenes, ...]; NaN scenes do not count.

    Returns None when no scene has the error or its trace is zero everywhere.
    """
    totals = traces.flatten(1).sum(1)
    known = ~totals.isnan()
    totals = totals.nan_to_num(0.0)
    total = totals.sum()
    if not total > 0:
        return None
    return SceneConcentration(
        effective_scenes=(total.square() / totals.square().sum()).item(),
        largest_share=(totals.max() / total).item(),
        largest_scene=int(totals.argmax()),
        num_scenes=int(known.sum()),
    )


def _comparable(traces: Tensor, normalization: str) -> Tensor:
    """Traces on the scale at which errors are mixed; a row of zeros stays zero."""
    if normalization == "raw":
        return traces
    mean = traces.mean(-1, keepdim=True)
    dead = mean == 0
    relative = traces / torch.where(dead, torch.ones_like(mean), mean)
    if normalization == "trace":
        comparable = relative / traces.shape[-1]
    elif normalization == "softmax":
        comparable = relative.softmax(-1)
    else:
        logs = relative.log1p()
        comparable = logs / torch.where(dead, torch.ones_like(mean), logs.sum(-1, keepdim=True))
    return torch.where(dead, torch.zeros_like(comparable), comparable)


def _rows_to_one(score: Tensor) -> Tensor:
    total = score.sum(-1, keepdim=True)
    uniform = torch.full_like(score, 1.0 / score.shape[-1])
    return torch.where(total > 0, score / torch.where(total > 0, total, 1.0), uniform)
