"""DTU: its layouts give cameras and depth that agree, and its metrics are those of the protocols.

Scans are made here: a slanted plane in millimetres, photographed by known cameras and written to
disk as published. Metrics are held against brute force over all pairs of points.
"""

import json
import shutil
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from plyfile import PlyData, PlyElement
from scipy.io import savemat
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from hess.cli.main import main
from hess.datasets import open_dataset
from hess.datasets.dtu import DTU_LAYOUTS, read_dtu
from hess.datasets.dtu_cameras import scan_number, split_projection
from hess.datasets.dtu_mvsnet import read_pfm
from hess.datasets.dtu_official import DtuTruth, read_dtu_truth
from hess.datasets.layout import find_layout
from hess.datasets.procedural import Procedural
from hess.datasets.recordings import load_scene
from hess.datasets.scene import Scene
from hess.errors import AlignmentError, ConfigError, DatasetError, LayoutError
from hess.evaluation.dtu import (
    DTU_OFFICIAL,
    DTU_PAPER,
    DTU_TEST_SCANS,
    DtuScanPoints,
    align_to_scan,
    distance_to_scan,
)
from hess.evaluation.dtu_pi3 import DTU_PI3, DtuPi3Points, pixel_metrics, point_to_point_icp
from hess.evaluation.frame_choice import SameFrames
from hess.evaluation.point_metrics import GroundTruthPoints
from hess.evaluation.protocols import PROTOCOLS
from hess.geometry.fit_rules import FitRule
from hess.geometry.image_fit import ImageFit
from hess.geometry.nearest import NearestNeighbors
from hess.geometry.ransac import agreeing_pairs
from hess.geometry.reduction import reduce_cloud
from hess.geometry.sim3 import Sim3
from hess.models.loading import load_model

ORIGINAL_SIZE = FitRule(
    name="original", choose=lambda sizes: [ImageFit.identity(*size) for size in sizes]
)
NORMAL = np.array([-0.3, -0.1, 1.0])  # the plane is NORMAL . x = 650 mm


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_tensor(values) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.float64)


# --- layouts ------------------------------------------------------------------------------------


def camera(view: int) -> np.ndarray:
    """cam_from_world of view 0, 1, 2, ... in mm."""
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler("yx", [4 * view, -3 * view], degrees=True).as_matrix()
    pose[:3, 3] = [-40.0 * view, 12.0 * view, 20.0 * view + 5]
    return pose


