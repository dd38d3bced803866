"""Nearest neighbours in a point cloud: exact for small clouds, inverted lists for large ones."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hess.errors import AlignmentError, ConfigError, LayoutError

if TYPE_CHECKING:
    from scipy.spatial import cKDTree

EXACT_MAX_POINTS = 1_000_000
"""Clouds up to this size get the exact k-d tree under ``method="auto"``; it answers some 10^5
queries per second on one core there."""

METHODS = ("auto", "exact", "ivf")
_TRAINING_SEED = 1234
_MIN_POINTS_PER_CENTROID = 39  # below this faiss warns that its k-means is undertrained


class NearestNeighbors:
    """Index over ``points`` [K, 3] that finds the nearest one to each query point.

    The exact index is a k-d tree in float64. The approximate one is faiss IVF-Flat under the L2
    metric with the paper's settings (App. B.2): 4,096 centroids, 16 probes, trained with a fixed
    seed on one thread, so it gives the same answer every time.

    Args:
        points: [K >= 1, 3], finite.
        method: "exact", "ivf", or "auto" (exact up to ``EXACT_MAX_POINTS``).
        num_centroids, num_probes: of the IVF index; 1 <= probes <= centroids <= K.

    Raises:
        AlignmentError: the cloud is empty or not finite.
        ConfigError: unknown method, or counts out of range.
        LayoutError: ``points`` does not have shape [K, 3].
    """

    def __init__(
        self,
        points: Tensor,
        method: str = "auto",
        *,
        num_centroids: int = 4096,
        num_probes: int = 16,
    ) -> None:
        self.points = points.detach()
        array = _as_array("points", self.points)
        if method not in METHODS:
            raise ConfigError(f"method must be one of {METHODS}, found {method!r}")
        if len(array) == 0:
            raise AlignmentError("nearest neighbours need at least one point, found none")
        if method == "auto":
            method = "exact" if len(array) <= EXACT_MAX_POINTS else "ivf"
        self.method = method
        if method == "exact":
            self._tree = _build_tree(array)
        else:
            if not 1 <= num_probes <= num_centroids <= len(array):
                raise ConfigError(
                    "an IVF index needs 1 <= num_probes <= num_centroids <= points, found "
                    f"{num_probes} probes, {num_centroids} centroids, {len(array)} points"
                )
            self._origin = array.mean(0)
            self._index = _build_ivf(array - self._origin, num_centroids, num_probes)

    @torch.no_grad()
    def query(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest cloud point of each of ``points`` [J, 3].

        Returns:
            distance [J] in the dtype and on the device of the query, and index int64 [J] into
            the cloud, on the same device.

        Raises:
            AlignmentError: a query point is not finite.
            LayoutError: ``points`` does not have shape [J, 3].
        """
        array = _as_array("query points", points)
        if self.method == "exact":
            distance, index = self._tree.query(array, workers=1)
        else:
            query = np.ascontiguousarray(array - self._origin, dtype=np.float32)
            squared, index = _on_one_thread(lambda: self._index.search(query, 1))
            distance, index = np.sqrt(np.maximum(squared[:, 0], 0.0)), index[:, 0]
        index = torch.from_numpy(np.asarray(index, dtype=np.int64)).to(points.device)
        return torch.from_numpy(np.asarray(distance)).to(points), index


def _as_array(name: str, points: Tensor) -> np.ndarray:
    if points.ndim != 2 or points.shape[1] != 3:
        raise LayoutError(f"{name} must have shape [M, 3], found {tuple(points.shape)}")
    array = points.detach().cpu().double().numpy()
    if not np.isfinite(array).all():
        raise AlignmentError(f"{name} must be finite, found NaN or infinity; mask them out first")
    return array


def _build_tree(points: np.ndarray) -> "cKDTree":
    from scipy.spatial import cKDTree

    return cKDTree(points)


def _build_ivf(points: np.ndarray, num_centroids: int, num_probes: int) -> Any:
    import faiss

    points = np.ascontiguousarray(points, dtype=np.float32)
    quantizer = faiss.IndexFlatL2(3)
    index = faiss.IndexIVFFlat(quantizer, 3, num_centroids, faiss.METRIC_L2)
    index.cp.seed = _TRAINING_SEED
    index.cp.min_points_per_centroid = min(_MIN_POINTS_PER_CENTROID, len(points) // num_centroids)
    index.nprobe = num_probes

    def fill() -> None:
        index.train(points)
        index.add(points)

    _on_one_thread(fill)
    return index


def _on_one_thread(work: Any) -> Any:
    # Sums over threads depend on their number; faiss only has a process-wide switch for it.
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        return work()
    finally:
        faiss.omp_set_num_threads(threads)
