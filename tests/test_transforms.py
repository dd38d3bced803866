"""Pruned heads and merged tokens: against finite differences, single heads and plain loops."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hess.attention.layout import TokenLayout
from hess.datasets.scene import Scene
from hess.errors import (
    AlreadySparsifiedError,
    ConfigError,
    DatasetError,
    HessError,
    LayoutError,
    ProfileError,
)
from hess.models.layers import Attention
from hess.models.pi3 import Pi3, Pi3Config
from hess.models.vggt import VGGT, VGGTConfig
from hess.policies import Dense, Uniform
from hess.sensitivity.head_importance import (
    HeadImportance,
    head_gates,
    measure_head_importance,
)
from hess.sensitivity.profile import model_fingerprint
from hess.sensitivity.scene_errors import CalibrationConfig, scene_errors
from hess.sparsification import SparsityStats, sparsify
from hess.transforms import (
    FisherMask,
    HeadPruning,
    TokenMerging,
    Transform,
    applied,
    pruned_heads,
    token_merging,
)
from hess.transforms.fisher_mask import rearrange
from hess.transforms.mask_tuning import tune_scales
from hess.transforms.pruned_heads import PrunedAttention, prune_heads
from hess.transforms.token_merging import MergingAttention, TokenRoles, most_similar, token_roles
from test_calibrate import Scenes, make_scene, only
from test_sensitivity import TinyModel, both_errors, tiny_scene

LAYERS, HEADS, NUM_SPECIAL = 3, 4, 3
SIZES = {"image_size": 32, "patch_size": 8, "dim": 32, "num_heads": HEADS, "layer_scale": 0.5}


def make_vggt() -> VGGT:
    torch.manual_seed(0)
    config = VGGTConfig(
        **SIZES,
        depth=LAYERS,
        num_registers=NUM_SPECIAL - 1,
        patch_embed="conv",
        camera_trunk_depth=1,
        camera_heads=2,
        camera_iterations=1,
        dense_head="linear",
        dense_layers=(0, 2),
        block_size_q=5,
        block_size_kv=4,
    )
    return VGGT(config).eval()


def make_pi3() -> Pi3:
    torch.manual_seed(0)
    config = Pi3Config(
        **SIZES,
        encoder_depth=1,
        decoder_depth=2 * LAYERS,
        num_registers=NUM_SPECIAL,
        head_depth=1,
        camera_dim=16,
        image_rule="square",
    )
    return Pi3(config).eval()


@pytest.fixture(scope="module")
def model() -> VGGT:
    return make_vggt()


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Two scenes of 3 views of 4 x 3 patches: 36 patches, 9 special tokens."""
    return torch.rand(2, 3, 3, 32, 24, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run(model, images) -> Tensor:
    out = model(images)
    return torch.cat([x.flatten() for x in (out.world_from_cam, out.depth, out.world_points)])


def importance_of(model, gradients: Tensor | None = None, **provenance) -> HeadImportance:
    """Gate gradients of the given or of random values, as if measured on ``model``."""
    if gradients is None:
        generator = torch.Generator().manual_seed(2)
        shape = 5, 2, len(model.global_attention_sites()), model.num_heads
        gradients = torch.randn(shape, generator=generator, dtype=torch.float64)
    told = {
        "model_name": model.model_name,
        "model_fingerprint": model_fingerprint(model),
        "camera_weight": 0.5,
    }
    return HeadImportance(
        gradients=gradients,
        scenes=tuple(f"scene {i}" for i in range(len(gradients))),
        provenance=told | provenance,
    )


def all_transforms(model) -> list[Transform]:
    importance = importance_of(model)
    mask = FisherMask(importance, sparsity=0.5)
    return [
        HeadPruning(importance, sparsity=0.5),
        mask,
        mask.tuned(model, [make_scene_for(model)]),
        TokenMerging(merge_ratio=0.3),
    ]


def make_scene_for(model) -> Scene:
    size = 2, 3, 4 * model.patch_size, 3 * model.patch_size
    return Scene(name="any", images=torch.rand(size, generator=torch.Generator().manual_seed(3)))


# --- gates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ["camera", "point"])
def test_gate_gradients_are_those_of_finite_differences(error):
    model, images, _ = tiny_scene(torch.float64)
    step = 1e-5
    with head_gates(model) as gates:
        found = torch.autograd.grad(both_errors(model(images))[error], gates)
        for layer, gate in enumerate(gates):
            for head in range(len(gate)):
                values = []
                for sign in (1, -1):
                    with torch.no_grad():
                        gate[head] = 1 + sign * step
                        values.append(both_errors(model(images))[error].item())
                        gate[head] = 1
                expected = (values[0] - values[1]) / (2 * step)
                assert abs(expected) > 1e-6
                assert found[layer][head].item() == pytest.approx(expected, rel=1e-5)


def test_measured_camera_gradients_are_those_of_scaled_weights():
    """On cameras alone the alignment is where the error is least, so it may move along."""
    model = TinyModel().double()
    importance = measure_head_importance(model, Scenes(1, only(0, depth=None)))
    scene, step = Scenes(1, only(0, depth=None))[0], 1e-4
    for layer, attention in enumerate(model.attentions):
        for head in range(2):
            columns = attention.proj.weight.data[:, 4 * head : 4 * head + 4]
            before, values = columns.clone(), []
            for sign in (1, -1):
                columns.copy_(before * (1 + sign * step))
                values.append(scene_errors(model, scene, CalibrationConfig()).camera.item())
            columns.copy_(before)
            expected = (values[0] - values[1]) / (2 * step)
            found = importance.gradients[0, 0, layer, head].item()
            assert found == pytest.approx(expected, rel=1e-3)
    assert importance.gradients[0, 1].isnan().all()


def test_importance_holds_every_scene_and_what_failed():
    model, seen = TinyModel(), []
    before = [(n, p.requires_grad, p.clone()) for n, p in model.named_parameters()]
    poseless = Scenes(3, only(1, world_from_cam=None))
    importance = measure_head_importance(model, poseless, progress=lambda *a: seen.append(a))
    assert importance.scenes == ("scene 0", "scene 2")
    assert [name for name, _ in importance.failed] == ["scene 1"]
    assert importance.gradients.shape == (2, 2, 2, 2)
    assert importance.gradients.abs().min() > 0
    assert seen == [(1, 3, "scene 0"), (2, 3, "scene 1"), (3, 3, "scene 2")]
    importance.check_model(model)
    json.dumps(importance.provenance)
    for (name, flag, value), (_, parameter) in zip(before, model.named_parameters(), strict=True):
        assert parameter.requires_grad == flag, name
        assert torch.equal(parameter, value)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())

    again = measure_head_importance(model, poseless, recompute=False)
    assert torch.equal(again.gradients, importance.gradients)


