"""The quality guard: how sparse attention may be for the result to stay close to the dense one.

A few of the photos are run dense and sparse, and their drift (``geometry.drift``) is measured. The
sparsest setting within the limit is taken for all photos.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hess.datasets.photos import spread_evenly
from hess.errors import AlignmentError, ConfigError
from hess.geometry.alignment import most_confident
from hess.geometry.drift import Drift, drift
from hess.models.base import Model, Predictions
from hess.policies.base import Policy
from hess.sparsification import sparsify

RATIOS = (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""Shares of the blocks to drop that are tried, ascending."""

PROBE_VIEWS = 8
"""Photos that are run to find out; the guard was checked with this number (docs/beyond.md)."""

MARGIN = 0.65
"""The drift of the probe may be this share of the limit, since that of all photos differs; chosen
on calibration scenes, checked on others (docs/beyond.md)."""

CONFIDENT_SHARE = 0.8
"""Share of the points that count: the rest is left out of point clouds, too."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Drift of the probe views at one setting.

    Args:
        sparse_ratio: share of the blocks asked to drop.
        block_sparsity: share that was dropped, in [0, 1].
        drift: from the dense prediction of the same views; None if the sparse prediction could
            not be compared (it is not finite, or collapsed).
        seconds: that the sparse prediction took.
    """

    sparse_ratio: float
    block_sparsity: float
    drift: Drift | None
    seconds: float

    @property
    def size(self) -> float:
        """The largest drift; infinite if it is unknown."""
        return torch.inf if self.drift is None else self.drift.largest


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the guard found.

    Args:
        max_drift: the limit.
        sparse_ratio: the largest tried ratio within the limit; None: none is, stay dense.
        probes: everything that was tried, by ratio.
        num_views: photos in the probe.
        dense_seconds: that the dense prediction of the probe took.
    """

    max_drift: float
    sparse_ratio: float | None
    probes: tuple[Probe, ...]
    num_views: int
    dense_seconds: float

    @property
    def chosen(self) -> Probe | None:
        """The probe of the chosen ratio."""
        return next((p for p in self.probes if p.sparse_ratio == self.sparse_ratio), None)


def check_max_drift(max_drift: float) -> None:
    """Raise :class:`ConfigError` unless the limit lies in (0, 1)."""
    if not 0 < max_drift < 1:
        raise ConfigError(f"the limit of drift must lie above 0 and below 1, found {max_drift}")


def choose_sparsity(
    model: Model,
    images: Tensor,
    policy_at: Callable[[float], Policy],
    max_drift: float,
    *,
    ratios: Sequence[float] = RATIOS,
    probe_views: int = PROBE_VIEWS,
    margin: float = MARGIN,
) -> Choice:
    """Find the sparsest setting whose drift on some of the photos is within the limit.

    Ratios are bisected: drift is taken to grow with them.

    Args:
        model: dense.
        images: all photos [N, 3, H, W] in [0, 1].
        policy_at: gives the policy that drops a share of the blocks.
        max_drift: limit of :attr:`Drift.largest` in (0, 1), as a share of the scene's size.
        ratios: to try, ascending.
        probe_views: photos to run, spread evenly; at least 2.
        margin: share of the limit that the probe may use, in (0, 1]. Where all photos are in the
            probe, it may use all.

    Raises:
        ConfigError: a parameter out of range.
        AlignmentError: the dense prediction itself is not finite or collapsed.
        AlreadySparsifiedError: the model is sparsified.
    """
    check_max_drift(max_drift)
    if probe_views < 2 or not 0 < margin <= 1:
        raise ConfigError(
            f"a probe needs at least 2 views and a margin in (0, 1], found {probe_views} and "
            f"{margin}"
        )
    if list(ratios) != sorted(set(ratios)) or not ratios:
        raise ConfigError(f"ratios to try must ascend, found {list(ratios)}")
    views = spread_evenly(len(images), probe_views)
    limit = max_drift * (1.0 if len(views) == len(images) else margin)
    probe_images = images[views][None].to(next(model.parameters()).device)
    dense, dense_seconds = _predict(model, probe_images)
    drift_of(dense, dense)  # raises what is wrong with it

    probes: dict[int, Probe] = {}
    low, high = 0, len(ratios)  # all below low are within the limit, all from high on beyond it
    while low < high:
        middle = (low + high) // 2
        with sparsify(model, policy_at(ratios[middle])) as run:
            sparse, seconds = _predict(model, probe_images)
        try:
            found: Drift | None = drift_of(dense, sparse)
        except AlignmentError:
            found = None
        probes[middle] = Probe(
            sparse_ratio=ratios[middle],
            block_sparsity=run.stats.block_sparsity,
            drift=found,
            seconds=seconds,
        )
        if probes[middle].size <= limit:
            low = middle + 1
        else:
            high = middle
    return Choice(
        max_drift=max_drift,
        sparse_ratio=ratios[low - 1] if low else None,
        probes=tuple(probes[index] for index in sorted(probes)),
        num_views=len(views),
        dense_seconds=dense_seconds,
    )


def _predict(model: Model, images: Tensor) -> tuple[Predictions, float]:
    """The prediction, and the seconds it took."""
    was_training = model.training
    model.eval()
    start = time.perf_counter()
    try:
        with torch.inference_mode():
            predictions = model(images)
            predictions.world_from_cam.sum().item()  # waits for a GPU
    finally:
        model.train(was_training)
    return predictions, time.perf_counter() - start


def drift_of(dense: Predictions, sparse: Predictions) -> Drift:
    """Drift of a prediction of one scene, on the points of which the dense model is most sure.

    Raises:
        AlignmentError: a prediction is not finite or its points lie on a line.
    """
    kept = most_confident(dense.point_confidence[0].flatten(), CONFIDENT_SHARE)
    points, moved = (x.world_points[0].flatten(0, -2)[kept] for x in (dense, sparse))
    return drift(dense.world_from_cam[0], points, sparse.world_from_cam[0], moved)
