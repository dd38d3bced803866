"""COLMAP models, written by pycolmap: cameras, points, photos that changed, damage."""

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pycolmap
import pytest
import torch
from PIL import Image

from hess.datasets import open_dataset
from hess.datasets.lens import CAMERA_MODELS, pinhole_intrinsics
from hess.errors import DatasetError
from hess.geometry.fit_rules import square_crop, vggt_crop
from known_world import (
    ORIGINAL_SIZE,
    assert_shows_plane,
    camera,
    pinhole,
    render,
    save_png,
    texture,
)

WIDTH, HEIGHT = 64, 48
K = pinhole(60, WIDTH, HEIGHT)
POINTS = np.array(
    [[x, y, 2 + 0.3 * x + 0.1 * y] for x in np.arange(-0.6, 0.7, 0.2) for y in (-0.4, -0.1, 0.3)]
)


def model(
    num_views: int = 3, camera_model: str = "PINHOLE", distortion: tuple[float, ...] = ()
) -> pycolmap.Reconstruction:
    """Views called walk/<n>.png, the last of which sees no points."""
    focal = (60, 60) if "fx" in CAMERA_MODELS.get(camera_model, ("fx",)) else (60,)
    principal = tuple(K[:2, 2])
    made = pycolmap.Reconstruction()
    made.add_camera_with_trivial_rig(
        pycolmap.Camera(
            camera_id=7,
            model=camera_model,
            width=WIDTH,
            height=HEIGHT,
            params=[*focal, *principal, *distortion],
        )
    )
    tracks = [pycolmap.Track() for _ in POINTS]
    for view in range(num_views):
        cam_from_world = np.linalg.inv(camera(view))
        pixels = (K @ (cam_from_world[:3, :3] @ POINTS.T + cam_from_world[:3, 3:])).T
        keypoints = np.vstack([pixels[:, :2] / pixels[:, 2:], [[5.5, 5.5]]])  # one of no point
        if view == num_views - 1:
            keypoints = keypoints[:0]
        for index in range(len(keypoints) - 1):
            tracks[index].add_element(view + 1, index)
        made.add_image_with_trivial_frame(
            pycolmap.Image(
                image_id=view + 1, camera_id=7, name=f"walk/{view}.png", keypoints=keypoints
            ),
            pycolmap.Rigid3d(cam_from_world[:3]),
        )
    for point, track in zip(POINTS, tracks, strict=True):
        made.add_point3D(point, track)
    return made


def write(folder: Path, *, at: str = "sparse/0", text: bool = False, **options: object) -> Path:
    """The photos in ``images/walk/``, and the model of them in ``at``."""
    made = model(**options)
    for view in range(made.num_images()):
        image, _ = render(K, camera(view), WIDTH, HEIGHT)
        save_png(folder / "images" / "walk" / f"{view}.png", image)
    (folder / at).mkdir(parents=True, exist_ok=True)
    (made.write_text if text else made.write_binary)(str(folder / at))
    return folder


def resize(folder: Path, size: tuple[int, int]) -> None:
    for path in (folder / "images" / "walk").iterdir():
        Image.open(path).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("at", ["sparse/0", "sparse", "."])
def test_cameras_and_points(at: str, text: bool, tmp_path: Path) -> None:
    dataset = open_dataset(write(tmp_path, at=at, text=text), image_fit=ORIGINAL_SIZE)
    assert dataset.name.startswith("colmap:")
    (scene,) = dataset
    assert scene.view_names == ("0.png", "1.png", "2.png")
    assert scene.unit == "arbitrary"
    np.testing.assert_allclose(scene.intrinsics, np.stack([K] * 3), rtol=1e-6)
    np.testing.assert_allclose(scene.world_from_cam, [camera(v) for v in range(3)], atol=1e-6)
    assert_shows_plane(scene)

    expected = np.zeros((3, HEIGHT, WIDTH))
    for view in range(2):
        cam_from_world = np.linalg.inv(camera(view))
        for point in POINTS:
            x, y, z = cam_from_world[:3, :3] @ point + cam_from_world[:3, 3]
            column, row = int(60 * x / z + K[0, 2]), int(60 * y / z + K[1, 2])
            expected[view, row, column] = z  # no two on one pixel
    assert (expected > 0).sum() == 2 * len(POINTS)
    np.testing.assert_allclose(scene.depth, expected, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 24), (160, 120), (43, 32)])