def test_importance_that_cannot_be_measured():
    model = TinyModel()
    with pytest.raises(DatasetError, match="empty"):
        measure_head_importance(model, Scenes(0))
    with pytest.raises(ProfileError, match=r"all 1 calibration scenes failed.*no poses"):
        measure_head_importance(model, Scenes(1, only(0, world_from_cam=None)))
    full = make_vggt()
    with sparsify(full, Dense()), pytest.raises(AlreadySparsifiedError):
        measure_head_importance(full, Scenes(1))
    model.attentions[0].proj = torch.nn.Identity()
    with pytest.raises(LayoutError, match="'proj'"), head_gates(model):
        pass


def test_importance_knows_its_model_and_checks_its_numbers(model):
    importance = importance_of(model)
    importance.check_model(model)
    with pytest.raises(ProfileError, match="measured on"):
        importance.check_model(make_pi3())
    good = importance.gradients
    for bad in (good.float(), good[:0], good[:, :1], good / 0):
        with pytest.raises(ProfileError, match="gate gradients"):
            importance_of(model, bad)
    with pytest.raises(ProfileError, match="lacks 'camera_weight'"):
        HeadImportance(
            gradients=good,
            scenes=("",) * 5,
            provenance={"model_name": "", "model_fingerprint": ""},
        )


