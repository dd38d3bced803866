"""Readers of photos and recorded captures: what they give must agree geometrically.

The layouts are written to disk with a known world, a slanted and textured plane, so every pixel of
a loaded scene can be checked: its depth must lift it to the plane, and its colour must be the
plane's there.
"""

import gzip
import json
import logging
import struct
import sys
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hess.datasets import Dataset, Scene, bundled_capture, load_photos, open_dataset
from hess.datasets.co3d import opencv_camera, read_co3d
from hess.datasets.decoding import read_image, read_size
from hess.datasets.frames import rigid_pose
from hess.datasets.photo_files import find_images
from hess.datasets.photos import load_images, spread_evenly
from hess.datasets.recordings import split_views
from hess.datasets.rgbd import read_depth_mm, register_depth
from hess.errors import ConfigError, DatasetError, LayoutError
from hess.geometry.fit_rules import FitRule, pixel_budget, square_crop, vggt_crop, vggt_pad
from known_world import ORIGINAL_SIZE, assert_on_plane, camera, pinhole, render, save_png

# --- layouts written to disk ---------------------------------------------------------------------


def write_rgbd_folder(folder: Path, num_views: int = 3) -> Path:
    k = pinhole(60, 64, 48)
    poses = [camera(view) for view in range(num_views)]
    for view, pose in enumerate(poses):
        image, depth = render(k, pose, 64, 48)
        millimetres = (depth * 1000).round().astype(np.uint16)
        millimetres[0, :5] = (0, 65535, 0, 65535, 0)
        save_png(folder / "images" / f"{view}.png", image)
        save_png(folder / "depth" / f"{view}.png", millimetres)
    integer_centres = k - np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
    np.savetxt(folder / "K.txt", integer_centres)
    np.savetxt(folder / "poses.txt", np.stack(poses).reshape(num_views, 16))
    return folder


def write_seven_scenes(folder: Path, num_views: int = 2) -> Path:
    colour_k, depth_k = pinhole(525, 640, 480), pinhole(585, 640, 480)
    for k in (colour_k, depth_k):
        k[:2, 2] = 320, 240
    for view in range(num_views):
        world_from_depth = camera(view)
        depth_from_colour = np.eye(4)
        depth_from_colour[0, 3] = 0.0256
        _, depth = render(depth_k, world_from_depth, 640, 480)
        image, _ = render(colour_k, world_from_depth @ depth_from_colour, 640, 480)
        millimetres = (depth * 1000).round().astype(np.uint16)
        millimetres[:20, :20] = 65535
        save_png(folder / f"frame-{view:06d}.color.png", image)
        save_png(folder / f"frame-{view:06d}.depth.png", millimetres)
        # The published rotations are only roughly orthonormal.
        stretched = world_from_depth.copy()
        stretched[:3, :3] *= 1.0004
        np.savetxt(folder / f"frame-{view:06d}.pose.txt", stretched)
    return folder


def write_condition(folder: Path, num_views: int = 3) -> Path:
    k = pinhole(50, 56, 42)
    rendered = [render(k, camera(view), 56, 42) for view in range(num_views)]
    for view, (image, _) in enumerate(rendered):
        save_png(folder / "rgb" / f"{view}.png", image)
    integer_centres = k - np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
    np.savez(
        folder / "condition.npz",
        intrinsics=np.stack([integer_centres] * num_views),
        poses=np.stack([camera(view) for view in range(num_views)]),
        depths=np.stack([depth for _, depth in rendered]).astype(np.float32),
    )
    return folder