def plane_depth(k: np.ndarray, cam_from_world: np.ndarray, width: int, height: int) -> np.ndarray:
    """z-depth of the plane; ``k`` has the centre of the top-left pixel at (0.5, 0.5)."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    rays = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ np.linalg.inv(k).T
    world_from_cam = np.linalg.inv(cam_from_world)
    directions = rays @ world_from_cam[:3, :3].T
    return (650.0 - NORMAL @ world_from_cam[:3, 3]) / (directions @ NORMAL)


def corner_k(integer_k: np.ndarray) -> np.ndarray:
    return integer_k + np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])


def save_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def grey(width: int, height: int) -> np.ndarray:
    return np.full((height, width, 3), 120, dtype=np.uint8)


def write_cam_txt(path: Path, pose: np.ndarray, k: np.ndarray, last: str = "425.0 2.5") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ["\n".join(" ".join(map(repr, row)) for row in m.tolist()) for m in (pose, k)]
    path.write_text(f"extrinsic\n{rows[0]}\n\nintrinsic\n{rows[1]}\n\n{last}\n")


NEUS_K = np.array([[90.0, 0.01, 33.2], [0, 88.0, 23.1], [0, 0, 1]])


def write_neus(folder: Path, factors: tuple[float, ...] = (1.0, -2.5, 1e-3)) -> Path:
    """Projection matrices are known up to a factor, which may be negative."""
    arrays = {}
    for view, factor in enumerate(factors):
        save_image(folder / "image" / f"{view:06d}.png", grey(64, 48))
        save_image(folder / "mask" / f"{view:03d}.png", grey(64, 48))
        projection = np.eye(4)
        projection[:3] = factor * NEUS_K @ camera(view)[:3]
        arrays |= {f"world_mat_{view}": projection, f"scale_mat_{view}": np.eye(4)}
        arrays[f"world_mat_inv_{view}"] = np.linalg.inv(projection)
    np.savez(folder / "cameras_sphere.npz", **arrays)
    return folder


MVSNET_K = np.array([[90.0, 0, 31.0], [0, 91.0, 24.2], [0, 0, 1]])


def write_mvsnet(folder: Path, views: int = 3, depth: bool = True) -> Path:
    for view in range(views):
        save_image(folder / "images" / f"{view:08d}.jpg", grey(64, 48))
        last = ("425.0 2.5", "425.0 2.5 192", "425.0 2.5 192 905.0")[view % 3]
        write_cam_txt(folder / "cams" / f"{view:08d}_cam.txt", camera(view), MVSNET_K, last)
        if depth:
            values = plane_depth(corner_k(MVSNET_K), camera(view), 64, 48).astype(np.float32)
            values[30, 30], values[31, 31] = np.nan, -1
            (folder / "depths").mkdir(exist_ok=True)
            np.save(folder / "depths" / f"{view:08d}.npy", values)
            mask = np.full((48, 64), 255, dtype=np.uint8)
            mask[:, :12] = 0
            save_image(folder / "binary_masks" / f"{view:08d}.png", mask)
    return folder


def write_training(root: Path, scans: tuple[int, ...] = (4, 12), views: int = 2) -> Path:
    """Cameras and depth for 160x128, photos of 640x512, as cut from 1600x1200."""
    full = np.array([[2892.33, 0, 823.205], [0, 2883.175, 619.071], [0, 0, 1]])
    quarter = full.copy()
    quarter[:2] /= 8
    quarter[:2, 2] -= np.array([80, 44]) / 4
    # Where the edges of the pixels are, everything scales exactly.
    corner = corner_k(full)
    corner[:2] /= 8
    corner[:2, 2] -= np.array([80, 44]) / 4
    for view in range(views):
        for folder in ("", "train"):  # those of the full size lie above, and are not to be taken
            path = root / "Cameras" / folder / f"{view:08d}_cam.txt"
            write_cam_txt(path, camera(view), quarter if folder else full)
        depth = plane_depth(corner, camera(view), 160, 128).astype("<f4")
        header = b"Pf\n160 128\n-1.0\n"
        mask = np.full((128, 160), 255, dtype=np.uint8)
        mask[:5] = 0
        for scan in scans:
            for light in (0, 3):
                name = f"rect_{view + 1:03d}_{light}_r5000.png"
                save_image(root / "Rectified" / f"scan{scan}_train" / name, grey(640, 512))
            save_image(root / f"Depths/scan{scan}_train/depth_visual_{view:04d}.png", mask)
            pfm = root / f"Depths/scan{scan}_train/depth_map_{view:04d}.pfm"
            pfm.write_bytes(header + depth[::-1].tobytes())
    return root


def load(folder: Path, fit: FitRule = ORIGINAL_SIZE) -> Scene:
    (sequence,) = read_dtu(folder)
    return load_scene(sequence.name, sequence.frames, unit=sequence.unit, image_fit=fit)


def load_all(folder: Path) -> list[Scene]:
    return [
        load_scene(s.name, s.frames, unit=s.unit, image_fit=ORIGINAL_SIZE)
        for s in read_dtu(folder)
    ]


def assert_on_plane(scene: Scene) -> None:
    points, valid = (t.numpy() for t in scene.point_map())
    assert valid.any(axis=(1, 2)).all()
    assert np.abs(points[valid] @ NORMAL - 650.0).max() < 0.01


def test_neus_cameras_see_what_their_matrices_see(tmp_path: Path) -> None:
    scene = load(write_neus(tmp_path / "scan24"))
    assert scene.unit == "mm"
    assert scene.depth is None
    world = np.random.default_rng(0).normal(size=(20, 3)) * 50 + [0, 0, 650]
    homogeneous = np.c_[world, np.ones(20)]
    for view in range(3):
        pixels = homogeneous @ (NEUS_K @ camera(view)[:3]).T
        expected = pixels[:, :2] / pixels[:, 2:] + 0.5
        in_cam = homogeneous @ np.linalg.inv(scene.world_from_cam[view].double().numpy()).T
        found = in_cam[:, :3] @ scene.intrinsics[view].double().numpy().T
        np.testing.assert_allclose(found[:, :2] / found[:, 2:], expected, atol=2e-3)
        assert (in_cam[:, 2] > 0).all()


@given(st.integers(0, 10**6), st.sampled_from([-7.0, -1.0, 0.02, 1.0, 300.0]))
@settings(max_examples=25, deadline=None)
def test_projection_is_split_into_its_parts(seed: int, factor: float) -> None:
    rng = np.random.default_rng(seed)
    k = np.array([[rng.uniform(50, 3000), rng.normal(), 800], [0, 2000.0, 600], [0, 0, 1]])
    pose = np.eye(4)
    pose[:3, :3] = Rotation.random(random_state=rng).as_matrix()
    pose[:3, 3] = rng.normal(size=3) * 100
    intrinsics, found = split_projection(as_tensor(factor * k @ pose[:3]), Path("cameras"))
    np.testing.assert_allclose(intrinsics, k, rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(found, pose, atol=1e-6)


def test_mvsnet_depth_lies_on_the_plane(tmp_path: Path) -> None:
    scene = load(write_mvsnet(tmp_path / "scan9"))
    assert (scene.unit, scene.num_views) == ("mm", 3)
    assert_on_plane(scene)


def test_mvsnet_masks_are_eroded_by_a_window_of_ten(tmp_path: Path) -> None:
    folder = write_mvsnet(tmp_path / "scan9", views=1)
    mask = np.random.default_rng(0).random((48, 64)) > 0.01
    save_image(folder / "binary_masks" / "00000000.png", (mask * 255).astype(np.uint8))
    depth = np.load(folder / "depths" / "00000000.npy")
    expected = np.zeros((48, 64), dtype=bool)
    for row in range(48):
        for column in range(64):
            window = mask[max(0, row - 5) : row + 5, max(0, column - 5) : column + 5]
            expected[row, column] = window.all() and depth[row, column] > 0
    assert 0 < expected.sum() < mask.sum()
    assert np.array_equal(load(folder).depth[0].numpy() > 0, expected)


def test_mvsnet_without_depth_has_cameras_only(tmp_path: Path) -> None:
    scene = load(write_mvsnet(tmp_path / "scan9", depth=False))
    assert scene.depth is None
    assert scene.has_poses
    np.testing.assert_allclose(scene.intrinsics[0], corner_k(MVSNET_K), atol=1e-5)


def test_mvsnet_training_depth_lies_on_the_plane(tmp_path: Path) -> None:
    quarter = FitRule(
        name="quarter",
        choose=lambda sizes: [
            replace(ImageFit.identity(640, 512), scale_x=0.25, scale_y=0.25, width=160, height=128)
            for _ in sizes
        ],
    )
    sequences = read_dtu(write_training(tmp_path))
    assert [s.name for s in sequences] == ["scan4", "scan12"]
    for sequence in sequences:
        assert [f.image_path.name for f in sequence.frames] == [
            "rect_001_3_r5000.png",
            "rect_002_3_r5000.png",
        ]
        scene = load_scene("s", sequence.frames, unit=sequence.unit, image_fit=quarter)
        assert_on_plane(scene)
        assert (scene.depth[:, :5] == 0).all()
        assert (scene.depth[:, 5:] > 0).all()


def test_pfm_of_either_byte_order_is_read_from_the_top(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    for order, scale in (("<", b"-1.0"), (">", b"1.0")):
        path = tmp_path / "map.pfm"
        path.write_bytes(
            b"Pf\n3 2\n" + scale + b"\n" + struct.pack(f"{order}6f", *values[::-1].flat)
        )
        np.testing.assert_array_equal(read_pfm(path), values)


@pytest.mark.parametrize(
    ("write", "layout"),
    [(write_neus, "neus"), (write_mvsnet, "mvsnet"), (write_training, "mvsnet-training")],
)
def test_layouts_are_recognised(write, layout: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "dtu" / "scan24")
    found, scans = find_layout(folder, DTU_LAYOUTS)
    assert (found.name, scans) == (layout, [folder])
    assert open_dataset(folder, image_fit=ORIGINAL_SIZE).name.startswith(f"{layout}:")
    assert len(read_dtu(tmp_path / "dtu")) == len(read_dtu(folder))


def test_only_scans_are_in_millimetres(tmp_path: Path) -> None:
    assert read_dtu(write_mvsnet(tmp_path / "Family"))[0].unit == "arbitrary"
    assert scan_number("dtu_scan024/3") == 24
    assert scan_number("Family") is None


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def write_over(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("write", "damage", "message"),
    [
        (write_neus, write_over("cameras_sphere.npz", b"PK\3\4"), "cameras_sphere.npz"),
        (write_neus, lambda f: shutil.copy(f / "image/000000.png", f / "image/7.png"), "mat_7"),
        (
            write_neus,
            lambda f: save_image(f / "image/000001.png", grey(32, 24)),
            "67x47 pixels, found 32x24",
        ),
        (
            write_neus,
            lambda f: np.savez(f / "cameras_sphere.npz", world_mat_0=np.zeros((4, 4))),
            "rank 3",
        ),
        (write_neus, lambda f: np.savez(f / "cameras_sphere.npz", world_mat_0=["x"]), "world_mat"),
        (write_mvsnet, remove("cams/00000001_cam.txt"), "00000001_cam.txt: .*extrinsic"),
        (write_mvsnet, write_over("cams/00000001_cam.txt", b"extrinsic 1 2"), "00000001_cam"),
        (write_mvsnet, write_over("cams/00000001_cam.txt", b"\xff\xfe\x00"), "00000001_cam"),
        (
            write_mvsnet,
            lambda f: write_cam_txt(f / "cams/00000001_cam.txt", np.zeros((4, 4)), MVSNET_K),
            "right-handed rotation",
        ),
        (
            write_mvsnet,
            lambda f: write_cam_txt(f / "cams/00000001_cam.txt", camera(1), -MVSNET_K),
            "focal lengths above 0",
        ),
        (write_mvsnet, remove("depths/00000001.npy"), "00000001.npy: missing"),
        (write_mvsnet, remove("binary_masks/00000001.png"), "00000001.png: missing"),
        (write_mvsnet, write_over("depths/00000001.npy", b"\x93NUMPY"), "00000001.npy"),
        (write_mvsnet, lambda f: np.save(f / "depths/00000001.npy", np.ones(3)), "H, W"),
        (
            write_mvsnet,
            lambda f: np.save(f / "depths/00000001.npy", np.ones((48, 60))),
            "size 64x48, found 60x48",
        ),
        (write_mvsnet, write_over("binary_masks/00000001.png", b"no"), "expected a mask"),
        (write_training, remove("Cameras/train/00000001_cam.txt"), "train/00000001_cam"),
        (write_training, remove("Depths/scan4_train/depth_map_0001.pfm"), "missing"),
        (
            write_training,
            write_over("Depths/scan4_train/depth_map_0001.pfm", b"Pf\n160 128\n-1\n1234"),
            "depth_map_0001.pfm: expected a single-channel PFM",
        ),
        (
            write_training,
            lambda f: save_image(
                f / "Depths/scan4_train/depth_visual_0001.png", np.ones((9, 9), np.uint8)
            ),
            "size of its depth map",
        ),
        (
            write_training,
            lambda f: [p.unlink() for p in f.glob("Rectified/scan12_train/*_3_*")],
            "all lamps",
        ),
    ],
)
def test_what_is_missing_or_damaged_is_named(write, damage, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "scan4")
    damage(folder)
    with pytest.raises(DatasetError, match=message):
        load_all(folder)


def test_other_folders_are_no_scans(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(DatasetError, match="expected one or several DTU scans"):
            read_dtu(path)


# --- official ground truth ----------------------------------------------------------------------


BOX = ((-10.0, -12.0, 600.0), (10.0, 12.0, 640.0))


def write_official(
    root: Path,
    points: np.ndarray,
    observed: np.ndarray,
    plane,
    *,
    scan: int = 24,
    box: tuple | np.ndarray = BOX,
) -> Path:
    (root / "Points" / "stl").mkdir(parents=True, exist_ok=True)
    (root / "ObsMask").mkdir(exist_ok=True)
    fields = [(name, "f4") for name in ("x", "y", "z", "nx", "ny", "nz")]
    vertices = np.zeros(len(points), dtype=fields)
    for axis, name in enumerate("xyz"):
        vertices[name] = points[:, axis]
    ply = PlyData([PlyElement.describe(vertices, "vertex")], byte_order="<")
    ply.write(root / "Points" / "stl" / f"stl{scan:03d}_total.ply")
    savemat(
        root / "ObsMask" / f"ObsMask{scan}_10.mat",
        {
            "ObsMask": observed.astype(np.uint8),
            "BB": np.array(box, dtype=np.float32),
            "Res": 2.0,
            "Margin": 10,
        },
    )
    plane = np.array(plane, dtype=float).reshape(4, 1)
    savemat(root / "ObsMask" / f"Plane{scan}.mat", {"P": plane})
    return root


def test_official_truth_is_read_as_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(50, 3)).astype(np.float32)
    observed = rng.random((11, 13, 21)) > 0.5
    truth = read_dtu_truth(write_official(tmp_path, points, observed, [0, 0, -1, 620]), 24)
    np.testing.assert_array_equal(truth.points, points)
    np.testing.assert_array_equal(truth.observed, observed)
    assert (truth.scan, truth.voxel_size) == (24, 2.0)
    assert truth.points.dtype == torch.float64
    # The first voxel is centred on the corner of the box, and 2 mm wide.
    inside = as_tensor([[-10.9, -12, 600], [-8.9, -12, 602.9], [10.9, 12.9, 640.9]])
    expected = [observed[0, 0, 0], observed[1, 0, 1], observed[10, 12, 20]]
    assert truth.is_observed(inside).tolist() == expected
    outside = as_tensor([[-11.1, -12, 600], [0, 0, 1e6], [0, 0, -1e6]])
    assert not truth.is_observed(outside).any()
    assert truth.above_table(as_tensor([[0, 0, 619.9], [0, 0, 620.1]])).tolist() == [True, False]
    box = as_tensor([[-70, 0, 620], [-70.1, 0, 620], [129.9, 0, 620], [130, 0, 620]])
    assert truth.in_box(box, (60, 120)).tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("Points/stl/stl024_total.ply", None),
        ("Points/stl/stl024_total.ply", b"ply\nformat"),
        ("Points/stl/stl024_total.ply", b"ply\nformat ascii 1.0\nelement face 0\nend_header\n"),
        ("ObsMask/ObsMask24_10.mat", None),
        ("ObsMask/ObsMask24_10.mat", b""),
        ("ObsMask/ObsMask24_10.mat", b"x" * 500),
        ("ObsMask/ObsMask24_10.mat", 300),
        ("ObsMask/Plane24.mat", None),
        ("ObsMask/Plane24.mat", 140),
    ],
)
def test_damaged_official_files_are_named(name: str, content, tmp_path: Path) -> None:
    write_official(tmp_path, np.ones((5, 3)), np.ones((11, 13, 21)), [0, 0, -1, 620])
    path = tmp_path / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    with pytest.raises(DatasetError, match=path.name):
        read_dtu_truth(tmp_path, 24)


def test_official_files_without_their_arrays_are_refused(tmp_path: Path) -> None:
    write_official(tmp_path, np.ones((5, 3)), np.ones((11, 13, 21)), [0, 0, -1, 620])
    savemat(tmp_path / "ObsMask" / "Plane24.mat", {"P": np.ones(3)})
    with pytest.raises(DatasetError, match=r"plane \[4\]"):
        read_dtu_truth(tmp_path, 24)
    savemat(tmp_path / "ObsMask" / "Plane24.mat", {"Q": np.ones(4)})
    with pytest.raises(DatasetError, match="Plane24"):
        read_dtu_truth(tmp_path, 24)


# --- reduction ----------------------------------------------------------------------------------


def greedy(points: np.ndarray, order: list[int], radius: float) -> list[int]:
    kept: list[int] = []
    for index in order:
        if (np.linalg.norm(points[kept] - points[index], axis=1) > radius).all():
            kept.append(index)
    return kept


@given(st.integers(0, 10**6), st.integers(0, 60), st.sampled_from([0.05, 0.2, 1.0]))
@settings(max_examples=30, deadline=None)
def test_reduction_is_the_greedy_one(seed: int, count: int, radius: float) -> None:
    points = np.random.default_rng(seed).random((count, 3)) * [1, 1, 0.1]
    order = torch.randperm(count, generator=seeded(seed)).tolist()
    kept = reduce_cloud(torch.from_numpy(points), radius, seeded(seed))
    assert kept.tolist() == greedy(points, order, radius)


def test_reduction_leaves_no_point_near_and_none_uncovered() -> None:
    points = np.random.default_rng(0).random((6_000, 3)) * [6, 6, 0.1]  # several chunks
    kept = reduce_cloud(torch.from_numpy(points), 0.2, seeded()).numpy()
    distance = np.linalg.norm(points[:, None] - points[None, kept], axis=-1)
    assert 300 < len(kept) < 3_000
    among_kept = distance[kept]
    assert among_kept[~np.eye(len(kept), dtype=bool)].min() > 0.2
    assert distance.min(axis=1).max() <= 0.2


def test_reduction_drops_copies_and_repeats_itself() -> None:
    copies = torch.ones(5_000, 3, dtype=torch.float64)
    assert len(reduce_cloud(copies, 0.2, seeded())) == 1
    grid = torch.cartesian_prod(*[torch.arange(12.0).double()] * 3)
    assert len(reduce_cloud(grid, 0.999, seeded())) == len(grid)
    kept = grid[reduce_cloud(grid, 1.0, seeded())].numpy()
    assert cKDTree(kept).query(kept, k=2)[0][:, 1].min() > 1.0  # at the radius counts as within
    first, again, other = (reduce_cloud(grid, 1.5, seeded(s)).tolist() for s in (1, 1, 2))
    assert first == again != other


def test_reduction_refuses_nonsense() -> None:
    with pytest.raises(ConfigError):
        reduce_cloud(torch.zeros(2, 3), 0.0, seeded())
    with pytest.raises(LayoutError):
        reduce_cloud(torch.zeros(2, 2), 0.2, seeded())
    with pytest.raises(AlignmentError):
        reduce_cloud(torch.full((2, 3), torch.nan), 0.2, seeded())


# --- official measure ---------------------------------------------------------------------------


def flat_truth(points: np.ndarray | None = None, **fields) -> DtuTruth:
    """A flat square of 20x20 mm at z = 620 mm, all observed, the table at z = 630 mm below it."""
    if points is None:
        x, y = np.meshgrid(np.arange(-10, 10, 0.5), np.arange(-10, 10, 0.5))
        points = np.stack([x, y, np.full_like(x, 620)], axis=-1).reshape(-1, 3)
    defaults = {
        "observed": torch.ones(11, 11, 21, dtype=torch.bool),
        "box": as_tensor([[-10, -10, 600], [10, 10, 640]]),
        "voxel_size": 2.0,
        "plane": as_tensor([0, 0, -1, 630]),
    }
    return DtuTruth(scan=24, points=as_tensor(points), **(defaults | fields))


def test_known_accuracy_and_completeness() -> None:
    truth = flat_truth()
    same = distance_to_scan(truth.points, truth).cloud
    assert (same.accuracy, same.completeness, same.chamfer_mean) == (0, 0, 0)
    above = distance_to_scan(truth.points + as_tensor([0, 0, -1.5]), truth)
    assert above.cloud.accuracy == pytest.approx(1.5)
    assert above.cloud.completeness == pytest.approx(1.5)
    assert (above.accuracy_share, above.completeness_share) == (1.0, 1.0)
    half = distance_to_scan(truth.points[truth.points[:, 0] < 0], truth).cloud
    assert half.accuracy == 0
    # The other half is 0.5, 1, ... 10 mm away from the last point at x = -0.5.
    assert half.completeness == pytest.approx(np.arange(0.5, 10.1, 0.5).mean() / 2)


def test_dense_copies_do_not_outweigh_single_points() -> None:
    truth = flat_truth()
    rng = np.random.default_rng(0)
    wrong = as_tensor([[0, 0, 617]]) + 1e-3 * torch.from_numpy(rng.random((4_000, 3)))
    cloud = distance_to_scan(torch.cat([truth.points, wrong]), truth).cloud
    assert cloud.accuracy == pytest.approx(3 / 1601, rel=1e-2)


def test_only_what_the_scanner_could_see_is_judged() -> None:
    observed = torch.ones(11, 11, 21, dtype=torch.bool)
    observed[:, :, :5] = False  # up to z = 609
    truth = flat_truth(observed=observed)
    stray = truth.points + as_tensor([0, 0, -12])  # z = 608
    seen = distance_to_scan(torch.cat([truth.points, stray]), truth)
    assert seen.cloud.accuracy == 0
    all_seen = distance_to_scan(torch.cat([truth.points, stray]), flat_truth())
    assert all_seen.cloud.accuracy == pytest.approx(6)


def test_scan_below_the_table_need_not_be_complete() -> None:
    square = flat_truth().points.numpy()
    table = square + np.array([0, 0, 11])
    cloud = distance_to_scan(torch.from_numpy(square), flat_truth(np.concatenate([square, table])))
    assert cloud.cloud.completeness == 0
    lower_table = flat_truth(np.concatenate([square, table]), plane=as_tensor([0, 0, -1, 640]))
    cloud = distance_to_scan(torch.from_numpy(square), lower_table)
    assert cloud.cloud.completeness == pytest.approx(5.5)


def test_distances_beyond_the_limit_do_not_count_but_show_in_the_shares() -> None:
    truth = flat_truth(observed=torch.ones(11, 11, 41, dtype=torch.bool))  # up to z = 681
    far = truth.points + as_tensor([0, 0, 25])
    metrics = distance_to_scan(torch.cat([truth.points, far]), truth)
    assert metrics.cloud.accuracy == 0
    assert metrics.accuracy_share == 0.5
    no_limit = replace(DTU_OFFICIAL, max_distance=1e9)
    assert distance_to_scan(torch.cat([truth.points, far]), truth, no_limit).cloud.accuracy == 12.5


def test_official_measure_against_brute_force() -> None:
    rng = np.random.default_rng(3)
    points = rng.uniform([-20, -20, 590], [20, 20, 650], size=(400, 3))
    pred = rng.uniform([-90, -90, 520], [150, 150, 780], size=(1_500, 3))
    pred = np.concatenate([pred, points + rng.normal(size=(400, 3))])
    observed = rng.random((11, 11, 21)) > 0.4
    plane = np.array([0.1, -0.2, -1, 622])
    truth = flat_truth(points, observed=torch.from_numpy(observed), plane=as_tensor(plane))
    measure = DtuScanPoints(reduction=1.5, max_distance=6.0, seed=5)
    metrics = distance_to_scan(torch.from_numpy(pred), truth, measure)

    order = torch.randperm(len(pred), generator=seeded(5)).tolist()
    reduced = pred[greedy(pred, order, 1.5)]
    low, high = np.array([-10, -10, 600.0]), np.array([10, 10, 640.0])
    near = reduced[((reduced >= low - 60) & (reduced < high + 120)).all(axis=1)]
    seen = []
    for point in near:
        voxel = np.round((point - low) / 2).astype(int)
        if (voxel >= 0).all() and (voxel < observed.shape).all() and observed[tuple(voxel)]:
            seen.append(point)
    above = points[points @ plane[:3] + plane[3] > 0]
    to_scan = np.linalg.norm(np.array(seen)[:, None] - points, axis=-1).min(axis=1)
    to_pred = np.linalg.norm(above[:, None] - near, axis=-1).min(axis=1)
    for found, share, distance in (
        (metrics.cloud.accuracy, metrics.accuracy_share, to_scan),
        (metrics.cloud.completeness, metrics.completeness_share, to_pred),
    ):
        assert 0 < share == pytest.approx((distance < 6).mean())
        assert found == pytest.approx(distance[distance < 6].mean(), rel=1e-9)
    assert metrics.cloud.accuracy_median == pytest.approx(np.median(to_scan[to_scan < 6]))
    assert metrics.cloud.completeness_median == pytest.approx(np.median(to_pred[to_pred < 6]))


def test_clouds_far_from_the_scan_are_refused() -> None:
    truth = flat_truth()
    for shift, message in ((1e4, "observed volume"), (torch.nan, "finite")):
        with pytest.raises(AlignmentError, match=message):
            distance_to_scan(truth.points + shift, truth)
    with pytest.raises(AlignmentError, match="observed volume"):
        distance_to_scan(truth.points[:0], truth)
    with pytest.raises(AlignmentError, match="is within 1"):
        distance_to_scan(truth.points - 5, truth, replace(DTU_OFFICIAL, max_distance=1.0))


# --- alignment ----------------------------------------------------------------------------------


def similarity() -> Sim3:
    """From DTU's frame to that of a prediction."""
    turn = Rotation.from_euler("xyz", [20, -50, 70], degrees=True).as_matrix()
    return Sim3(scale=0.004, rotation=as_tensor(turn), translation=as_tensor([1.0, -2.0, 0.5]))


