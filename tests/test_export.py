"""Every export is read back by a library that did not write it and checked as geometry."""

import json
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pycolmap
import pytest
import torch
import trimesh
from hypothesis import given
from hypothesis import strategies as st
from plyfile import PlyData
from torch import Tensor

from hess.datasets import open_dataset
from hess.errors import BackendUnavailableError, ConfigError, DatasetError
from hess.export import PointCloud
from hess.export.point_cloud import even_sample
from hess.geometry.fit_rules import FitRule, square_crop, vggt_crop, vggt_pad
from hess.reconstruction import Reconstruction

WALL = 4.0
FORMATS = ("scene.ply", "scene.glb", "scene.npz", "transforms.json", "colmap")
SIZES = ((60, 40), (60, 40), (40, 60), (48, 48))


def turned(around_x: float, around_y: float) -> Tensor:
    (cx, sx), (cy, sy) = ((np.cos(a), np.sin(a)) for a in (around_x, around_y))
    about_x = torch.tensor([[1, 0, 0], [0, cx, -sx], [0, sx, cx]], dtype=torch.float64)
    about_y = torch.tensor([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]], dtype=torch.float64)
    return about_y @ about_x


def wall_color(points: Tensor) -> Tensor:
    """Painted so that the colour tells the place; never white."""
    return (0.5 + 0.1 * points).clamp(0, 0.9)


def see_wall(rule: FitRule, sizes: tuple[tuple[int, int], ...] = SIZES) -> Reconstruction:
    """The wall z = 4, seen without any error by cameras of focal length 50 pixels."""
    count, fits = len(sizes), rule(sizes)
    poses = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    original = torch.eye(3, dtype=torch.float64).repeat(count, 1, 1)
    for view, (width, height) in enumerate(sizes):
        poses[view, :3, :3] = turned(0.1 * view, -0.08 * view)
        poses[view, :3, 3] = torch.tensor([0.2 * view, -0.1 * view, 0.05 * view])
        original[view, :2] = torch.tensor([[50, 0, 0.52 * width], [0, 48, 0.47 * height]])
    intrinsics = torch.stack(
        [f.intrinsics_to_model(k) for f, k in zip(fits, original, strict=True)]
    )
    height, width = fits[0].height, fits[0].width
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack((column + 0.5, row + 0.5, torch.ones(height, width)), -1).double()
    rays = torch.einsum("nij,njk,hwk->nhwi", poses[:, :3, :3], intrinsics.inverse(), pixels)
    centers = poses[:, None, None, :3, 3]
    depth = (WALL - centers[..., 2]) / rays[..., 2]
    points = centers + depth[..., None] * rays
    images = wall_color(points).movedim(-1, 1).float()
    for image, fit in zip(images, fits, strict=True):
        (left, right), (top, bottom) = fit.shown
        shown = torch.zeros(height, width, dtype=torch.bool)
        shown[top:bottom, left:right] = True
        image[:, ~shown] = 1.0
    confidence = torch.linspace(0, 1, depth.numel()).reshape(depth.shape)
    return Reconstruction(
        model_name="wall",
        view_names=tuple(f"day {n % 2}/view{n}.jpg" for n in range(count)),
        image_paths=(None,) * count,
        image_fits=tuple(fits),
        images=images,
        world_from_cam=poses.float(),
        intrinsics=intrinsics.float(),
        original_intrinsics=original.float(),
        depth=depth.float(),
        depth_confidence=confidence,
        world_points=points.float(),
        confidence=confidence,
    )


RULES = {"crop": vggt_crop(42, 7), "pad": vggt_pad(42, 7), "square": square_crop(24)}


@pytest.fixture(params=sorted(RULES))
def wall(request: pytest.FixtureRequest) -> Reconstruction:
    return see_wall(RULES[request.param])


def shown_pixels(recon: Reconstruction) -> int:
    spans = [fit.shown for fit in recon.image_fits]
    return sum((right - left) * (bottom - top) for (left, right), (top, bottom) in spans)


