"""Drift between predictions, and the guard that keeps it within a limit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hess.guard
from hess.errors import AlignmentError, AlreadySparsifiedError, ConfigError
from hess.geometry.drift import drift
from hess.geometry.poses import pose_from
from hess.geometry.sim3 import Sim3
from hess.guard import RATIOS, choose_sparsity, drift_of
from hess.models.loading import load_model
from hess.policies import HessPlus, Uniform
from hess.sensitivity.profile import load_profile
from hess.sparsification import sparsify

VIEWS, PIXELS = 5, 40


def rotation(axis: Tensor, angle: float) -> Tensor:
    x, y, z = (axis.double() / axis.double().norm() * angle).tolist()
    skew = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    return torch.linalg.matrix_exp(skew)


def prediction(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Poses and points of a scene."""
    generator = torch.Generator().manual_seed(seed)
    axes, centers = torch.randn(2, VIEWS, 3, generator=generator).double()
    poses = pose_from(torch.stack([rotation(a, 0.5) for a in axes]), 2 * centers)
    return poses, torch.randn(VIEWS, PIXELS, 3, generator=generator).double() * 3 + 7


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(-3, 3))
def test_a_similarity_of_the_whole_scene_is_no_drift(seed, scale, angle) -> None:
    poses, points = prediction(seed)
    moved = Sim3(
        scale=scale,
        rotation=rotation(torch.tensor([1.0, 2, 3]), angle),
        translation=torch.tensor([5.0, -1, 2]),
    )
    found = drift(poses, points, moved.apply_to_poses(poses), moved.apply(points))
    assert found.largest < 1e-9


def test_drift_is_a_share_of_the_size_of_the_scene() -> None:
    """Cameras that move and turn by known amounts while the points stay."""
    poses, points = prediction()
    size = (points - points.flatten(0, 1).mean(0)).flatten(0, 1).norm(dim=-1).mean()
    moved = poses.clone()
    moved[:, :3, 3] += torch.tensor([0.3, 0.0, 0.4]) * size
    turn = rotation(torch.tensor([1.0, 1, 0]), 0.02)
    moved[:, :3, :3] = moved[:, :3, :3] @ turn
    found = drift(poses, points, moved, points)
    assert found.points == pytest.approx(0, abs=1e-12)
    assert found.positions == pytest.approx(0.5)
    assert found.rotations == pytest.approx(0.02)
    assert found.largest == found.positions
    assert found.as_dict()["largest"] == found.largest
    bigger = drift(poses, 10 * points, moved, 10 * points)
    assert bigger.positions == pytest.approx(0.05)
    assert bigger.rotations == pytest.approx(0.02)


@pytest.mark.parametrize("angle", [1e-7, 1e-3, 3.0, math.pi])
def test_angles_are_right_from_tiny_to_a_half_turn(angle) -> None:
    poses, points = prediction()
    moved = poses.clone()
    moved[:, :3, :3] = moved[:, :3, :3] @ rotation(torch.tensor([0.0, 1, 0]), angle)
    assert drift(poses, points, moved, points).rotations == pytest.approx(angle, rel=1e-6)


def test_predictions_that_cannot_be_compared() -> None:
    poses, points = prediction()
    with pytest.raises(AlignmentError, match="same photos"):
        drift(poses, points, poses[:-1], points)
    broken = points.clone()
    broken[0, 0, 0] = torch.nan
    with pytest.raises(AlignmentError, match="NaN"):
        drift(poses, points, poses, broken)
    with pytest.raises(AlignmentError):
        drift(poses, points, poses, torch.zeros_like(points))


# --- the guard -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return load_model("nano")


@pytest.fixture(scope="module")
def images() -> Tensor:
    from hess.datasets.procedural import Procedural

    return Procedural(num_scenes=1, num_views=6, split="calibration")[0].images


def policy_at(ratio: float) -> HessPlus:
    return HessPlus(load_profile("nano-label-free"), sparse_ratio=ratio)


def exhaustive(model, images: Tensor, limit: float) -> float | None:
    """The largest ratio below the first one that drifts too far."""
    with torch.inference_mode():
        dense = model(images[None])
    best = None
    for ratio in RATIOS:
        with sparsify(model, policy_at(ratio)), torch.inference_mode():
            sparse = model(images[None])
        if drift_of(dense, sparse).largest > limit:
            break
        best = ratio
    return best


@pytest.mark.parametrize("limit", [1e-6, 0.03, 0.08, 0.9])
def test_the_choice_is_the_sparsest_within_the_limit(model, images, limit) -> None:
    """All photos are in the probe, so the limit itself counts."""
    choice = choose_sparsity(model, images, policy_at, limit)
    assert choice.sparse_ratio == exhaustive(model, images, limit)
    assert choice.num_views == len(images)
    assert len(choice.probes) <= math.ceil(math.log2(len(RATIOS) + 1))
    ratios = [probe.sparse_ratio for probe in choice.probes]
    assert ratios == sorted(ratios)
    if choice.chosen is not None:
        assert choice.chosen.size <= limit
        assert choice.chosen.block_sparsity > 0
    assert all(probe.seconds > 0 for probe in choice.probes)


def test_some_photos_leave_a_margin(model, images, monkeypatch) -> None:
    limits = []
    monkeypatch.setattr(
        hess.guard, "spread_evenly", lambda n, most: limits.append((n, most)) or list(range(most))
    )
    loose = choose_sparsity(model, images, policy_at, 0.05, probe_views=3, margin=1.0)
    tight = choose_sparsity(model, images, policy_at, 0.05, probe_views=3, margin=0.2)
    assert limits == [(6, 3), (6, 3)]
    assert loose.num_views == 3
    assert (tight.sparse_ratio or 0) < (loose.sparse_ratio or 0)
    assert tight.chosen is None or tight.chosen.size <= 0.01


def test_a_sparse_prediction_that_collapses_counts_as_too_far(model, images, monkeypatch) -> None:
    calls = []

    def collapse(dense, sparse):
        calls.append(sparse)
        if len(calls) > 1:
            raise AlignmentError("the points lie on a line")

    monkeypatch.setattr(hess.guard, "drift_of", collapse)
    choice = choose_sparsity(model, images, policy_at, 0.5)
    assert choice.sparse_ratio is None
    assert choice.chosen is None
    assert {probe.drift for probe in choice.probes} == {None}
    assert choice.probes[0].size == math.inf


def test_the_model_is_left_as_it_was(model, images) -> None:
    with torch.inference_mode():
        before = model(images[None]).world_points
        choose_sparsity(model, images, policy_at, 0.05)
        assert torch.equal(model(images[None]).world_points, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drift": 0.0}, "limit of drift"),
        ({"max_drift": 1.0}, "limit of drift"),
        ({"probe_views": 1}, "at least 2 views"),
        ({"margin": 0.0}, "margin"),
        ({"ratios": (0.5, 0.3)}, "ascend"),
        ({"ratios": ()}, "ascend"),
    ],
)
def test_bad_parameters(model, images, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_sparsity(model, images, policy_at, **{"max_drift": 0.1} | options)


def test_a_sparse_model_and_a_broken_one_are_refused(model, images) -> None:
    with sparsify(model, Uniform(sparse_ratio=0.5)), pytest.raises(AlreadySparsifiedError):
        choose_sparsity(model, images, policy_at, 0.1)
    with pytest.raises(AlignmentError):
        choose_sparsity(model, torch.full_like(images, torch.nan), policy_at, 0.1)
