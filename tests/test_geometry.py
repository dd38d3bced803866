"""Poses, quaternions, projection, similarities and nearest neighbours against scipy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from hess.errors import AlignmentError, ConfigError, LayoutError
from hess.geometry.nearest import NearestNeighbors
from hess.geometry.poses import (
    camera_centers,
    invert_pose,
    matrix_to_quaternion,
    nearest_rotation,
    pose_from,
    quaternion_to_matrix,
    rotation_angle_deg,
)
from hess.geometry.projection import intrinsics_from_points, project, unproject_depth
from hess.geometry.sim3 import Sim3, umeyama

seeds = st.integers(0, 2**31)


def random_rotations(seed: int, count: int) -> torch.Tensor:
    return torch.from_numpy(Rotation.random(count, random_state=seed).as_matrix())


def random_sim3(seed: int) -> Sim3:
    rng = np.random.default_rng(seed)
    return Sim3(
        scale=float(np.exp(rng.uniform(-2, 2))),
        rotation=random_rotations(seed, 1)[0],
        translation=torch.from_numpy(rng.normal(size=3) * 3),
    )


def cloud(seed: int, count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 3)))


# --- rotations -------------------------------------------------------------------------------


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_quaternions_agree_with_scipy(seed):
    rotation = Rotation.random(20, random_state=seed)
    expected = rotation.as_quat()
    expected *= np.where(expected[:, 3:] < 0, -1, 1)
    matrix = torch.from_numpy(rotation.as_matrix())
    torch.testing.assert_close(matrix_to_quaternion(matrix), torch.from_numpy(expected))
    quaternion = torch.from_numpy(rotation.as_quat() * 3.7)
    torch.testing.assert_close(quaternion_to_matrix(quaternion), matrix)


@pytest.mark.parametrize("axis", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, -1, 0), (1, 2, 3)])
@pytest.mark.parametrize("angle", [0.0, 1e-9, 0.3, math.pi - 1e-9, math.pi])
def test_quaternion_round_trip_and_gradient_at_the_hard_rotations(axis, angle):
    unit = np.array(axis) / np.linalg.norm(axis)
    matrix = torch.from_numpy(Rotation.from_rotvec(unit * angle).as_matrix()).requires_grad_()
    quaternion = matrix_to_quaternion(matrix)
    torch.testing.assert_close(
        quaternion_to_matrix(quaternion).detach(), matrix.detach(), atol=1e-12, rtol=0
    )
    (gradient,) = torch.autograd.grad(quaternion.sum(), matrix)
    assert torch.isfinite(gradient).all()


def test_quaternion_gradient_matches_finite_differences():
    matrix = random_rotations(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(matrix_to_quaternion, matrix)
    quaternion = torch.randn(4, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    assert torch.autograd.gradcheck(quaternion_to_matrix, quaternion.requires_grad_())


@pytest.mark.parametrize(
    "degrees", [0.0, 1e-7, 1e-3, 0.5, 45.0, 90.0, 179.0, 179.9999, 180 - 1e-7, 180.0]
)
def test_rotation_angle_is_precise_over_the_whole_range(degrees):
    axis = np.array([0.6, -0.64, 0.48])
    matrix = Rotation.from_rotvec(axis * math.radians(degrees)).as_matrix()
    found = rotation_angle_deg(torch.from_numpy(matrix)).item()
    assert found == pytest.approx(degrees, rel=1e-7, abs=1e-12)
    single = rotation_angle_deg(torch.from_numpy(matrix).float()).item()
    assert single == pytest.approx(degrees, rel=1e-5, abs=1e-5)


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_nearest_rotation_beats_every_other_rotation(seed):
    matrix = cloud(seed, 6).view(2, 3, 3)  # half of all such matrices are reflections
    found = nearest_rotation(matrix)
    torch.testing.assert_close(found @ found.mT, torch.eye(3).double().expand(2, 3, 3))
    assert (torch.linalg.det(found) > 0).all()
    others = random_rotations(seed, 200)
    nearby = found[:, None] @ torch.from_numpy(
        Rotation.from_rotvec(1e-2 * np.random.default_rng(seed).normal(size=(50, 3))).as_matrix()
    )
    best = (found - matrix).square().sum((-1, -2))[:, None]
    assert (best <= (others - matrix[:, None]).square().sum((-1, -2)) + 1e-12).all()
    assert (best <= (nearby - matrix[:, None]).square().sum((-1, -2)) + 1e-12).all()


def test_nearest_rotation_has_the_right_gradient_where_that_of_the_svd_is_undefined():
    matrix = cloud(4, 12).view(4, 3, 3)
    matrix[0] = torch.eye(3)
    matrix[1] = 2 * random_rotations(5, 1)[0]
    matrix[2] = torch.diag(torch.tensor([1.0, 2.0, -0.5]))  # a reflection
    assert torch.autograd.gradcheck(nearest_rotation, matrix.requires_grad_())


def test_invert_pose_is_the_matrix_inverse():
    pose = pose_from(random_rotations(1, 6).view(2, 3, 3, 3), cloud(2, 6).view(2, 3, 3))
    torch.testing.assert_close(invert_pose(pose), torch.linalg.inv(pose))
    origin = invert_pose(pose) @ torch.cat(
        (camera_centers(pose), torch.ones(2, 3, 1, dtype=torch.float64)), -1
    ).unsqueeze(-1)
    torch.testing.assert_close(origin[..., :3, 0], torch.zeros(2, 3, 3, dtype=torch.float64))


# --- projection ------------------------------------------------------------------------------


def test_unproject_puts_pixel_centres_on_their_rays():
    intrinsics = torch.tensor([[4.0, 0.0, 3.0], [0.0, 2.0, 1.0], [0.0, 0.0, 1.0]])
    points = unproject_depth(torch.full((2, 6), 8.0), intrinsics, torch.eye(4))
    # pixel (row 1, column 5) has its centre at (5.5, 1.5)
    expected = torch.tensor([(5.5 - 3.0) / 4.0 * 8.0, (1.5 - 1.0) / 2.0 * 8.0, 8.0])
    torch.testing.assert_close(points[1, 5], expected)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_project_undoes_unproject(seed):
    rng = np.random.default_rng(seed)
    intrinsics = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    intrinsics[:, [0, 1], [0, 1]] = torch.from_numpy(rng.uniform(20, 60, (2, 2)))
    intrinsics[:, :2, 2] = torch.from_numpy(rng.uniform(2, 8, (2, 2)))
    intrinsics[:, 0, 1] = float(rng.uniform(-2, 2))
    pose = pose_from(random_rotations(seed, 2), cloud(seed, 2))
    depth = torch.from_numpy(rng.uniform(0.5, 9, (2, 5, 7)))
    points = unproject_depth(depth, intrinsics, pose)
    pixels, found_depth = project(points.flatten(1, 2), intrinsics, invert_pose(pose))
    rows, columns = torch.meshgrid(torch.arange(5) + 0.5, torch.arange(7) + 0.5, indexing="ij")
    expected = torch.stack((columns, rows), -1).reshape(-1, 2).double().expand(2, -1, -1)
    torch.testing.assert_close(pixels, expected)
    torch.testing.assert_close(found_depth, depth.flatten(1))


def pinhole_points(seed: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two cameras with centred principal points: intrinsics and the points of their pixels."""
    rng = np.random.default_rng(seed)
    intrinsics = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    intrinsics[:, [0, 1], [0, 1]] = torch.from_numpy(rng.uniform(20, 60, (2, 2)))
    intrinsics[:, :2, 2] = torch.tensor([width / 2, height / 2], dtype=torch.float64)
    depth = torch.from_numpy(rng.uniform(0.5, 9, (2, height, width)))
    return intrinsics, unproject_depth(depth, intrinsics, torch.eye(4, dtype=torch.float64))


@given(seeds, st.integers(2, 9), st.integers(2, 9))
@settings(max_examples=25, deadline=None)
def test_intrinsics_of_pinhole_points_are_exact(seed, height, width):
    expected, points = pinhole_points(seed, height, width)
    weights = torch.from_numpy(np.random.default_rng(seed).uniform(0.1, 1, (2, height, width)))
    torch.testing.assert_close(intrinsics_from_points(points, weights), expected)


def test_focal_length_is_the_median_pixel_by_weight_and_distance_from_the_centre():
    rng = np.random.default_rng(1)
    _, points = pinhole_points(1, 6, 8)
    points = points[0] * torch.from_numpy(1 + 0.2 * rng.normal(size=(6, 8, 3)))
    weights = torch.from_numpy(rng.integers(1, 9, (6, 8))).double()
    found = intrinsics_from_points(points, weights)[0, 0].item()
    votes = []
    for row in range(6):
        for column in range(8):
            offset = column + 0.5 - 4
            x, _, z = points[row, column].tolist()
            # Offsets are odd multiples of 1/2, so that votes can be counted in whole numbers.
            votes += [offset * z / x] * int(weights[row, column].item() * 2 * abs(offset))
    assert min(votes) > 0
    assert found == pytest.approx(np.quantile(votes, 0.5, method="inverted_cdf"), rel=1e-12)


