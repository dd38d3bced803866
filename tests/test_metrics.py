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
from hess.evaluation.point_metrics import GroundTruthPoints, cloud_distance, point_metrics
from hess.evaluation.pose_metrics import auc, pair_errors, trajectory_error
from hess.evaluation.protocol import PROCEDURAL_8, Protocol

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


@pytest.mark.parametrize(
    "wrong",
    [
        {"pair_order": "other"},
        {"auc_thresholds": ()},
        {"auc_thresholds": (30, 3)},
        {"auc_thresholds": (0, 3)},
        {"point_alignment": "none"},
        {"point_stride": 0},
        {"unit": "feet"},
        {"views": 2},
    ],
)
def test_protocol_refuses_nonsense(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        Protocol(name="wrong", **wrong)


def test_default_protocol_is_data() -> None:
    data = PROCEDURAL_8.as_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["name"] == "procedural-8"
    assert data["views"] == 8
    assert {"auc_30", "ate_rmse", "chamfer_mean", "point_error"} <= {*PROCEDURAL_8.metrics}
