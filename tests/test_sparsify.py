"""The module swap: what it changes, what it leaves, and what it counts."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hess.attention.layout import TokenLayout
from hess.attention.pooled_scores import pool_scores
from hess.attention.reference import token_mask
from hess.errors import (
    AlreadySparsifiedError,
    BackendUnavailableError,
    ConfigError,
    HessError,
    LayoutError,
    ProfileError,
)
from hess.models.layers import Attention
from hess.models.vggt import VGGT, VGGTConfig
from hess.policies import Dense, HeSS, Uniform
from hess.sparsification import SparseAttention, SparsityStats, sparsify
from stand_ins import FixedScores

LAYERS, HEADS, NUM_SPECIAL = 3, 4, 3
HALF = Uniform(sparse_ratio=0.5)


@pytest.fixture(scope="module")
def model() -> VGGT:
    torch.manual_seed(0)
    config = VGGTConfig(
        image_size=32,
        patch_size=8,
        dim=32,
        depth=LAYERS,
        num_heads=HEADS,
        num_registers=NUM_SPECIAL - 1,
        layer_scale=1.0,
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


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Two scenes of 3 views of 4 x 3 patches: 36 patches, 9 special tokens."""
    return torch.rand(2, 3, 3, 32, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def run(model: VGGT, images: Tensor) -> Tensor:
    """All outputs of a forward pass in one tensor."""
    out = model(images)
    parts = (out.world_from_cam, out.intrinsics, out.depth, out.world_points)
    return torch.cat([part.flatten() for part in parts])


def modules(model: VGGT) -> list[tuple[str, type, int]]:
    return [(name, type(module), id(module)) for name, module in model.named_modules()]


def test_everything_is_as_before_after_leaving(model, images) -> None:
    before, keys, tree = run(model, images), list(model.state_dict()), modules(model)
    with sparsify(model, HALF):
        during = run(model, images)
        assert list(model.state_dict()) == keys
        assert all(isinstance(s.module, SparseAttention) for s in model.global_attention_sites())
    assert not torch.allclose(during, before)
    assert torch.equal(run(model, images), before)
    assert modules(model) == tree
    assert list(model.state_dict()) == keys


def test_an_exception_inside_restores_too(model, images) -> None:
    before, tree = run(model, images), modules(model)
    with pytest.raises(RuntimeError, match="inside"), sparsify(model, HALF):
        raise RuntimeError("inside")
    assert modules(model) == tree
    assert torch.equal(run(model, images), before)


def test_plain_handle_restores_once_and_for_all(model) -> None:
    tree = modules(model)
    handle = sparsify(model, HALF)
    assert modules(model) != tree
    handle.restore()
    assert modules(model) == tree
    with sparsify(model, HALF):
        handle.restore()  # does not undo the other one
        assert modules(model) != tree
    with pytest.raises(HessError, match="call sparsify"), handle:
        pass


def test_training_mode_survives(model) -> None:
    try:
        with sparsify(model, HALF):
            assert not model.global_attention_sites()[0].module.training
            model.train()
        assert all(module.training for module in model.modules())
    finally:
        model.eval()


def test_weights_are_shared_not_copied(model) -> None:
    before = dict(model.named_parameters())
    with sparsify(model, HALF):
        during = dict(model.named_parameters())
        assert list(during) == list(before)
        assert all(during[name] is before[name] for name in before)


@pytest.mark.parametrize("backend", ["reference", "masked", "gather", "native"])
@pytest.mark.parametrize("policy", [Uniform(sparse_ratio=0), Uniform(cdf_threshold=1), Dense()])
def test_dropping_nothing_is_the_dense_model(model, images, policy, backend) -> None:
    """In float64, for outputs are exponentials that make a rounding in float32 large."""
    tolerance = 1e-9
    if backend == "native":
        tolerance = 1e-4
    else:
        model, images = copy.deepcopy(model).double(), images.double()
    expected = run(model, images)
    with sparsify(model, policy, backend=backend) as sparse:
        torch.testing.assert_close(run(model, images), expected, rtol=tolerance, atol=tolerance)
    assert sparse.stats.block_sparsity == 0
    assert sparse.stats.flop_saving == 0


def test_backends_agree_and_are_recorded(model, images) -> None:
    outputs = {}
    for backend in ("auto", "reference", "masked", "gather", "native"):
        with sparsify(model, HALF, backend=backend) as sparse:
            outputs[backend] = run(model, images)
        assert sparse.stats.backends == ("native" if backend == "auto" else backend,)
    for backend in ("masked", "gather", "native"):
        torch.testing.assert_close(outputs[backend], outputs["reference"], rtol=1e-4, atol=1e-5)
    assert torch.equal(outputs["auto"], outputs["native"])


def test_hess_with_equal_scores_is_uniform(model, images) -> None:
    with sparsify(model, HALF):
        expected = run(model, images)
    with sparsify(model, HeSS(FixedScores(torch.ones(LAYERS, HEADS)), sparse_ratio=0.5)):
        assert torch.equal(run(model, images), expected)


def test_a_site_computes_masked_attention_between_project_and_merge(model) -> None:
    layout = TokenLayout(num_views=3, grid_h=4, grid_w=3, num_special=NUM_SPECIAL)
    x = torch.randn(2, layout.num_tokens, 32, generator=torch.Generator().manual_seed(2))
    dense = model.global_attention_sites()[1].module
    q, k, v = dense.project(x, None)
    mask = HALF.block_mask(pool_scores(q, k, layout, 5, 4), 1)
    visible = token_mask(mask, layout, 5, 4)
    expected = dense.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=visible))
    with sparsify(model, HALF):
        out = model.global_attention_sites()[1].module(x, None, layout)
        with pytest.raises(LayoutError, match="token layout"):
            model.global_attention_sites()[1].module(x)
    torch.testing.assert_close(out, expected)