def write_co3d(root: Path, num_views: int = 4, half_depth: bool = False) -> Path:
    """One sequence "apple/seq1" in portrait format; even frames are "train", odd ones "test"."""
    width, height = 48, 64
    k = pinhole(60, width, height)
    flip = np.diag([-1.0, -1.0, 1.0])
    annotations = []
    for view in range(num_views):
        pose = camera(view)
        cam_from_world = np.linalg.inv(pose)
        image, depth = render(k, pose, width, height)
        if half_depth:
            half_k = np.diag([0.5, 0.5, 1]) @ k
            _, depth = render(half_k, pose, width // 2, height // 2)
        stored = (depth / 2).astype(np.float16)  # scale_adjustment is 2
        stored[1, 20] = np.inf
        mask = np.full(stored.shape, 255, dtype=np.uint8)
        mask[:, :10] = 0
        sequence = root / "apple" / "seq1"
        save_png(sequence / "images" / f"{view}.png", image)
        save_png(sequence / "depths" / f"{view}.png", stored.view(np.uint16))
        save_png(sequence / "depth_masks" / f"{view}.png", mask)
        annotations.append(
            {
                "sequence_name": "seq1",
                "frame_number": view,
                "image": {"path": f"apple/seq1/images/{view}.png", "size": [height, width]},
                "depth": {
                    "path": f"apple/seq1/depths/{view}.png",
                    "scale_adjustment": 2.0,
                    "mask_path": f"apple/seq1/depth_masks/{view}.png",
                },
                "viewpoint": {
                    "R": (flip @ cam_from_world[:3, :3]).T.tolist(),
                    "T": (flip @ cam_from_world[:3, 3]).tolist(),
                    "focal_length": [60 / 24, 60 / 24],
                    "principal_point": [-1.5 / 24, 0.75 / 24],
                    "intrinsics_format": "ndc_isotropic",
                },
            }
        )
    lists = {
        split: [["seq1", a["frame_number"], a["image"]["path"]] for a in annotations[start::2]]
        for start, split in enumerate(("train", "test"))
    }
    category = root / "apple"
    (category / "set_lists").mkdir()
    (category / "set_lists" / "set_lists_fewview_dev.json").write_text(json.dumps(lists))
    (category / "frame_annotations.jgz").write_bytes(
        gzip.compress(json.dumps(annotations).encode())
    )
    quality = [{"sequence_name": "seq1", "category": "apple", "viewpoint_quality_score": 0.9}]
    (category / "sequence_annotations.jgz").write_bytes(
        gzip.compress(json.dumps(quality).encode())
    )
    return root


# --- every layout gives scenes that agree with the world they show -------------------------------


@pytest.mark.parametrize(
    ("write", "unit", "num_views"),
    [
        (write_rgbd_folder, "m", 3),
        (write_condition, "arbitrary", 3),
        (write_co3d, "arbitrary", 2),
    ],
)
def test_scenes_lie_on_the_plane(write, unit: str, num_views: int, tmp_path: Path) -> None:
    dataset = open_dataset(write(tmp_path), image_fit=ORIGINAL_SIZE)
    assert isinstance(dataset, Dataset)
    assert len(dataset) == 1
    scene = dataset[0]
    assert (scene.num_views, scene.unit) == (num_views, unit)
    assert_on_plane(scene)


@pytest.mark.parametrize(
    "fit",
    [square_crop(30), vggt_crop(42, 14), vggt_pad(42, 14), pixel_budget(1500, 14)],
    ids=lambda fit: fit.name,
)
@pytest.mark.parametrize("write", [write_rgbd_folder, write_condition, write_co3d])
def test_scenes_lie_on_the_plane_after_the_fit(write, fit: FitRule, tmp_path: Path) -> None:
    scene = open_dataset(write(tmp_path), image_fit=fit)[0]
    # Depth is taken up to half an original pixel beside the sample: 0.5 / 50 x 2.3 x slope 0.5.
    assert_on_plane(scene, distance=0.015, colour=0.03)


def test_seven_scenes_depth_is_moved_to_the_colour_camera(tmp_path: Path) -> None:
    scene = open_dataset(write_seven_scenes(tmp_path), image_fit=ORIGINAL_SIZE)[0]
    assert scene.unit == "m"
    assert scene.view_names == ("frame-000000.color.png", "frame-000001.color.png")
    assert_on_plane(scene, distance=0.003, colour=0.02)
    # The colour camera sees more than the depth camera, whose focal length is longer.
    assert 0.7 < (scene.depth > 0).float().mean() < 0.85
    rotation = scene.world_from_cam[:, :3, :3]
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3).expand(2, 3, 3), atol=1e-6)


def test_a_wrong_focal_length_would_be_noticed(tmp_path: Path) -> None:
    scene = open_dataset(write_seven_scenes(tmp_path), image_fit=ORIGINAL_SIZE)[0]
    wrong = scene.intrinsics.clone()
    wrong[:, 0, 0] = wrong[:, 1, 1] = 585
    with pytest.raises(AssertionError):
        assert_on_plane(replace(scene, intrinsics=wrong), distance=0.003, colour=0.02)


def test_co3d_depth_is_unknown_where_masked_or_infinite(tmp_path: Path) -> None:
    scene = open_dataset(write_co3d(tmp_path), image_fit=ORIGINAL_SIZE)[0]
    expected = torch.ones(64, 48, dtype=torch.bool)
    expected[:, :10] = False
    expected[1, 20] = False
    assert torch.equal(scene.depth > 0, expected.expand(2, 64, 48))
    assert scene.depth.isfinite().all()


def test_co3d_depth_of_another_size_than_the_photo(tmp_path: Path) -> None:
    scene = open_dataset(write_co3d(tmp_path, half_depth=True), image_fit=ORIGINAL_SIZE)[0]
    assert_on_plane(scene, distance=0.015, colour=0.03)


def test_nearest_surface_wins_when_depth_is_registered() -> None:
    eye = torch.eye(4).double()
    k = torch.tensor([[10.0, 0, 5], [0, 10.0, 5], [0, 0, 1]]).double()
    depth = torch.full((10, 10), 4.0)
    depth[4:6, 4:6] = 1.0
    shifted = eye.clone()
    shifted[0, 3] = 0.2  # two pixels at depth 1, half a pixel at depth 4
    moved = register_depth(
        depth,
        depth_intrinsics=k,
        target_intrinsics=k,
        target_from_depth=shifted,
        width=10,
        height=10,
    )
    assert (moved[4:6, 6:8] == 1.0).all()
    assert (moved[:4, 1:] == 4.0).all()
    assert (moved[4:6, 5] == 0.0).all()  # was hidden behind the near patch