def test_errors_are_mixed_over_the_scenes_that_have_them(model):
    gradients = torch.ones(3, 2, LAYERS, HEADS, dtype=torch.float64)
    gradients[:, 1] = 2
    gradients[1, 1] = torch.nan
    importance = importance_of(model, gradients, camera_weight=0.75)
    assert importance.mixed(lambda g: g.mean(0)).unique().tolist() == [0.75 * 1 + 0.25 * 2]
    assert importance.mixed(lambda g: g.sum(0), 0.0).unique().tolist() == [4]
    gradients[:, 1] = torch.nan
    cameras = importance_of(model, gradients)
    assert cameras.mixed(lambda g: g.sum(0), 1.0).unique().tolist() == [3]
    with pytest.raises(ProfileError, match="point error"):
        cameras.mixed(lambda g: g.sum(0))
    with pytest.raises(ConfigError, match="camera_weight"):
        cameras.mixed(lambda g: g.sum(0), 1.5)


# --- which heads -----------------------------------------------------------------------------


def cameras_only(model, of_scenes: list) -> HeadImportance:
    gradients = torch.full((len(of_scenes), 2, LAYERS, HEADS), torch.nan, dtype=torch.float64)
    gradients[:, 0] = torch.tensor(of_scenes, dtype=torch.float64)
    return importance_of(model, gradients, camera_weight=1.0)


def test_michel_prunes_the_lowest_mean_magnitudes_per_unit_of_the_layer(model):
    # Means of magnitudes: layer 0 [3 4 0 0], layer 1 [100 100 100 100], layer 2 [0 0 5 12];
    # per l2 norm: [.6 .8 0 0], [.5 .5 .5 .5], [0 0 .38 .92]. The signs would cancel.
    first = [[3, -4, 0, 0], [100, 100, 100, 100], [0, 0, 5, 12]]
    second = [[-3, 4, 0, 0], [-100, 100, -100, 100], [0, 0, -5, 12]]
    importance = cameras_only(model, [first, second])
    pruned = {
        4: [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]],
        5: [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]],
        9: [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]],
    }
    for count, kept in pruned.items():
        transform = HeadPruning(importance, sparsity=count / 12)
        assert transform.scales.tolist() == kept
        assert transform.settings()["pruned_heads"] == count


def test_errors_weigh_alike_in_michel_whatever_their_unit(model):
    gradients = torch.zeros(1, 2, LAYERS, HEADS, dtype=torch.float64)
    gradients[0, 0] = 1e6 * torch.tensor([3.0, 2, 0, 0])
    gradients[0, 1] = 1e-6 * torch.tensor([0.0, 2, 3, 0])
    # Per l2 norm [.83 .55 0 0] and [0 .55 .83 0]: together the second head is first.
    transform = HeadPruning(importance_of(model, gradients), sparsity=0.75)
    assert transform.scales.tolist() == [[0, 1, 0, 0]] * LAYERS
    camera = HeadPruning(importance_of(model, gradients), sparsity=0.75, camera_weight=1)
    assert camera.scales.tolist() == [[1, 0, 0, 0]] * LAYERS


def test_layers_weigh_alike_in_michel_whether_or_not_the_errors_agree(model):
    # Where the errors agree the mixture is longer; dividing by its norm makes up for that.
    gradients = torch.zeros(1, 2, LAYERS, HEADS, dtype=torch.float64)
    gradients[0, :, 0] = torch.tensor([10.0, 6, 5.7, 5.7])
    gradients[0, 0, 1] = torch.tensor([1.0, 1, 0, 0])
    gradients[0, 1, 1] = torch.tensor([0.0, 0, 1, 1])
    transform = HeadPruning(importance_of(model, gradients), sparsity=6 / 12)
    # Per l2 norm: layer 0 [.71 .43 .41 .41], layer 1 [.5 .5 .5 .5] (.35 if not divided again).
    assert transform.scales.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]


def test_errors_weigh_alike_in_kwon_whatever_their_unit(model):
    # One head per scene, so that none makes up for another and nothing is rearranged.
    gradients = torch.zeros(3, 2, LAYERS, HEADS, dtype=torch.float64)
    gradients[:2, 0, 0] = 1e6 * torch.tensor([[3.0, 0, 0, 0], [0, 2, 0, 0]])
    gradients[:2, 1, 0] = 1e-6 * torch.tensor([[0.0, 0, 3, 0], [0, 2, 0, 0]])
    gradients[2, 1, 2] = 1e-6 * torch.tensor([0.0, 0, 0, 1])
    # Per trace: 9/13 4/13 0 0 and 0 4/14 9/14 0 in layer 0, 0 0 0 1/14 in layer 2.
    kept = {1: [[0, 0]], 2: [[0, 0], [0, 2]], 4: [[0, 0], [0, 1], [0, 2], [2, 3]]}
    for count, heads in kept.items():
        mask = FisherMask(importance_of(model, gradients), sparsity=1 - count / 12)
        assert mask.scales.nonzero().tolist() == heads


