"""Replacing a COLMAP model folder so that nothing else is ever deleted."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hess.errors import ConfigError

_FILES = {
    f"{name}{suffix}"
    for name in ("cameras", "images", "points3D", "rigs", "frames")
    for suffix in (".bin", ".txt")
}


@contextmanager
def replaced_model(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path`` that takes its name when the block ends well.

    Missing parent folders are made. If the block raises, an older model at ``path`` is left as it
    was. The older model is moved aside before the new one takes its place; if the process is
    killed in between, the next call moves it back.

    Raises:
        ConfigError: ``path`` is a file, or a folder that holds anything but a COLMAP model.
        OSError: the place cannot be written.
    """
    path = path.resolve()
    new, old = (path.with_name(f".{path.name}.{what}") for what in ("tmp", "old"))
    for folder in (path, new, old):
        _check_replaceable(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    if old.exists() and not path.exists():
        old.rename(path)
    _remove(old)
    _remove(new)
    new.mkdir()
    try:
        yield new
        for file in new.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        _remove(old)
    finally:
        _remove(new)


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file; a COLMAP model needs the name of a folder")
    foreign = sorted(x.name for x in folder.iterdir() if x.name not in _FILES or not x.is_file())
    if foreign:
        raise ConfigError(
            f"{folder} holds more than a COLMAP model, such as {foreign[0]!r}, and is not "
            "replaced; name a new folder"
        )


def _remove(folder: Path) -> None:
    """Remove a folder that may hold files of a model; anything else makes it stay (OSError)."""
    if not folder.exists():
        return
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()
