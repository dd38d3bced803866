"""Photos, cameras and depth stay in step when they are brought to a model's input size."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hess.datasets.photos import load_images
from hess.errors import ConfigError, LayoutError
from hess.geometry.fit_rules import FitRule, pixel_budget, square_crop, vggt_crop, vggt_pad
from hess.geometry.image_fit import ImageFit

GOLDEN = Path(__file__).parent / "golden" / "preprocess"
SIDES = st.integers(1, 4000)
SIZES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=4)
RULES = [square_crop(48), vggt_crop(56, 14), vggt_pad(56, 14), pixel_budget(3000, 14)]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


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


@every_rule
@given(SIZES, st.floats(-50, 50), st.floats(-50, 50))
def test_pixels_go_there_and_back(
    rule: FitRule, sizes: list[tuple[int, int]], x: float, y: float
) -> None:
    pixels = torch.tensor([x, y], dtype=torch.float64)
    for fit in rule(sizes):
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


# --- the rules of VGGT and Pi3 -------------------------------------------------------------------


@pytest.mark.parametrize("case", json.loads((GOLDEN / "index.json").read_text()).items())
def test_vggt_rules_equal_upstream_to_the_bit(case: tuple[str, dict]) -> None:
    name, expected = case
    rule = {"crop": vggt_crop, "pad": vggt_pad}[name.split(".")[1]](518, 14)
    loaded = load_images([GOLDEN / f"{photo}.png" for photo in expected["inputs"]], image_fit=rule)
    assert list(loaded.images.shape) == expected["shape"]
    for index, image in enumerate(loaded.images):
        golden = np.asarray(Image.open(GOLDEN / f"out.{name}.{index}.png").convert("RGB"))
        found = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(found, golden)


def test_square_crop_is_what_nano_was_measured_with() -> None:
    # Pillow resizes rows or columns first by the shape of what it is given, which shows in the
    # last bits: the square has to be cut out before.
    image = np.random.default_rng(0).integers(0, 256, (85, 24, 3), dtype=np.uint8)
    square = Image.fromarray(image).resize((48, 48), Image.Resampling.BICUBIC, box=(0, 30, 24, 54))
    found = square_crop(48)([(24, 85)])[0].image_to_model(image)
    np.testing.assert_array_equal(found, np.asarray(square))


@given(SIZES)
def test_vggt_crop_fills_the_width(sizes: list[tuple[int, int]]) -> None:
    fits = vggt_crop(56, 14)(sizes)
    for (width, height), fit in zip(sizes, fits, strict=True):
        assert (fit.width, fit.height % 14) == (56, 0)
        rows = 14 * max(1, round(height * 56 / width / 14))
        assert (fit.scale_x, fit.scale_y) == (56 / width, rows / height)
        margin = rows - fit.height  # cropped if positive, padded if negative
        assert 2 * fit.offset_y in (margin - 1, margin, margin + 1)
        assert fit.offset_x == 0
    assert fits[0].height == min(56, max(round(fit.scale_y * fit.original_height) for fit in fits))


@given(SIZES)
def test_vggt_pad_shows_all_of_a_photo(sizes: list[tuple[int, int]]) -> None:
    for (width, height), fit in zip(sizes, vggt_pad(56, 14)(sizes), strict=True):
        corners = torch.tensor([[0, 0], [width, height]], dtype=torch.float64)
        (left, top), (right, bottom) = fit.pixels_to_model(corners).round().tolist()
        assert max(right - left, bottom - top) == 56
        assert min(left, top) >= 0
        assert abs(left - (56 - right)) <= 1
        assert abs(top - (56 - bottom)) <= 1


@pytest.mark.parametrize(
    ("photo", "expected"),
    [
        ((1920, 1080), (672, 378)),
        ((640, 480), (574, 434)),  # 588 x 434 is nearer in shape but above the budget
        ((480, 640), (434, 574)),
        ((1000, 1000), (504, 504)),
        ((20000, 20), (15974, 14)),
    ],
)
def test_pixel_budget_follows_the_first_photo(
    photo: tuple[int, int], expected: tuple[int, int]
) -> None:
    fits = pixel_budget(255_000, 14)([photo, (30, 40)])
    assert [(fit.width, fit.height) for fit in fits] == [expected, expected]
    assert (fits[0].scale_x, fits[0].scale_y) == (expected[0] / photo[0], expected[1] / photo[1])
    assert (fits[1].scale_x, fits[1].scale_y) == (expected[0] / 30, expected[1] / 40)
    assert {fit.resample for fit in fits} == {"lanczos"}


@given(SIDES, SIDES, st.integers(196, 300_000))
def test_pixel_budget_holds(width: int, height: int, budget: int) -> None:
    (fit,) = pixel_budget(budget, 14)([(width, height)])
    assert fit.width * fit.height <= budget
    assert fit.width % 14 == fit.height % 14 == 0
    assert min(fit.width, fit.height) >= 14


def test_an_odd_pixel_is_cut_or_padded_at_the_end() -> None:
    (padded,) = vggt_pad(21, 7)([(30, 20)])  # 21 x 14 pixels, 7 rows of white
    (cropped,) = vggt_crop(21, 7)([(30, 40)])  # 21 x 28 pixels, 7 rows too many
    assert (padded.offset_y, cropped.offset_y) == (-3, 3)


def test_lanczos_is_lanczos() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    (fit,) = pixel_budget(1000, 14)([(50, 40)])
    expected = Image.fromarray(image).resize((fit.width, fit.height), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(fit.image_to_model(image), np.asarray(expected))


@every_rule
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_mark_lands_where_the_map_says(rule: FitRule, data: st.DataObject) -> None:
    sizes = data.draw(
        st.lists(st.tuples(st.integers(20, 200), st.integers(20, 200)), min_size=1, max_size=3)
    )
    fit = rule(sizes)[0]
    width, height = sizes[0]
    # A red rectangle of about 3 x 3 model pixels on black; padding is white, so red minus blue
    # is the mark alone.
    mark_w, mark_h = round(3 / fit.scale_x) + 1, round(3 / fit.scale_y) + 1
    x = data.draw(st.integers(0, max(0, width - mark_w)))
    y = data.draw(st.integers(0, max(0, height - mark_h)))
    photo = np.zeros((height, width, 3), dtype=np.uint8)
    photo[y : y + mark_h, x : x + mark_w, 0] = 255
    red = fit.image_to_model(photo).astype(float)
    red = red[..., 0] - red[..., 2]

    corners = torch.tensor([[x, y], [min(width, x + mark_w), min(height, y + mark_h)]]).double()
    (left, top), (right, bottom) = fit.pixels_to_model(corners).tolist()
    if right < -3 or bottom < -3 or left > fit.width + 3 or top > fit.height + 3:
        assert red.max() == 0  # in the part that was cropped
    elif left >= 3 and top >= 3 and right <= fit.width - 3 and bottom <= fit.height - 3:
        rows, columns = np.mgrid[: fit.height, : fit.width] + 0.5
        centre = (red * columns).sum() / red.sum(), (red * rows).sum() / red.sum()
        assert centre == pytest.approx(((left + right) / 2, (top + bottom) / 2), abs=0.3)


@every_rule
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=3),
)
def test_depth_is_known_where_the_photo_is_shown(
    rule: FitRule, sizes: list[tuple[int, int]]
) -> None:
    for (width, height), fit in zip(sizes, rule(sizes), strict=True):
        image = fit.image_to_model(np.zeros((height, width, 3), dtype=np.uint8))
        known = fit.depth_to_model(torch.ones(height, width)).numpy() > 0
        np.testing.assert_array_equal(known, (image == 0).all(-1))


def test_a_very_narrow_photo_is_not_blown_up() -> None:
    (fit,) = vggt_crop(518, 14)([(1, 100_000)])  # 518 x 51,800,000 pixels in full
    image = fit.image_to_model(np.full((100_000, 1, 3), 9, dtype=np.uint8))
    assert image.shape == (518, 518, 3)
    assert (image == 9).all()


def test_rules_refuse_what_they_cannot_do() -> None:
    for rule in (vggt_crop, vggt_pad):
        for size in (0, 13, 520):
            with pytest.raises(ConfigError, match="multiple of the patch size 14"):
                rule(size, 14)
    with pytest.raises(ConfigError, match="at least one patch"):
        pixel_budget(195, 14)
    with pytest.raises(ConfigError, match="bicubic or lanczos"):
        ImageFit(**{**vars(padded_fit()), "resample": "nearest"})
    with pytest.raises(ConfigError, match="whole pixels"):
        ImageFit(**{**vars(padded_fit()), "offset_y": -24.5, "crop_last": True})
    names = [
        rule.name for rule in (vggt_crop(518, 14), vggt_pad(518, 14), pixel_budget(255000, 14))
    ]
    assert names == ["crop(518)", "pad(518)", "pixel_budget(255000)"]
