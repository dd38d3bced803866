"""Photos with cameras in one table: transforms.json and Middlebury."""

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hess.datasets import open_dataset
from hess.errors import DatasetError
from hess.export.transforms import write_transforms
from hess.geometry.fit_rules import square_crop
from hess.geometry.image_fit import ImageFit
from known_world import ORIGINAL_SIZE, assert_shows_plane, camera, pinhole, render, save_png

WIDTH, HEIGHT = 64, 48
K = pinhole(60, WIDTH, HEIGHT)
CENTRED = np.array([[60, 0, WIDTH / 2], [0, 60, HEIGHT / 2], [0, 0, 1]])
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
SHARED = {"fl_x": 60.0, "fl_y": 60.0, "cx": K[0, 2], "cy": K[1, 2], "w": WIDTH, "h": HEIGHT}


def write(
    folder: Path,
    shared: dict[str, Any] = SHARED,
    *,
    each: dict[str, Any] | None = None,
    k: np.ndarray = K,
    name: str = "transforms.json",
    listed: str = "images/{}.png",
) -> Path:
    """Photos 0, 1, 10 with their poses; the file lists them in another order."""
    frames = []
    for view in (10, 0, 1):
        save_png(folder / "images" / f"{view}.png", render(k, camera(view), WIDTH, HEIGHT)[0])
        pose = (camera(view) @ OPENGL).tolist()
        frames.append({"file_path": listed.format(view), "transform_matrix": pose, **(each or {})})
    (folder / name).write_text(json.dumps({**shared, "frames": frames}))
    return folder


def edit(folder: Path, **changes: object) -> None:
    path = folder / "transforms.json"
    content = json.loads(path.read_text())
    content["frames"][0].update(changes)
    path.write_text(json.dumps(content))


ANGLE = 2 * math.atan(WIDTH / 2 / 60)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared": {}, "each": SHARED},
        {"shared": {**SHARED, "fl_x": 999.0}, "each": {"fl_x": 60.0}},  # a frame's own count
        {"shared": {"camera_angle_x": ANGLE}, "k": CENTRED, "listed": "./images/{}"},
        {"shared": {"camera_angle_x": ANGLE, "w": 64, "h": 48}, "k": CENTRED},
        {"name": "transforms_train.json", "listed": "images/{}"},
        {"shared": {**SHARED, "camera_model": "OPENCV", "k1": 1e-4, "p2": 1e-5}},
    ],
)
def test_cameras_of_transforms(options: dict[str, Any], tmp_path: Path) -> None:
    dataset = open_dataset(write(tmp_path, **options), image_fit=ORIGINAL_SIZE)
    assert dataset.name.startswith("transforms:")
    (scene,) = dataset
    assert scene.view_names == ("0.png", "1.png", "10.png")
    assert scene.depth is None
    assert_shows_plane(scene)
    np.testing.assert_allclose(scene.world_from_cam[1], camera(1), atol=1e-6)


def test_wrong_axes_would_be_noticed(tmp_path: Path) -> None:
    write(tmp_path)
    edit(tmp_path, transform_matrix=camera(10).tolist())
    with pytest.raises(AssertionError):
        assert_shows_plane(open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)[0])


def test_what_we_export_can_be_read(tmp_path: Path) -> None:
    write(tmp_path)
    exported = SimpleNamespace(
        view_names=("1.png", "0.png"),
        image_paths=(tmp_path / "images" / "1.png", None),
        image_fits=[ImageFit.identity(WIDTH, HEIGHT)] * 2,
        original_intrinsics=torch.from_numpy(np.stack([K, K])),
        world_from_cam=torch.from_numpy(np.stack([camera(1), camera(0)])),
    )
    write_transforms(tmp_path / "images" / "transforms.json", exported)
    scene = open_dataset(tmp_path / "images", image_fit=ORIGINAL_SIZE)[0]
    assert scene.view_names == ("0.png", "1.png")
    assert_shows_plane(scene)


@pytest.mark.parametrize("size", [(32, 24), (128, 96), (43, 32)])
def test_cameras_follow_resized_photos(size: tuple[int, int], tmp_path: Path) -> None:
    for path in (write(tmp_path) / "images").iterdir():
        Image.open(path).resize(size, Image.Resampling.BICUBIC).save(path)
    scene = open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)[0]
    assert scene.images.shape[-2:] == size[::-1]
    assert_shows_plane(scene, colour=0.02)