def read_ply(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    vertices = PlyData.read(path)["vertex"]
    points = np.stack([vertices[axis] for axis in "xyz"], axis=1)
    colors = np.stack([vertices[name] for name in ("red", "green", "blue")], axis=1)
    return points, colors, vertices["confidence"]


def test_ply_holds_the_painted_wall(wall: Reconstruction, tmp_path: Path) -> None:
    path = tmp_path / "new" / "scene.ply"
    wall.save(path, drop_lowest=0)
    points, colors, confidence = read_ply(path)
    assert len(points) == shown_pixels(wall)
    np.testing.assert_allclose(points[:, 2], WALL, rtol=1e-5)
    np.testing.assert_allclose(colors, 255 * wall_color(torch.from_numpy(points)), atol=0.51)
    assert confidence.dtype == np.float32
    assert (np.diff(confidence) > 0).all()
    assert list(path.parent.iterdir()) == [path]


def test_ply_drops_padding_nan_and_the_least_confident(tmp_path: Path) -> None:
    wall = see_wall(RULES["pad"])
    points, confidence = wall.world_points.clone(), wall.confidence.clone()
    (left, _), (top, _) = wall.image_fits[0].shown
    points[0, top, left, 1] = torch.nan
    confidence[0, top + 1, left] = torch.inf
    wall = replace(wall, world_points=points, confidence=confidence)
    wall.save(tmp_path / "scene.ply", drop_lowest=0.25)
    found, _, kept_confidence = read_ply(tmp_path / "scene.ply")
    usable = shown_pixels(wall) - 2
    assert len(found) == usable - int(0.25 * usable)
    assert np.isfinite(found).all()
    shown = torch.cat([image[0] < 1 for image in wall.images]).flatten()
    shown &= confidence.flatten().isfinite() & points.isfinite().all(-1).flatten()
    ascending = confidence.flatten()[shown].sort().values
    np.testing.assert_array_equal(np.sort(kept_confidence), ascending[int(0.25 * usable) :])


def test_voxels_thin_a_file_out(wall: Reconstruction, tmp_path: Path) -> None:
    wall.save(tmp_path / "scene.ply", drop_lowest=0, voxel_size=0.5)
    points, colors, _ = read_ply(tmp_path / "scene.ply")
    assert 20 < len(points) < shown_pixels(wall) / 3
    cells = np.floor(points[:, :2] / 0.5)
    assert len(np.unique(cells, axis=0)) > 0.9 * len(points)  # a mean can touch its cell's edge
    np.testing.assert_allclose(points[:, 2], WALL, rtol=1e-5)
    np.testing.assert_allclose(colors, 255 * wall_color(torch.from_numpy(points)), atol=3)


@given(
    st.lists(st.tuples(*[st.floats(-50, 50, width=32)] * 3), min_size=1, max_size=30),
    st.sampled_from([0.25, 1.0, 7.5]),
)
def test_a_voxel_holds_the_mean_of_its_points(rows: list[tuple], size: float) -> None:
    points = torch.tensor(rows)
    values = torch.arange(len(rows)) / len(rows)
    cloud = PointCloud(points=points, colors=values[:, None].expand(-1, 3), confidence=values)
    found = cloud.one_per_voxel(size)
    groups: dict[tuple, list[int]] = {}
    for index, row in enumerate(np.array(rows, dtype=np.float64)):
        groups.setdefault(tuple(np.floor(row / size)), []).append(index)
    for cell, members in groups.items():
        mean = points[members].double().mean(0)
        nearest = (found.points.double() - mean).abs().amax(-1)
        matches = (nearest <= 1e-5).nonzero().flatten()
        assert len(matches) >= 1, cell
        errors = (found.confidence[matches].double() - values[members].double().mean()).abs()
        assert errors.min() < 1e-6
    assert len(found) == len(groups)
    again = cloud.one_per_voxel(size)
    assert torch.equal(found.points, again.points)


@pytest.mark.parametrize("size", [0.0, -1.0, float("nan"), 1e-30])
def test_impossible_voxels_are_refused(size: float) -> None:
    wall = see_wall(RULES["square"])
    with pytest.raises(ConfigError, match="voxel_size"):
        wall.point_cloud(voxel_size=size)


@given(st.integers(1, 100_000), st.integers(1, 3000))
def test_a_sample_is_even(count: int, limit: int) -> None:
    index = even_sample(count, limit)
    gaps = torch.cat((index, torch.tensor([count]))) - torch.cat((torch.tensor([-1]), index))
    assert 1 <= len(index) <= limit or count <= limit
    assert len(index) >= min(count, limit) / 2
    assert gaps.min() >= 1
    assert gaps.max() <= 2 * max(1, count / limit) + 1
    assert torch.equal(index, even_sample(count, limit))


def test_a_sample_takes_all_columns_of_an_image() -> None:
    columns = even_sample(518 * 518, 518) % 518
    assert len(columns.unique()) > 250


def test_glb_shows_points_and_cameras(wall: Reconstruction, tmp_path: Path) -> None:
    wall.save(tmp_path / "scene.glb", drop_lowest=0)
    scene = trimesh.load(tmp_path / "scene.glb")
    flip = np.diag([1.0, -1.0, -1.0, 1.0])

    (cloud,) = (g for g in scene.geometry.values() if isinstance(g, trimesh.PointCloud))
    expected = wall.point_cloud(drop_lowest=0)
    points = np.asarray(cloud.vertices)
    np.testing.assert_allclose(points @ flip[:3, :3], expected.points, atol=1e-5)
    linear = np.asarray(cloud.colors)[:, :3] / 255  # back to sRGB by a gamma close to the curve
    np.testing.assert_allclose(linear ** (1 / 2.2), expected.colors, atol=0.04)

    extent = np.linalg.norm(points.max(0) - points.min(0))
    materials = []
    for view, name in enumerate(wall.view_names):
        pose, geometry = scene.graph[f"camera {name}"]
        found = flip @ pose @ flip
        np.testing.assert_allclose(found, wall.world_from_cam[view], atol=1e-6)
        mesh = scene.geometry[geometry]
        # Its far corners, taken to the photo, are the photo's corners.
        in_cam = np.asarray(mesh.vertices) * [1, -1, -1]
        length = in_cam[:, 2].max()
        assert 0.01 * extent < length < 0.1 * extent
        far = in_cam[in_cam[:, 2] > 0.9 * length]
        seen = far @ wall.original_intrinsics[view].numpy().T
        seen = seen[:, :2] / seen[:, 2:]
        fit = wall.image_fits[view]
        size = [fit.original_width, fit.original_height]
        np.testing.assert_allclose(seen.min(0), 0, atol=2)
        np.testing.assert_allclose(seen.max(0), size, atol=2)
        assert np.linalg.norm(in_cam, axis=1).min() < 0.02 * length  # the tip is at the centre
        materials.append(tuple(mesh.visual.material.baseColorFactor))
    assert materials[0] != materials[1]
    assert len(set(materials[1:])) == 1


def test_glb_keeps_dark_colours_apart(tmp_path: Path) -> None:
    """In 8 linear bits 26 of the 256 shades of a photo would be black or the shade above."""
    wall = see_wall(RULES["square"])
    shades = torch.arange(24 * 24).remainder(256).reshape(24, 24) / 255
    wall = replace(wall, images=shades.expand(4, 3, 24, 24))
    wall.save(tmp_path / "scene.glb", drop_lowest=0)

    data = (tmp_path / "scene.glb").read_bytes()
    (length,) = struct.unpack_from("<I", data, 12)
    tree, buffer = json.loads(data[20 : 20 + length]), data[28 + length :]
    assert struct.unpack_from("<I", data, 8) == (len(data),)
    assert tree["buffers"][0]["byteLength"] == len(buffer)
    (attributes,) = (
        primitive["attributes"]
        for mesh in tree["meshes"]
        for primitive in mesh["primitives"]
        if "COLOR_0" in primitive["attributes"]
    )
    accessor = tree["accessors"][attributes["COLOR_0"]]
    view = tree["bufferViews"][accessor["bufferView"]]
    count = accessor["count"]
    assert (accessor["componentType"], accessor["type"]) == (5126, "VEC3")  # float32
    assert not accessor.get("normalized", False)
    assert count == 4 * 24 * 24 == tree["accessors"][attributes["POSITION"]]["count"]
    assert view["byteLength"] == 12 * count
    start = view["byteOffset"] + accessor.get("byteOffset", 0)
    linear = np.frombuffer(buffer, "<f4", 3 * count, start).astype(float).reshape(count, 3)
    dark = linear <= 0.0031308  # back to sRGB
    srgb = np.where(dark, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    expected = shades.flatten().repeat(4).numpy()[:, None].repeat(3, 1)
    np.testing.assert_allclose(255 * srgb, 255 * expected, atol=0.01)


def test_transforms_put_points_on_their_pixels(wall: Reconstruction, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    wall = replace(
        wall, image_paths=(photos / "a b.jpg", None, tmp_path / "out" / "c.jpg", photos / "d.jpg")
    )
    wall.save(tmp_path / "out" / "transforms.json")
    data = json.loads((tmp_path / "out" / "transforms.json").read_text())
    assert data["camera_model"] == "OPENCV"
    paths = [frame["file_path"] for frame in data["frames"]]
    assert paths == ["../photos/a b.jpg", "day 1/view1.jpg", "c.jpg", "../photos/d.jpg"]
    for view, frame in enumerate(data["frames"]):
        assert (frame["w"], frame["h"]) == SIZES[view]
        pose = np.array(frame["transform_matrix"])
        row, column = 20, 11
        point = np.append(wall.world_points[view, row, column].numpy(), 1)
        x, y, z, _ = np.linalg.inv(pose) @ point
        assert z < 0  # OpenGL looks backwards
        pixel = [
            frame["cx"] + frame["fl_x"] * x / -z,
            frame["cy"] + frame["fl_y"] * -y / -z,
        ]
        model_pixel = torch.tensor([column + 0.5, row + 0.5], dtype=torch.float64)
        expected = wall.image_fits[view].pixels_to_original(model_pixel)
        np.testing.assert_allclose(pixel, expected, atol=1e-4)


def test_transforms_name_photos_from_where_the_folder_really_is(tmp_path: Path) -> None:
    real = tmp_path / "disk" / "out"
    (real / "images").mkdir(parents=True)
    (tmp_path / "out").symlink_to(real)
    photos = (
        tmp_path / "out" / "images" / "a.jpg",  # within the linked folder
        tmp_path / "out" / ".." / "b.jpg",  # on the disk, beside the folder that the link means
        tmp_path / "c.jpg",
    )
    wall = replace(see_wall(RULES["square"], SIZES[:3]), image_paths=photos)
    wall.save(tmp_path / "out" / "transforms.json")
    frames = json.loads((real / "transforms.json").read_text())["frames"]
    paths = [frame["file_path"] for frame in frames]
    assert paths == ["images/a.jpg", "../b.jpg", "../../c.jpg"]


def test_transforms_name_the_cloud_they_are_told(tmp_path: Path) -> None:
    wall = see_wall(RULES["square"])
    wall.save(tmp_path / "scene.ply", drop_lowest=0)
    wall.save(tmp_path / "transforms.json", ply_file="scene.ply")
    data = json.loads((tmp_path / "transforms.json").read_text())
    # nerfstudio applies the same change to the cloud and to the cameras, which must fit before.
    points = read_ply(tmp_path / data["ply_file_path"])[0].reshape(4, 24 * 24, 3)
    for frame, own in zip(data["frames"], points, strict=True):
        pose = np.array(frame["transform_matrix"])
        x, y, z = ((own - pose[:3, 3]) @ pose[:3, :3]).T
        column = frame["cx"] + frame["fl_x"] * x / -z
        row = frame["cy"] - frame["fl_y"] * y / -z
        assert ((column > 0) & (column < frame["w"]) & (row > 0) & (row < frame["h"])).all()
    assert "applied_transform" not in data
    wall.save(tmp_path / "transforms.json")
    assert "ply_file_path" not in json.loads((tmp_path / "transforms.json").read_text())


def test_colmap_model_is_the_scene(wall: Reconstruction, tmp_path: Path) -> None:
    wall.save(tmp_path / "colmap", drop_lowest=0)
    model = pycolmap.Reconstruction(tmp_path / "colmap")
    assert model.num_reg_images() == len(SIZES)
    assert model.num_points3D() == shown_pixels(wall)
    assert model.compute_mean_reprojection_error() < 1e-3
    assert model.compute_mean_track_length() > 2
    for view, name in enumerate(wall.view_names):
        image = model.images[view + 1]
        camera = model.cameras[image.camera_id]
        assert image.name == name
        assert camera.model.name == "PINHOLE"
        assert (camera.width, camera.height) == SIZES[view]
        pose = np.linalg.inv(np.vstack((image.cam_from_world().matrix(), [0, 0, 0, 1])))
        np.testing.assert_allclose(pose, wall.world_from_cam[view], atol=1e-6)
        keypoints = {point.point3D_id: point.xy for point in image.points2D}
        assert len(keypoints) == image.num_points3D == len(image.points2D)
        for point_id, keypoint in list(keypoints.items())[::7]:
            xyz = model.points3D[point_id].xyz
            projected = camera.img_from_cam(image.cam_from_world() * xyz)
            np.testing.assert_allclose(projected, keypoint, atol=1e-3)
            assert (keypoint >= 0).all()
            assert (keypoint <= SIZES[view]).all()
    for point in list(model.points3D.values())[::7]:
        assert point.xyz[2] == pytest.approx(WALL, rel=1e-5)
        expected = 255 * wall_color(torch.from_numpy(point.xyz)).numpy()
        np.testing.assert_allclose(point.color, expected, atol=0.51)
    # Its own pixel's centre is among the keypoints, in pixels of the photo.
    first, fit = model.images[1], wall.image_fits[0]
    row, column = 20, 11
    centre = fit.pixels_to_original(torch.tensor([column + 0.5, row + 0.5])).numpy()
    distance = np.linalg.norm([p.xy - centre for p in first.points2D], axis=1)
    point = model.points3D[first.points2D[int(distance.argmin())].point3D_id]
    assert distance.min() < 1e-4
    np.testing.assert_allclose(point.xyz, wall.world_points[0, row, column], atol=1e-5)


def test_colmap_errors_are_those_of_the_points(tmp_path: Path) -> None:
    """A point head whose points all miss their pixel by 0.6 original pixels says so."""
    exact = see_wall(square_crop(20), ((40, 40),) * 3)
    shift = torch.eye(3)
    shift[0, 2] = 0.3  # model pixels, each of two original ones
    points = []
    for view in range(3):
        pose, k = exact.world_from_cam[view], exact.intrinsics[view]
        in_cam = (exact.world_points[view] - pose[:3, 3]) @ pose[:3, :3]
        moved = in_cam @ (k.inverse() @ shift @ k).T
        points.append(moved @ pose[:3, :3].T + pose[:3, 3])
    moved = replace(exact, world_points=torch.stack(points))
    moved.save(tmp_path / "colmap", drop_lowest=0)
    model = pycolmap.Reconstruction(tmp_path / "colmap")
    assert model.compute_mean_track_length() > 2
    assert model.compute_mean_reprojection_error() == pytest.approx(0.6, abs=1e-3)
    assert [p.error for p in model.points3D.values()] == pytest.approx(
        [0.6] * model.num_points3D(), abs=1e-3
    )
    keypoints = np.array([p.xy for image in model.images.values() for p in image.points2D])
    assert keypoints.min() >= 0
    assert keypoints.max() <= 40


def test_colmap_tracks_end_where_something_is_in_front(tmp_path: Path) -> None:
    wall = see_wall(square_crop(20), ((40, 40),) * 3)
    depth = wall.depth.clone()
    depth[1, :, :] *= 0.9  # view 1 claims to see something nearer
    replace(wall, depth=depth).save(tmp_path / "colmap", drop_lowest=0)
    model = pycolmap.Reconstruction(tmp_path / "colmap")
    assert model.images[2].num_points3D == 20 * 20  # its own points only
    assert model.images[1].num_points3D > 20 * 20
    for point in model.points3D.values():
        views = [element.image_id for element in point.track.elements]
        assert len(views) == len(set(views)) >= 1


def test_colmap_keeps_some_points_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hess.export.colmap.MAX_POINTS", 100)
    wall = see_wall(RULES["crop"])
    wall.save(tmp_path / "colmap")
    wall.save(tmp_path / "again")
    model = pycolmap.Reconstruction(tmp_path / "colmap")
    assert 50 <= model.num_points3D() <= 100
    for file in (tmp_path / "colmap").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_colmap_of_a_real_capture(tmp_path: Path) -> None:
    """True cameras and sensor depth: neighbouring frames see the same points."""
    dataset = open_dataset("bundled", image_fit=square_crop(56), views_per_scene=6, num_scenes=1)
    scene = dataset[0]
    points, known = scene.point_map()
    points[~known] = torch.nan
    ones = torch.ones_like(scene.depth)
    recon = Reconstruction(
        model_name="truth",
        view_names=scene.view_names,
        image_paths=(None,) * 6,
        image_fits=tuple(square_crop(56)([(56, 56)] * 6)),
        images=scene.images,
        world_from_cam=scene.world_from_cam,
        intrinsics=scene.intrinsics,
        original_intrinsics=scene.intrinsics,
        depth=scene.depth,
        depth_confidence=ones,
        world_points=points,
        confidence=ones,
    )
    recon.save(tmp_path / "colmap", drop_lowest=0)
    model = pycolmap.Reconstruction(tmp_path / "colmap")
    assert model.num_points3D() == int(known.sum())
    assert model.compute_mean_reprojection_error() < 0.01
    assert model.compute_mean_track_length() > 1.3


def test_colmap_leaves_out_points_behind_their_camera(tmp_path: Path) -> None:
    wall = see_wall(RULES["square"])
    points = wall.world_points.clone()
    points[0] *= -1
    replace(wall, world_points=points).save(tmp_path / "colmap", drop_lowest=0)
    model = pycolmap.Reconstruction(tmp_path / "colmap")
    assert model.num_points3D() == 3 * 24 * 24
    assert len(model.images[1].points2D) == 0
    assert model.compute_mean_reprojection_error() < 1e-3
    with pytest.raises(DatasetError, match="in front"):
        replace(wall, world_points=-wall.world_points).save(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", FORMATS)
def test_a_failed_save_leaves_the_old_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    see_wall(RULES["crop"]).save(tmp_path / name)
    before = contents(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="disk full"):
            see_wall(RULES["crop"], SIZES[:3]).save(tmp_path / name)
    assert contents(tmp_path) == before
    see_wall(RULES["crop"], SIZES[:3]).save(tmp_path / name)
    after = contents(tmp_path)
    assert after != before
    assert after.keys() == before.keys()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", FORMATS)
def test_a_place_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(OSError, match="file"):
        see_wall(RULES["square"]).save(tmp_path / "file" / name)
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("foreign", ["photo.jpg", "images/a.jpg", "cameras.bin/x", "database.db"])
def test_only_a_colmap_model_is_replaced(foreign: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / foreign).parent.mkdir(parents=True)
    (folder / foreign).write_bytes(b"mine")
    (folder / "points3D.txt").write_bytes(b"# also mine")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="more than a COLMAP model"):
        see_wall(RULES["square"]).save(folder)
    assert contents(tmp_path) == before
    (tmp_path / "note").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="is a file"):
        see_wall(RULES["square"]).save(tmp_path / "note")


def test_a_model_moved_aside_by_a_killed_process_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "colmap"
    see_wall(RULES["square"]).save(folder)
    before = contents(folder)
    rename = Path.rename

    def killed_at_second(path: Path, target: Path) -> Path:
        if path.name.endswith(".tmp"):
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_at_second)
        with pytest.raises(KeyboardInterrupt):
            see_wall(RULES["crop"]).save(folder)
    assert not folder.exists()

    def fails(self: pycolmap.Reconstruction, path: str) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(pycolmap.Reconstruction, "write", fails)
        with pytest.raises(OSError, match="disk full"):
            see_wall(RULES["crop"]).save(folder)
    assert contents(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_symbolic_link_to_a_model_stays_a_link(tmp_path: Path) -> None:
    see_wall(RULES["square"]).save(tmp_path / "real")
    before = contents(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    see_wall(RULES["crop"]).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") != before


def spoil_points(wall: Reconstruction) -> Reconstruction:
    return replace(wall, world_points=torch.full_like(wall.world_points, torch.nan))


def spoil_focal_length(wall: Reconstruction) -> Reconstruction:
    original = wall.original_intrinsics.clone()
    original[1, 0, 0] = torch.nan
    return replace(wall, original_intrinsics=original)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("scene.ply", spoil_points, "finite point"),
        ("scene.glb", spoil_points, "finite point"),
        ("colmap", spoil_points, "finite point"),
        ("scene.glb", spoil_focal_length, "view1.jpg"),
        ("transforms.json", spoil_focal_length, "view1.jpg"),
        ("colmap", spoil_focal_length, "view1.jpg"),
    ],
)
def test_what_cannot_be_saved_is_named(
    name: str, spoil: Callable[[Reconstruction], Reconstruction], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match=message):
        spoil(see_wall(RULES["square"])).save(tmp_path / name)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["scene.ply", "scene.glb", "colmap"])
def test_drop_lowest_must_be_a_share(name: str, tmp_path: Path) -> None:
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="drop_lowest"):
            see_wall(RULES["square"]).save(tmp_path / name, drop_lowest=share)


def test_unknown_suffix_lists_the_known(tmp_path: Path) -> None:
    expected = r"\.ply, \.glb, \.npz, \.json or a name without suffix .*'\.obj'"
    with pytest.raises(ConfigError, match=expected):
        see_wall(RULES["square"]).save(tmp_path / "scene.obj")


@pytest.mark.parametrize(
    ("library", "name"),
    [("plyfile", "scene.ply"), ("trimesh", "scene.glb"), ("pycolmap", "colmap")],
)
def test_a_missing_library_is_named(
    library: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BackendUnavailableError, match=f"pip install {library}"):
        see_wall(RULES["square"]).save(tmp_path / name)
