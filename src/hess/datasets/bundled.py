"""The real RGB-D capture that ships with the package: 12 frames of an office (MIT licence)."""

from importlib.resources import files
from pathlib import Path

from hess.errors import DatasetError


def bundled_capture() -> Path:
    """Folder of the bundled capture: images/, depth/, K.txt, poses.txt.

    Raises:
        DatasetError: the package is installed without its data files.
    """
    folder = Path(str(files("hess") / "assets" / "hololens_office"))
    if not folder.is_dir():
        raise DatasetError(
            f"{folder}: the bundled capture is missing; install the package as a normal folder "
            "(pip install, not a zip archive)"
        )
    return folder