def curved_truth() -> DtuTruth:
    x, y = np.meshgrid(np.arange(-40, 40, 1.0), np.arange(-40, 40, 1.0))
    z = 620 + 8 * np.sin(x / 9) + 6 * np.cos(y / 7)
    observed = torch.ones(51, 51, 31, dtype=torch.bool)
    box = as_tensor([[-50, -50, 590], [50, 50, 650]])
    points = np.stack([x, y, z], axis=-1).reshape(-1, 3)
    return flat_truth(points, observed=observed, box=box, plane=as_tensor([0, 0, -1, 700]))


def centers(count: int = 12) -> torch.Tensor:
    rng = np.random.default_rng(1)
    return as_tensor(rng.normal(size=(count, 3)) * [150, 100, 40])


def test_cameras_align_a_prediction_and_ransac_bears_wrong_ones() -> None:
    truth, gt = curved_truth(), centers()
    pred = similarity().apply(truth.points)
    pred_centers = similarity().apply(gt)
    aligned = align_to_scan(pred, pred_centers, gt, truth)
    torch.testing.assert_close(aligned.apply(pred), truth.points, atol=1e-6, rtol=0)

    wrong = pred_centers.clone()
    wrong[:4] += 0.5
    plain = align_to_scan(pred, wrong, gt, truth)
    assert (plain.apply(pred) - truth.points).norm(dim=1).min() > 10
    robust = align_to_scan(pred, wrong, gt, truth, DTU_PAPER)
    torch.testing.assert_close(robust.apply(pred), truth.points, atol=1e-3, rtol=0)
    assert agreeing_pairs(wrong, gt, 10.0, seeded()).tolist() == [False] * 4 + [True] * 8


