"""Training of nano: losses by hand, the optimiser against an SVD, resuming bit for bit."""

import math
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hess.datasets.procedural import Procedural, ProceduralConfig, SceneBatch
from hess.errors import CheckpointError, ConfigError
from hess.geometry.poses import invert_pose
from hess.models.camera_head import decode_cameras
from hess.models.vggt import VGGT
from hess.training.losses import camera_loss, confident_loss, make_targets
from hess.training.matching import MatchingLoss
from hess.training.muon import Muon, orthogonalise
from hess.training.nano import NANO
from hess.training.pool import ScenePool
from hess.training.trainer import Trainer, TrainingConfig, read_log, validate

SMALL = ProceduralConfig(image_size=8)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Targets and losses


@pytest.fixture(scope="module")
def batch() -> SceneBatch:
    return Procedural(2, 4, config=SMALL).render([0, 1])


def test_targets_are_the_scene_seen_from_the_first_camera_at_unit_scale(batch: SceneBatch) -> None:
    targets = make_targets(batch)
    for i, scene in enumerate(Procedural(2, 4, config=SMALL)):
        world = scene.point_map()[0].double()
        cam0_from_world = invert_pose(scene.world_from_cam[0].double())
        seen = world @ cam0_from_world[:3, :3].T + cam0_from_world[:3, 3]
        scale = seen.norm(dim=-1).mean()
        torch.testing.assert_close(targets.points[i].double(), seen / scale, atol=1e-5, rtol=0)
        torch.testing.assert_close(targets.depth[i], scene.depth / scale.float())
    torch.testing.assert_close(targets.points.norm(dim=-1).mean(dim=(1, 2, 3)), torch.ones(2))


def test_target_encodings_decode_to_the_cameras(batch: SceneBatch) -> None:
    targets = make_targets(batch)
    cam_from_cam0, intrinsics = decode_cameras(targets.encoding, 8, 8)
    torch.testing.assert_close(intrinsics, batch.intrinsics)
    identity = torch.eye(4).expand(2, 4, 4)
    torch.testing.assert_close(cam_from_cam0[:, 0], identity, atol=1e-6, rtol=0)
    # Each camera sees its own depth map where the target points are.
    for view in range(4):
        pose = cam_from_cam0[:, view, None, None]
        points = targets.points[:, view, ..., None]
        in_cam = (pose[..., :3, :3] @ points).squeeze(-1) + pose[..., :3, 3]
        torch.testing.assert_close(in_cam[..., 2], targets.depth[:, view], atol=1e-5, rtol=0)


def test_camera_loss_is_zero_at_the_truth_whatever_the_quaternions_sign(
    batch: SceneBatch,
) -> None:
    target = make_targets(batch).encoding
    flipped = target.clone()
    flipped[..., 3:7] *= -1
    assert camera_loss([target, flipped], target) == 0
    assert camera_loss([target + 0.1], target) > 0


def test_camera_loss_by_hand() -> None:
    target = torch.tensor([[[0.0, 0, 0, 0, 0, 0, 1, 1, 1]]])
    moved, wider = target.clone(), target.clone()
    moved[..., 0] = 1.0  # Huber with beta 0.05: 1 - 0.025, one of three numbers
    wider[..., 7] = 2.0  # the same, one of two numbers at half weight
    assert camera_loss([moved], target).item() == pytest.approx(0.975 / 3)
    assert camera_loss([wider], target).item() == pytest.approx(0.975 / 4)
    early = camera_loss([moved, target], target).item()
    assert early == pytest.approx(0.6 / 1.6 * 0.975 / 3)


def test_confident_loss_by_hand() -> None:
    error, confidence = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0])
    expected = ((2 * 1 - 0.2 * math.log(2)) + 3) / 2
    assert confident_loss(error, confidence).item() == pytest.approx(expected)


DIM, LAYERS, VIEWS, PATCHES = 16, 3, 3, 5


