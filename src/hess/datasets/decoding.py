"""Decoding one photo safely: size limit, orientation, transparency, 16 bits, HEIC."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from hess.errors import DatasetError

# What the decoders of Pillow and pillow-heif raise on damaged files.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error)

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_UPRIGHT = 1  # EXIF orientations: as stored,
_SIDEWAYS = (5, 6, 7, 8)  # and those that swap width and height
_READ_BY_ALL = ("JPEG", "MPO", "PNG")  # MPO is a JPEG file with more pictures behind the first


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
        sideways = exif.get(ExifTags.Base.Orientation) in _SIDEWAYS
        return (image.height, image.width) if sideways else image.size


def read_image(path: Path) -> Image.Image:
    """Decode one JPEG, PNG, WebP, HEIC or AVIF file to upright 8-bit RGB.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled to 8 bits.

    Raises:
        DatasetError: the file is missing, damaged, of another format, larger than Pillow's limit
            against decompression bombs, or HEIC without pillow-heif.
    """
    return read_photo(path)[0]


def read_photo(path: Path) -> tuple[Image.Image, bool]:
    """:func:`read_image`, and whether every program sees these pixels in the file.

    It does not where the orientation stands in EXIF only, which COLMAP and nerfstudio ignore, nor
    if the file is neither JPEG nor PNG.

    Raises:
        DatasetError: as :func:`read_image`.
    """
    with _opened(path) as image:
        image.load()
        turned = image.getexif().get(ExifTags.Base.Orientation, _UPRIGHT) != _UPRIGHT
        as_stored = image.format in _READ_BY_ALL and not turned
        ImageOps.exif_transpose(image, in_place=True)
    return _as_rgb(image), as_stored


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        grey = np.asarray(image).astype(np.float64) / 257.0
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy
