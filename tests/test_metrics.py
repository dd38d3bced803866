"""Pose and point metrics against golden values, brute force and independent libraries."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from evo.core.metrics import APE, PoseRelation, StatisticsType
from evo.core.trajectory import PosePath3D
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from hess.errors import AlignmentError, ConfigError, LayoutError
from hess.evaluation.means import (
    macro_mean_and_error,
    mean_and_error,
    weighted_mean_and_error,
)
from hess.evaluation.point_metrics import (
    GroundTruthPoints,
    cloud_distance,
    normal_consistency,
    point_metrics,
)
from hess.evaluation.pose_metrics import auc, pair_errors, trajectory_error
from hess.geometry.normals import point_map_normals
from hess.geometry.projection import unproject_depth

GOLDEN = Path(__file__).parent / "golden" / "pose_metrics.safetensors"


def random_poses(num: int, seed: int) -> torch.Tensor:
    poses = np.tile(np.eye(4), (num, 1, 1))
    poses[:, :3, :3] = Rotation.random(num, random_state=seed).as_matrix()
    poses[:, :3, 3] = np.random.default_rng(seed).normal(size=(num, 3))
    return torch.from_numpy(poses)


def moved(poses: torch.Tensor, scale: float, seed: int) -> torch.Tensor:
    """The same cameras in another world frame of another scale."""
    rotation = torch.from_numpy(Rotation.random(random_state=seed).as_matrix())
    result = poses.clone()
    result[:, :3, :3] = rotation @ poses[:, :3, :3]
    result[:, :3, 3] = scale * poses[:, :3, 3] @ rotation.T + torch.tensor([3.0, -1.0, 2.0])
    return result


@pytest.mark.parametrize("order", ["vggt", "pi3"])
@pytest.mark.parametrize("sequence", range(4))
def test_golden_pair_errors_and_auc(order: str, sequence: int) -> None:
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()["config"])
        pred, gt = (
            torch.linalg.inv(file.get_tensor(f"{sequence}.{name}_cam_from_world"))
            for name in ("pred", "gt")
        )
        expected = [
            file.get_tensor(f"{sequence}.{order}.{name}_deg")
            for name in ("rotation", "translation")
        ]
    rotation, translation = pair_errors(pred, gt, order)
    torch.testing.assert_close(rotation, expected[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(translation, expected[1], rtol=0, atol=1e-9)
    for threshold in (3, 5, 15, 30):
        found = float(auc(torch.maximum(rotation, translation), threshold))
        assert found == pytest.approx(config[f"{sequence}.{order}.auc_{threshold}"], abs=1e-12)


@pytest.mark.parametrize("order", ["vggt", "pi3"])
def test_pair_errors_against_a_loop_over_pairs(order: str) -> None:
    pred, gt = random_poses(5, 1), random_poses(5, 2)
    rotation, translation = pair_errors(pred, gt, order)
    expected_rotation, expected_translation = [], []
    for i in range(5):
        for j in range(i + 1, 5):
            a, b = (i, j) if order == "vggt" else (j, i)
            p, g = (np.linalg.inv(x[a].numpy()) @ x[b].numpy() for x in (pred, gt))
            turn = Rotation.from_matrix(g[:3, :3].T @ p[:3, :3])
            expected_rotation.append(math.degrees(turn.magnitude()))
            cosine = p[:3, 3] @ g[:3, 3] / np.linalg.norm(p[:3, 3]) / np.linalg.norm(g[:3, 3])
            expected_translation.append(math.degrees(math.acos(abs(cosine))))
    np.testing.assert_allclose(rotation, expected_rotation, atol=1e-6)
    np.testing.assert_allclose(translation, expected_translation, atol=1e-6)


def test_pair_errors_are_batched_and_ignore_frame_and_scale() -> None:
    gt = random_poses(6, 3)
    batch = torch.stack([gt, moved(gt, 2.5, 4), random_poses(6, 5)])
    rotation, translation = pair_errors(batch, gt.expand(3, 6, 4, 4))
    assert rotation.shape == translation.shape == (3, 15)
    assert rotation[:2].max() < 1e-6
    assert translation[:2].max() < 1e-6
    alone = pair_errors(batch[2], gt)
    torch.testing.assert_close(rotation[2], alone[0])
    torch.testing.assert_close(translation[2], alone[1])


def test_translation_direction_has_no_sign_and_zero_counts_as_90() -> None:
    gt = torch.eye(4).repeat(2, 1, 1)
    gt[1, 0, 3] = 1.0
    pred = gt.clone()
    pred[1, 0, 3] = -4.0
    assert pair_errors(pred, gt)[1].item() == 0
    pred[1, 0, 3] = 0.0
    assert pair_errors(pred, gt)[1].item() == 90


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 40).map(float), st.floats(0, 180)), min_size=1, max_size=30),
    st.sampled_from([1, 3, 5, 15, 30]),
)
def test_auc_is_the_mean_of_the_cumulative_histogram(errors: list[float], limit: int) -> None:
    histogram, _ = np.histogram(errors, bins=np.arange(limit + 1))
    expected = np.mean(np.cumsum(histogram / len(errors)))
    assert float(auc(torch.tensor(errors, dtype=torch.float64), limit)) == pytest.approx(expected)


def test_auc_refuses_what_is_no_error() -> None:
    with pytest.raises(LayoutError, match="NaN"):
        auc(torch.tensor([1.0, float("nan")]), 30)
    with pytest.raises(LayoutError, match="at least one"):
        auc(torch.zeros(0), 30)
    with pytest.raises(ConfigError):
        auc(torch.zeros(3), 0)
    with pytest.raises(LayoutError):
        pair_errors(torch.eye(4)[None], torch.eye(4)[None])
    with pytest.raises(ConfigError, match="pair order"):
        pair_errors(random_poses(3, 0), random_poses(3, 1), "other")


def test_trajectory_error_agrees_with_evo() -> None:
    gt = random_poses(9, 6)
    pred = moved(gt, 0.3, 7)
    pred[:, :3, 3] += 0.05 * torch.from_numpy(np.random.default_rng(8).normal(size=(9, 3)))
    reference, estimate = (PosePath3D(poses_se3=list(x.numpy())) for x in (gt, pred))
    estimate.align(reference, correct_scale=True)
    ape = APE(PoseRelation.translation_part)
    ape.process_data((reference, estimate))
    found = trajectory_error(pred, gt)
    assert found.rmse == pytest.approx(ape.get_statistic(StatisticsType.rmse), rel=1e-9)
    assert found.relative == pytest.approx(found.rmse / reference.path_length, rel=1e-9)


def test_trajectory_error_is_undefined_without_motion() -> None:
    still = random_poses(4, 9)
    still[:, :3, 3] = 1.0
    with pytest.raises(AlignmentError, match="never move"):
        trajectory_error(random_poses(4, 10), still)
    with pytest.raises(AlignmentError):
        trajectory_error(still, random_poses(4, 10))


def test_cloud_distance_on_known_clouds() -> None:
    gt = torch.tensor([[0.0, 0, 0], [10, 0, 0], [20, 0, 0], [30, 0, 0]])
    pred = torch.tensor([[0.0, 1, 0], [10, 3, 0]])
    found = cloud_distance(pred, gt)
    assert found.accuracy == pytest.approx(2.0)
    assert found.accuracy_median == pytest.approx(2.0)
    far = [1.0, 3.0, math.hypot(10, 3), math.hypot(20, 3)]
    assert found.completeness == pytest.approx(sum(far) / 4)
    assert found.completeness_median == pytest.approx((3 + math.hypot(10, 3)) / 2)
    assert found.chamfer_mean == pytest.approx((found.accuracy + found.completeness) / 2)


def test_cloud_distance_agrees_with_scipy_and_refuses_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    pred, gt = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (70, 90))
    found = cloud_distance(pred, gt)
    assert found.accuracy == pytest.approx(cKDTree(gt).query(pred)[0].mean())
    assert found.completeness == pytest.approx(cKDTree(pred).query(gt)[0].mean())
    with pytest.raises(AlignmentError, match="empty"):
        cloud_distance(pred[:0], gt)


@pytest.mark.parametrize("alignment", ["umeyama", "umeyama+icp"])
def test_point_metrics_align_scale_and_frame_away(alignment: str) -> None:
    generator = torch.Generator().manual_seed(1)
    points = torch.rand(2, 12, 10, 3, generator=generator, dtype=torch.float64)
    rotation = torch.from_numpy(Rotation.random(random_state=2).as_matrix())
    pred = 0.2 * points @ rotation.T + 5.0
    found = point_metrics(pred, GroundTruthPoints(points, torch.ones(2, 12, 10) > 0, 1), alignment)
    assert found.point_error < 1e-9
    assert found.cloud.chamfer_mean < 1e-9
    assert found.world_from_pred.scale == pytest.approx(5.0)


def test_point_error_pairs_pixels_and_skips_unknown_and_strided_ones() -> None:
    generator = torch.Generator().manual_seed(3)
    points = torch.rand(2, 8, 8, 3, generator=generator, dtype=torch.float64)
    valid = torch.ones(2, 8, 8, dtype=torch.bool)
    valid[0, 4, 4] = False
    pred = points.clone()
    pred[:, 1::2] = 1e6  # rows that the stride skips
    pred[0, 4, 4] = float("nan")  # a pixel whose truth is unknown
    truth = GroundTruthPoints(points, valid, 2)
    assert len(truth.points) == 31
    assert point_metrics(pred, truth).point_error < 1e-12
    # Swapping two points leaves the cloud, and so the chamfer distance to it, almost as it was.
    swapped = points.clone()
    swapped[1, 0, 0], swapped[1, 6, 6] = points[1, 6, 6], points[1, 0, 0]
    found = point_metrics(swapped, truth)
    assert found.point_error > found.cloud.chamfer_mean


def test_point_metrics_refuse_degenerate_predictions() -> None:
    points = torch.rand(1, 4, 4, 3, generator=torch.Generator().manual_seed(4))
    truth = GroundTruthPoints(points, torch.ones(1, 4, 4) > 0, 1)
    with pytest.raises(AlignmentError):
        point_metrics(torch.zeros(1, 4, 4, 3), truth)
    with pytest.raises(AlignmentError, match="finite"):
        point_metrics(points / 0, truth)
    with pytest.raises(LayoutError, match="shape"):
        point_metrics(points[:, :3], truth)
    with pytest.raises(ConfigError, match="alignment"):
        point_metrics(points, truth, "guess")


def test_constructed_cloud_has_its_accuracy_and_completeness() -> None:
    """A 20 x 20 grid of which the prediction has the left half, raised by 0.3."""
    columns, rows = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
    gt = torch.stack([columns, rows, torch.zeros(20, 20)], dim=-1).double()
    pred = gt[:10] + torch.tensor([0.0, 0.0, 0.3])
    found = cloud_distance(pred.reshape(-1, 3), gt.reshape(-1, 3))
    assert found.accuracy == pytest.approx(0.3)
    missing = [math.hypot(column, 0.3) for column in range(1, 11)]
    assert found.completeness == pytest.approx((10 * 0.3 + sum(missing)) / 20)
    assert found.completeness_median == pytest.approx((0.3 + missing[0]) / 2)


def test_normals_of_a_plane_and_a_ball() -> None:
    height, width = 40, 50
    intrinsics = torch.tensor([[60.0, 0, 25], [0, 60, 20], [0, 0, 1]]).double()
    rays = unproject_depth(torch.ones(height, width).double(), intrinsics, torch.eye(4).double())
    normal = torch.tensor([0.3, -0.2, 0.9]).double()
    normal /= normal.norm()
    plane = rays * (2 / (rays @ normal))[..., None]
    valid = torch.ones(height, width, dtype=torch.bool)
    valid[10, 20] = False
    normals, known = point_map_normals(plane, valid)
    torch.testing.assert_close(normals[known], normal.expand(int(known.sum()), 3))
    # All but the border, the unknown pixel and its four neighbours; 0 where there is none.
    assert known.sum() == (height - 2) * (width - 2) - 5
    assert not known[10, 19:22].any()
    assert not known[9:12, 20].any()
    assert normals[~known].abs().max() == 0
    # A ball of radius 1 at distance 3: its normals point away from the camera, to its centre.
    center = torch.tensor([0.0, 0, 3]).double()
    along, length = rays @ center, (rays * rays).sum(-1)
    discriminant = along.square() - length * 8
    hit = discriminant > 0.5
    depth = (along - discriminant.clamp(min=0).sqrt()) / length
    ball = rays * depth[..., None]
    normals, known = point_map_normals(ball, hit)
    cosine = (normals * (center - ball)).sum(-1)[known]
    assert known.sum() > 100
    assert cosine.min() > 0.99
    # Points on a line have no normal.
    assert not point_map_normals(torch.zeros(4, 4, 3), torch.ones(4, 4) > 0)[1].any()
    with pytest.raises(LayoutError):
        point_map_normals(plane, valid[1:])


def test_normal_consistency_of_tilted_surfaces() -> None:
    generator = torch.Generator().manual_seed(5)
    points = torch.rand(50, 3, generator=generator).double()
    up = torch.tensor([0.0, 0, 1]).double().expand(50, 3)
    angle = math.radians(30)
    tilted = torch.tensor([math.sin(angle), 0, -math.cos(angle)]).double().expand(50, 3)
    assert normal_consistency(points, 4 * tilted, points, up) == pytest.approx(math.cos(angle))
    assert normal_consistency(points, -up, points, up) == pytest.approx(1)
    assert normal_consistency(points, up, points[:0], up[:0]) is None
    with pytest.raises(AlignmentError, match="no normals"):
        normal_consistency(points[:0], up[:0], points, up)
    with pytest.raises(LayoutError, match="one shape"):
        normal_consistency(points, up[1:], points, up)


def test_normal_consistency_agrees_with_a_loop() -> None:
    rng = np.random.default_rng(6)
    pred, pred_normals = rng.normal(size=(2, 40, 3))
    gt, gt_normals = rng.normal(size=(2, 60, 3))
    pred_normals, gt_normals = (
        normals / np.linalg.norm(normals, axis=1, keepdims=True)
        for normals in (pred_normals, gt_normals)
    )
    to_gt = [
        abs(pred_normals[i] @ gt_normals[((gt - pred[i]) ** 2).sum(1).argmin()]) for i in range(40)
    ]
    to_pred = [
        abs(gt_normals[i] @ pred_normals[((pred - gt[i]) ** 2).sum(1).argmin()]) for i in range(60)
    ]
    found = normal_consistency(*map(torch.from_numpy, (pred, pred_normals, gt, gt_normals)))
    assert found == pytest.approx((np.mean(to_gt) + np.mean(to_pred)) / 2)


def wavy_surface(height: int, width: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = columns / 5, rows / 5
    return torch.stack([x, y, torch.sin(x) + torch.cos(2 * y)], dim=-1).double()[None]


@pytest.mark.parametrize("stride", [1, 2])
def test_normals_of_a_moved_prediction_agree_before_the_stride(stride: int) -> None:
    points = wavy_surface(20, 24)
    valid = torch.ones(1, 20, 24, dtype=torch.bool)
    valid[0, 5:8, 5:8] = False
    rotation = torch.from_numpy(Rotation.random(random_state=7).as_matrix())
    pred = 0.1 * points @ rotation.T - 2.0
    pred[~valid] = float("nan")
    truth = GroundTruthPoints(points, valid, stride, normals=True)
    assert point_metrics(pred, truth, normals=True).normal_consistency == pytest.approx(1)
    assert point_metrics(pred, truth).normal_consistency is None
    # Rows that the stride skips still bend the normals of those it keeps.
    bent = points.clone()
    bent[:, 1::4, :, 2] += 1.0
    found = truth.normal_consistency(bent, point_metrics(points, truth).world_from_pred)
    assert found is not None
    assert found < 0.95
    # Without two neighbours in a row there are points, but no normals.
    alone = torch.zeros(1, 20, 24, dtype=torch.bool)
    alone[:, ::4, ::4] = True
    truth = GroundTruthPoints(points, alone, 1, normals=True)
    assert point_metrics(pred.nan_to_num(), truth, normals=True).normal_consistency is None
    with pytest.raises(ConfigError, match="normals=True"):
        point_metrics(points, GroundTruthPoints(points, valid, 1), normals=True)


def golden_errors(order: str, num_views: int, sequence: int) -> np.ndarray:
    """Larger error of every pair of the first views of a golden sequence, in degrees."""
    with safe_open(GOLDEN, "pt") as file:
        pred, gt = (
            torch.linalg.inv(file.get_tensor(f"{sequence}.{name}_cam_from_world"))[:num_views]
            for name in ("pred", "gt")
        )
    return np.maximum(*(errors.numpy() for errors in pair_errors(pred, gt, order)))


def histogram_auc(errors: np.ndarray, threshold: int) -> float:
    histogram, _ = np.histogram(errors, bins=np.arange(threshold + 1))
    return float(np.mean(np.cumsum(histogram / len(errors))))


@pytest.mark.parametrize("threshold", [3, 5, 15, 30])
def test_weighted_auc_is_that_of_the_pooled_pairs(threshold: int) -> None:
    scenes = [golden_errors("pi3", views, i) for i, views in enumerate((3, 10, 6, 9))]
    # Errors on the very edges of the bins too.
    scenes.append(np.array([0.0, 3.0, 5.0, 15.0, 30.0, 31.0]))
    aucs = [float(auc(torch.from_numpy(errors), threshold)) for errors in scenes]
    pairs = [len(errors) for errors in scenes]
    pooled, _ = weighted_mean_and_error(aucs, pairs)
    assert pooled == pytest.approx(histogram_auc(np.concatenate(scenes), threshold), abs=1e-12)
    assert pooled != pytest.approx(np.mean(aucs), abs=1e-4)
    # VGGT: pairs pooled per category, categories alike.
    macro, _ = macro_mean_and_error(aucs, pairs, ["a", "b", "a", "a", "b"])
    categories = [np.concatenate([scenes[i] for i in index]) for index in ((0, 2, 3), (1, 4))]
    expected = np.mean([histogram_auc(errors, threshold) for errors in categories])
    assert macro == pytest.approx(expected, abs=1e-12)


def test_standard_errors_of_means() -> None:
    rng = np.random.default_rng(9)
    values = rng.normal(size=12)
    mean, error = weighted_mean_and_error(values, [7.0] * 12)
    assert (mean, error) == pytest.approx(mean_and_error(values))
    assert error == pytest.approx(values.std(ddof=1) / math.sqrt(12))
    # Two categories of equal size: independent means, each with its own error.
    _, error = macro_mean_and_error(values, [1.0] * 12, [0, 1] * 6)
    parts = [values[i::2].std(ddof=1) / math.sqrt(6) for i in range(2)]
    assert error == pytest.approx(math.hypot(*parts) / 2)
    # The spread of the weighted mean over many draws of scenes is what its error says.
    draws = rng.normal(size=(4000, 30)) + rng.integers(1, 5, size=(4000, 30)) / 4
    weights = rng.integers(1, 5, size=(4000, 30)).astype(float)
    found = [weighted_mean_and_error(*draw) for draw in zip(draws, weights, strict=True)]
    spread = np.std([mean for mean, _ in found])
    assert np.mean([error for _, error in found]) == pytest.approx(spread, rel=0.05)
    assert weighted_mean_and_error([3.0], [2.0]) == (3.0, None)
    assert macro_mean_and_error([3.0, 5.0, 7.0], [1.0, 1, 1], "aab") == (5.5, None)
    with pytest.raises(AlignmentError, match="no value"):
        weighted_mean_and_error([], [])
    with pytest.raises(AlignmentError, match="no value"):
        macro_mean_and_error([], [], [])