def test_icp_mends_what_the_cameras_leave() -> None:
    truth, gt = curved_truth(), centers()
    pred = similarity().apply(truth.points)
    shifted = similarity().apply(gt + as_tensor([0.3, 0.2, -0.5]))  # all agree on what is wrong
    without = align_to_scan(pred, shifted, gt, truth, replace(DTU_PAPER, icp_distance=None))
    with_icp = align_to_scan(pred, shifted, gt, truth, DTU_PAPER)
    before, after = (
        distance_to_scan(a.apply(pred), truth).cloud.chamfer_mean for a in (without, with_icp)
    )
    assert before > 0.6
    assert after < 1e-6


def test_alignment_refuses_what_determines_nothing() -> None:
    truth, gt = curved_truth(), centers()
    line = gt * as_tensor([1.0, 0, 0])
    for measure in (DTU_OFFICIAL, DTU_PAPER):
        for wrong in (line, gt[:2], gt * torch.nan):
            with pytest.raises(AlignmentError):
                align_to_scan(truth.points, wrong, gt[: len(wrong)], truth, measure)
        with pytest.raises(LayoutError):
            align_to_scan(truth.points, gt[:5], gt, truth, measure)
    single = flat_truth(np.array([[0, 0, 620.0]]))
    with pytest.raises(AlignmentError, match="single point"):
        align_to_scan(truth.points, gt, gt, single, DTU_PAPER)


