"""Photos, cameras and depth stay in step when they are brought to a model's input size."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hess.errors import ConfigError, LayoutError
from hess.geometry.image_fit import ImageFit, square_crop

SIDES = st.integers(1, 4000)


def ramp(width: int, height: int) -> np.ndarray:
    """Red is the column and green the row of a pixel, blue is 7."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.full_like(rows, 7)], axis=-1).astype(np.uint8)


def padded_fit() -> ImageFit:
    """A 200x100 photo at half size in the middle of a 100x100 canvas."""
    return ImageFit(
        original_width=200,
        original_height=100,
        scale_x=0.5,
        scale_y=0.5,
        offset_x=0.0,
        offset_y=-25.0,
        width=100,
        height=100,
    )


@given(SIDES, SIDES, st.integers(1, 518))
def test_square_crop_shows_the_middle_of_the_photo(width: int, height: int, size: int) -> None:
    fit = square_crop(size)([(width, height)])[0]
    corners = fit.pixels_to_original(torch.tensor([[0.0, 0.0], [size, size]]).double())
    side = min(width, height)
    assert (corners[1] - corners[0]).tolist() == pytest.approx([side, side])
    middle = torch.tensor([width / 2, height / 2], dtype=torch.float64)
    # Whole pixels are cropped, so an odd margin leaves the middle half a pixel off.
    assert (corners.mean(0) - middle).abs().max() <= 0.5 + 1e-9
    assert corners.min() >= -1e-9
    assert corners[1, 0] <= width + 1e-9
    assert corners[1, 1] <= height + 1e-9


@given(SIDES, SIDES, st.floats(-50, 50), st.floats(-50, 50))
def test_pixels_go_there_and_back(width: int, height: int, x: float, y: float) -> None:
    fit = square_crop(48)([(width, height)])[0]
    pixels = torch.tensor([x, y], dtype=torch.float64)
    there = fit.pixels_to_model(pixels)
    assert torch.allclose(fit.pixels_to_original(there), pixels, atol=1e-6)
    by_matrix = fit.model_from_original @ torch.tensor([x, y, 1.0], dtype=torch.float64)
    assert torch.allclose(by_matrix[:2], there)


def test_intrinsics_project_to_the_fitted_pixel() -> None:
    fit = square_crop(48)([(540, 360)])[0]
    k = torch.tensor([[495.0, 0.3, 269.5], [0, 490.0, 169.2], [0, 0, 1]], dtype=torch.float64)
    point = torch.tensor([0.2, -0.1, 1.7], dtype=torch.float64)
    original, model = k @ point, fit.intrinsics_to_model(k) @ point
    expected = fit.pixels_to_model(original[:2] / original[2])
    assert torch.allclose(model[:2] / model[2], expected)
    assert torch.allclose(fit.intrinsics_to_original(fit.intrinsics_to_model(k)), k)
    assert fit.intrinsics_to_model(k.float()).dtype == torch.float32


@pytest.mark.parametrize(
    "fit", [square_crop(48)([(200, 120)])[0], square_crop(77)([(90, 201)])[0]]
)
def test_image_content_lies_where_the_map_says(fit: ImageFit) -> None:
    result = fit.image_to_model(ramp(fit.original_width, fit.original_height))
    assert result.shape == (fit.height, fit.width, 3)
    assert result.dtype == np.uint8
    rows, columns = np.mgrid[: fit.height, : fit.width] + 0.5
    source = fit.pixels_to_original(torch.from_numpy(np.stack([columns, rows], axis=-1)))
    difference = np.abs(result[..., :2] - (source.numpy() - 0.5))
    inner = slice(3, -3)  # the kernel is cut off at the edge of a photo
    assert difference[inner, inner].max() < 0.75
    assert (result[..., 2] == 7).all()


def test_strong_reduction_does_not_alias() -> None:
    checkerboard = (np.indices((360, 360)).sum(0) % 2 * 255).astype(np.uint8)
    result = square_crop(48)([(360, 360)])[0].image_to_model(np.stack([checkerboard] * 3, axis=-1))
    assert np.abs(result.astype(int) - 127).max() <= 4


def test_pictures_and_arrays_give_the_same() -> None:
    fit, array = square_crop(20)([(64, 40)])[0], ramp(64, 40)
    np.testing.assert_array_equal(
        fit.image_to_model(array), fit.image_to_model(Image.fromarray(array))
    )


def test_identity_changes_nothing() -> None:
    fit, image = ImageFit.identity(40, 30), ramp(40, 30)
    depth = torch.rand(30, 40)
    np.testing.assert_array_equal(fit.image_to_model(image), image)
    assert torch.equal(fit.depth_to_model(depth), depth)
    assert torch.equal(fit.model_from_original, torch.eye(3).double())


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_depth_takes_the_pixel_under_the_sample(width: int, height: int, size: int) -> None:
    fit = square_crop(size)([(width, height)])[0]
    depth = torch.arange(width * height, dtype=torch.float32).reshape(height, width)
    fitted = fit.depth_to_model(depth)
    for row, column in ((0, 0), (size - 1, 0), (size // 2, size - 1)):
        x, y = fit.pixels_to_original(torch.tensor([column + 0.5, row + 0.5]).double())
        found_y, found_x = divmod(int(fitted[row, column]), width)
        # The sample lies in the pixel it took, up to rounding at the border of two pixels.
        assert abs(float(x) - (found_x + 0.5)) <= 0.5 + 1e-6
        assert abs(float(y) - (found_y + 0.5)) <= 0.5 + 1e-6


def test_depth_is_never_mixed_with_unknown() -> None:
    generator = torch.Generator().manual_seed(0)
    known = torch.rand(100, 130, generator=generator) < 0.5
    fitted = square_crop(24)([(130, 100)])[0].depth_to_model(known * 2.0)
    assert set(fitted.unique().tolist()) == {0.0, 2.0}


def test_padding_is_white_and_has_no_depth() -> None:
    fit = padded_fit()
    result = fit.image_to_model(ramp(200, 100))
    assert (result[:25] == 255).all()
    assert (result[75:] == 255).all()
    assert np.abs(result[50, 10:90, 0] - (2.0 * np.arange(10, 90) + 0.5)).max() <= 1
    depth = fit.depth_to_model(torch.ones(100, 200))
    assert torch.equal(depth.sum(1) > 0, (torch.arange(100) >= 25) & (torch.arange(100) < 75))


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(LayoutError, match="200x100"):
        padded_fit().image_to_model(ramp(100, 200))
    with pytest.raises(LayoutError, match="200x100"):
        padded_fit().depth_to_model(torch.ones(200, 100))
    with pytest.raises(ConfigError, match="at least 1"):
        square_crop(0)
    with pytest.raises(ConfigError, match="show"):
        ImageFit(
            original_width=10,
            original_height=10,
            scale_x=1.0,
            scale_y=1.0,
            offset_x=10.0,
            offset_y=0.0,
            width=5,
            height=5,
        )
