"""Named arrays as a NumPy archive."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hess.files import atomic_write


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write ``arrays`` atomically; read them with ``numpy.load(path)``."""
    with atomic_write(path) as file:
        # Not compressed: floats barely shrink, and hundreds of views would take minutes.
        # A file object, because savez adds ".npz" to names that end otherwise.
        np.savez(file, **arrays)  # type: ignore[arg-type]  # allow_pickle in its stub