def test_ransac_is_repeatable_and_refuses_nonsense() -> None:
    source = centers(40)
    target = source + as_tensor(np.random.default_rng(0).normal(size=(40, 3)) * 8)
    first, again = (agreeing_pairs(source, target, 10.0, seeded(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert 3 <= first.sum() < 40
    with pytest.raises(ConfigError):
        agreeing_pairs(source, target, 0.0, seeded())
    with pytest.raises(LayoutError):
        agreeing_pairs(source, target[:3], 1.0, seeded())


# --- pi3's protocol -----------------------------------------------------------------------------


def curved_map() -> torch.Tensor:
    """Point map [1, 80, 80, 3] in mm."""
    return curved_truth().points.reshape(1, 80, 80, 3)


def pixel_truth(known: torch.Tensor | None = None):
    scene = Scene(
        name="scan1/0",
        images=torch.zeros(1, 3, 80, 80),
        world_from_cam=torch.eye(4)[None],
        intrinsics=torch.tensor([[[90.0, 0, 40], [0, 90, 40], [0, 0, 1]]]),
        depth=curved_map()[..., 2].float() * (1.0 if known is None else known),
        unit="mm",
    )
    truth = GroundTruthPoints(*scene.point_map(), 1, normals=True)
    return truth, scene.point_map()[0].double()


def test_pi3_alignment_removes_a_similarity() -> None:
    truth, points = pixel_truth()
    metrics = pixel_metrics(similarity().apply(points), truth)
    assert metrics.cloud.chamfer_mean < 1e-3
    assert metrics.point_error < 1e-3
    assert metrics.normal_consistency == pytest.approx(1.0, abs=1e-6)
    assert pixel_metrics(points, truth, replace(DTU_PI3, normals=False)).normal_consistency is None


def test_pi3_judges_known_pixels_only_and_without_a_limit() -> None:
    known = torch.ones(1, 80, 80)
    known[:, :, :20] = 0
    truth, points = pixel_truth(known)
    _, all_points = pixel_truth()
    pred = all_points.clone()
    pred[:, :, :20] = 1e5  # unknown: no say
    assert pixel_metrics(pred, truth).cloud.accuracy < 1e-3
    pred[:, 40, 40] += as_tensor([0, 0, -1000.0])  # one of 4,800; far off, and counted
    metrics = pixel_metrics(pred, truth)
    aligned = metrics.world_from_pred.apply(pred)[known.bool()].numpy()
    true = points[known.bool()].numpy()
    to_true, to_pred = cKDTree(true).query(aligned)[0], cKDTree(aligned).query(true)[0]
    assert to_true.max() > 500
    assert metrics.cloud.accuracy == pytest.approx(to_true.mean(), rel=1e-6)
    assert metrics.cloud.accuracy_median == pytest.approx(np.median(to_true), rel=1e-6)
    assert metrics.cloud.completeness == pytest.approx(to_pred.mean(), rel=1e-6)


def test_pi3_icp_mends_what_outliers_do_to_umeyama() -> None:
    truth, points = pixel_truth()
    pred = points.clone()
    pred[:, :20, :40] += as_tensor([0, 0, -300.0])
    pred = similarity().apply(pred)
    inliers = torch.ones(1, 80, 80, dtype=torch.bool)
    inliers[:, :20, :40] = False
    tight = replace(DTU_PI3, icp_distance=1e-6)  # pairs nothing
    without, with_icp = (
        pixel_metrics(pred, truth, measure).world_from_pred for measure in (tight, DTU_PI3)
    )
    rigid = with_icp.compose(without.inverse())
    assert rigid.scale == pytest.approx(1.0)
    errors = [truth.neighbors.query(a.apply(pred)[inliers])[0].mean() for a in (without, with_icp)]
    assert errors[1] < errors[0] / 2


def test_point_icp_finds_a_small_motion_and_ignores_what_is_far() -> None:
    target = curved_truth().points
    turn = Rotation.from_euler("xyz", [0.4, -0.3, 0.6], degrees=True).as_matrix()
    moved = Sim3(scale=1.0, rotation=as_tensor(turn), translation=as_tensor([0.1, 4.0, -3.6]))
    index = NearestNeighbors(target)
    source = moved.inverse().apply(target)
    start = index.query(source)[0].mean()
    found = point_to_point_icp(source, index, 100.0)
    assert index.query(found.apply(source))[0].mean() < start / 5
    assert found.scale == 1.0
    far = point_to_point_icp(source + 500, index, 100.0)
    torch.testing.assert_close(far.apply(source), source)


# --- protocols are data -------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [DTU_OFFICIAL, DTU_PAPER, DTU_PI3])
def test_measures_are_json_and_differ(measure) -> None:
    fields = measure.as_dict()
    assert json.loads(json.dumps(fields)) == fields
    others = {m.describe() for m in (DTU_OFFICIAL, DTU_PAPER, DTU_PI3) if m is not measure}
    assert measure.describe() not in others


def test_published_settings() -> None:
    assert (DTU_OFFICIAL.reduction, DTU_OFFICIAL.max_distance) == (0.2, 20.0)
    assert DTU_OFFICIAL.box_margin == (60.0, 120.0)
    assert DTU_PI3.icp_distance == 100.0
    assert len(DTU_TEST_SCANS) == 22
    official, paper, pi3 = (PROTOCOLS[f"dtu-{name}"] for name in ("official", "paper", "pi3"))
    assert (official.points, paper.points, pi3.points) == (DTU_OFFICIAL, DTU_PAPER, DTU_PI3)
    assert official.frames == paper.frames == SameFrames()
    assert pi3.frames == SameFrames(numbers=tuple(range(0, 50, 5)))
    assert {protocol.unit for protocol in (official, paper, pi3)} == {"mm"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"reduction": 0.0},
        {"max_distance": -1.0},
        {"box_margin": (60.0, float("inf"))},
        {"ransac_distance": float("nan")},
        {"icp_distance": 0.0},
    ],
)
def test_official_measure_refuses_nonsense(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DtuScanPoints(**wrong)


@pytest.mark.parametrize("distance", [0.0, float("nan"), float("inf")])
def test_pi3_measure_refuses_nonsense(distance: float) -> None:
    with pytest.raises(ConfigError, match="icp_distance"):
        DtuPi3Points(icp_distance=distance)


# --- the command line ---------------------------------------------------------------------------

MM = 100.0  # per unit of the rooms that nano was trained on
NUMBERS = range(0, 50, 5)


@pytest.fixture(scope="module")
def rooms() -> list[Scene]:
    return list(Procedural(num_scenes=2, num_views=10, split="test"))


def write_room(folder: Path, room: Scene, numbers: Sequence[int]) -> Path:
    """A room as a scan in MVSNet's layout; photos between ``numbers`` repeat the one before."""
    poses = np.linalg.inv(room.world_from_cam.double().numpy())
    poses[:, :3, 3] *= MM
    pixels = (255 * room.images.movedim(1, -1)).round().byte().numpy()
    for number in range(max(numbers) + 1):
        view = max(i for i, start in enumerate(numbers) if start <= number)
        name = f"{number:08d}"
        save_image(folder / "images" / f"{name}.png", pixels[view])
        k = room.intrinsics[view].double().numpy() - corner_k(np.zeros((3, 3)))
        write_cam_txt(folder / "cams" / f"{name}_cam.txt", poses[view], k)
        save_image(folder / "binary_masks" / f"{name}.png", np.full((48, 48), 255, np.uint8))
        (folder / "depths").mkdir(exist_ok=True)
        np.save(folder / "depths" / f"{name}.npy", MM * room.depth[view].numpy())
    return folder


def write_scan(root: Path, room: Scene, scan: int) -> Path:
    """The room as official ground truth: what its photos see, all of it above the table."""
    points = MM * room.point_map()[0].reshape(-1, 3).numpy()
    box = np.stack([points.min(axis=0), points.max(axis=0)])
    observed = np.ones(np.ceil((box[1] - box[0]) / 2).astype(int) + 1)
    return write_official(root, points, observed, [0, 0, 0, 1], scan=scan, box=box)


@pytest.fixture(scope="module")
def dtu(tmp_path_factory: pytest.TempPathFactory, rooms: list[Scene]) -> Path:
    """Scans of three photos, one of fifty for pi3, and the official ground truth."""
    folder = tmp_path_factory.mktemp("dtu")
    for scan, room in zip((24, 106), rooms, strict=True):
        write_room(folder / "few" / f"scan{scan}", room.take_views([0, 1, 2]), range(3))
        write_scan(folder / "official", room.take_views([0, 1, 2]), scan)
    write_room(folder / "many" / "scan24", rooms[0], NUMBERS)
    return folder


def run_evaluate(rows: Path, data: Path, protocol: str, *more: str) -> list[dict]:
    arguments = ["-o", rows, "--data", data, "--protocol", protocol, "--policies", "dense"]
    arguments += ["--batch-size", "1", *more]
    assert main(["evaluate", *map(str, arguments)]) == 0
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    return [{key: v for key, v in row.items() if key not in ("dirty", "machine")} for row in found]


@pytest.mark.parametrize("name", ["dtu-official", "dtu-paper"])
def test_evaluate_against_the_laser_scan(
    dtu: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    rows, truth = tmp_path / "rows.jsonl", ("--truth", str(dtu / "official"))
    (row,) = run_evaluate(rows, dtu / "few", name, *truth)
    shown = capsys.readouterr().err
    protocol = PROTOCOLS[name].with_truth(dtu / "official")
    assert f"protocol {protocol.describe()}" in shown
    assert row["protocol"] == protocol.as_dict()
    assert (row["unit"], row["n_scenes"], row["n_scenes_with_points"]) == ("mm", 2, 2)

    model = load_model("nano")
    expected: dict[str, list[float]] = {}
    for scene in open_dataset(dtu / "few", image_fit=model.image_rule):
        with torch.inference_mode():
            found = model(scene.images[None])
        points = found.world_points[0].reshape(-1, 3).double()
        centers = [p[:, :3, 3].double() for p in (found.world_from_cam[0], scene.world_from_cam)]
        scan = read_dtu_truth(dtu / "official", scan_number(scene.name))
        aligned = align_to_scan(points, *centers, scan, protocol.points).apply(points)
        metrics = distance_to_scan(aligned, scan, protocol.points)
        for metric in ("accuracy", "completeness", "chamfer_mean", "accuracy_median"):
            expected.setdefault(metric, []).append(getattr(metrics.cloud, metric))
        for metric in ("accuracy_share", "completeness_share"):
            expected.setdefault(metric, []).append(getattr(metrics, metric))
    for metric, values in expected.items():
        assert row[metric] == pytest.approx(np.mean(values), rel=1e-6)
    assert 0 < row["chamfer_mean"] < 20
    assert 0.3 < row["accuracy_share"] < 1
    (poses,) = run_evaluate(tmp_path / "poses.jsonl", dtu / "few", "any-views")
    assert [row[m] for m in ("auc_30", "ate_rmse")] == [poses[m] for m in ("auc_30", "ate_rmse")]

    # Cut off after the first scan, the second is measured again.
    sidecar = rows.with_suffix(".scenes.jsonl")
    whole = sidecar.read_bytes()
    scenes = [scene for line in whole.splitlines()[1:] for scene in json.loads(line)["scenes"]]
    assert [scene["scene"] for scene in scenes] == ["scan24", "scan106"]
    assert set(protocol.metrics) == scenes[0]["metrics"].keys()
    sidecar.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    assert run_evaluate(rows, dtu / "few", name, *truth) == [row]
    assert sidecar.read_bytes() == whole
    other = write_copy(dtu / "official", tmp_path / "other")
    arguments = ["-o", rows, "--data", dtu / "few", "--protocol", name, "--truth", other]
    arguments += ["--policies", "dense", "--batch-size", 1]
    assert main(["evaluate", *map(str, arguments)]) == 2
    assert "another configuration (different: protocol)" in unwrapped(capsys)


def test_evaluate_as_pi3_does(dtu: Path, tmp_path: Path, rooms: list[Scene]) -> None:
    rows = tmp_path / "rows.jsonl"
    (row,) = run_evaluate(rows, dtu / "many", "dtu-pi3")
    assert row["protocol"] == PROTOCOLS["dtu-pi3"].as_dict()
    assert (row["unit"], row["n_scenes"], row["n_scenes_with_points"]) == ("mm", 1, 1)
    # The ten photos are the views of the room.
    room = rooms[0]
    points, valid = room.point_map()
    images = (255 * room.images).round().byte().float() / 255
    with torch.inference_mode():
        found = load_model("nano")(images[None])
    truth = GroundTruthPoints(MM * points, valid, 1, normals=True)
    expected = pixel_metrics(found.world_points[0], truth)
    assert row["chamfer_mean"] == pytest.approx(expected.cloud.chamfer_mean, rel=1e-3)
    assert row["point_error"] == pytest.approx(expected.point_error, rel=1e-3)
    assert row["normal_consistency"] == pytest.approx(expected.normal_consistency, rel=1e-3)
    assert 0 < row["chamfer_mean"] < 20
    assert "accuracy_share" not in row
    assert run_evaluate(rows, dtu / "many", "dtu-pi3") == [row]


def write_copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def unwrapped(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return " ".join(shown.split())


def nothing(root: Path) -> None:
    pass


def call_scans_otherwise(root: Path) -> None:
    for folder in (root / "few", root / "many"):
        (folder / "scan24").rename(folder / "Family")


def remove_depth(root: Path) -> None:
    for name in ("depths", "binary_masks"):
        shutil.rmtree(root / "many" / "scan24" / name)


@pytest.mark.parametrize(
    ("damage", "arguments", "code", "message"),
    [
        (nothing, "few --protocol dtu-official", 2, "Points/stl/ and ObsMask/ of DTU as --truth"),
        (nothing, "few --protocol dtu-paper --truth {root}/few", 1, "found no Points/stl/"),
        (nothing, "few --protocol dtu-pi3 --truth {root}/official", 2, "leave --truth out"),
        (nothing, "few --protocol dtu-official --truth {root}/official --views 2", 2,
         "takes all photos of a sequence, found --views 2"),
        (nothing, "few --protocol dtu-pi3", 1, "'scan24' has 3"),
        (remove("official/Points/stl/stl106_total.ply"),
         "few --protocol dtu-official --truth {root}/official", 1,
         "stl106_total.ply: expected a PLY point cloud"),
        (remove("official/ObsMask/ObsMask24_10.mat"),
         "few --protocol dtu-official --truth {root}/official", 1, "SampleSet archive of DTU"),
        (remove("official/ObsMask/Plane24.mat"),
         "few --protocol dtu-paper --truth {root}/official", 1, "Plane24.mat: expected"),
        (call_scans_otherwise, "few --protocol dtu-official --truth {root}/official", 1,
         "scene 'Family': expected the number of a DTU scan in the name of its folder"),
        (call_scans_otherwise, "many --protocol dtu-pi3", 1,
         "scene 'Family': expected the number of a DTU scan"),
        (remove_depth, "many --protocol dtu-pi3", 1, "no pixel with known depth"),
    ],
)  # fmt: skip
def test_misused_evaluations_say_why(
    dtu: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage, arguments: str,
    code: int, message: str,
) -> None:  # fmt: skip
    root = write_copy(dtu, tmp_path / "dtu")
    damage(root)
    data, *more = arguments.format(root=root).split()
    command = ["evaluate", "-o", str(tmp_path / "rows.jsonl"), "--data", str(root / data), *more]
    assert main([*command, "--policies", "dense"]) == code
    assert message in unwrapped(capsys)
    assert not (tmp_path / "rows.jsonl").exists()