def test_intrinsics_ignore_outliers_and_what_no_camera_can_see():
    expected, points = pinhole_points(7, 20, 30)
    rng = np.random.default_rng(8)
    noisy = points * torch.from_numpy(1 + 0.01 * rng.normal(size=points.shape))
    wild = torch.from_numpy(rng.uniform(size=noisy.shape[:-1]) < 0.3)
    noisy[wild] = torch.from_numpy(rng.normal(size=(int(wild.sum()), 3)) * 5)
    noisy[:, 0, 0] = torch.nan
    noisy[:, 0, 1] = torch.inf
    noisy[:, 0, 2, 2] = 0.0
    found = intrinsics_from_points(noisy, torch.ones(2, 20, 30).double())
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    # Pixels on the wrong side of the axis speak for no camera, however many they are.
    mirrored = noisy.clone()
    mirrored[:, :, 3:] *= torch.tensor([-1.0, -1.0, 1.0])
    assert (intrinsics_from_points(mirrored, torch.ones(2, 20, 30).double()) >= 0).all()
    # Wild points without weight do nothing at all.
    spoiled = torch.where(wild[..., None], noisy, points)
    found = intrinsics_from_points(spoiled, (~wild).double())
    torch.testing.assert_close(found, expected)


def test_intrinsics_that_nothing_tells_are_nan():
    _, points = pinhole_points(9, 4, 4)
    found = intrinsics_from_points(-points, torch.ones(2, 4, 4))
    assert found[:, [0, 1], [0, 1]].isnan().all()
    assert (found[:, :2, 2] == 2).all()
    with pytest.raises(LayoutError, match=r"points \[\.\.\., H, W, 3\]"):
        intrinsics_from_points(points, torch.ones(2, 4))


def test_wrong_shapes_are_named():
    with pytest.raises(LayoutError, match=r"intrinsics must have shape \[\.\.\., 3, 3\]"):
        unproject_depth(torch.ones(2, 2), torch.eye(4), torch.eye(4))
    with pytest.raises(LayoutError, match="quaternion must have shape"):
        quaternion_to_matrix(torch.ones(3))


# --- similarities ----------------------------------------------------------------------------


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_sim3_inverse_and_composition(seed):
    first, second = random_sim3(seed), random_sim3(seed + 1)
    points = cloud(seed, 7)
    torch.testing.assert_close(first.inverse().apply(first.apply(points)), points)
    composed = second.compose(first)
    torch.testing.assert_close(composed.apply(points), second.apply(first.apply(points)))


def test_sim3_moves_poses_with_their_points():
    sim3 = random_sim3(5)
    pose = pose_from(random_rotations(6, 3), cloud(7, 3))
    moved = sim3.apply_to_poses(pose)
    in_cam = cloud(8, 3).unsqueeze(-1)
    world = (pose[:, :3, :3] @ in_cam).squeeze(-1) + camera_centers(pose)
    scaled = (moved[:, :3, :3] @ (sim3.scale * in_cam)).squeeze(-1) + camera_centers(moved)
    torch.testing.assert_close(scaled, sim3.apply(world))


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_umeyama_recovers_a_known_similarity(seed):
    sim3, source = random_sim3(seed), cloud(seed, 30)
    found = umeyama(source, sim3.apply(source))
    assert found.scale == pytest.approx(sim3.scale, rel=1e-9)
    torch.testing.assert_close(found.rotation, sim3.rotation, atol=1e-9, rtol=0)
    torch.testing.assert_close(found.translation, sim3.translation, atol=1e-8, rtol=1e-9)


def test_umeyama_never_reflects():
    source = cloud(1, 40)
    mirrored = source * torch.tensor([1.0, 1.0, -1.0])
    found = umeyama(source, mirrored)
    assert torch.linalg.det(found.rotation).item() == pytest.approx(1.0)
    # Best over all rotations: no random similarity with the same centroids does better.
    best = (found.apply(source) - mirrored).square().sum()
    for seed in range(50):
        other = Sim3(
            scale=found.scale, rotation=random_rotations(seed, 1)[0], translation=torch.zeros(3)
        )
        shift = mirrored.mean(0) - other.apply(source).mean(0)
        assert best <= (other.apply(source) + shift - mirrored).square().sum()


def test_umeyama_handles_planar_points_and_noise():
    source = cloud(2, 500)
    source[:, 2] = 0.0
    sim3 = random_sim3(3)
    noise = 0.01 * sim3.scale * cloud(4, 500)
    found = umeyama(source, sim3.apply(source) + noise)
    assert found.scale == pytest.approx(sim3.scale, rel=3e-3)
    assert rotation_angle_deg(found.rotation @ sim3.rotation.mT).item() < 0.2