def test_cameras_follow_resized_photos(size: tuple[int, int], tmp_path: Path) -> None:
    write(tmp_path)
    resize(tmp_path, size)
    scene = open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)[0]
    assert scene.images.shape[-2:] == size[::-1]
    assert_shows_plane(scene, colour=0.02)
    points, valid = (t.numpy() for t in scene.point_map())
    assert valid[:2].sum() >= 1.9 * len(POINTS)
    half_pixel = 0.5 * 2.2 / scene.intrinsics[0, 0, 0].item()
    distance = np.linalg.norm(points[valid][:, None] - POINTS, axis=-1).min(axis=1)
    assert distance.max() < 1.6 * half_pixel
    shown = scene.images.permute(0, 2, 3, 1).numpy()[valid]
    assert np.abs(shown - texture(points[valid])).max() < 0.1


@pytest.mark.parametrize("fit", [square_crop(24), vggt_crop(28, 14)], ids=lambda fit: fit.name)
def test_points_are_kept_at_the_size_of_a_model(fit, tmp_path: Path) -> None:
    scene = open_dataset(write(tmp_path), image_fit=fit)[0]
    assert_shows_plane(scene, colour=0.02)
    # Taking the nearest pixel of a sparse map in full size would lose three of four.
    assert (scene.depth[0] > 0).sum() > 0.6 * len(POINTS)
    assert (scene.depth[2] == 0).all()


def test_photos_of_another_shape_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    resize(tmp_path, (48, 48))
    with pytest.raises(DatasetError, match=r"0\.png.*calibrated for \(64, 48\).*found \(48, 48\)"):
        open_dataset(tmp_path, image_fit=square_crop(16))[0]


def test_photos_that_exif_turns_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down, which the size does not tell
    path = tmp_path / "images" / "walk" / "1.png"
    Image.open(path).save(path, exif=exif)
    with pytest.raises(DatasetError, match=r"1\.png.*EXIF"):
        open_dataset(tmp_path, image_fit=square_crop(16))[0]


def test_missing_photos(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path)
    (tmp_path / "images" / "walk" / "0.png").unlink()
    with caplog.at_level(logging.WARNING):
        scene = open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)[0]
    assert "1 of 3 photos are missing" in caplog.text
    assert_shows_plane(scene)
    assert scene.view_names == ("1.png", "2.png")
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(DatasetError, match=r"walk/0\.png, found none of them in images/"):
        open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)


def test_largest_of_several_models(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, at="sparse/0", num_views=2)
    write(tmp_path, at="sparse/1", num_views=4)
    with caplog.at_level(logging.WARNING):
        assert open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)[0].num_views == 4
    assert "2 models" in caplog.text
    # A model alone finds its photos, too.
    assert open_dataset(tmp_path / "sparse" / "0", image_fit=ORIGINAL_SIZE)[0].num_views == 2


def test_several_reconstructions_in_one_folder(tmp_path: Path) -> None:
    for name in ("b/2", "b/10", "a/1"):
        write(tmp_path / name)
    dataset = open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)
    assert [scene.name for scene in dataset] == ["a/1/0", "b/2/0", "b/10/0"]


DISTORTED = {
    "SIMPLE_RADIAL": (0.05,),
    "RADIAL": (0.05, 0.01),
    "OPENCV": (0.05, -0.01, 0.002, -0.0005),
    "FULL_OPENCV": (0.05, -0.01, 0.002, -0.0005, 0.03, -0.004, 0.01, -0.02),
}


@pytest.mark.parametrize("kind", DISTORTED)
@pytest.mark.parametrize("text", [False, True])
def test_small_distortion_is_stated(
    kind: str, text: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, camera_model=kind, distortion=DISTORTED[kind], text=text)
    with caplog.at_level(logging.WARNING):
        scene = open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)[0]
    np.testing.assert_allclose(scene.intrinsics[0], K, rtol=1e-6)
    assert caplog.text.count("is left out") == 1


