"""Plain photos brought to a model's size."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hess.datasets.decoding import read_photo, read_size
from hess.datasets.photo_files import PhotoSource, find_images
from hess.datasets.scene import Scene
from hess.errors import ConfigError, DatasetError
from hess.geometry.fit_rules import FitRule
from hess.geometry.image_fit import ImageFit

__all__ = [
    "LoadedImages",
    "PhotoSource",
    "Progress",
    "find_images",
    "load_images",
    "load_photos",
    "spread_evenly",
]

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]

DECODE_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class LoadedImages:
    """Photos at one size.

    Args:
        images: float32 [N, 3, H, W] in [0, 1].
        fits: how each photo was brought to this size.
        paths: where each came from.
        names: unique name of each: its path below the folder that all photos asked for share, with
            forward slashes.
        kept: index of each in the list of paths that was asked for, ascending.
        as_stored: whether the file shows each photo as it is here to programs that know neither
            EXIF orientation nor formats other than JPEG and PNG; see
            :func:`hess.datasets.upright.upright_photos`.
        skipped: the unreadable ones.
    """

    images: Tensor
    fits: tuple[ImageFit, ...]
    paths: tuple[Path, ...]
    names: tuple[str, ...]
    kept: tuple[int, ...]
    as_stored: tuple[bool, ...]
    skipped: tuple[Path, ...] = ()


def spread_evenly(num_items: int, max_items: int | None) -> list[int]:
    """Indices of at most ``max_items`` of so many items, the first and the last among them.

    Raises:
        ConfigError: ``max_items`` is below 1.
    """
    if max_items is not None and max_items < 1:
        raise ConfigError(f"expected at least 1 view, found {max_items}")
    if max_items is None or num_items <= max_items:
        return list(range(num_items))
    return [i * (num_items - 1) // max(1, max_items - 1) for i in range(max_items)]


def load_images(
    paths: Sequence[Path],
    *,
    image_fit: FitRule,
    strict: bool = False,
    max_views: int | None = None,
    progress: Progress | None = None,
) -> LoadedImages:
    """Read photos and bring each to the size that ``image_fit`` chooses for it.

    The sizes come from the headers, and at most a few photos are in memory in full size. A photo
    that turns out unreadable has no influence on how the others are fitted.

    Args:
        paths: the photos, of any sizes, each once.
        image_fit: must give all of them the same output size.
        strict: raise on the first unreadable photo instead of skipping it with a warning.
        max_views: at most so many of the photos, spread evenly; None takes all.
        progress: called with photos done, photos in all, and the name of the last one.

    Raises:
        ConfigError: ``max_views`` is below 1.
        DatasetError: no photo is usable, one is given twice or refused as a decompression bomb,
            or one is unreadable (``strict``).
        LayoutError: ``image_fit`` gives them different output sizes.
    """
    names = _unique_names(paths)
    problems: dict[int, DatasetError] = {}

    def skip(index: int, error: DatasetError) -> None:
        if strict or isinstance(error.__cause__, Image.DecompressionBombError):
            raise error
        logger.warning("skipped %s", error)
        problems[index] = error

    found: dict[int, tuple[int, int]] = {}
    for index, path in enumerate(paths):
        try:
            found[index] = read_size(path)
        except DatasetError as error:
            skip(index, error)
    indices = list(found)
    sizes = {indices[i]: found[indices[i]] for i in spread_evenly(len(found), max_views)}

    fitted: dict[int, _Fitted] = {}
    # Every photo that drops out may change the fits of those that are done.
    while sizes:
        fits = dict(zip(sizes, image_fit(list(sizes.values())), strict=True))
        todo = [i for i, fit in fits.items() if i not in fitted or fitted[i].fit != fit]
        if not todo:
            break
        with ThreadPoolExecutor(DECODE_THREADS) as pool:
            results = pool.map(_decode, [paths[i] for i in todo], [fits[i] for i in todo])
            for index, result in zip(todo, results, strict=True):
                match result:
                    case _Fitted():
                        fitted[index] = result
                    case DatasetError():
                        skip(index, result)
                        del sizes[index]
                    case _:
                        sizes[index] = result
                if progress is not None:
                    progress(len(fitted), len(sizes), names[index])
    if not sizes:
        first_problem = next(iter(problems.values()))
        raise DatasetError(
            f"none of the {len(paths)} photos could be read; the first: {first_problem}"
        )

    kept = tuple(sizes)
    photos = [fitted.pop(index) for index in kept]
    first = photos[0].fit
    images = torch.empty(len(photos), 3, first.height, first.width)
    for image, photo in zip(images, photos, strict=True):
        image.copy_(torch.from_numpy(photo.pixels).permute(2, 0, 1) / 255.0)
    return LoadedImages(
        images=images,
        fits=tuple(photo.fit for photo in photos),
        paths=tuple(paths[index] for index in kept),
        names=tuple(names[index] for index in kept),
        kept=kept,
        as_stored=tuple(photo.as_stored for photo in photos),
        skipped=tuple(paths[index] for index in sorted(problems)),
    )


@dataclass(frozen=True, kw_only=True)
class _Fitted:
    """Pixels uint8 [H, W, 3] of a photo at its fit."""

    fit: ImageFit
    pixels: np.ndarray
    as_stored: bool


def _decode(path: Path, fit: ImageFit) -> _Fitted | DatasetError | tuple[int, int]:
    """The photo at its fit, what is wrong with it, or its size if its header did not tell."""
    try:
        image, as_stored = read_photo(path)
    except DatasetError as error:
        return error
    if image.size != (fit.original_width, fit.original_height):
        return image.size
    return _Fitted(fit=fit, pixels=fit.image_to_model(image), as_stored=as_stored)


def _unique_names(paths: Sequence[Path]) -> list[str]:
    """Each path below the folder that all share, with forward slashes."""
    absolute = [Path(os.path.abspath(path)) for path in paths]
    if not absolute:
        raise DatasetError("expected at least one photo, found an empty list")
    shared = os.path.commonpath([path.parent for path in absolute])
    names = [path.relative_to(shared).as_posix() for path in absolute]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise DatasetError(f"{name}: expected every photo once, found it {count} times")
    return names


def load_photos(
    source: PhotoSource,
    *,
    image_fit: FitRule,
    strict: bool = False,
    max_views: int | None = None,
    progress: Progress | None = None,
) -> Scene:
    """One scene of the photos of ``source`` (see :func:`find_images`), without ground truth.

    Raises:
        ConfigError, DatasetError, LayoutError: see :func:`find_images` and :func:`load_images`.
    """
    loaded = load_images(
        find_images(source),
        image_fit=image_fit,
        strict=strict,
        max_views=max_views,
        progress=progress,
    )
    return Scene(
        name=loaded.paths[0].parent.name or "photos",
        images=loaded.images,
        view_names=loaded.names,
        image_paths=loaded.paths,
        image_fits=loaded.fits,
    )