def test_umeyama_weights_silence_outliers_and_count_repeats():
    source, sim3 = cloud(5, 20), random_sim3(6)
    target = sim3.apply(source)
    spoiled = target.clone()
    spoiled[:5] += 100.0
    weights = torch.ones(20)
    weights[:5] = 0.0
    assert umeyama(source, spoiled, weights).scale == pytest.approx(sim3.scale, rel=1e-9)
    noisy = target + cloud(7, 20)
    repeats = torch.tensor([1, 3] * 10)
    once = umeyama(source, noisy, repeats.double())
    index = torch.arange(20).repeat_interleave(repeats)
    repeated = umeyama(source[index], noisy[index])
    assert once.scale == pytest.approx(repeated.scale, rel=1e-9)
    torch.testing.assert_close(once.rotation, repeated.rotation)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.zeros(2, 3), "at least 3 point pairs, found 2"),
        (torch.ones(5, 3), "all in one place"),
        (torch.arange(5.0)[:, None] * torch.tensor([1.0, 2.0, -1.0]) + 7, "on one line"),
        (torch.full((5, 3), torch.nan), "finite"),
    ],
)
def test_umeyama_refuses_what_has_no_answer(points, message):
    fine = cloud(0, len(points)).float()
    with pytest.raises(AlignmentError, match=message):
        umeyama(points, fine)
    with pytest.raises(AlignmentError, match=message):
        umeyama(fine, points)


def test_sim3_refuses_what_is_no_similarity():
    eye, zero = torch.eye(3), torch.zeros(3)
    with pytest.raises(AlignmentError, match="scale"):
        Sim3(scale=-1.0, rotation=eye, translation=zero)
    with pytest.raises(AlignmentError, match="orthonormal"):
        Sim3(scale=1.0, rotation=-eye, translation=zero)


# --- nearest neighbours ----------------------------------------------------------------------


def test_exact_neighbours_agree_with_brute_force():
    points, queries = cloud(1, 300), cloud(2, 100)
    distance, index = NearestNeighbors(points).query(queries)
    brute = torch.cdist(queries, points)
    torch.testing.assert_close(distance, brute.min(1).values)
    assert torch.equal(index, brute.argmin(1))


def test_ivf_finds_almost_all_exact_neighbours_and_repeats_itself():
    points, queries = cloud(3, 20_000).float(), cloud(4, 2_000).float()
    exact_distance, exact_index = cKDTree(points.numpy()).query(queries.numpy())
    build = lambda: NearestNeighbors(points, "ivf", num_centroids=128, num_probes=16)  # noqa: E731
    distance, index = build().query(queries)
    hit = index.numpy() == exact_index
    assert hit.mean() > 0.98
    np.testing.assert_allclose(distance.numpy()[hit], exact_distance[hit], atol=1e-4)
    assert (distance.numpy() >= exact_distance - 1e-4).all()
    again_distance, again_index = build().query(queries)
    assert torch.equal(distance, again_distance)
    assert torch.equal(index, again_index)
    few = NearestNeighbors(points, "ivf", num_centroids=128, num_probes=1).query(queries)[1]
    assert (few.numpy() == exact_index).mean() < hit.mean()


def test_auto_chooses_by_size(monkeypatch):
    monkeypatch.setattr("hess.geometry.nearest.EXACT_MAX_POINTS", 500)
    assert NearestNeighbors(cloud(0, 500)).method == "exact"
    assert NearestNeighbors(cloud(0, 501), num_centroids=8, num_probes=2).method == "ivf"


def test_neighbours_refuse_bad_input():
    with pytest.raises(AlignmentError, match="at least one point"):
        NearestNeighbors(torch.zeros(0, 3))
    with pytest.raises(AlignmentError, match="finite"):
        NearestNeighbors(torch.tensor([[0.0, torch.inf, 0.0]]))
    with pytest.raises(LayoutError, match=r"\[M, 3\]"):
        NearestNeighbors(torch.zeros(4, 2))
    with pytest.raises(ConfigError, match="method"):
        NearestNeighbors(torch.zeros(4, 3), "annoy")
    with pytest.raises(ConfigError, match="5 centroids, 4 points"):
        NearestNeighbors(torch.zeros(4, 3), "ivf", num_centroids=5, num_probes=1)
    with pytest.raises(AlignmentError, match="query points must be finite"):
        NearestNeighbors(torch.zeros(4, 3)).query(torch.full((1, 3), torch.nan))