def test_kwon_searches_over_layers_by_the_mean_square(model):
    # One large gradient in one of two scenes: squares see it, magnitudes less.
    first = [[1, 0, 0, 0], [0, 3, 0, 0], [0, 0, 2, 0]]
    second = [[1, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 2.1]]
    importance = cameras_only(model, [first, second])
    kept = FisherMask(importance, sparsity=9 / 12).scales
    assert kept.nonzero().tolist() == [[1, 1], [2, 2], [2, 3]]  # 9, 4.41 / 2, 4 / 2 against 1


def test_rearranging_prunes_heads_that_make_up_for_each_other(model):
    # Heads 0 and 1 add up, head 2 undoes either: to prune 0 and 2 costs next to nothing.
    row = [1.0, 1.0, -1.05, 9.0]
    importance = cameras_only(model, [[row, [9] * 4, [9] * 4]])
    assert FisherMask(importance, sparsity=2 / 12).scales[0].tolist() in [
        [0, 1, 0, 1],
        [1, 0, 0, 1],
    ]
    assert FisherMask(importance, sparsity=1 / 12).scales[0].tolist() == [0, 1, 1, 1]


@given(seed=st.integers(0, 1000), heads=st.integers(2, 6), scenes=st.integers(1, 4))
def test_rearranged_masks_prune_as_many_and_lose_no_more(seed, heads, scenes):
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(scenes, heads, generator=generator, dtype=torch.float64)
    fisher = g.mT @ g / scenes

    def loss(heads) -> float:
        return g[:, list(heads)].sum(1).square().mean().item()

    for count in range(heads + 1):
        start = torch.zeros(heads, dtype=torch.bool)
        start[fisher.diagonal().argsort()[:count]] = True
        found = rearrange(fisher, start).nonzero().flatten().tolist()
        assert len(found) == count
        assert loss(found) <= loss(start.nonzero().flatten().tolist()) + 1e-12
        best = min(loss(h) for h in itertools.combinations(range(heads), count))
        assert loss(found) >= best - 1e-12
        if count in (heads, heads - 1):  # one exchange sees all masks there are
            assert loss(found) == pytest.approx(best)


def test_pruning_by_shares_rounds_to_whole_heads(model):
    importance = importance_of(model)
    for kind in (HeadPruning, FisherMask):
        for sparsity in (0.0, 0.1, 0.5, 0.77, 1.0):
            pruned = (kind(importance, sparsity=sparsity).scales == 0).sum().item()
            assert pruned == math.floor(sparsity * LAYERS * HEADS + 0.5)
        for bad in (-0.1, 1.1, math.nan):
            with pytest.raises(ConfigError, match="sparsity"):
                kind(importance, sparsity=bad)
    assert (
        HeadPruning(importance, sparsity=0.5).settings()
        != HeadPruning(
            importance_of(model, importance.gradients.flip(-1)), sparsity=0.5
        ).settings()
    )


# --- pruned attention ------------------------------------------------------------------------


def make_attention(seed: int = 5) -> Attention:
    torch.manual_seed(seed)
    return Attention(16, 4, qk_norm=True).double()


@torch.no_grad()
def test_all_heads_pruned_but_one_is_that_head_alone():
    dense = make_attention()
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    for head in range(4):
        alone = Attention(16, 1, qk_norm=True).double()
        alone.head_dim, rows = 4, slice(4 * head, 4 * head + 4)
        alone.qkv.weight.data = dense.qkv.weight.unflatten(0, (3, 16))[:, rows].flatten(0, 1)
        alone.qkv.bias.data = dense.qkv.bias.unflatten(0, (3, 16))[:, rows].flatten()
        alone.proj.weight.data = dense.proj.weight[:, rows]
        alone.proj.bias.data = dense.proj.bias
        alone.q_norm, alone.k_norm = dense.q_norm, dense.k_norm
        scales = [float(h == head) for h in range(4)]
        pruned = PrunedAttention(dense, 0, scales, SparsityStats(1, 4, [0]))
        torch.testing.assert_close(pruned(x), alone(x))
        doubled = PrunedAttention(dense, 0, [2 * s for s in scales], SparsityStats(1, 4, [0]))
        bias = dense.proj.bias
        torch.testing.assert_close(doubled(x) - bias, 2 * (alone(x) - bias))