def test_missing_photos(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, {"camera_angle_x": ANGLE}, k=CENTRED)  # no size but that of the photos
    (tmp_path / "images" / "1.png").unlink()
    with caplog.at_level(logging.WARNING):
        scene = open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)[0]
    assert "1 of 3 photos are missing, such as" in caplog.text
    assert "images/1.png" in caplog.text
    assert scene.view_names == ("0.png", "10.png")
    for name in (0, 10):
        (tmp_path / "images" / f"{name}.png").unlink()
    with pytest.raises(DatasetError, match=r"3 photos that it lists, found none.*0\.png"):
        open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w": 100}, r"10\.png: its camera is calibrated for \(100, 48\)"),
        ({"k1": -0.4}, "undistort"),
        ({"k4": 0.1}, "no k4"),
        ({"camera_model": "OPENCV_FISHEYE"}, "found camera_model OPENCV_FISHEYE"),
        ({"is_fisheye": True}, "perspective"),
        ({"transform_matrix": [[1, 0], [0, 1]]}, r"transform_matrix of shape \(2, 2\)"),
        ({"transform_matrix": [[1, 0, 0, 0]] * 4}, "right-handed rotation"),
        ({"transform_matrix": None}, "found"),
        ({"fl_x": 0}, "positive size and focal length"),
        ({"cx": float("nan")}, "finite"),
        ({"w": float("inf")}, "found"),
        ({"w": "wide"}, "wide"),
        ({"file_path": None}, "found"),
        ({"file_path": "images/0.png"}, r"expected every photo once"),
    ],
)
def test_damaged_frames_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(DatasetError, match=message):
        open_dataset(tmp_path, image_fit=square_crop(16))[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "transforms.json: expected cameras"),
        ("{", "transforms.json: expected cameras"),
        ("[]", "transforms.json: expected cameras"),
        ("3", "transforms.json: expected cameras"),
        ('{"frames": 3}', "transforms.json: expected cameras"),
        ('{"frames": []}', "found none of them"),
        ('{"frames": [{}]}', "'file_path'"),
        ('{"frames": [{"file_path": "images/0.png"}]}', "'transform_matrix'"),
        ("{}", "'frames'"),
    ],
)
def test_damaged_transforms_are_named(content: str, message: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "transforms.json").write_text(content)
    with pytest.raises(DatasetError, match=message):
        open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)


def test_a_focal_length_is_needed(tmp_path: Path) -> None:
    write(tmp_path, {"w": WIDTH, "h": HEIGHT})
    with pytest.raises(DatasetError, match="'camera_angle_x'"):
        open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)


# --- Middlebury ---------------------------------------------------------------------------------

LARGE_K = np.array([[1500.0, 0, 302.3], [0, 1510.0, 246.9], [0, 0, 1]])


def write_middlebury(folder: Path, num_views: int = 2) -> Path:
    lines = [str(num_views)]
    for view in range(num_views):
        cam_from_world = np.linalg.inv(camera(view))
        at_half = LARGE_K + np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
        save_png(folder / f"t{view}.png", render(at_half, camera(view), 640, 480)[0])
        parts = (LARGE_K, cam_from_world[:3, :3], cam_from_world[:3, 3])
        numbers = np.concatenate([part.ravel() for part in parts])
        lines.append(" ".join([f"t{view}.png", *map(repr, numbers.tolist())]))
    (folder / "t_par.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_cameras_of_middlebury(tmp_path: Path) -> None:
    dataset = open_dataset(write_middlebury(tmp_path), image_fit=ORIGINAL_SIZE)
    assert dataset.name.startswith("middlebury:")
    (scene,) = dataset
    assert (scene.unit, scene.view_names) == ("m", ("t0.png", "t1.png"))
    np.testing.assert_allclose(scene.world_from_cam[1], camera(1), atol=1e-6)
    np.testing.assert_allclose(scene.intrinsics[1, :2, 2], LARGE_K[:2, 2] + 0.5, rtol=1e-6)
    assert_shows_plane(scene)


def test_damaged_middlebury_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_middlebury(tmp_path) / "t_par.txt"
    whole = path.read_text()
    first, *rest = whole.splitlines()
    for text in ("", first, "\n".join([first, rest[0]]), whole[:-30], whole.replace("0.", "x")):
        path.write_text(text)
        with pytest.raises(DatasetError, match=r"t_par\.txt: expected"):
            open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)
    path.write_text(whole.replace("1500.0", "-1500.0"))
    with pytest.raises(DatasetError, match=r"t_par\.txt.*positive focal lengths"):
        open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)
    path.write_text(whole)
    Image.new("RGB", (320, 240)).save(tmp_path / "t0.png")
    with pytest.raises(DatasetError, match=r"t0\.png.*calibrated for \(640, 480\)"):
        open_dataset(tmp_path, image_fit=square_crop(8))[0]
    (tmp_path / "t0.png").unlink()
    with caplog.at_level(logging.WARNING):
        assert open_dataset(tmp_path, image_fit=square_crop(8))[0].num_views == 1
    assert "1 of 2 photos are missing" in caplog.text
