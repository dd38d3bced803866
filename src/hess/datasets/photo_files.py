"""Which photos a folder, a pattern or a list stands for."""

import glob
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hess.errors import DatasetError

PhotoSource = str | Path | Sequence[str | Path]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".heic", ".heif", ".avif")
VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".3gp")
SUBFOLDERS = ("images", "rgb")


def natural_key(text: str) -> list[str | int]:
    """Sort key under which "view2" comes before "view10"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", text.lower())]


def _in_folder(folder: Path) -> list[Path]:
    """Image files of a folder in natural order; only the colour images of a 7-Scenes folder."""
    visible = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    images = [p for p in visible if p.suffix.lower() in SUFFIXES]
    colour = [p for p in images if p.stem.endswith(".color")]
    return sorted(colour or images, key=lambda p: natural_key(p.name))


def find_images(source: PhotoSource) -> list[Path]:
    """Paths of the photos that ``source`` stands for.

    Args:
        source: a folder (its JPEG, PNG, WebP, HEIC and AVIF files, or those of its ``images/`` or
            ``rgb/``), one file, a glob pattern such as ``"trip/*.jpg"``, or a list of files, all
            of which must be there. Folders and patterns are put in natural order; a list keeps
            its own.

    Returns:
        At least one path.

    Raises:
        DatasetError: nothing is there, nothing that is an image, or a video; or a file of a list
            is missing or a folder.
    """
    paths = _find(source)
    if videos := [path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES]:
        raise DatasetError(
            f"{videos[0]}: expected photos, found a video; take frames from it with "
            "hess.datasets.video.extract_frames, or give it alone to `hess reconstruct`"
        )
    return paths


def _find(source: PhotoSource) -> list[Path]:
    if not isinstance(source, str | Path):
        if not source:
            raise DatasetError("expected at least one photo, found an empty list")
        return [_listed(Path(item).expanduser()) for item in source]

    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        for folder in (path, *(path / name for name in SUBFOLDERS)):
            if folder.is_dir() and (images := _in_folder(folder)):
                return images
        suffixes = Counter(p.suffix.lower() or "no suffix" for p in path.iterdir() if p.is_file())
        found = ", ".join(f"{count} x {suffix}" for suffix, count in suffixes.most_common(5))
        raise DatasetError(
            f"{path}: expected photos ({' '.join(SUFFIXES)}) in this folder or its "
            f"{' or '.join(name + '/' for name in SUBFOLDERS)}, found {found or 'no files'}; "
            "convert other formats to JPEG or PNG, and give a video as a file"
        )
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    files = [match for match in matches if match.is_file()]
    if not files:
        raise DatasetError(f"{path}: no such folder or file, and as a pattern it matches no file")
    return sorted(files, key=lambda p: natural_key(str(p)))


def _listed(path: Path) -> Path:
    if path.is_dir():
        raise DatasetError(
            f"{path}: expected photos only in a list of several, found a folder; list its photos, "
            f"such as {path}/*.jpg, or give the folder alone"
        )
    if not path.exists():
        raise DatasetError(f"{path}: no such file; correct its name or leave it out")
    return path