@pytest.mark.parametrize("kind", DISTORTED)
def test_distortion_is_measured_as_pycolmap_does(kind: str) -> None:
    lens = pycolmap.Camera(
        model=kind,
        width=WIDTH,
        height=HEIGHT,
        params=[*([60] if "RADIAL" in kind else [60, 62]), 33, 23, *DISTORTED[kind]],
    )
    named = dict(zip(CAMERA_MODELS[kind], lens.params, strict=True))
    intrinsics, shift = pinhole_intrinsics(named, width=WIDTH, height=HEIGHT, source=Path("c"))
    columns, rows = np.meshgrid(np.linspace(0, WIDTH, 161), np.linspace(0, HEIGHT, 121))
    pixels = np.stack([columns, rows, np.ones_like(rows)], axis=-1).reshape(-1, 3)
    rays = pixels @ np.linalg.inv(intrinsics.numpy()).T
    moved = np.linalg.norm(lens.img_from_cam(rays) - pixels[:, :2], axis=1).max()
    assert shift == pytest.approx(moved, rel=2e-3)


@pytest.mark.parametrize(
    ("kind", "distortion", "message"),
    [
        ("SIMPLE_RADIAL", (-0.3,), r"up to \d+ of 64x48 pixels; undistort"),
        ("OPENCV_FISHEYE", (0.0, 0.0, 0.0, 0.0), "found OPENCV_FISHEYE.*undistort"),
        ("SIMPLE_RADIAL", (float("nan"),), "finite"),
    ],
)
@pytest.mark.parametrize("text", [False, True])
def test_strong_distortion_is_refused(
    kind: str, distortion: tuple[float, ...], message: str, text: bool, tmp_path: Path
) -> None:
    write(tmp_path, camera_model=kind, distortion=distortion, text=text)
    with pytest.raises(DatasetError, match=message):
        open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)


@pytest.mark.parametrize("name", ["cameras", "images", "points3D"])
@pytest.mark.parametrize("suffix", [".bin", ".txt"])
def test_damaged_files_are_named(name: str, suffix: str, tmp_path: Path) -> None:
    write(tmp_path, text=suffix == ".txt")
    path = tmp_path / "sparse" / "0" / f"{name}{suffix}"
    whole = path.read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, len(whole), dtype=np.uint8).tobytes()
    for damaged in (noise, whole[: len(whole) // 2], whole[: len(whole) * 9 // 10], b""):
        path.write_bytes(damaged)
        with pytest.raises(DatasetError, match=rf"{name}\{suffix}|{path.parent}"):
            open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)
    path.unlink()
    with pytest.raises(DatasetError, match=rf"{name}\{suffix}.*copy the whole model"):
        open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)


def test_files_of_different_models(tmp_path: Path) -> None:
    write(tmp_path)
    shutil.copy(write(tmp_path / "other") / "sparse/0/points3D.bin", tmp_path / "points3D.bin")
    empty = pycolmap.Reconstruction()
    (tmp_path / "empty").mkdir()
    empty.write_binary(str(tmp_path / "empty"))
    shutil.copy(tmp_path / "empty" / "points3D.bin", tmp_path / "sparse" / "0")
    with pytest.raises(DatasetError, match="belong to different models"):
        open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)
    for file in (tmp_path / "empty").iterdir():
        shutil.copy(file, tmp_path / "sparse" / "0")
    with pytest.raises(DatasetError, match="a COLMAP model of photos, found none"):
        open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)


def test_text_as_people_write_it(tmp_path: Path) -> None:
    write(tmp_path, text=True)
    folder = tmp_path / "sparse" / "0"
    for path in folder.iterdir():
        lines = [line for line in path.read_text().split("\n") if not line.startswith("#")]
        path.write_text(os.linesep.join(["# by hand", "", *lines, ""]))
    scene = open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)[0]
    assert scene.num_views == 3
    assert (scene.depth > 0).sum() == 2 * len(POINTS)
    assert torch.equal(scene.depth[2], torch.zeros(HEIGHT, WIDTH))
