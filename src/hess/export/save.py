"""Saves a reconstruction in the format that the path asks for."""

from pathlib import Path

from hess.errors import BackendUnavailableError, ConfigError, DatasetError
from hess.export.colmap import write_colmap
from hess.export.exportable import Exportable
from hess.export.glb import write_glb
from hess.export.npz import write_npz
from hess.export.ply import write_ply
from hess.export.point_cloud import PointCloud
from hess.export.transforms import write_transforms

FORMATS = (".ply", ".glb", ".npz", ".json", "a name without suffix (COLMAP folder)")


def save_reconstruction(
    recon: Exportable,
    path: str | Path,
    *,
    drop_lowest: float = 0.2,
    voxel_size: float | None = None,
    ply_file: str | None = None,
) -> None:
    """Write ``recon`` to ``path``, in one piece or not at all. The suffix names the format.

    ====== ==========================================================================
    .ply   coloured points with confidence
    .glb   coloured points and camera frusta, to look at
    .npz   everything, as NumPy arrays
    .json  cameras, as nerfstudio's transforms.json
    (none) cameras and points, as a folder with a COLMAP sparse model
    ====== ==========================================================================

    COLMAP models and .json refer to the photos as they are upright. For photos that are stored
    turned, or as HEIC, see :func:`hess.datasets.upright.upright_photos`.

    Args:
        recon: what to save.
        path: the file or folder to make or replace; missing parent folders are made.
        drop_lowest: share of the least confident points, 0 up to but not including 1, that .ply,
            .glb and COLMAP leave out.
        voxel_size: side of a cube, in the unit of the points, of which .ply and .glb keep one
            point only; None keeps all.
        ply_file: for .json only: the .ply of this reconstruction, relative to the folder of
            ``path``, from which nerfstudio can start; None names none.

    Raises:
        ConfigError: the suffix is unknown, a parameter is out of range, or the folder is
            something else than a COLMAP model.
        DatasetError: no point is left to write, or a camera is not finite.
        BackendUnavailableError: the library that writes the format is not installed.
        OSError: the place cannot be written.
    """
    path = Path(path)

    def cloud() -> PointCloud:
        return recon.point_cloud(drop_lowest=drop_lowest, voxel_size=voxel_size)

    try:
        match path.suffix.lower():
            case ".ply":
                write_ply(path, cloud())
            case ".glb":
                _check_cameras(recon)
                write_glb(path, recon, cloud())
            case ".npz":
                write_npz(path, recon.to_arrays())
            case ".json":
                _check_cameras(recon)
                write_transforms(path, recon, ply_file=ply_file)
            case "":
                _check_cameras(recon)
                write_colmap(path, recon, drop_lowest=drop_lowest)
            case unknown:
                raise ConfigError(
                    f"{path}: expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, "
                    f"found {unknown!r}"
                )
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"{path}: the package that writes this format is missing; pip install {error.name}"
        ) from error


def _check_cameras(recon: Exportable) -> None:
    for name, pose, intrinsics in zip(
        recon.view_names, recon.world_from_cam, recon.original_intrinsics, strict=True
    ):
        focal = intrinsics[[0, 1], [0, 1]]
        if not (pose.isfinite().all() and intrinsics.isfinite().all() and (focal > 0).all()):
            raise DatasetError(
                f"view {name}: a camera needs finite numbers and focal lengths above 0, found "
                f"focal lengths {focal.tolist()} and position {pose[:3, 3].tolist()}; "
                "save as .ply or .npz, which need no cameras"
            )
