"""Named arrays as a compressed NumPy archive."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hess.files import atomic_write


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write ``arrays`` atomically; read them with ``numpy.load(path)``."""
    with atomic_write(path) as file:
        # A file object, because savez adds ".npz" to names that end otherwise.
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # allow_pickle in its stub