@torch.no_grad()
def test_pruned_heads_are_not_computed_and_none_leaves_the_bias(monkeypatch):
    seen = []
    attend = pruned_heads.dense_attention
    monkeypatch.setattr(
        pruned_heads, "dense_attention", lambda *qkv: seen.append(qkv[0].shape[1]) or attend(*qkv)
    )
    dense, x = make_attention(), torch.ones(1, 3, 16, dtype=torch.float64)
    for kept in range(4):
        scales = [1.0] * kept + [0.0] * (4 - kept)
        out = PrunedAttention(dense, 0, scales, SparsityStats(1, 4, [0]))(x)
        if kept == 0:
            assert torch.equal(out, dense.proj.bias.expand(1, 3, 16))
    assert seen == [1, 2, 3]


def test_statistics_say_which_heads_are_gone(model, images):
    transform = HeadPruning(importance_of(model), sparsity=0.4)
    with applied(model, transform) as at_work:
        run(model, images)
    stats = at_work.stats
    assert stats.num_scenes == 2
    assert stats.backends == ("dense",)
    assert stats.block_sparsity == stats.flop_saving == pytest.approx(5 / 12)
    assert torch.equal(stats.block_sparsity_per_head, 1 - transform.scales)
    assert stats.as_dict()["flop_saving_per_head"] == (1 - transform.scales).tolist()


def test_scales_of_another_model_are_refused(model):
    with pytest.raises(ConfigError, match="scales"):
        prune_heads(model, torch.ones(LAYERS, HEADS + 1))
    other = importance_of(model, model_fingerprint="0" * 64)
    for kind in (HeadPruning, FisherMask):
        with pytest.raises(ProfileError, match="measured on"):
            kind(other, sparsity=0.5).apply(model)
        with pytest.raises(ProfileError, match="measured on"):
            applied(model, kind(other, sparsity=0.5))


# --- mask tuning -----------------------------------------------------------------------------


def twin_heads(factor: float) -> VGGT:
    """A model whose head 1 of layer 1 is ``factor`` times its head 0, in what it adds."""
    model = make_vggt()
    attention = model.global_attention_sites()[1].module
    with torch.no_grad():
        for projection in attention.qkv.weight.unflatten(0, (3, HEADS, -1)):
            projection[1] = projection[0]
        for projection in attention.qkv.bias.unflatten(0, (3, HEADS, -1)):
            projection[1] = projection[0]
        columns = attention.proj.weight.unflatten(1, (HEADS, -1))
        columns[:, 1] = factor * columns[:, 0]
    return model


def test_tuning_lets_a_head_stand_in_for_its_twin(images):
    model = twin_heads(0.5)
    kept = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    kept[1, 1] = False
    scales = tune_scales(model, [make_scene_for(model)], kept)
    expected = torch.ones(LAYERS, HEADS, dtype=torch.float64)
    expected[1, :2] = torch.tensor([1.5, 0.0])
    torch.testing.assert_close(scales, expected, atol=1e-3, rtol=0)
    dense = run(model, images)
    with prune_heads(model, kept.double()):
        untuned = run(model, images)
    with prune_heads(model, scales):
        tuned = run(model, images)
    assert (tuned - dense).norm() < 0.01 * (untuned - dense).norm()
    assert torch.equal(run(model, images), dense)


@torch.no_grad()
def test_tuned_scales_are_the_best_of_every_layer(model):
    kept = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    kept[0, 2] = kept[2, 0] = False
    scene = make_scene_for(model)
    tuned = tune_scales(model, [scene], kept)
    assert (tuned[1] != 1).all()  # a whole layer makes up for those before it

    def streams(scales: Tensor) -> list[Tensor]:
        """What the MLP of every global block gets to see, before its norm."""
        seen = []
        with prune_heads(model, scales):
            blocks = [site.parent for site in model.global_attention_sites()]
            handles = [
                b.norm2.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
                for b in blocks
            ]
            model(scene.images[None])
        for handle in handles:
            handle.remove()
        return seen

    wanted = streams(torch.ones(LAYERS, HEADS))
    for layer, head in kept.nonzero().tolist():
        errors = []
        for change in (-0.02, 0.0, 0.02):
            scales = tuned.clone()
            scales[layer, head] += change
            errors.append((streams(scales)[layer] - wanted[layer]).square().sum().item())
        left, least, right = errors
        assert least < min(left, right)
        assert left - least == pytest.approx(right - least, rel=0.05)


