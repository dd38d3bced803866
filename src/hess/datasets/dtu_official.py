"""The points that DTU predictions are judged against: laser scan, observed volume and table.

Format: the "Points" and "SampleSet" archives of the DTU MVS data set (Aanaes et al., 2016).
"""

import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hess.errors import DatasetError
from hess.geometry.nearest import NearestNeighbors


@dataclass(frozen=True, kw_only=True, eq=False)
class DtuTruth:
    """Ground truth of one scan, in millimetres.

    Args:
        scan: its number.
        points: float64 [K >= 1, 3], the scanned surface.
        observed: bool [X, Y, Z], the voxels that the scanner could see.
        box: float64 [2, 3], centre of the first voxel, and the far corner of the volume.
        voxel_size: edge of a voxel, > 0.
        plane: float64 [4]; ``plane . (x, 1) > 0`` holds above the table.

    Raises:
        DatasetError: a field has another shape, or is not finite.
    """

    scan: int
    points: Tensor
    observed: Tensor
    box: Tensor
    voxel_size: float
    plane: Tensor

    def __post_init__(self) -> None:
        shapes = {
            "points": self.points.ndim == 2 and self.points.shape[1] == 3 and len(self.points) > 0,
            "observed": self.observed.ndim == 3 and self.observed.numel() > 0,
            "box": tuple(self.box.shape) == (2, 3),
            "plane": tuple(self.plane.shape) == (4,),
        }
        if wrong := [name for name, right in shapes.items() if not right]:
            found = {name: tuple(getattr(self, name).shape) for name in wrong}
            raise DatasetError(
                f"DTU scan {self.scan}: expected points [K, 3], observed [X, Y, Z], box [2, 3] "
                f"and plane [4], found {found}"
            )
        numbers = torch.cat([self.points.flatten(), self.box.flatten(), self.plane])
        if not bool(numbers.isfinite().all()) or not 0 < self.voxel_size < float("inf"):
            raise DatasetError(f"DTU scan {self.scan}: points, box, voxel size must be finite")

    @cached_property
    def neighbors(self) -> NearestNeighbors:
        """Exact index over ``points``, made when first asked for."""
        return NearestNeighbors(self.points, "exact")

    def in_box(self, points: Tensor, margin: tuple[float, float]) -> Tensor:
        """Which of the points [M, 3] lie in the box, widened by ``margin`` below and above."""
        low, high = self.box[0] - margin[0], self.box[1] + margin[1]
        return ((points >= low) & (points < high)).all(dim=1)

    def is_observed(self, points: Tensor) -> Tensor:
        """Which of the points [M, 3] lie in an observed voxel."""
        voxel = ((points - self.box[0]) / self.voxel_size).round()
        inside = ((voxel >= 0) & (voxel < torch.tensor(self.observed.shape))).all(dim=1)
        x, y, z = voxel.where(inside[:, None], 0.0).long().unbind(1)
        return inside & self.observed[x, y, z]

    def above_table(self, points: Tensor) -> Tensor:
        """Which of the points [M, 3] lie above the table."""
        return points @ self.plane[:3] + self.plane[3] > 0


def read_dtu_truth(root: Path, scan: int) -> DtuTruth:
    """Ground truth of a scan from the folder that holds ``Points/stl/`` and ``ObsMask/``.

    Raises:
        DatasetError: a file is missing or damaged; it is named.
    """
    points = _read_points(root / "Points" / "stl" / f"stl{scan:03d}_total.ply")
    mask_path = root / "ObsMask" / f"ObsMask{scan}_10.mat"
    observed, box, voxel_size = _read_mat(mask_path, ("ObsMask", "BB", "Res"))
    if voxel_size.size != 1:
        raise DatasetError(f"{mask_path}: expected one number Res, found {voxel_size.tolist()}")
    plane = _read_mat(root / "ObsMask" / f"Plane{scan}.mat", ("P",))[0]
    return DtuTruth(
        scan=scan,
        points=points,
        observed=torch.from_numpy(observed != 0),
        box=torch.from_numpy(box.astype(np.float64)),
        voxel_size=float(voxel_size.item()),
        plane=torch.from_numpy(plane.astype(np.float64).reshape(-1)),
    )


def _read_points(path: Path) -> Tensor:
    from plyfile import PlyData, PlyParseError

    try:
        vertices = PlyData.read(path)["vertex"]
        columns = [np.asarray(vertices[axis], dtype=np.float64) for axis in "xyz"]
    except (OSError, ValueError, KeyError, PlyParseError) as error:
        raise DatasetError(
            f"{path}: expected a PLY point cloud, found: {error}; take it from the Points archive "
            "of DTU"
        ) from error
    return torch.from_numpy(np.stack(columns, axis=1))


def _read_mat(path: Path, names: tuple[str, ...]) -> list[np.ndarray]:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    damaged = (OSError, ValueError, TypeError, KeyError, EOFError, zlib.error)
    try:
        content = loadmat(path, variable_names=names)
        return [content[name] for name in names]
    except (*damaged, NotImplementedError, MatReadError) as error:
        raise DatasetError(
            f"{path}: expected a MATLAB file with {', '.join(names)}, found: {error}; take it "
            "from the SampleSet archive of DTU"
        ) from error
