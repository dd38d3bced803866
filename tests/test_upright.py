"""Files that COLMAP and nerfstudio open must show the photos as the model saw them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pillow_heif  # Pillow must be loaded before pycolmap: their zlibs clash the other way round
import pycolmap
import pytest
from PIL import Image

from hess.datasets.decoding import read_image
from hess.datasets.photos import LoadedImages, find_images, load_images
from hess.datasets.upright import upright_photos
from hess.errors import DatasetError
from hess.geometry.fit_rules import vggt_pad

CORNERS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255,) * 3}


def picture() -> Image.Image:
    image = Image.new("RGB", (96, 64))
    for index, color in enumerate(CORNERS):
        row, column = divmod(index, 2)
        image.paste(color, (48 * column, 32 * row, 48 * column + 48, 32 * row + 32))
    return image


def write_photo(path: Path, *, orientation: int = 1) -> Path:
    """Suffix tells the format; ``orientation`` is EXIF's, 1 being upright."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    if path.suffix.lower() == ".heic":
        pillow_heif.from_pillow(picture()).save(path, quality=95, exif=exif.tobytes())
    else:
        picture().save(path, exif=exif)
    return path


def load(*paths: Path) -> LoadedImages:
    return load_images(paths, image_fit=vggt_pad(28, 14))


def read_by_colmap(path: Path) -> np.ndarray:
    bitmap = pycolmap.Bitmap.read(path, True)
    assert bitmap is not None, path
    return bitmap.to_array()


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_other_tools_would_see_a_turned_photo_otherwise(tmp_path: Path) -> None:
    path = write_photo(tmp_path / "a.jpg", orientation=6)
    assert read_image(path).size == (64, 96)
    assert read_by_colmap(path).shape == (64, 96, 3)
    assert load(path).as_stored == (False,)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.PNG", "a.webp", "a.avif", "a.heic"])
def test_stored_pixels_are_what_the_model_saw(name: str, orientation: int, tmp_path: Path) -> None:
    photo = write_photo(tmp_path / "in" / name, orientation=orientation)
    other = write_photo(tmp_path / "in" / "other.webp")  # so that files are written at all
    loaded = load(photo, other)
    result = upright_photos(loaded, tmp_path / "images")
    (path, _), (fit, _) = result.paths, result.fits
    stored = Image.open(path)
    assert stored.format == ("PNG" if name == "a.PNG" else "JPEG")
    assert stored.size == (fit.original_width, fit.original_height)
    assert stored.getexif().get(0x0112, 1) == 1
    seen = np.asarray(read_image(photo), dtype=int)
    tolerance = 0 if name == "a.PNG" else 2  # another orientation would differ by over 80
    for found in (np.asarray(stored), read_by_colmap(path)):
        assert found.shape == seen.shape
        assert np.abs(found.astype(int) - seen).mean() <= tolerance
    again = load(*result.paths)
    assert again.fits == result.fits
    assert again.as_stored == result.as_stored == (True, True)
    assert (again.images - result.images).abs().mean() < 0.02


def test_plain_photos_stay_where_they_are(tmp_path: Path) -> None:
    loaded = load(write_photo(tmp_path / "a.jpg"), write_photo(tmp_path / "b.png"))
    assert loaded.as_stored == (True, True)
    assert upright_photos(loaded, tmp_path / "images") is loaded
    assert not (tmp_path / "images").exists()