def test_tuning_stops_at_a_layer_that_asks_for_too_much():
    model = twin_heads(20.0)
    kept = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    kept[1, 1] = False
    scales = tune_scales(model, [make_scene_for(model)], kept)
    assert torch.equal(scales, kept.double())


def test_tuned_masks_keep_their_heads(model):
    mask = FisherMask(importance_of(model), sparsity=0.5)
    tuned = mask.tuned(model, [make_scene_for(model)])
    assert torch.equal(tuned.scales == 0, mask.scales == 0)
    assert not torch.equal(tuned.scales, mask.scales)
    assert (mask.settings()["tuned"], tuned.settings()["tuned"]) == (False, True)
    with pytest.raises(ConfigError, match="tuned_scales"):
        FisherMask(mask.importance, sparsity=0.5, tuned_scales=torch.ones(LAYERS, HEADS))
    with pytest.raises(ConfigError, match="at least one scene"):
        mask.tuned(model, [])
    with pytest.raises(ProfileError, match="measured on"):
        mask.tuned(make_pi3(), [make_scene_for(model)])
    none = torch.zeros(2, 2, dtype=torch.bool)
    none[:, 0] = True
    with pytest.raises(ConfigError, match="of a Block"):
        tune_scales(TinyModel(), [make_scene(0)], none)


# --- token merging ---------------------------------------------------------------------------

FIVE = TokenLayout(num_views=3, grid_h=3, grid_w=5, num_special=2)  # uneven cells


def features(layout: TokenLayout, batch: int = 2, dim: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, layout.num_tokens, dim, generator=generator, dtype=torch.float64)


def test_merging_a_tiny_set_by_hand():
    # Directions of five tokens: 0 and 4 are destinations, 1 2 3 sources.
    degrees = torch.tensor([0.0, 10.0, 85.0, 45.1, 90.0])
    x = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], -1)[None]
    x = x * torch.tensor([1.0, 2, 3, 4, 5])[:, None]  # lengths do not count
    roles = TokenRoles(sources=torch.tensor([[1, 2, 3]]), destinations=torch.tensor([0, 4]))
    values = torch.tensor([1.0, 3.0, 10.0, 100.0, 20.0]).view(1, 1, 5, 1)
    by_count = {
        0: ([0, 1, 2, 3, 4], [1, 3, 10, 100, 20]),
        1: ([0, 1, 3, 2, 3], [1, 3, 100, 15]),  # 2 is 5 degrees from 4
        2: ([0, 0, 2, 1, 2], [2, 100, 15]),  # then 1, 10 degrees from 0
        3: ([0, 0, 1, 1, 1], [2, 130 / 3]),  # then 3, a little nearer to 4
    }
    for count, (place, means) in by_count.items():
        merge = most_similar(x, roles, count)
        assert merge.place.tolist() == [place]
        assert merge.num_kept == len(means) == 5 - count
        averaged = merge.average(values)
        torch.testing.assert_close(averaged.flatten(), torch.tensor(means, dtype=torch.float32))
        back = merge.copy_back(averaged[:, 0])
        assert back.shape == (1, 5, 1)
        assert back.flatten().tolist() == [averaged.flatten()[p].item() for p in place]


