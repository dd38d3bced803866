"""Ways to lay out recorded sequences in a folder, and how such folders are found."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hess.datasets.frames import FrameSequence
from hess.datasets.photo_files import SUFFIXES, natural_key


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Files that belong together in one folder.

    Args:
        name: for messages and provenance.
        files: what the folder is recognised by, in words.
        matches: whether a folder is meant to be of this layout; looks at file names only.
        read: its sequences, usually one named after it; raises DatasetError.
    """

    name: str
    files: str
    matches: Callable[[Path], bool]
    read: Callable[[Path], list[FrameSequence]]


def find_layout(path: Path, layouts: Sequence[Layout]) -> tuple[Layout, list[Path]] | None:
    """The first layout that fits the folder ``path``, or else folders one or two levels below.

    Photos in ``path`` itself say that it is not a collection of other folders.
    """
    levels = [[path]]
    if not any(file.suffix.lower() in SUFFIXES for file in path.iterdir()):
        levels.append(_subfolders(path))
        levels.append([below for folder in levels[1] for below in _subfolders(folder)])
    for folders in levels:
        for layout in layouts:
            if found := [folder for folder in folders if layout.matches(folder)]:
                return layout, found
    return None


def _subfolders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    return [folder / name for name in sorted(names, key=natural_key)]