def test_statistics_of_a_known_mask(model, images) -> None:
    # 36 patches: 8 query rows, 9 key blocks of which 4 stay; 9 special keys fill 3 more blocks.
    with sparsify(model, HALF, layers=[0, 2]) as sparse:
        run(model, images)
        run(model, images[:1])
    stats = sparse.stats
    assert stats.num_scenes == 3
    blocks = stats.block_sparsity_per_head
    assert torch.allclose(blocks, torch.tensor([5 / 12, 0, 5 / 12]).double()[:, None].expand(3, 4))
    assert stats.block_sparsity == pytest.approx(2 / 3 * 5 / 12)
    # All key blocks are full (9 x 4 = 36): every one of 36 queries drops 20 of 45 keys.
    flops = stats.flop_saving_per_head
    assert torch.allclose(flops[[0, 2]], torch.tensor(36 * 20 / 45**2).double())
    assert (flops[1] == 0).all()
    assert stats.flop_saving == pytest.approx(2 / 3 * 36 * 20 / 45**2)

    report = json.loads(json.dumps(stats.as_dict()))
    assert report["layers"] == [0, 2]
    assert report["num_scenes"] == 3
    assert report["block_sparsity_per_head"] == blocks.tolist()
    assert "block sparsity 27.8%" in str(stats)


def test_statistics_average_over_scenes_not_over_calls(model, images) -> None:
    adaptive = Uniform(cdf_threshold=0.6)
    means = []
    for part in (images, images[:1], images[1:]):
        with sparsify(model, adaptive, layers=[0]) as sparse:
            run(model, part)
        means.append(sparse.stats.block_sparsity_per_head[0])
    torch.testing.assert_close(means[0], (means[1] + means[2]) / 2)


def test_no_number_without_a_forward_pass(model, images) -> None:
    with sparsify(model, HALF) as sparse:
        with pytest.raises(HessError, match="run the model"):
            sparse.stats.as_dict()
        run(model, images)
        sparse.stats.as_dict()
        sparse.stats.reset()
        with pytest.raises(HessError, match="run the model"):
            _ = sparse.stats.flop_saving


