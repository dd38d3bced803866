"""Saves a reconstruction in the format that the file name asks for."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from hess.errors import ConfigError
from hess.export.npz import write_npz
from hess.export.ply import write_ply


class Exportable(Protocol):
    """What a reconstruction must offer to be saved."""

    def point_cloud(self, *, drop_lowest: float) -> tuple[Tensor, Tensor]:
        """Points [M, 3] and colours [M, 3] in [0, 1]."""

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All of it as named arrays."""


def _save_ply(recon: Exportable, path: Path, drop_lowest: float) -> None:
    points, colors = recon.point_cloud(drop_lowest=drop_lowest)
    write_ply(path, points=points, colors=colors)


def _save_npz(recon: Exportable, path: Path, drop_lowest: float) -> None:
    write_npz(path, recon.to_arrays())


_WRITERS: dict[str, Callable[[Exportable, Path, float], None]] = {
    ".npz": _save_npz,
    ".ply": _save_ply,
}


def save_reconstruction(recon: Exportable, path: str | Path, *, drop_lowest: float = 0.2) -> None:
    """Write ``recon`` to ``path``, atomically: .ply (coloured points) or .npz (everything).

    Args:
        recon: what to save.
        path: the file to make or replace; its suffix names the format.
        drop_lowest: share of the least confident points, 0 to 1, left out of a point cloud; an
            .npz keeps all.

    Raises:
        ConfigError: the suffix is unknown, or ``drop_lowest`` is out of range.
    """
    path = Path(path)
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise ConfigError(
            f"{path}: expected a file name that ends in {' or '.join(sorted(_WRITERS))}, "
            f"found {path.suffix or 'no suffix'!r}"
        )
    writer(recon, path, drop_lowest)
