"""Rules that choose how the photos of a scene are brought to a model's input size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt, trunc

from hess.errors import ConfigError, LayoutError
from hess.geometry.image_fit import ImageFit, Resample

_MAX_RESIZED_PIXELS = 100_000_000


@dataclass(frozen=True, kw_only=True)
class FitRule:
    """Chooses an :class:`ImageFit` for each photo of a scene, from the sizes of all of them.

    ``name`` identifies the rule and its settings in provenance records.
    """

    name: str
    choose: Callable[[Sequence[tuple[int, int]]], list[ImageFit]]

    def __call__(self, sizes: Sequence[tuple[int, int]]) -> list[ImageFit]:
        """Fits for photos of these (width, height), all of one output size.

        Raises:
            LayoutError: the rule gives different output sizes.
        """
        fits = self.choose(sizes)
        outputs = {(fit.width, fit.height) for fit in fits}
        if len(outputs) > 1:
            raise LayoutError(
                f"{self.name} gives these photos different sizes {sorted(outputs)}; use a rule "
                "with one output size, such as square_crop"
            )
        return fits


def square_crop(size: int) -> FitRule:
    """Centre crop to a square of the shorter side, then resize to ``size`` x ``size`` pixels.

    Raises:
        ConfigError: ``size`` is not positive.
    """
    if size < 1:
        raise ConfigError(f"square_crop needs a size of at least 1 pixel, found {size}")

    def fit(width: int, height: int) -> ImageFit:
        side = min(width, height)
        scale = size / side
        return ImageFit(
            original_width=width,
            original_height=height,
            scale_x=scale,
            scale_y=scale,
            offset_x=(width - side) // 2 * scale,
            offset_y=(height - side) // 2 * scale,
            width=size,
            height=size,
        )

    return FitRule(
        name=f"square_crop({size})", choose=lambda sizes: [fit(*size) for size in sizes]
    )


def vggt_crop(size: int, patch_size: int) -> FitRule:
    """VGGT's rule for photos: full width, the middle of what is taller than wide.

    Each photo gets ``size`` columns and the nearest whole number of patches in height; what
    exceeds ``size`` rows is cropped alike at the top and bottom. Lower photos of a scene are
    padded white to the height of the highest. ("crop" mode of load_and_preprocess_images, VGGT.)

    Raises:
        ConfigError: ``size`` is not a positive multiple of ``patch_size``.
    """
    _check_patches("crop", size, patch_size)

    def choose(sizes: Sequence[tuple[int, int]]) -> list[ImageFit]:
        resized = [(size, _whole_patches(h * (size / w), patch_size)) for w, h in sizes]
        output = (size, min(size, max(height for _, height in resized)))
        return [_centred(*pair, output) for pair in zip(sizes, resized, strict=True)]

    return FitRule(name=f"crop({size})", choose=choose)


def vggt_pad(size: int, patch_size: int) -> FitRule:
    """VGGT's rule that keeps all of a photo: padded white to a square.

    The longer side gets ``size`` pixels and the other the nearest whole number of patches.
    ("pad" mode of load_and_preprocess_images, VGGT.)

    Raises:
        ConfigError: ``size`` is not a positive multiple of ``patch_size``.
    """
    _check_patches("pad", size, patch_size)

    def fit(width: int, height: int) -> ImageFit:
        if width >= height:
            resized = (size, _whole_patches(height * (size / width), patch_size))
        else:
            resized = (_whole_patches(width * (size / height), patch_size), size)
        return _centred((width, height), resized, (size, size))

    return FitRule(name=f"pad({size})", choose=lambda sizes: [fit(*size) for size in sizes])


def pixel_budget(max_pixels: int, patch_size: int) -> FitRule:
    """Pi3's rule: all photos stretched to one size near the shape of the first.

    The first photo is scaled to ``max_pixels``, both sides are rounded to whole patches, and the
    side that is too long for its shape gives up patches until the budget holds. The aspect ratio
    is kept only roughly, so the two scales differ. (load_images_as_tensor, Pi3.)

    Raises:
        ConfigError: the budget does not hold one patch.
    """
    if patch_size < 1 or max_pixels < patch_size**2:
        raise ConfigError(
            f"a pixel budget must hold at least one patch of {patch_size}x{patch_size} pixels, "
            f"found {max_pixels}"
        )

    def choose(sizes: Sequence[tuple[int, int]]) -> list[ImageFit]:
        width, height = sizes[0]
        scale = sqrt(max_pixels / (width * height))
        columns = max(1, round(width * scale / patch_size))
        rows = max(1, round(height * scale / patch_size))
        while columns * rows * patch_size**2 > max_pixels:
            too_wide = columns / rows > width / height
            if rows == 1 or (too_wide and columns > 1):
                columns -= 1
            else:
                rows -= 1
        output = (columns * patch_size, rows * patch_size)
        return [_centred(size, output, output, resample="lanczos") for size in sizes]

    return FitRule(name=f"pixel_budget({max_pixels})", choose=choose)


def _check_patches(name: str, size: int, patch_size: int) -> None:
    if size < 1 or patch_size < 1 or size % patch_size:
        raise ConfigError(
            f"{name} needs a size that is a positive multiple of the patch size {patch_size}, "
            f"found {size}"
        )


def _whole_patches(length: float, patch_size: int) -> int:
    """The nearest length in whole patches, at least one."""
    return max(1, round(length / patch_size)) * patch_size


def _centred(
    original: tuple[int, int],
    resized: tuple[int, int],
    output: tuple[int, int],
    resample: Resample = "bicubic",
) -> ImageFit:
    """The photo at size ``resized`` in the middle of ``output``, cropped or padded to it."""
    scale_x, scale_y = (to / of for to, of in zip(resized, original, strict=True))
    # Towards zero: an odd pixel is cropped or padded at the right and bottom, as VGGT does.
    offset_x, offset_y = (trunc((of - to) / 2) for of, to in zip(resized, output, strict=True))
    # Exactly as upstream resizes, except for photos so narrow that this would fill the memory.
    crop_last = resized[0] * resized[1] <= _MAX_RESIZED_PIXELS
    return ImageFit(
        original_width=original[0],
        original_height=original[1],
        scale_x=scale_x,
        scale_y=scale_y,
        offset_x=float(offset_x),
        offset_y=float(offset_y),
        width=output[0],
        height=output[1],
        resample=resample,
        crop_last=crop_last,
    )
