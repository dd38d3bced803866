"""Photos in files that any program shows as the model saw them."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath

from hess.datasets.decoding import read_image
from hess.datasets.own_folder import renew_folder
from hess.datasets.photos import DECODE_THREADS, LoadedImages, Progress
from hess.errors import DatasetError
from hess.files import atomic_write

_JPEG = (".jpg", ".jpeg")
_QUALITY = 95


def upright_photos(
    loaded: LoadedImages, folder: str | Path, *, progress: Progress | None = None
) -> LoadedImages:
    """The same photos in files that are upright without EXIF and either JPEG or PNG.

    A camera model is in pixels of the upright photo. COLMAP and nerfstudio read the pixels as they
    are stored, whatever EXIF says of their orientation, and COLMAP not every format.

    If all files are such already, ``loaded`` is returned and nothing is written. Otherwise
    ``folder`` gets all the photos, because COLMAP wants them in one: byte for byte, or where that
    would not do decoded and without EXIF, as PNG if they are called so, else as JPEG of
    quality 95. Names stay the same, but for the suffix of what becomes a JPEG.

    Args:
        loaded: the photos, whose files are still there.
        folder: made if missing; empty, or as an earlier call left it, whose files are replaced.
        progress: called with photos done, photos in all, and the name of the last one.

    Returns:
        ``loaded``, with paths and names of the files in ``folder``.

    Raises:
        DatasetError: ``folder`` holds something else or one of the photos, or a photo cannot be
            read any more.
        OSError: the place cannot be written.
    """
    if all(loaded.as_stored):
        return loaded
    folder = Path(folder).expanduser()
    inside = [path for path in loaded.paths if path.resolve().is_relative_to(folder.resolve())]
    if inside:
        raise DatasetError(
            f"{folder}: upright copies of the photos need a folder of their own, found the photo "
            f"{inside[0].name} there; choose another"
        )
    names = _file_names(loaded)
    renew_folder(folder, names)
    targets = [folder / name for name in names]
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        written = pool.map(_write, loaded.paths, targets, loaded.as_stored)
        for done, name in enumerate(written, start=1):
            if progress is not None:
                progress(done, len(names), name)
    return replace(
        loaded, paths=tuple(targets), names=tuple(names), as_stored=(True,) * len(names)
    )


def _file_names(loaded: LoadedImages) -> list[str]:
    """No two alike, even where upper and lower case are the same."""
    taken = {name.lower() for name in loaded.names}
    names = []
    for name, as_stored in zip(loaded.names, loaded.as_stored, strict=True):
        path = PurePosixPath(name)
        if not as_stored and path.suffix.lower() not in (".png", *_JPEG):
            path = path.with_suffix(".jpg")
            while str(path).lower() in taken:
                path = path.with_stem(f"{path.stem}_")
            taken.add(str(path).lower())
        names.append(str(path))
    return names


def _write(source: Path, target: Path, as_stored: bool) -> str:
    with atomic_write(target) as file:
        if as_stored:
            with source.open("rb") as original:
                shutil.copyfileobj(original, file)
        elif target.suffix.lower() in _JPEG:
            read_image(source).save(file, "JPEG", quality=_QUALITY)
        else:
            read_image(source).save(file, "PNG")
    return target.name