def test_dense_does_not_even_pool(model, images, monkeypatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("pooled for nothing")

    monkeypatch.setattr("hess.sparsification.pool_scores", refuse)
    with sparsify(model, Dense()) as sparse:
        run(model, images)
    assert sparse.stats.backends == ("dense",)


def test_statistics_stay_on_the_device_until_asked() -> None:
    """A tensor on the device "meta" has no contents, so fetching it raises."""
    stats = SparsityStats(1, HEADS, [0])
    shares = torch.empty(2, HEADS, dtype=torch.float64, device="meta")
    stats.record(0, shares, shares, "masked")
    stats.record(0, shares, shares, "masked")
    assert stats.num_scenes == 4
    with pytest.raises(NotImplementedError):
        _ = stats.block_sparsity


def test_short_sequences_can_be_left_dense_and_count_as_such(model, images) -> None:
    expected = run(model, images)
    tokens = images.shape[1] * (NUM_SPECIAL + 12)
    with sparsify(model, HALF, dense_below=tokens + 1) as sparse:
        assert torch.equal(run(model, images), expected)
    assert sparse.stats.backends == ("dense",)
    assert sparse.stats.block_sparsity == sparse.stats.flop_saving == 0
    with sparsify(model, HALF, dense_below=tokens) as sparse:
        run(model, images)
    assert sparse.stats.backends == ("native",)
    assert sparse.stats.block_sparsity > 0


def test_the_backend_is_logged_once_per_kind_of_input(model, images, caplog) -> None:
    with caplog.at_level("INFO", logger="hess"), sparsify(model, HALF):
        run(model, images)
        run(model, images)
        run(model, images[:, :2])
    said = [record.getMessage() for record in caplog.records if record.name == "hess"]
    assert len(said) == 2
    assert all("runs on the native backend (asked: auto)" in line for line in said)


def test_layers_left_out_stay_dense(model) -> None:
    with sparsify(model, HALF, layers=[1]):
        types = [type(site.module) for site in model.global_attention_sites()]
    assert types == [Attention, SparseAttention, Attention]


def test_block_sizes_can_be_chosen(model, images) -> None:
    with sparsify(model, HALF, block_size_q=36, block_size_kv=18) as sparse:
        run(model, images)
    assert sparse.stats.block_sparsity == pytest.approx(1 / 3)  # 1 of 2 blocks and a special one


def test_refusals_leave_the_model_alone(model) -> None:
    tree = modules(model)
    with pytest.raises(ConfigError, match="backend must be one of"):
        sparsify(model, HALF, backend="flash")
    with pytest.raises(BackendUnavailableError, match="triton backend cannot run here: it needs"):
        sparsify(model, HALF, backend="triton")
    with pytest.raises(ConfigError, match="dense_below must be at least 0"):
        sparsify(model, HALF, dense_below=-1)
    for layers in ([], [3], [-1]):
        with pytest.raises(ConfigError, match="layers must name"):
            sparsify(model, HALF, layers=layers)
    for sizes in ({"block_size_q": 0}, {"block_size_kv": -3}):
        with pytest.raises(ConfigError, match="block size"):
            sparsify(model, HALF, **sizes)
    assert modules(model) == tree


def test_a_profile_of_another_model_is_refused(model) -> None:
    shallow = FixedScores(torch.ones(LAYERS - 1, HEADS))
    with pytest.raises(ProfileError, match=r"scores of \(2, 4\), found a model of \(3, 4\)"):
        sparsify(model, HeSS(shallow, sparse_ratio=0.5))
    assert not any(isinstance(s.module, SparseAttention) for s in model.global_attention_sites())


def test_sparsifying_twice_is_refused(model) -> None:
    with sparsify(model, HALF, layers=[0]), pytest.raises(AlreadySparsifiedError):
        sparsify(model, HALF, layers=[1])
    with sparsify(model, HALF, layers=[1]):
        pass
