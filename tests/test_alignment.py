"""Alignment of a prediction to the ground truth: Umeyama start, ICP refinement."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from hess.errors import AlignmentError, ConfigError
from hess.geometry.alignment import align_points, most_confident
from hess.geometry.poses import rotation_angle_deg
from hess.geometry.sim3 import Sim3, umeyama


def room(seed: int, count: int = 4000) -> torch.Tensor:
    """Points on the floor, two walls and a ball: surfaces with normals in all directions."""
    rng = np.random.default_rng(seed)
    u, v = rng.uniform(-1, 1, (2, count))
    kind = rng.integers(0, 4, count)
    ball = rng.normal(size=(count, 3))
    ball = 0.4 * ball / np.linalg.norm(ball, axis=1, keepdims=True)
    one = np.ones(count)
    surfaces = np.stack(
        [
            np.stack([u, v, -one], 1),
            np.stack([u, one, v], 1),
            np.stack([-one, u, v], 1),
            ball,
        ]
    )
    return torch.from_numpy(surfaces[kind, np.arange(count)])


def gt_from_pred() -> Sim3:
    return Sim3(
        scale=2.5,
        rotation=torch.from_numpy(Rotation.from_rotvec([0.4, -1.2, 0.7]).as_matrix()),
        translation=torch.tensor([1.0, -4.0, 9.0]),
    )


def difference(found: Sim3, expected: Sim3, points: torch.Tensor) -> float:
    return (found.apply(points) - expected.apply(points)).norm(dim=1).max().item()


def test_exact_pairs_give_the_exact_similarity():
    pred, truth = room(0), gt_from_pred()
    gt = truth.apply(pred)
    result = align_points(pred, gt, pred, gt)
    assert difference(result.world_from_pred, truth, pred) < 1e-6
    assert result.rmse_after <= result.rmse_before < 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_icp_repairs_a_start_that_outlier_pairs_have_bent(seed):
    rng = np.random.default_rng(seed)
    pred, truth = room(seed), gt_from_pred()
    gt = truth.apply(room(seed + 100))  # another sampling of the same surfaces
    # Good pairs fix the scale; a bias that turns and shifts them stands for outliers.
    bend = Sim3(
        scale=1.0,
        rotation=torch.from_numpy(Rotation.from_rotvec([0.02, -0.03, 0.025]).as_matrix()),
        translation=torch.tensor([0.03, -0.02, 0.02]),
    )
    noise = torch.from_numpy(rng.normal(size=pred.shape)) * 0.01
    gt_pairs = truth.apply(bend.apply(pred) + noise)
    start = align_points(pred, gt, pred, gt_pairs, icp=False)
    assert not start.icp_used
    assert start.rmse_after == start.rmse_before
    result = align_points(pred, gt, pred, gt_pairs)
    assert result.icp_used
    assert result.rmse_after < result.rmse_before == start.rmse_before
    turn = result.world_from_pred.rotation @ truth.rotation.mT
    assert rotation_angle_deg(turn).item() < 0.3
    assert difference(start.world_from_pred, truth, pred) > 0.15
    assert difference(result.world_from_pred, truth, pred) < 0.03


def test_icp_keeps_the_scale_of_umeyama():
    pred, truth = room(1), gt_from_pred()
    gt_pairs = truth.apply(pred) + torch.tensor([0.05, 0.05, 0.0])
    result = align_points(pred, truth.apply(room(2)), pred, gt_pairs)
    assert result.icp_used
    assert result.world_from_pred.scale == pytest.approx(umeyama(pred, gt_pairs).scale, rel=1e-9)


def test_umeyama_stays_when_icp_has_nothing_to_hold_on_to():
    pred, truth = room(3, count=200), gt_from_pred()
    pairs = truth.apply(pred)
    far = pairs + torch.tensor([1e3, 0.0, 0.0])  # the clouds do not touch
    result = align_points(pred, far, pred, pairs)
    assert not result.icp_used
    assert result.rmse_after == result.rmse_before
    assert difference(result.world_from_pred, umeyama(pred, pairs), pred) == 0.0


def test_a_handful_of_points_is_enough_for_umeyama():
    pred, truth = room(4, count=4), gt_from_pred()
    result = align_points(pred, truth.apply(pred), pred, truth.apply(pred))
    assert difference(result.world_from_pred, truth, pred) < 1e-6


def test_alignment_is_deterministic_and_takes_no_gradient():
    pred, truth = room(5).float().requires_grad_(), gt_from_pred()
    gt = truth.apply(room(6)).float()
    gt_pairs = truth.apply(pred.detach()) + 0.05
    first, second = (align_points(pred, gt, pred, gt_pairs) for _ in range(2))
    assert torch.equal(first.world_from_pred.rotation, second.world_from_pred.rotation)
    assert torch.equal(first.world_from_pred.translation, second.world_from_pred.translation)
    assert not first.world_from_pred.rotation.requires_grad


def test_large_clouds_are_thinned_for_icp(monkeypatch):
    monkeypatch.setattr("hess.geometry.alignment.ICP_MAX_POINTS", 1500)
    pred, truth = room(7), gt_from_pred()
    gt_pairs = truth.apply(pred) + torch.tensor([0.1, -0.1, 0.1])
    result = align_points(pred, truth.apply(room(8)), pred, gt_pairs)
    assert result.icp_used
    assert difference(result.world_from_pred, truth, pred) < 0.05


def test_most_confident_keeps_the_share_and_breaks_ties_by_position():
    confidence = torch.tensor([[1.0, 3.0, 2.0], [3.0, 3.0, 0.0]])
    assert most_confident(confidence, 1.0).all()
    assert most_confident(confidence, 0.3).tolist() == [[False, True, False], [True, False, False]]
    assert most_confident(confidence, 0.5).sum() == 3
    assert most_confident(confidence, 0.5)[1, 1]
    assert most_confident(torch.ones(5000), 0.7).tolist() == [True] * 3500 + [False] * 1500
    with pytest.raises(ConfigError, match="0, 1"):
        most_confident(confidence, 0.0)


def test_bad_input_is_refused():
    pred = room(9, count=50)
    with pytest.raises(AlignmentError, match="at least 3"):
        align_points(pred, pred, pred[:2], pred[:2])
    with pytest.raises(ConfigError, match="max_correspondence"):
        align_points(pred, pred, pred, pred, max_correspondence=0.0)
