"""RANSAC: which of many point pairs agree on one similarity (Fischler and Bolles 1981)."""

import math

import torch
from torch import Tensor

from hess.errors import AlignmentError, ConfigError, LayoutError
from hess.geometry.sim3 import Sim3, umeyama

_SAMPLES = 500
_MAX_JUDGES = 5_000


@torch.no_grad()
def agreeing_pairs(
    source: Tensor, target: Tensor, distance: float, generator: torch.Generator
) -> Tensor:
    """The pairs that agree with the best similarity through three of them.

    Best of 500 random triples is the one with the smallest sum of squared residuals, each capped
    at ``distance``, over at most 5,000 evenly spaced pairs.

    Args:
        source, target: corresponding points [M >= 3, 3].
        distance: a pair agrees when the similarity brings it this close, > 0, in the unit of
            ``target``.
        generator: draws the triples; on the CPU.

    Returns:
        bool [M]; at least three are True.

    Raises:
        AlignmentError: a point is not finite, or no triple determines a similarity.
        ConfigError: the distance is not positive.
        LayoutError: shapes are not as above.
    """
    if not distance > 0:
        raise ConfigError(f"the distance of agreement must be above 0, found {distance}")
    if source.ndim != 2 or source.shape != target.shape or source.shape[1] != 3:
        raise LayoutError(
            "RANSAC needs source and target of one shape [M, 3], found "
            f"{tuple(source.shape)} and {tuple(target.shape)}"
        )
    source, target = source.detach().cpu().double(), target.detach().cpu().double()
    if len(source) < 3 or not bool((source.isfinite() & target.isfinite()).all()):
        raise AlignmentError(
            f"a similarity needs at least 3 pairs of finite points, found {len(source)} pairs"
        )
    stride = math.ceil(len(source) / _MAX_JUDGES)
    best, lowest = None, math.inf
    for _ in range(_SAMPLES):
        triple = torch.randint(len(source), (3,), generator=generator)
        try:
            candidate = umeyama(source[triple], target[triple])
        except AlignmentError:  # one pair drawn twice, or three on a line
            continue
        residuals = _residuals(candidate, source[::stride], target[::stride])
        cost = residuals.clamp(max=distance).square().sum().item()
        if cost < lowest:
            best, lowest, drawn = candidate, cost, triple
    if best is None:
        raise AlignmentError(
            f"no three of {len(source)} pairs determine a similarity: they lie on a line, or in "
            "one place"
        )
    agree = _residuals(best, source, target) <= distance
    agree[drawn] = True
    return agree


def _residuals(candidate: Sim3, source: Tensor, target: Tensor) -> Tensor:
    return torch.linalg.vector_norm(candidate.apply(source) - target, dim=-1)