def test_all_that_are_used_go_to_one_folder_under_unique_names(tmp_path: Path) -> None:
    source = tmp_path / "in"
    plain = write_photo(source / "day1" / "a.jpg")
    turned = write_photo(source / "day2" / "a.jpg", orientation=3)
    heic = write_photo(source / "day1" / "a.HEIC")
    avif = write_photo(source / "day1" / "b.avif")
    fake = source / "day1" / "c.jpg"  # HEIC by content, as phones send them
    fake.write_bytes(heic.read_bytes())
    broken = source / "day1" / "d.jpg"
    broken.write_bytes(b"no photo")
    unused = write_photo(source / "day2" / "e.jpg", orientation=6)
    photos = [plain, broken, turned, heic, avif, unused, fake]
    loaded = load_images(photos, image_fit=vggt_pad(28, 14), max_views=5)
    assert loaded.paths == (plain, turned, heic, avif, fake)
    assert loaded.skipped == (broken,)

    steps: list[tuple[int, int, str]] = []
    result = upright_photos(loaded, tmp_path / "images", progress=lambda *step: steps.append(step))
    names = ["day1/a.jpg", "day2/a.jpg", "day1/a_.jpg", "day1/b.jpg", "day1/c.jpg"]
    assert result.names == tuple(names)
    assert result.paths == tuple(tmp_path / "images" / name for name in names)
    assert result.images is loaded.images
    assert result.fits == loaded.fits
    files = contents(tmp_path / "images")
    assert files.keys() == {*names, "made_by_hess.json"}
    assert files["day1/a.jpg"] == plain.read_bytes()
    assert files["day2/a.jpg"] != turned.read_bytes()
    assert steps == [(n, 5, Path(name).name) for n, name in enumerate(names, start=1)]


def test_running_again_replaces_only_what_was_written(tmp_path: Path) -> None:
    images = tmp_path / "images"
    first = load(write_photo(tmp_path / "a.heic"), write_photo(tmp_path / "b.jpg"))
    upright_photos(first, images)
    second = load(write_photo(tmp_path / "b.jpg", orientation=8))
    upright_photos(second, images)
    assert contents(images).keys() == {"b.jpg", "made_by_hess.json"}
    assert read_by_colmap(images / "b.jpg").shape == (96, 64, 3)
    (images / "mine.jpg").write_bytes(b"mine")
    before = contents(images)
    with pytest.raises(DatasetError, match=r"mine\.jpg"):
        upright_photos(first, images)
    assert contents(images) == before
    assert find_images(images) == [images / "b.jpg", images / "mine.jpg"]


@pytest.mark.parametrize("record", [None, "{", "[]", '{"files": 3}', '{"files": ["other.jpg"]}'])
def test_somebody_elses_photos_are_never_replaced(record: str | None, tmp_path: Path) -> None:
    loaded = load(write_photo(tmp_path / "in" / "a.jpg", orientation=6))
    images = tmp_path / "images"
    write_photo(images / "a.jpg")
    if record is not None:
        (images / "made_by_hess.json").write_text(record)
    before = contents(images)
    with pytest.raises(DatasetError, match=r"a\.jpg, which is not from hess"):
        upright_photos(loaded, images)
    assert contents(images) == before


def test_a_photo_is_never_written_over_itself(tmp_path: Path) -> None:
    images = tmp_path / "images"
    upright_photos(load(write_photo(tmp_path / "a.heic")), images)
    (tmp_path / "link").symlink_to(images)
    ours, turned = images / "a.jpg", write_photo(tmp_path / "b.jpg", orientation=6)
    before = contents(images)
    for folder in (images, tmp_path / "link"):
        with pytest.raises(DatasetError, match=r"found the photo a\.jpg"):
            upright_photos(load(ours, turned), folder)
    assert contents(images) == before


def test_a_full_disk_leaves_no_half_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(write_photo(tmp_path / "a.heic"), write_photo(tmp_path / "b.jpg"))
    images = tmp_path / "images"

    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", full)
        with pytest.raises(OSError, match="disk full"):
            upright_photos(loaded, images)
    assert contents(images).keys() == {"a.jpg", "made_by_hess.json"}
    result = upright_photos(loaded, images)
    assert contents(images).keys() == {"a.jpg", "b.jpg", "made_by_hess.json"}
    assert json.loads((images / "made_by_hess.json").read_text()) == {"files": ["a.jpg", "b.jpg"]}
    assert load(*result.paths).as_stored == (True, True)


def test_a_photo_that_vanished_is_named(tmp_path: Path) -> None:
    path = write_photo(tmp_path / "a.heic")
    loaded = replace(load(path), as_stored=(False,))
    path.unlink()
    with pytest.raises(DatasetError, match=r"a\.heic"):
        upright_photos(loaded, tmp_path / "images")