@pytest.fixture
def matching() -> MatchingLoss:
    """All layers with the same descriptor, so that only their order tells them apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = MatchingLoss(DIM, LAYERS)
    for describe in loss.describe:
        describe.load_state_dict(loss.describe[0].state_dict())
    return loss


def correspondences() -> tuple[Tensor, Tensor]:
    """Five far points seen by every view in another order: points, and a token per point."""
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(PATCHES, generator=generator) for _ in range(VIEWS)])
    places = torch.eye(PATCHES)[:, :3] + torch.arange(PATCHES)[:, None]
    return places[order][None], random(PATCHES, DIM)[order][None]


def test_matching_loss_wants_equal_tokens_for_equal_points(matching: MatchingLoss) -> None:
    points, tokens = correspondences()
    right = matching([tokens] * LAYERS, points)
    wrong = matching([random(1, VIEWS, PATCHES, DIM, seed=s) for s in range(LAYERS)], points)
    blind = matching([torch.ones(1, VIEWS, PATCHES, DIM)] * LAYERS, points)
    # A patch has one match in each of the other views; without any hint all patches are equal.
    assert blind.item() == pytest.approx(math.log((VIEWS - 1) * PATCHES))
    assert math.log(VIEWS - 1) <= right.item() < 0.7 * blind.item()
    assert right < wrong


def test_matching_loss_singles_out_no_layer(matching: MatchingLoss) -> None:
    points, tokens = correspondences()
    layers = [tokens + 0.5 * random(*tokens.shape, seed=s) for s in range(LAYERS)]
    torch.testing.assert_close(matching(layers, points), matching(layers[::-1], points))
    same = [layers[0].clone().requires_grad_() for _ in range(LAYERS)]
    matching(same, points).backward()
    for layer in same:
        assert layer.grad.abs().max() > 0
        torch.testing.assert_close(layer.grad, same[0].grad)


def test_matching_loss_ignores_patches_that_no_other_view_sees(matching: MatchingLoss) -> None:
    _, tokens = correspondences()
    apart = 10.0 * torch.arange(VIEWS * PATCHES).view(1, VIEWS, PATCHES, 1).expand(-1, -1, -1, 3)
    assert matching([tokens] * LAYERS, apart) == 0


# Optimiser and schedule


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (96, 24), (3, 20, 20)])
def test_orthogonalise_keeps_singular_vectors_and_levels_singular_values(
    shape: tuple[int, ...],
) -> None:
    u, _, vt = torch.linalg.svd(random(*shape).double(), full_matrices=False)
    spectrum = torch.linspace(0.1, 1.0, u.shape[-1], dtype=torch.float64)
    result = orthogonalise((u * spectrum) @ vt * 1e-3)
    assert result.dtype == torch.float64
    turned = u.mT @ result @ vt.mT
    levels = turned.diagonal(dim1=-2, dim2=-1)
    assert levels.min() > 0.6
    assert levels.max() < 1.3
    assert (turned - torch.diag_embed(levels)).abs().max() < 0.05  # bfloat16
    assert torch.linalg.svdvals(result).max() < 1.3


def test_orthogonalise_survives_zeros() -> None:
    assert torch.equal(orthogonalise(torch.zeros(4, 4)), torch.zeros(4, 4))


# Entries are about 0.3, and Newton-Schulz runs in bfloat16.
ROUNDING = {"atol": 0.06, "rtol": 0.0}


def muon_step(gradient: Tensor, **options: float) -> Tensor:
    """What one step of length 1 adds to a matrix of ones."""
    parameter = nn.Parameter(torch.ones_like(gradient))
    parameter.grad = gradient.clone()
    Muon([parameter], lr=1.0, **{"weight_decay": 0.0, **options}).step()
    return parameter.detach() - 1


def test_muon_treats_query_key_and_value_apart() -> None:
    gradient = random(36, 12) * torch.tensor([1.0, 100.0, 0.01]).repeat_interleave(12)[:, None]
    parts = muon_step(gradient).view(3, 12, 12)
    for part, own in zip(parts, gradient.view(3, 12, 12), strict=True):
        torch.testing.assert_close(part, -orthogonalise(own), **ROUNDING)
    # As one matrix the value part would hardly move.
    assert parts.norm(dim=(1, 2)).min() > 0.6 * parts.norm(dim=(1, 2)).max()


def test_muon_steps_by_hand() -> None:
    gradient = random(24, 12)
    step = muon_step(gradient)
    torch.testing.assert_close(step, -(2**0.5) * orthogonalise(gradient), **ROUNDING)
    decayed = muon_step(gradient, weight_decay=0.1)
    torch.testing.assert_close(decayed, step - 0.1)
    # The second step follows the average of both gradients, and looks ahead (Nesterov).
    parameter, second = nn.Parameter(torch.zeros(24, 12)), random(24, 12, seed=1)
    muon = Muon([parameter], lr=1.0, weight_decay=0.0, momentum=0.9)
    for latest in (gradient, second):
        before = parameter.detach().clone()
        parameter.grad = latest.clone()
        muon.step()
    average = 0.9 * (0.1 * gradient) + 0.1 * second
    direction = orthogonalise(0.1 * second + 0.9 * average)
    torch.testing.assert_close(parameter - before, -(2**0.5) * direction, **ROUNDING)
    # Matrices of one shape share a stack, not a step.
    both = [nn.Parameter(torch.zeros(24, 12)) for _ in range(2)]
    both[0].grad, both[1].grad = gradient.clone(), -gradient
    Muon(both, lr=1.0, weight_decay=0.0).step()
    torch.testing.assert_close(both[0], step)
    torch.testing.assert_close(both[1], -step)


def test_learning_rate_warms_up_stays_and_falls() -> None:
    config = TrainingConfig(steps=1000)
    rates = [config.learning_rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[49] == pytest.approx(0.5)
    assert rates[99:501] == pytest.approx([1.0] * 402)
    assert rates[750] == pytest.approx(0.5)
    assert rates[-1] == 0.02
    assert all(a >= b for a, b in pairwise(rates[100:]))


def test_views_grow_and_divide_the_frames() -> None:
    config = TrainingConfig(steps=100)
    assert {config.views(step) for step in range(30)} == {3, 4}
    assert {config.views(step) for step in range(30, 100)} == {4, 6, 8}
    assert all(config.frames_per_step % config.views(step) == 0 for step in range(100))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"reuse": 0},
        {"decay_from": 0.0},
        {"frames_per_step": 20},
        {"frames_per_step": 0},
        {"seed": -1},
        {"seed": 2**20 - 1},  # the validation scenes
        {"matching": -0.5},
        {"matching": math.nan},
    ],
)
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TrainingConfig(**wrong)


# Scene pool


def make_pool(seed: int = 0) -> ScenePool:
    scenes = Procedural(2**40, 4, "train", config=SMALL)
    return ScenePool(scenes, seed=seed, size=20, reuse=3)


def equal(a: SceneBatch, b: SceneBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_a_pool_repeats_itself_and_goes_on_where_it_was_left() -> None:
    pool, same, other = make_pool(), make_pool(), make_pool(seed=1)
    for _ in range(5):
        drawn = pool.draw(3, 2)
        assert drawn.images.shape == (3, 2, 3, 8, 8)
        assert equal(drawn, same.draw(3, 2))
        assert not torch.equal(drawn.world_from_cam, other.draw(3, 2).world_from_cam)
    resumed = make_pool(seed=2)
    resumed.restore(pool.state())
    for _ in range(10):
        assert equal(pool.draw(3, 2), resumed.draw(3, 2))


def test_a_pool_uses_every_scene_a_few_times_with_other_views() -> None:
    pool = make_pool()
    uses: dict[float, list[tuple]] = {}
    for _ in range(60):
        scene = pool.draw(1, 4)
        views = [tuple(pose.flatten().tolist()) for pose in scene.world_from_cam[0]]
        assert len(set(views)) == 4
        uses.setdefault(scene.intrinsics[0, 0, 0, 0].item(), []).append(tuple(views))
    assert max(map(len, uses.values())) == 3
    assert any(len(set(orders)) > 1 for orders in uses.values())
    state = pool.state()
    held = sum(3 - count for _, count in state["entries"])
    assert 60 + held == 3 * state["next_index"]  # nothing is skipped


# The whole trainer

CONFIG = TrainingConfig(steps=4, frames_per_step=24)
QUICK = {"log_every": 1, "evaluate_every": 2, "validation_scenes": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    torch.set_num_threads(1)
    trainer = Trainer(CONFIG, tmp_path_factory.mktemp("run"))
    trainer.run(**QUICK)
    return trainer


def without_time(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_training_logs_finite_losses_and_validation(finished: Trainer) -> None:
    rows = read_log(finished.log)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    losses = {"step", "seconds", "camera", "points", "depth", "matching"}
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        validated = {"val_auc_30", "val_point_error"} if row["step"] % 2 == 0 else set()
        assert row.keys() == losses | validated
    start = VGGT(NANO).state_dict()
    assert {k: v.shape for k, v in finished.model.state_dict().items()} == {
        k: v.shape for k, v in start.items()
    }


def test_a_stopped_training_ends_with_the_same_bits(finished: Trainer, tmp_path: Path) -> None:
    def stop(step: int, steps: int, _: dict[str, float]) -> None:
        assert steps == 4
        if step == 3:
            raise KeyboardInterrupt

    first = Trainer(CONFIG, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        first.run(**QUICK, progress=stop)
    with first.log.open("a") as log:
        log.write('{"step": 4, "cam')  # what a kill in the middle of a write leaves
    second = Trainer(CONFIG, tmp_path)
    assert second.step == 2
    assert [row["step"] for row in read_log(second.log)] == [1, 2]
    second.run(**QUICK)

    whole, resumed = finished.modules.state_dict(), second.modules.state_dict()
    assert whole.keys() == resumed.keys()
    different = [key for key in whole if not torch.equal(whole[key], resumed[key])]
    assert different == []
    assert not torch.equal(
        whole["model.camera_head.pose_branch.fc2.weight"],
        first.modules.state_dict()["model.camera_head.pose_branch.fc2.weight"],
    )
    rows = read_log(second.log)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for key in ("val_auc_30", "val_point_error"):
        assert rows[-1][key] == read_log(finished.log)[-1][key]

    third = Trainer(CONFIG, tmp_path)
    third.run(**QUICK)  # nothing is left to do
    assert read_log(third.log) == rows


def test_another_run_in_the_same_folder_is_refused(finished: Trainer, tmp_path: Path) -> None:
    before = finished.log.read_bytes()
    for wrong in (TrainingConfig(steps=4, seed=1), TrainingConfig(steps=4, matching=0.0)):
        with pytest.raises(CheckpointError, match="use another folder"):
            Trainer(wrong, finished.folder)
    with pytest.raises(CheckpointError, match="has had 4 steps"):
        Trainer(TrainingConfig(steps=3, frames_per_step=24), finished.folder)
    assert finished.log.read_bytes() == before
    shutil.copy(finished.checkpoint, tmp_path)
    damaged = tmp_path / "checkpoint.pt"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        Trainer(CONFIG, tmp_path)


def test_the_seed_decides_the_initial_weights_and_nothing_global(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    a, b = (Trainer(TrainingConfig(seed=seed), tmp_path / str(seed)) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weight = "aggregator.global_blocks.0.attn.qkv.weight"
    assert not torch.equal(a.model.state_dict()[weight], b.model.state_dict()[weight])


def test_validation_is_finite_and_repeats(finished: Trainer) -> None:
    found = validate(finished.recipe, num_scenes=2, num_views=3)
    assert found.keys() == {"val_auc_30", "val_point_error"}
    assert 0 <= found["val_auc_30"] <= 1
    assert 0 < found["val_point_error"] < math.inf
    assert validate(finished.recipe, num_scenes=2, num_views=3) == found
