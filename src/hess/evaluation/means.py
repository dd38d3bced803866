"""Means over scenes and their standard errors: all alike, pairs pooled, or by category."""

import math
from collections.abc import Hashable, Sequence
from typing import Literal

from hess.errors import AlignmentError

Mean = Literal["scenes", "pairs", "categories"]
"""What counts the same: every scene; every pair of views of all scenes (pi3); every category,
with the pairs of its scenes pooled (VGGT)."""


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error (None for a single value).

    Raises:
        AlignmentError: no values; the mean over nothing is not a number.
    """
    n = len(values)
    if n == 0:
        raise AlignmentError("there is no value to average: every scene failed")
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def weighted_mean_and_error(
    values: Sequence[float], weights: Sequence[float]
) -> tuple[float, float | None]:
    """Mean with positive weights and its standard error over the values (None for one value).

    The AUC of one scene is a mean over its pairs, so the mean of the scenes' AUC weighted by
    their number of pairs is exactly the AUC of all pairs pooled. The error is that of a ratio of
    sums over independent scenes, to first order; with equal weights it is the usual one.

    Raises:
        AlignmentError: no values.
    """
    n = len(values)
    if n == 0:
        raise AlignmentError("there is no value to average: every scene failed")
    total = math.fsum(weights)
    weighted = [(value, weight) for value, weight in zip(values, weights, strict=True)]
    mean = math.fsum(value * weight for value, weight in weighted) / total
    if n == 1:
        return mean, None
    spread = math.fsum((weight * (value - mean)) ** 2 for value, weight in weighted)
    return mean, math.sqrt(spread * n / (n - 1)) / total


def macro_mean_and_error(
    values: Sequence[float], weights: Sequence[float], categories: Sequence[Hashable]
) -> tuple[float, float | None]:
    """Mean over categories of their weighted means, and its standard error.

    The categories are taken as given and their scenes as drawn, so the error is None when a
    category has a single scene.

    Raises:
        AlignmentError: no values.
    """
    members: dict[Hashable, tuple[list[float], list[float]]] = {}
    for value, weight, category in zip(values, weights, categories, strict=True):
        of_category = members.setdefault(category, ([], []))
        of_category[0].append(value)
        of_category[1].append(weight)
    means = [weighted_mean_and_error(*of_category) for of_category in members.values()]
    mean, _ = mean_and_error([mean for mean, _ in means])
    errors = [error for _, error in means if error is not None]
    if len(errors) < len(means):
        return mean, None
    return mean, math.sqrt(math.fsum(error**2 for error in errors)) / len(means)