@pytest.mark.parametrize("reference_view", [True, False])
def test_roles_of_tokens(reference_view):
    settings = TokenMerging(merge_ratio=0.5, protected=0.2, reference_view=reference_view)
    x = features(FIVE)
    roles = token_roles(x, FIVE, settings, 0)
    destinations = set(roles.destinations.tolist())
    special = set(FIVE.special_index.tolist())
    for b in range(2):
        sources = set(roles.sources[b].tolist())
        assert not sources & destinations
        assert not (sources | destinations) & special
        for view in range(3):
            patches = [view * 17 + 2 + i for i in range(15)]
            if view == 0 and reference_view:
                assert destinations >= set(patches)
                continue
            cells = [
                {patches[5 * r + c] for r in range(3) for c in range(5) if (r // 2, c // 2) == at}
                for at in itertools.product(range(2), range(3))
            ]
            assert [len(cell & destinations) for cell in cells] == [1] * 6
            mean = F.normalize(x[b, patches].float(), dim=-1).mean(0)
            likeness = {
                p: F.cosine_similarity(x[b, p].float(), mean, dim=0).item() for p in patches
            }
            free = sorted(set(patches) - destinations, key=likeness.get)
            assert sources & set(patches) == set(free[3:])  # 20 % of 15 are protected


def test_destinations_depend_on_seed_and_layer_only():
    def destinations(seed: int, layer: int, x: Tensor) -> list[int]:
        settings = TokenMerging(merge_ratio=0.5, seed=seed)
        return token_roles(x, FIVE, settings, layer).destinations.tolist()

    x = features(FIVE)
    assert destinations(3, 2, x) == destinations(3, 2, x.flip(1)[:1])
    different = {tuple(destinations(s, layer, x)) for s in range(4) for layer in range(4)}
    assert len(different) == 16


@given(seed=st.integers(0, 1000), count=st.integers(0, 9))
def test_the_most_similar_are_merged_as_plain_loops_would(seed, count):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 14, 4, generator=generator, dtype=torch.float64)
    order = torch.randperm(14, generator=generator)
    sources = order[:9].sort().values.expand(2, -1)
    destinations = order[9:12].sort().values
    merge = most_similar(x, TokenRoles(sources=sources, destinations=destinations), count)
    for b in range(2):
        nearest = {}
        for s in sources[b].tolist():
            alike = {
                d: F.cosine_similarity(x[b, s], x[b, d], dim=0) for d in destinations.tolist()
            }
            into = max(alike, key=alike.get)
            nearest[s] = (alike[into].item(), into)
        merged = sorted(nearest, key=lambda s: -nearest[s][0])[:count]
        kept = [t for t in range(14) if t not in merged]
        for t in range(14):
            stands_for = nearest[t][1] if t in merged else t
            assert kept[merge.place[b, t]] == stands_for


def test_chunks_of_the_similarity_change_nothing(monkeypatch):
    x = features(FIVE)
    roles = token_roles(x, FIVE, TokenMerging(merge_ratio=0.5), 0)
    whole = most_similar(x, roles, 10)
    monkeypatch.setattr(token_merging, "SIMILARITIES_PER_CHUNK", 1)
    assert torch.equal(most_similar(x, roles, 10).place, whole.place)


@torch.no_grad()
def test_merged_attention_is_attention_over_means():
    dense, x = make_attention(), features(FIVE)
    stats = SparsityStats(1, 4, [0])
    settings = TokenMerging(merge_ratio=0.25)
    out = MergingAttention(dense, 0, settings, stats)(x, None, FIVE)
    count = 13  # a quarter of 51; 14 may be merged
    place = most_similar(x, token_roles(x, FIVE, settings, 0), count).place
    for b in range(2):
        groups = [[t for t in range(51) if place[b, t] == kept] for kept in range(51 - count)]
        q, k, v = (
            torch.stack([t[0][:, group].mean(1) for group in groups], 1)
            for t in dense.project(x[b : b + 1], None)
        )
        attended = ((q @ k.mT) / 2).softmax(-1) @ v  # head_dim 4
        for kept, group in enumerate(groups):
            expected = dense.proj(attended[:, kept].flatten())
            torch.testing.assert_close(out[b, group], expected.expand(len(group), -1))
    patches, kept = 45, 51 - count
    assert stats.flop_saving == pytest.approx(1 - kept**2 / 51**2)
    assert stats.block_sparsity == pytest.approx(1 - (patches - count) * kept / (patches * 51))


def test_what_cannot_be_merged_is_not_and_the_statistics_say_so(model, images):
    # 3 views of 12 patches; 2 of them have 4 destinations and 1 protected patch each.
    with applied(model, TokenMerging(merge_ratio=0.9)) as at_work:
        run(model, images)
    assert at_work.stats.flop_saving == pytest.approx(1 - (45 - 2 * 7) ** 2 / 45**2)
    with applied(model, TokenMerging(merge_ratio=0.9, first_layer=2)) as late:
        run(model, images)
    per_layer = late.stats.flop_saving_per_head[:, 0].tolist()
    assert per_layer == pytest.approx([0, 0, at_work.stats.flop_saving])
    with applied(model, TokenMerging(merge_ratio=0.9)) as single:
        run(model, images[:, :1])
    assert single.stats.flop_saving == 0  # every patch of the reference view is a destination


def test_scenes_of_a_batch_do_not_see_each_other(model, images):
    with applied(model, TokenMerging(merge_ratio=0.3)):
        together = model(images).world_points
        apart = torch.cat([model(scene[None]).world_points for scene in images])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "bad",
    [
        {"merge_ratio": 1.0},
        {"merge_ratio": -0.1},
        {"first_layer": -1},
        {"cell": 0},
        {"protected": 1.1},
        {"seed": -1},
    ],
)
def test_bad_merging_parameters(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        TokenMerging(**({"merge_ratio": 0.5} | bad))


@torch.no_grad()
def test_merging_needs_a_layout_and_a_layer(model):
    attention = MergingAttention(
        make_attention(), 0, TokenMerging(merge_ratio=0.3), SparsityStats(1, 4, [0])
    )
    with pytest.raises(LayoutError, match="found None"):
        attention(features(FIVE))
    with pytest.raises(LayoutError, match="51 tokens"):
        attention(features(FIVE)[:, 1:], None, FIVE)
    with pytest.raises(ConfigError, match="first_layer"):
        TokenMerging(merge_ratio=0.3, first_layer=LAYERS).apply(model)


# --- the contract of all ---------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_vggt, make_pi3])
def test_all_change_the_model_and_leave_it_as_it_was(make, images):
    model = make()
    dense, keys = run(model, images), list(model.state_dict())
    tree = [(name, id(module)) for name, module in model.named_modules()]
    outputs = []
    for transform in all_transforms(model):
        for _ in range(2):
            with applied(model, transform) as at_work:
                outputs.append(run(model, images))
                assert list(model.state_dict()) == keys
            assert [(name, id(module)) for name, module in model.named_modules()] == tree
            assert torch.equal(run(model, images), dense)
        assert torch.equal(outputs[-1], outputs[-2])  # same again, bit for bit
        assert not torch.allclose(outputs[-1], dense)
        assert outputs[-1].isfinite().all()
        assert 0 < at_work.stats.flop_saving < 1
        json.dumps(transform.settings(), allow_nan=False)


def test_nothing_to_save_is_the_dense_model_bit_for_bit(model, images):
    importance, dense = importance_of(model), run(model, images)
    for transform in (
        HeadPruning(importance, sparsity=0.0),
        FisherMask(importance, sparsity=0.0),
        FisherMask(importance, sparsity=0.0).tuned(model, [make_scene_for(model)]),
        TokenMerging(merge_ratio=0.0),
    ):
        with applied(model, transform) as at_work:
            assert torch.equal(run(model, images), dense)
        assert at_work.stats.block_sparsity == at_work.stats.flop_saving == 0


def test_only_one_method_at_a_time_and_errors_inside_restore(model, images):
    dense = run(model, images)
    for transform in all_transforms(model):
        with applied(model, transform) as at_work:
            for second in (transform, Uniform(sparse_ratio=0.5)):
                with pytest.raises(AlreadySparsifiedError):
                    applied(model, second)
        with pytest.raises(HessError, match="apply"), at_work:
            pass
        with pytest.raises(RuntimeError, match="inside"), applied(model, transform):
            raise RuntimeError("inside")
        assert torch.equal(run(model, images), dense)


def test_applied_takes_policies_and_transforms(model, images):
    with applied(model, Uniform(sparse_ratio=0.5), layers=[1], backend="masked") as at_work:
        run(model, images)
    assert at_work.stats.layers == (1,)
    assert at_work.stats.backends == ("masked",)
    merging = TokenMerging(merge_ratio=0.3)
    with applied(model, merging, backend="masked", block_size_q=3) as at_work:
        run(model, images)
    assert at_work.stats.backends == ("dense",)
    for option in ({"layers": [1]}, {"dense_below": 5}):
        with pytest.raises(ConfigError, match="would not heed"):
            applied(model, merging, **option)
    assert isinstance(merging, Transform)
    assert not isinstance(Dense(), Transform)
