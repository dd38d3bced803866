"""Plain photos: finding them, decoding them safely, and bringing them to a model's size."""

import glob
import logging
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from hess.datasets.scene import Scene
from hess.errors import ConfigError, DatasetError
from hess.geometry.fit_rules import FitRule
from hess.geometry.image_fit import ImageFit

logger = logging.getLogger(__name__)

PhotoSource = str | Path | Sequence[str | Path]
Progress = Callable[[int, int, str], None]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".heic", ".heif", ".avif")
VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".3gp")
SUBFOLDERS = ("images", "rgb")

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_DECODE_THREADS = 4

# What the decoders of Pillow and pillow-heif raise on damaged files.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error)


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
    """

    images: Tensor
    fits: tuple[ImageFit, ...]
    paths: tuple[Path, ...]
    names: tuple[str, ...]
    kept: tuple[int, ...]


def natural_key(text: str) -> list[str | int]:
    """Sort key under which "view2" comes before "view10"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", text.lower())]


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
            ``rgb/``), one file, a glob pattern such as ``"trip/*.jpg"``, or a list of files.
            Folders and patterns are put in natural order; a list keeps its own.

    Returns:
        At least one path.

    Raises:
        DatasetError: nothing is there, nothing that is an image, or a video.
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
        return [Path(item).expanduser() for item in source]

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


def _open_heif(path: Path) -> Image.Image:
    """HEIC or HEIF, without registering the format with Pillow for the whole process."""
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise DatasetError(
            f"{path}: reading HEIC needs the library pillow-heif; "
            "pip install 'hess-vggt[heic]', or convert the photo to JPEG"
        ) from error
    image: Image.Image = HeifImageFile(path)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > 2 * limit:  # as Image.open does
        raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels are too many")
    return image


def _open(path: Path) -> Image.Image:
    """The header of a photo, whatever its suffix says; its pixels are read when they are used."""
    known = Image.registered_extensions()
    formats = ["JPEG", "PNG", "WEBP", *(["AVIF"] if ".avif" in known else [])]
    try:
        return Image.open(path, formats=formats)
    except UnidentifiedImageError:
        with path.open("rb") as file:
            start = file.read(64)
        if start[4:8] != b"ftyp":
            raise
        if b"avif" in start:
            raise DatasetError(
                f"{path}: reading AVIF needs Pillow 11.3 or newer; pip install -U pillow"
            ) from None
        if not any(brand in start for brand in _HEIF_BRANDS):
            raise
    return _open_heif(path)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """:func:`_open` with typed errors, for what is done inside the block as well."""
    try:
        with _open(path) as image:
            yield image
    except DatasetError:
        raise
    except Image.DecompressionBombError as error:
        raise DatasetError(
            f"{path}: refused, {error}; if you trust the file, shrink it to a normal photo size"
        ) from error
    except DECODE_ERRORS as error:
        raise DatasetError(
            f"{path}: expected a JPEG, PNG, WebP, HEIC or AVIF image, could not read it ({error})"
        ) from error


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright photo by its header, without decoding it.

    An orientation that a PNG file states behind its pixels is not seen.

    Raises:
        DatasetError: as :func:`read_image`, as far as the header shows it.
    """
    with _opened(path) as image:
        # Asking a PNG file without EXIF for its EXIF would decode it.
        exif = image.getexif() if "exif" in image.info else {}
        turned = exif.get(ExifTags.Base.Orientation) in _TURNED
        return (image.height, image.width) if turned else image.size


def read_image(path: Path) -> Image.Image:
    """Decode one JPEG, PNG, WebP, HEIC or AVIF file to upright 8-bit RGB.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled to 8 bits.

    Raises:
        DatasetError: the file is missing, damaged, of another format, larger than Pillow's limit
            against decompression bombs, or HEIC without pillow-heif.
    """
    with _opened(path) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        grey = np.asarray(image).astype(np.float64) / 257.0
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


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
    problems: list[DatasetError] = []

    def skip(error: DatasetError) -> None:
        if strict or isinstance(error.__cause__, Image.DecompressionBombError):
            raise error
        logger.warning("skipped %s", error)
        problems.append(error)

    found: dict[int, tuple[int, int]] = {}
    for index, path in enumerate(paths):
        try:
            found[index] = read_size(path)
        except DatasetError as error:
            skip(error)
    indices = list(found)
    sizes = {indices[i]: found[indices[i]] for i in spread_evenly(len(found), max_views)}

    fitted: dict[int, tuple[ImageFit, np.ndarray]] = {}
    # Every photo that drops out may change the fits of those that are done.
    while sizes:
        fits = dict(zip(sizes, image_fit(list(sizes.values())), strict=True))
        todo = [i for i, fit in fits.items() if i not in fitted or fitted[i][0] != fit]
        if not todo:
            break
        with ThreadPoolExecutor(_DECODE_THREADS) as pool:
            results = pool.map(_decode, [paths[i] for i in todo], [fits[i] for i in todo])
            for index, result in zip(todo, results, strict=True):
                match result:
                    case np.ndarray():
                        fitted[index] = fits[index], result
                    case DatasetError():
                        skip(result)
                        del sizes[index]
                    case _:
                        sizes[index] = result
                if progress is not None:
                    progress(len(fitted), len(sizes), names[index])
    if not sizes:
        raise DatasetError(
            f"none of the {len(paths)} photos could be read; the first: {problems[0]}"
        )

    kept = tuple(sizes)
    chosen = tuple(fitted[index][0] for index in kept)
    images = torch.empty(len(kept), 3, chosen[0].height, chosen[0].width)
    for image, index in zip(images, kept, strict=True):
        _, pixels = fitted.pop(index)
        image.copy_(torch.from_numpy(pixels).permute(2, 0, 1) / 255.0)
    return LoadedImages(
        images=images,
        fits=chosen,
        paths=tuple(paths[index] for index in kept),
        names=tuple(names[index] for index in kept),
        kept=kept,
    )


def _decode(path: Path, fit: ImageFit) -> np.ndarray | DatasetError | tuple[int, int]:
    """The photo at its fit, what is wrong with it, or its size if its header did not tell."""
    try:
        image = read_image(path)
    except DatasetError as error:
        return error
    if image.size != (fit.original_width, fit.original_height):
        return image.size
    return fit.image_to_model(image)


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
