"""How a photo is brought to a model's input size, as a recorded affine map of pixels.

Pixel coordinates are continuous: the centre of the top-left pixel is at (0.5, 0.5), its corner at
(0, 0). A fit maps them by ``x_model = scale_x * x_original - offset_x`` and alike in y, so results
can be taken back to the pixels of the original photo.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hess.errors import ConfigError, LayoutError

Resample = Literal["bicubic", "lanczos"]

_WHITE = (255, 255, 255)
_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True, kw_only=True)
class ImageFit:
    """The map from one original photo to a model's input image.

    Args:
        original_width, original_height: size of the photo in pixels.
        scale_x, scale_y: model pixels per original pixel, above 0.
        offset_x, offset_y: what is cropped at the left and top, in model pixels (negative: white
            padding).
        width, height: size of the model's input image in pixels.
        resample: filter that resizes the photo.
        crop_last: resize all of the photo and then cut the shown part out, as VGGT does, instead
            of resizing the shown part only. The two differ in how 8-bit values are rounded.

    Raises:
        ConfigError: a size or scale is not positive, the fit shows nothing of the photo, the
            filter is unknown, or ``crop_last`` would have to cut through pixels.
    """

    original_width: int
    original_height: int
    scale_x: float
    scale_y: float
    offset_x: float
    offset_y: float
    width: int
    height: int
    resample: Resample = "bicubic"
    crop_last: bool = False

    def __post_init__(self) -> None:
        if self.resample not in _FILTERS:
            raise ConfigError(f"resample must be bicubic or lanczos, found {self.resample!r}")
        sizes = (self.original_width, self.original_height, self.width, self.height)
        if min(sizes) < 1 or not min(self.scale_x, self.scale_y) > 0:
            raise ConfigError(f"an image fit needs positive sizes and scales, found {self}")
        (left, right), (top, bottom) = self.shown
        if left >= right or top >= bottom:
            raise ConfigError(f"an image fit must show a part of the photo, found {self}")
        cuts = (*self._resized, self.offset_x, self.offset_y)
        if self.crop_last and any(abs(cut - round(cut)) > 1e-6 for cut in cuts):
            raise ConfigError(
                f"crop_last needs a resized photo and offsets of whole pixels, found {self}"
            )

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
    def _resized(self) -> tuple[float, float]:
        """Width and height of the whole photo in model pixels."""
        return self.scale_x * self.original_width, self.scale_y * self.original_height

    @property
    def shown(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Columns and rows of the model image that show the photo and not padding."""
        width, height = self._resized
        right, bottom = round(width - self.offset_x), round(height - self.offset_y)
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

        Pillow's bicubic and Lanczos widen their kernel when they shrink, so they do not alias at
        any reduction, and they are what VGGT and Pi3 resize with. Pillow's box filter is not used:
        it weights every source pixel 0 or 1, which is uneven unless the reduction is a whole
        number.

        Args:
            image: RGB picture or uint8 array [original_height, original_width, 3].

        Returns:
            uint8 [height, width, 3].

        Raises:
            LayoutError: the image does not have the original size of this fit.
        """
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        self._check_size(picture.height, picture.width)
        (left, right), (top, bottom) = self.shown
        if picture.mode != "RGB":
            picture = picture.convert("RGB")
        resample = _FILTERS[self.resample]
        if self.crop_last:
            x, y = round(self.offset_x), round(self.offset_y)
            width, height = self._resized
            resized = picture.resize((round(width), round(height)), resample)
            shown = resized.crop((left + x, top + y, right + x, bottom + y))
        else:
            box = (
                max(0.0, (left + self.offset_x) / self.scale_x),
                max(0.0, (top + self.offset_y) / self.scale_y),
                min(float(self.original_width), (right + self.offset_x) / self.scale_x),
                min(float(self.original_height), (bottom + self.offset_y) / self.scale_y),
            )
            shown = picture.resize((right - left, bottom - top), resample, box=box)
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