def reprojection(scene: Scene, world_from_cam: np.ndarray) -> dict[str, float]:
    """Agreement of depth and colour over pairs of views that share > 15 % of their pixels."""
    assert scene.depth is not None
    assert scene.intrinsics is not None
    depth, k = scene.depth.double().numpy(), scene.intrinsics.double().numpy()
    colour = scene.images.mean(1).numpy()
    n, height, width = depth.shape
    step = max(1, height // 90)
    within, in_front, correlations = [], [], []
    for i in range(n):
        rows, columns = np.mgrid[:height:step, :width:step]
        z = depth[i, rows, columns]
        known = z > 0
        rows, columns, z = rows[known], columns[known], z[known]
        rays = np.linalg.inv(k[i]) @ np.stack([columns + 0.5, rows + 0.5, np.ones(len(rows))])
        world = world_from_cam[i] @ np.vstack([rays * z, np.ones(len(rows))])
        for j in range(n):
            x, y, expected = k[j] @ (np.linalg.inv(world_from_cam[j]) @ world)[:3]
            front = np.where(expected > 0.01, expected, np.inf)
            column, row = np.floor(x / front).astype(int), np.floor(y / front).astype(int)
            seen = (expected > 0.01) & (column >= 0) & (column < width)
            seen &= (row >= 0) & (row < height)
            measured = depth[j, row.clip(0, height - 1), column.clip(0, width - 1)]
            seen &= measured > 0
            if i == j or seen.mean() < 0.15:
                continue
            relative = (expected[seen] - measured[seen]) / measured[seen]
            within.append((np.abs(relative) < 0.02).mean())
            in_front.append((relative < -0.05).mean())
            close = np.abs(relative) < 0.05
            if close.sum() > 50:
                here = colour[i, rows[seen][close], columns[seen][close]]
                there = colour[j, row[seen][close], column[seen][close]]
                correlations.append(np.corrcoef(here, there)[0, 1])
    return {
        "pairs": len(within),
        "within_2_percent": float(np.mean(within)),
        "in_front": float(np.mean(in_front)),
        "correlation": float(np.mean(correlations)) if correlations else 0.0,
    }


@pytest.mark.parametrize(
    "fit",
    [ORIGINAL_SIZE, square_crop(48), vggt_crop(70, 14), vggt_pad(70, 14), pixel_budget(3600, 14)],
    ids=lambda fit: fit.name,
)
def test_bundled_capture_agrees_with_itself(fit: FitRule) -> None:
    scene = open_dataset("bundled", image_fit=fit)[0]
    assert (scene.num_views, scene.unit) == (12, "m")
    poses = scene.world_from_cam.double().numpy()
    found = reprojection(scene, poses)
    # Measured: 57 (44) pairs, 79 (73) % within 2 %, 0.5 % in front, correlation 0.79 (0.85).
    # What does not agree is hidden behind something else.
    assert found["pairs"] >= 40
    assert found["within_2_percent"] > 0.70
    assert found["in_front"] < 0.01
    assert found["correlation"] > 0.75
    control = reprojection(scene, np.linalg.inv(poses))
    assert control["within_2_percent"] < 0.2


def test_bundled_capture_carries_its_licence() -> None:
    folder = bundled_capture()
    assert "Arda Duzceker" in (folder / "LICENSE.MIT").read_text()
    assert len(list((folder / "images").iterdir())) == 12
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 3e6


# --- CO3D cameras --------------------------------------------------------------------------------


@pytest.mark.parametrize("intrinsics_format", ["ndc_isotropic", "ndc_norm_image_bounds", None])
def test_co3d_camera_projects_like_pytorch3d(intrinsics_format: str | None) -> None:
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    rotation *= np.sign(np.linalg.det(rotation))
    translation, focal, principal = [0.2, -0.3, 6.0], [2.1, 2.4], [0.05, -0.1]
    width, height = 1066, 1896
    viewpoint = {
        "R": rotation.tolist(),
        "T": translation,
        "focal_length": focal,
        "principal_point": principal,
    }
    if intrinsics_format is not None:
        viewpoint["intrinsics_format"] = intrinsics_format
    cam_from_world, k = opencv_camera(viewpoint, width=width, height=height)

    world = rng.normal(size=(20, 3))
    in_cam = world @ rotation + np.array(translation)  # x left, y up
    ndc = np.array(focal) * in_cam[:, :2] / in_cam[:, 2:] + np.array(principal)
    sides = np.array([width, height])
    unit = sides.min() / 2 if intrinsics_format == "ndc_isotropic" else sides / 2
    expected = sides / 2 - unit * ndc

    opencv = k.numpy() @ (
        cam_from_world.numpy()[:3, :3] @ world.T + cam_from_world[:3, 3:].numpy()
    )
    np.testing.assert_allclose((opencv[:2] / opencv[2]).T, expected)
    np.testing.assert_allclose(opencv[2], in_cam[:, 2])


def test_co3d_splits_quality_and_errors(tmp_path: Path) -> None:
    write_co3d(tmp_path)
    (sequence,) = read_co3d(tmp_path / "apple", split="test")
    assert [frame.image_path.name for frame in sequence.frames] == ["1.png", "3.png"]
    with pytest.raises(DatasetError, match=r"quality above 0\.95"):
        read_co3d(tmp_path, min_viewpoint_quality=0.95)
    with pytest.raises(DatasetError, match=r"set lists of this category: fewview_dev; .*:NAME"):
        read_co3d(tmp_path, set_list="manyview_dev_0")
    with pytest.raises(DatasetError, match="'train'"):
        read_co3d(tmp_path, split="training")
    (tmp_path / "apple" / "seq1" / "images" / "0.png").unlink()
    with pytest.raises(DatasetError, match=r"0\.png"):
        open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)[0]
    (tmp_path / "apple" / "sequence_annotations.jgz").write_bytes(b"\x1f\x8bcut off")
    with pytest.raises(DatasetError, match=r"sequence_annotations\.jgz"):
        read_co3d(tmp_path)


