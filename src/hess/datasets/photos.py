"""Plain photos: finding them, decoding them safely, and bringing them to a model's size."""

import glob
import logging
import re
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hess.datasets.scene import Scene
from hess.errors import DatasetError
from hess.geometry.image_fit import FitRule, ImageFit

logger = logging.getLogger(__name__)

PhotoSource = str | Path | Sequence[str | Path]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SUBFOLDERS = ("images", "rgb")

# What Pillow's JPEG, PNG and WebP decoders raise on damaged files.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error)


@dataclass(frozen=True, kw_only=True)
class LoadedImages:
    """Photos at one size.

    Args:
        images: float32 [N, 3, H, W] in [0, 1].
        fits: how each photo was brought to this size.
        paths: where each came from.
        kept: index of each in the list of paths that was asked for, ascending.
    """

    images: Tensor
    fits: tuple[ImageFit, ...]
    paths: tuple[Path, ...]
    kept: tuple[int, ...]


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
        source: a folder (its JPEG, PNG and WebP files, or those of its ``images/`` or ``rgb/``),
            one file, a glob pattern such as ``"trip/*.jpg"``, or a list of files. Folders and
            patterns are put in natural order; a list keeps its own.

    Returns:
        At least one path.

    Raises:
        DatasetError: nothing is there, or nothing that is an image.
    """
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
            "convert other formats to JPEG or PNG first"
        )
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    files = [match for match in matches if match.is_file()]
    if not files:
        raise DatasetError(f"{path}: no such folder or file, and as a pattern it matches no file")
    return sorted(files, key=lambda p: natural_key(str(p)))


def read_image(path: Path) -> Image.Image:
    """Decode one JPEG, PNG or WebP file to upright 8-bit RGB.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled to 8 bits.

    Raises:
        DatasetError: the file is missing, damaged, of another format, or larger than Pillow's
            limit against decompression bombs.
    """
    try:
        with Image.open(path, formats=("JPEG", "PNG", "WEBP")) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except Image.DecompressionBombError as error:
        raise DatasetError(
            f"{path}: refused, {error}; if you trust the file, shrink it to a normal photo size"
        ) from error
    except DECODE_ERRORS as error:
        raise DatasetError(
            f"{path}: expected a JPEG, PNG or WebP image, could not read it ({error})"
        ) from error
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        grey = np.asarray(image).astype(np.float64) / 257.0
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def load_images(
    paths: Sequence[Path], *, image_fit: FitRule, strict: bool = False
) -> LoadedImages:
    """Read photos and bring each to the size that ``image_fit`` chooses for it.

    Args:
        paths: the photos, of any sizes.
        image_fit: must give all of them the same output size.
        strict: raise on the first unreadable photo instead of skipping it with a warning.

    Raises:
        DatasetError: no photo is usable, one is unreadable (``strict``), or output sizes differ.
    """
    images: list[Image.Image] = []
    kept: list[int] = []
    for index, path in enumerate(paths):
        try:
            image = read_image(path)
        except DatasetError as error:
            if strict or isinstance(error.__cause__, Image.DecompressionBombError):
                raise
            logger.warning("skipped %s", error)
            continue
        images.append(image)
        kept.append(index)
    if not images:
        raise DatasetError(
            f"none of the {len(paths)} photos could be read, first {paths[0]}; "
            "expected JPEG, PNG or WebP files"
        )
    fits = image_fit([image.size for image in images])
    tensors = [
        torch.from_numpy(fit.image_to_model(image)).permute(2, 0, 1) / 255.0
        for fit, image in zip(fits, images, strict=True)
    ]
    return LoadedImages(
        images=torch.stack(tensors),
        fits=tuple(fits),
        paths=tuple(paths[index] for index in kept),
        kept=tuple(kept),
    )


def load_photos(source: PhotoSource, *, image_fit: FitRule, strict: bool = False) -> Scene:
    """One scene of all photos of ``source`` (see :func:`find_images`), without ground truth.

    Raises:
        DatasetError: see :func:`find_images` and :func:`load_images`.
    """
    loaded = load_images(find_images(source), image_fit=image_fit, strict=strict)
    return Scene(
        name=loaded.paths[0].parent.name or "photos",
        images=loaded.images,
        view_names=tuple(path.name for path in loaded.paths),
    )
