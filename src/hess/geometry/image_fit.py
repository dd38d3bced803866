"""How a photo is brought to a model's input size, as a recorded affine map of pixels.

Pixel coordinates are continuous: the centre of the top-left pixel is at (0.5, 0.5), its corner at
(0, 0). A fit maps them by ``x_model = scale_x * x_original - offset_x`` and alike in y, so results
can be taken back to the pixels of the original photo. A :class:`FitRule` chooses the fit from the
size of the photo.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hess.errors import ConfigError, LayoutError

_WHITE = (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class ImageFit:
    """The map from one original photo to a model's input image.

    Args:
        original_width, original_height: size of the photo in pixels.
        scale_x, scale_y: model pixels per original pixel, above 0.
        offset_x, offset_y: what is cropped at the left and top, in model pixels (negative: white
            padding).
        width, height: size of the model's input image in pixels.

    Raises:
        ConfigError: a size or scale is not positive, or the fit shows nothing of the photo.
    """

    original_width: int
    original_height: int
    scale_x: float
    scale_y: float
    offset_x: float
    offset_y: float
    width: int
    height: int

    def __post_init__(self) -> None:
        sizes = (self.original_width, self.original_height, self.width, self.height)
        if min(sizes) < 1 or not min(self.scale_x, self.scale_y) > 0:
            raise ConfigError(f"an image fit needs positive sizes and scales, found {self}")
        (left, right), (top, bottom) = self._shown
        if left >= right or top >= bottom:
            raise ConfigError(f"an image fit must show a part of the photo, found {self}")

    @staticmethod
    def identity(width: int, height: int) -> "ImageFit":
        """The fit that leaves an image of this size as it is."""
        return ImageFit(
            original_width=width,
            original_height=height,
            scale_x=1.0,
            scale_y=1.0,
            offset_x=0.0,
            offset_y=0.0,
            width=width,
            height=height,
        )

    @property
    def model_from_original(self) -> Tensor:
        """The map as a matrix on homogeneous pixels: float64 [3, 3]."""
        return torch.tensor(
            [
                [self.scale_x, 0.0, -self.offset_x],
                [0.0, self.scale_y, -self.offset_y],
                [0.0, 0.0, 1.0],
            ],
            dtype=torch.float64,
        )

    @property
    def _shown(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Columns and rows of the model image that show the photo and not padding."""
        right = round(self.scale_x * self.original_width - self.offset_x)
        bottom = round(self.scale_y * self.original_height - self.offset_y)
        return (
            (max(0, round(-self.offset_x)), min(self.width, right)),
            (max(0, round(-self.offset_y)), min(self.height, bottom)),
        )

    def pixels_to_model(self, pixels: Tensor) -> Tensor:
        """Original pixel coordinates [..., 2] (x, y) -> model pixel coordinates [..., 2]."""
        scale = pixels.new_tensor([self.scale_x, self.scale_y])
        return pixels * scale - pixels.new_tensor([self.offset_x, self.offset_y])

    def pixels_to_original(self, pixels: Tensor) -> Tensor:
        """Model pixel coordinates [..., 2] (x, y) -> original pixel coordinates [..., 2]."""
        scale = pixels.new_tensor([self.scale_x, self.scale_y])
        return (pixels + pixels.new_tensor([self.offset_x, self.offset_y])) / scale

    def intrinsics_to_model(self, intrinsics: Tensor) -> Tensor:
        """Intrinsics [..., 3, 3] in original pixels -> the same camera in model pixels."""
        return (self.model_from_original @ intrinsics.double()).to(intrinsics.dtype)

    def intrinsics_to_original(self, intrinsics: Tensor) -> Tensor:
        """Intrinsics [..., 3, 3] in model pixels -> the same camera in original pixels."""
        original_from_model = torch.linalg.inv(self.model_from_original)
        return (original_from_model @ intrinsics.double()).to(intrinsics.dtype)

    def image_to_model(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """Crop, resize and pad a photo.

        Pillow's bicubic widens its kernel when it shrinks, so it does not alias at any reduction,
        and it is what VGGT resizes with. Pillow's box filter is not used: it weights every source
        pixel 0 or 1, which is uneven unless the reduction is a whole number.

        Args:
            image: RGB picture or uint8 array [original_height, original_width, 3].

        Returns:
            uint8 [height, width, 3].

        Raises:
            LayoutError: the image does not have the original size of this fit.
        """
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        self._check_size(picture.height, picture.width)
        (left, right), (top, bottom) = self._shown
        box = (
            max(0.0, (left + self.offset_x) / self.scale_x),
            max(0.0, (top + self.offset_y) / self.scale_y),
            min(float(self.original_width), (right + self.offset_x) / self.scale_x),
            min(float(self.original_height), (bottom + self.offset_y) / self.scale_y),
        )
        shown = picture.convert("RGB").resize(
            (right - left, bottom - top), Image.Resampling.BICUBIC, box=box
        )
        canvas = Image.new("RGB", (self.width, self.height), _WHITE)
        canvas.paste(shown, (left, top))
        return np.array(canvas)

    def depth_to_model(self, depth: Tensor) -> Tensor:
        """Depth map at the model's size by nearest pixel, so that no two depths are ever mixed.

        Args:
            depth: [original_height, original_width], 0 where unknown.

        Returns:
            [height, width], 0 where the nearest original pixel is unknown or outside the photo.

        Raises:
            LayoutError: the depth map does not have the original size of this fit.
        """
        self._check_size(*depth.shape)
        columns = torch.arange(self.width, dtype=torch.float64) + 0.5
        rows = torch.arange(self.height, dtype=torch.float64) + 0.5
        x = ((columns + self.offset_x) / self.scale_x).floor().long()
        y = ((rows + self.offset_y) / self.scale_y).floor().long()
        inside_x = (x >= 0) & (x < self.original_width)
        inside_y = (y >= 0) & (y < self.original_height)
        nearest = depth[y.clamp(0, self.original_height - 1)]
        nearest = nearest[:, x.clamp(0, self.original_width - 1)]
        return nearest * (inside_y[:, None] & inside_x[None, :])

    def _check_size(self, height: int, width: int) -> None:
        if (width, height) != (self.original_width, self.original_height):
            raise LayoutError(
                f"this fit is for images of {self.original_width}x{self.original_height} pixels, "
                f"found {width}x{height}; make one fit per image size"
            )


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