def test_photos_of_another_size_than_their_calibration_are_refused(tmp_path: Path) -> None:
    write_co3d(tmp_path)
    path = tmp_path / "apple" / "seq1" / "images" / "0.png"
    Image.open(path).resize((24, 32)).save(path)
    with pytest.raises(DatasetError, match=r"calibrated for \(48, 64\)"):
        open_dataset(tmp_path, image_fit=square_crop(16))[0]


def edit_annotations(category: Path, change, name: str = "frame") -> None:
    """``change`` gets the list and may edit it in place or return another."""
    path = category / f"{name}_annotations.jgz"
    annotations = json.loads(gzip.decompress(path.read_bytes()))
    changed = change(annotations)
    content = annotations if changed is None else changed
    path.write_bytes(gzip.compress(json.dumps(content).encode()))


def test_co3d_parts_and_categories(tmp_path: Path) -> None:
    write_co3d(tmp_path)
    options = {"image_fit": ORIGINAL_SIZE}
    assert open_dataset(tmp_path, **options)[0].view_names == ("0.png", "2.png")
    for part in ("test", "fewview_dev/test"):
        dataset = open_dataset(f"{tmp_path}:{part}", **options)
        assert dataset.provenance["source"] == f"{tmp_path}:{part}"
        scene = dataset[0]
        assert (scene.view_names, scene.category) == (("1.png", "3.png"), "apple")
        assert_on_plane(scene)
    (scene,) = open_dataset(f"{tmp_path}/apple:test", **options)
    assert (scene.name, scene.category) == ("apple/seq1/0", "apple")
    assert scene.take_views([1]).category == "apple"
    with pytest.raises(DatasetError, match=r"lists of this category: fewview_dev; name one of"):
        open_dataset(f"{tmp_path}:manyview_dev_0/train", **options)
    with pytest.raises(DatasetError, match=r"split of \['test', 'train'\], found 'val'"):
        open_dataset(f"{tmp_path}:val", **options)
    write_rgbd_folder(tmp_path / "room")
    with pytest.raises(DatasetError, match="leave the part out"):
        open_dataset(f"{tmp_path}/room:test", **options)
    assert open_dataset(tmp_path / "room", **options)[0].category is None


def test_co3d_names_what_to_download(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_co3d(tmp_path)
    sequence = tmp_path / "apple" / "seq1"
    for folder in ("depth_masks", "depths", "images"):
        (sequence / folder / "2.png").unlink()
        with pytest.raises(DatasetError, match=rf"{folder}/2\.png: .*download"):
            open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)[0]

    def second_sequence(annotations: list) -> list:
        text = json.dumps(annotations).replace("seq1", "seq2")
        return annotations + json.loads(text)

    edit_annotations(tmp_path / "apple", second_sequence)
    path = tmp_path / "apple" / "set_lists" / "set_lists_fewview_dev.json"
    splits = json.loads(path.read_text())
    splits["train"] += [["seq2", 0, "apple/seq2/images/0.png"]]
    path.write_text(json.dumps(splits))
    with caplog.at_level(logging.WARNING):
        assert [s.name for s in read_co3d(tmp_path)] == ["apple/seq1"]
    assert "1 of 2 sequences are not there" in caplog.text
    (tmp_path / "apple" / "frame_annotations.jgz").unlink()
    with pytest.raises(DatasetError, match=r"frame_annotations\.jgz.*download"):
        open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)


def test_co3d_frames_without_ground_truth(tmp_path: Path) -> None:
    write_co3d(tmp_path, num_views=8)

    def redact(annotations: list) -> None:
        annotations[0]["viewpoint"] = None
        annotations[2]["image"]["path"] = None
        annotations[4]["depth"] = None

    edit_annotations(tmp_path / "apple", redact)
    scene = open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)[0]
    assert scene.view_names == ("4.png", "6.png")
    assert (scene.depth > 0).any(dim=2).any(dim=1).tolist() == [False, True]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["viewpoint", "R"], [[1, 0], [0, 1]], "frame annotations"),
        (["viewpoint", "R"], None, "frame annotations"),
        (["viewpoint", "R"], [[2, 0, 0], [0, 2, 0], [0, 0, 2]], "right-handed"),
        (["viewpoint", "T"], [0, 0], "frame annotations"),
        (["viewpoint", "focal_length"], [float("nan"), 1], "not finite"),
        (["viewpoint", "focal_length"], [0, 1], "not finite"),
        (["viewpoint", "intrinsics_format"], "pixels", "intrinsics_format"),
        (["viewpoint"], 3, "frame annotations"),
        (["image", "size"], [64], "frame annotations"),
        (["depth", "scale_adjustment"], None, "frame annotations"),
        (["depth"], {"path": "x.png"}, "'scale_adjustment'"),
        (["sequence_name"], ["seq1"], "frame annotations"),
    ],
)
def test_damaged_co3d_frames_are_named(
    path: list[str], value: object, message: str, tmp_path: Path
) -> None:
    write_co3d(tmp_path)

    def damage(annotations: list) -> None:
        *parents, last = path
        target = annotations[0]
        for key in parents:
            target = target[key]
        target[last] = value

    edit_annotations(tmp_path / "apple", damage)
    with pytest.raises(DatasetError, match=rf"frame_annotations\.jgz.*{message}"):
        read_co3d(tmp_path)


def test_damaged_co3d_files_are_named(tmp_path: Path) -> None:
    write_co3d(tmp_path)
    category = tmp_path / "apple"
    for name in ("frame", "sequence"):
        for content in ({}, 3, [3], [{}], {"a": 1}):
            whole = (category / f"{name}_annotations.jgz").read_bytes()
            edit_annotations(category, lambda _, content=content: content, name)
            with pytest.raises(DatasetError, match="apple"):
                read_co3d(tmp_path)
            (category / f"{name}_annotations.jgz").write_bytes(whole)
    path = category / "set_lists" / "set_lists_fewview_dev.json"
    for text in ("", "{", "3", "[1]", '{"train": 3}', '{"train": [["seq1"]]}'):
        path.write_text(text)
        with pytest.raises(DatasetError, match=r"set_lists_fewview_dev\.json"):
            read_co3d(tmp_path)


# --- damaged RGB-D captures ----------------------------------------------------------------------


def test_rgbd_folder_names_what_is_missing(tmp_path: Path) -> None:
    folder = write_rgbd_folder(tmp_path)
    (folder / "depth" / "1.png").unlink()
    with pytest.raises(DatasetError, match=r"depth/1\.png"):
        open_dataset(folder, image_fit=ORIGINAL_SIZE)
    poses = (folder / "poses.txt").read_text().splitlines()
    (folder / "poses.txt").write_text("\n".join(poses[:2]))
    with pytest.raises(DatasetError, match="2 lines for 3 images"):
        open_dataset(folder, image_fit=ORIGINAL_SIZE)
    (folder / "K.txt").unlink()
    with pytest.raises(DatasetError, match=r"K\.txt"):
        open_dataset(folder, image_fit=ORIGINAL_SIZE)


@pytest.mark.parametrize("text", ["", "1 2 3", "1 0 0 0\n" * 3, "a b c d\n" * 4, "1 2\n3\n"])
def test_damaged_poses_are_named(text: str, tmp_path: Path) -> None:
    write_seven_scenes(tmp_path, num_views=1)
    (tmp_path / "frame-000000.pose.txt").write_text(text)
    with pytest.raises(DatasetError, match=r"000000\.pose\.txt: expected 4 rows of 4 numbers"):
        open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)


def test_damaged_condition_is_named(tmp_path: Path) -> None:
    write_condition(tmp_path)
    path = tmp_path / "condition.npz"
    whole = path.read_bytes()
    with np.load(path) as arrays:
        good = dict(arrays)
    for data in (b"", b"noise", whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(DatasetError, match=r"condition\.npz: expected arrays"):
            open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)
    for name, shape in (("poses", (3, 3, 4)), ("intrinsics", (2, 3, 3)), ("depths", (3, 42))):
        np.savez(path, **{**good, name: np.zeros(shape)})
        with pytest.raises(DatasetError, match=r"condition\.npz: expected intrinsics \[3, 3, 3\]"):
            open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)


def test_seven_scenes_refuses_another_sensor(tmp_path: Path) -> None:
    write_seven_scenes(tmp_path, num_views=1)
    np.savetxt(tmp_path / "camera-intrinsics.txt", pinhole(585, 640, 480) - [[0, 0, 1]] * 3)
    with pytest.raises(DatasetError, match="depth camera of 7-Scenes"):
        open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)


def test_depth_must_have_16_bits_and_the_size_of_its_photo(tmp_path: Path) -> None:
    folder = write_rgbd_folder(tmp_path)
    save_png(folder / "depth" / "0.png", np.ones((48, 64), dtype=np.uint8))
    with pytest.raises(DatasetError, match="16-bit"):
        open_dataset(folder, image_fit=ORIGINAL_SIZE)[0]
    save_png(folder / "depth" / "0.png", np.ones((24, 32), dtype=np.uint16))
    with pytest.raises(DatasetError, match="64x48, found 32x24"):
        open_dataset(folder, image_fit=ORIGINAL_SIZE)[0]


def test_unknown_depth_becomes_zero(tmp_path: Path) -> None:
    save_png(tmp_path / "d.png", np.array([[0, 1500, 65535]], dtype=np.uint16))
    assert read_depth_mm(tmp_path / "d.png").tolist() == [[0.0, 1.5, 0.0]]


def test_poses_are_made_rigid_or_refused() -> None:
    pose = torch.from_numpy(camera(3))
    bent = pose.clone()
    bent[:3, :3] += 4e-4 * torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    rigid = rigid_pose(bent, Path("p"))
    rotation = rigid[:3, :3]
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3).double(), atol=1e-12)
    assert (rotation - pose[:3, :3]).abs().max() < 2e-3
    mirrored = pose @ torch.diag(torch.tensor([-1.0, 1, 1, 1])).double()
    lost = torch.full((4, 4), -torch.inf)
    for bad in (2 * pose, mirrored, lost):
        with pytest.raises(DatasetError, match="right-handed rotation"):
            rigid_pose(bad, Path("p"))


# --- cutting sequences into scenes ---------------------------------------------------------------


@given(st.integers(1, 200), st.integers(1, 30), st.none() | st.integers(0, 5))
def test_scenes_of_a_sequence_are_disjoint(frames: int, views: int, seed: int | None) -> None:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    scenes = split_views(frames, views, generator)
    assert len(scenes) == max(1, frames // views)
    flat = [view for scene in scenes for view in scene]
    assert len(set(flat)) == len(flat)
    assert all(0 <= view < frames for view in flat)
    assert all(len(scene) == min(views, frames) and scene == sorted(scene) for scene in scenes)


def test_views_are_spread_evenly_or_drawn() -> None:
    assert split_views(40, 4) == [[i, i + 10, i + 20, i + 30] for i in range(10)]
    assert split_views(7, 4) == [[0, 1, 3, 5]]
    drawn = [split_views(100, 5, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != split_views(100, 5)


def test_several_sequences_take_turns(tmp_path: Path) -> None:
    write_rgbd_folder(tmp_path / "room2", num_views=4)
    write_rgbd_folder(tmp_path / "room10", num_views=4)
    options = {"image_fit": ORIGINAL_SIZE, "views_per_scene": 2}
    dataset = open_dataset(tmp_path, **options)
    assert [scene.name for scene in dataset] == ["room2/0", "room10/0", "room2/1", "room10/1"]
    assert [s.view_names for s in dataset][::2] == [("0.png", "2.png"), ("1.png", "3.png")]
    assert len(open_dataset(tmp_path, num_scenes=3, **options)) == 3
    drawn = [list(open_dataset(tmp_path, seed=s, **options)) for s in (3, 3)]
    assert [s.view_names for s in drawn[0]] == [s.view_names for s in drawn[1]]
    with pytest.raises(ConfigError, match="at least 1"):
        open_dataset(tmp_path, image_fit=ORIGINAL_SIZE, views_per_scene=0)


def test_provenance_is_json_and_complete(tmp_path: Path) -> None:
    dataset = open_dataset("bundled", image_fit=square_crop(48), views_per_scene=5, seed=7)
    assert json.loads(json.dumps(dataset.provenance)) == {
        "layout": "rgbd-folder",
        "source": "bundled",
        "image_fit": "square_crop(48)",
        "views_per_scene": 5,
        "seed": 7,
        "num_scenes": None,
    }


def test_procedural_scenes_by_name() -> None:
    options = {"image_fit": square_crop(12), "views_per_scene": 3}
    calibration = open_dataset("procedural", **options)
    assert (len(calibration), calibration.name) == (40, "procedural-calibration")
    test = open_dataset("procedural:test", num_scenes=1, **options)
    assert test[0].images.shape == (3, 3, 12, 12)
    assert not torch.equal(test[0].images, calibration[0].images)


def test_first_layout_of_a_folder_counts(tmp_path: Path) -> None:
    write_rgbd_folder(tmp_path)
    (tmp_path / "transforms.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"transforms\.json"):
        open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)
    # Photos are not passed over for what lies below them.
    save_png(tmp_path / "album" / "a.png", np.zeros((8, 8, 3), dtype=np.uint8))
    write_rgbd_folder(tmp_path / "album" / "room")
    assert open_dataset(tmp_path / "album", image_fit=ORIGINAL_SIZE).name.startswith("photos:")


def test_sequences_below_several_places(tmp_path: Path) -> None:
    for name in ("chess/seq-02", "chess/seq-01", "fire/seq-01"):
        write_seven_scenes(tmp_path / name, num_views=1)
    write_rgbd_folder(tmp_path / ".trash" / "room")
    dataset = open_dataset(tmp_path, image_fit=square_crop(8))
    assert [s.name for s in dataset] == ["chess/seq-01/0", "chess/seq-02/0", "fire/seq-01/0"]
    assert len(open_dataset(tmp_path / "chess", image_fit=square_crop(8))) == 2


def test_unknown_layout_lists_the_known(tmp_path: Path) -> None:
    (tmp_path / "IMG_1.TIFF").write_bytes(b"")
    with pytest.raises(DatasetError) as caught:
        open_dataset(tmp_path, image_fit=ORIGINAL_SIZE)
    known = "poses.txt frame_annotations.jgz condition.npz sparse/0 transforms.json _par.txt"
    for text in ("1 x .tiff", "procedural", *known.split()):
        assert text in str(caught.value)
    with pytest.raises(DatasetError, match="no such folder"):
        open_dataset(tmp_path / "nowhere", image_fit=ORIGINAL_SIZE)


# --- photos --------------------------------------------------------------------------------------


def save_photo(path: Path, size: tuple[int, int] = (20, 10), colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def test_photos_come_in_natural_order_at_one_size(tmp_path: Path) -> None:
    names = ["view10.png", "view9.jpg", "View1.webp"]
    for index, name in enumerate(names):
        save_photo(tmp_path / name, size=(20 + 10 * index, 30))
    save_photo(tmp_path / "._view2.png")  # what macOS leaves on foreign disks
    (tmp_path / "notes.txt").write_text("hello")
    scene = load_photos(tmp_path, image_fit=square_crop(8))
    assert scene.view_names == ("View1.webp", "view9.jpg", "view10.png")
    assert scene.images.shape == (3, 3, 8, 8)
    assert not scene.has_poses
    assert scene.images[2, 0].min() == 1.0
    assert scene.images.dtype == torch.float32


def test_sources_of_photos(tmp_path: Path) -> None:
    a, b = save_photo(tmp_path / "images" / "a.png"), save_photo(tmp_path / "images" / "b.png")
    assert find_images(tmp_path) == [a, b]  # images/ inside
    assert find_images(str(tmp_path / "*" / "*.png")) == [a, b]
    assert find_images([b, str(a)]) == [b, a]
    assert find_images(b) == [b]
    with pytest.raises(DatasetError, match="empty list"):
        find_images([])
    with pytest.raises(DatasetError, match="matches no file"):
        find_images(tmp_path / "*.jpg")
    for missing in (tmp_path / "imgaes" / "a.png", tmp_path / "*.png"):
        with pytest.raises(DatasetError, match="no such file"):
            find_images([a, missing])
    with pytest.raises(DatasetError, match=r"found a folder; list its photos, such as .*/\*\.jpg"):
        find_images([a, tmp_path / "images"])
    bracket = save_photo(tmp_path / "trip [1]" / "c.png")
    assert find_images(bracket.parent) == [bracket]


def test_only_colour_images_of_a_seven_scenes_folder(tmp_path: Path) -> None:
    write_seven_scenes(tmp_path, num_views=1)
    assert [path.name for path in find_images(tmp_path)] == ["frame-000000.color.png"]


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.avif", "a.heic", "late.png"])
def test_exif_orientation_is_applied(name: str, tmp_path: Path) -> None:
    stored = Image.new("RGB", (128, 64), "black")
    stored.paste("white", (0, 0, 64, 64))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: left becomes top
    path = tmp_path / name
    if name == "a.heic":
        save_heic(path, stored, exif=exif.tobytes())
    elif name == "late.png":  # EXIF behind the pixels, which a header does not show
        late = (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
        path.write_bytes(png(np.asarray(stored), depth=8, behind=late))
    else:
        stored.save(path, exif=exif)
    assert read_size(path) == ((128, 64) if name == "late.png" else (64, 128))
    pixels = np.asarray(read_image(path))
    assert pixels.shape == (128, 64, 3)
    assert pixels[:56].min() > 230
    assert pixels[72:].max() < 25
    (fit,) = load_images([path], image_fit=vggt_pad(28, 14)).fits
    assert (fit.original_width, fit.original_height) == (64, 128)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_over_white(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 2, 4))
    image.convert(mode).save(tmp_path / "a.png")
    pixels = np.asarray(read_image(tmp_path / "a.png"))
    assert (pixels[:, :2] == 0).all()
    assert (pixels[:, 2:] == 255).all()


def test_grey_images_of_8_and_16_bits(tmp_path: Path) -> None:
    save_png(tmp_path / "8.png", np.array([[0, 128, 255]], dtype=np.uint8))
    save_png(tmp_path / "16.png", np.array([[0, 128 * 257, 65535]], dtype=np.uint16))
    for name in ("8.png", "16.png"):
        pixels = np.asarray(read_image(tmp_path / name))
        assert pixels.tolist() == [[[0] * 3, [128] * 3, [255] * 3]]


def test_colour_of_16_bits_and_for_print(tmp_path: Path) -> None:
    colours = np.array([[[0, 128 * 257, 65535], [65535, 0, 0]]], dtype=">u2")
    (tmp_path / "a.png").write_bytes(png(colours, depth=16))
    assert np.asarray(read_image(tmp_path / "a.png")).tolist() == [[[0, 128, 255], [255, 0, 0]]]
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "b.jpg", quality=95)
    red = np.asarray(read_image(tmp_path / "b.jpg")).reshape(-1, 3)
    assert red[:, 0].min() > 230
    assert red[:, 1:].max() < 25


def png(pixels: np.ndarray, *, depth: int, behind: tuple[bytes, bytes] | None = None) -> bytes:
    """An RGB file of 8 or 16 bits, with a further chunk behind its pixels if wished."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    chunks = [
        (b"IHDR", struct.pack(">2I5B", width, height, depth, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        *([behind] if behind else []),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def save_heic(path: Path, image: Image.Image, **options: object) -> Path:
    pillow_heif.from_pillow(image).save(path, quality=95, format="HEIF", **options)
    return path


def test_heic_by_content_or_a_word_on_what_to_install(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_heic(tmp_path / "1.heic", Image.new("RGB", (64, 64), (200, 100, 50)))
    (tmp_path / "2.jpg").write_bytes((tmp_path / "1.heic").read_bytes())  # as phones send them
    jpeg = save_photo(tmp_path / "3.jpg", size=(64, 64))
    loaded = load_images(find_images(tmp_path), image_fit=square_crop(8))
    assert loaded.names == ("1.heic", "2.jpg", "3.jpg")
    expected = torch.tensor([200, 100, 50])[:, None, None] / 255
    assert (loaded.images[:2] - expected).abs().max() < 0.03
    assert ".heic" not in Image.registered_extensions()  # nothing global was changed

    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    with caplog.at_level(logging.WARNING):
        loaded = load_images(find_images(tmp_path), image_fit=square_crop(8))
    assert loaded.paths == (jpeg,)
    assert caplog.text.count("pip install 'hess-vggt[heic]'") == 2
    with pytest.raises(DatasetError, match=r"1\.heic: .*pip install 'hess-vggt\[heic\]'"):
        load_photos(tmp_path, image_fit=square_crop(8), strict=True)
    with pytest.raises(DatasetError, match=r"none of the 1 photos.*pip install"):
        load_photos(tmp_path / "1.heic", image_fit=square_crop(8))


def test_damaged_heic_is_skipped(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = save_heic(tmp_path / "a.heic", Image.fromarray(noise)).read_bytes()
    for length in (40, len(whole) // 4, len(whole) // 2):
        (tmp_path / "a.heic").write_bytes(whole[:length])
        with pytest.raises(DatasetError, match=r"a\.heic"):
            read_image(tmp_path / "a.heic")


def test_avif(tmp_path: Path) -> None:
    Image.new("RGB", (64, 32), (200, 100, 50)).save(tmp_path / "a.avif")
    scene = load_photos(tmp_path, image_fit=square_crop(8))
    expected = torch.tensor([200, 100, 50])[:, None, None] / 255
    assert (scene.images - expected).abs().max() < 0.03


def test_a_video_is_no_photo(tmp_path: Path) -> None:
    photo = save_photo(tmp_path / "a.jpg")
    video = tmp_path / "walk.MP4"
    video.write_bytes(b"")
    for source in (video, [photo, video], str(tmp_path / "*")):
        with pytest.raises(DatasetError, match=r"walk\.MP4.*extract_frames.*hess reconstruct"):
            find_images(source)
    assert find_images(tmp_path) == [photo]  # phones put short videos beside photos


def cut_in_half(path: Path) -> Path:
    """Its header stays whole, so that the damage shows only when it is decoded."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def save_noise(path: Path, size: tuple[int, int]) -> Path:
    pixels = np.random.default_rng(size).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(
    "fit", [vggt_crop(28, 14), pixel_budget(2000, 14)], ids=lambda fit: fit.name
)
def test_a_broken_photo_has_no_influence_on_the_others(fit: FitRule, tmp_path: Path) -> None:
    broken = cut_in_half(save_noise(tmp_path / "1.jpg", (50, 100)))
    assert read_size(broken) == (50, 100)
    good = [save_noise(tmp_path / f"{name}.png", (100, 50 + name)) for name in (2, 3)]
    # Alone they have another size than with the tall photo.
    alone = load_images(good, image_fit=fit)
    assert fit([(50, 100), (100, 52)])[1] != alone.fits[0]
    steps: list[tuple[int, int, str]] = []
    for paths in ([broken, *good], [*good, broken]):
        loaded = load_images(paths, image_fit=fit, progress=lambda *step: steps.append(step))
        assert loaded.fits == alone.fits
        assert torch.equal(loaded.images, alone.images)
        assert steps[-1][:2] == (2, 2)
    with pytest.raises(DatasetError, match=r"1\.jpg"):
        load_images([*good, broken], image_fit=fit, strict=True)


def test_names_are_unique_paths_below_the_shared_folder(tmp_path: Path) -> None:
    paths = [save_photo(tmp_path / name) for name in ("a/1.png", "b/c/1.png", "a/2.png")]
    loaded = load_images(paths, image_fit=square_crop(8))
    assert loaded.names == ("a/1.png", "b/c/1.png", "a/2.png")
    scene = load_photos(str(tmp_path / "**" / "*.png"), image_fit=square_crop(8))
    assert scene.view_names == ("a/1.png", "a/2.png", "b/c/1.png")
    assert load_photos(paths[0], image_fit=square_crop(8)).view_names == ("1.png",)
    with pytest.raises(DatasetError, match=r"1\.png: expected every photo once, found it 2"):
        load_images([paths[0], tmp_path / "b" / ".." / "a" / "1.png"], image_fit=square_crop(8))


@given(st.integers(1, 300), st.integers(1, 300))
def test_views_are_spread_from_the_first_to_the_last(items: int, views: int) -> None:
    chosen = spread_evenly(items, views)
    assert len(chosen) == min(items, views)
    assert chosen[0] == 0
    assert chosen[-1] == (items - 1 if views > 1 else 0)
    gaps = {b - a for a, b in pairwise(chosen)}
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)
    assert spread_evenly(items, None) == list(range(items))


def test_at_most_so_many_views(tmp_path: Path) -> None:
    for name in range(1, 12):
        save_photo(tmp_path / f"{name}.png")
    (tmp_path / "11.png").write_bytes(b"no photo")
    scene = load_photos(tmp_path, image_fit=square_crop(8), max_views=4)
    assert scene.view_names == ("1.png", "4.png", "7.png", "10.png")
    with pytest.raises(ConfigError, match="at least 1"):
        load_photos(tmp_path, image_fit=square_crop(8), max_views=0)


def test_unreadable_photos_are_named_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = save_photo(tmp_path / "good.png")
    whole = save_photo(tmp_path / "cut.jpg", size=(200, 200)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.webp").write_text("not an image")
    with caplog.at_level(logging.WARNING):
        loaded = load_images(find_images(tmp_path), image_fit=square_crop(8))
    assert loaded.paths == (good,)
    assert loaded.kept == (2,)
    assert [path.name for path in loaded.skipped] == ["cut.jpg", "empty.png", "text.webp"]
    for name in ("cut.jpg", "empty.png", "text.webp"):
        assert name in caplog.text
        with pytest.raises(DatasetError, match=name):
            load_images([good, tmp_path / name], image_fit=square_crop(8), strict=True)
    with pytest.raises(DatasetError, match="none of the 2 photos"):
        load_images([tmp_path / "cut.jpg", tmp_path / "missing.png"], image_fit=square_crop(8))


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_photo(tmp_path / "bomb.png", size=(50, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DatasetError, match=r"bomb\.png: refused"):
        load_photos(tmp_path, image_fit=square_crop(8))
    # Pillow looks at the size of HEIC files only when their format is registered.
    save_heic(tmp_path / "bomb.png", Image.new("RGB", (64, 64)))
    with pytest.raises(DatasetError, match=r"bomb\.png: refused"):
        load_photos(tmp_path, image_fit=square_crop(8))


def test_rule_must_give_one_size(tmp_path: Path) -> None:
    save_photo(tmp_path / "a.png", size=(10, 10))
    save_photo(tmp_path / "b.png", size=(20, 10))
    with pytest.raises(LayoutError, match="different sizes"):
        load_photos(tmp_path, image_fit=ORIGINAL_SIZE)
