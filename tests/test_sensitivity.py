"""Errors of Eq. 2-4, Fisher traces against explicit heads and finite differences, scores."""

import math
import weakref
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hess.attention.layout import TokenLayout
from hess.errors import AlignmentError, ConfigError, LayoutError
from hess.geometry.fit_rules import square_crop
from hess.geometry.nearest import NearestNeighbors
from hess.geometry.poses import pose_from
from hess.geometry.sim3 import Sim3
from hess.models.base import GlobalAttentionSite, Model, Predictions
from hess.models.vggt import VGGT, VGGTConfig
from hess.sensitivity.errors import camera_error, point_error, scene_scale
from hess.sensitivity.fisher import PROJECTIONS, fisher_probe, weight_norms
from hess.sensitivity.scores import aggregate_scenes, head_scores, scene_concentration

PATCH = 4


class TinyAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TinyModel(Model):
    """Photos whose colours hold the scene's points; two attentions disturb what is read off."""

    camera_weight: ClassVar[float] = 0.5

    def __init__(self, seed: int = 0, dim: int = 8, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.model_name, self.image_rule, self.patch_size = "tiny", square_crop(12), PATCH
        self.cloud_from = "point_head"
        self.num_special, self.num_heads = 1, heads
        self.block_size_q = self.block_size_kv = 2
        self.embed = nn.Linear(3 * PATCH * PATCH, dim)
        self.special = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.attentions = nn.ModuleList(TinyAttention(dim, heads) for _ in range(layers))
        self.camera_head = nn.Linear(dim, 3)
        self.point_head = nn.Linear(dim, 3 * PATCH * PATCH)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))

    def global_attention_sites(self) -> list[GlobalAttentionSite]:
        return [
            GlobalAttentionSite(layer_idx=i, parent=self.attentions, attribute=str(i))
            for i in range(len(self.attentions))
        ]

    def certainty(self, confidence: Tensor) -> Tensor:
        return 1 - 1 / confidence

    def backbone_parts(self) -> list[nn.Module]:
        return []

    def forward(
        self, images: Tensor, attend: Callable[[int, Tensor], Tensor] | None = None
    ) -> Predictions:
        batch, views, _, height, width = images.shape
        grid = (height // PATCH, width // PATCH)
        images = images.to(self.special.dtype)
        pixels = F.pixel_unshuffle(images.flatten(0, 1), PATCH).flatten(2).mT
        patches = self.embed(pixels).unflatten(0, (batch, views))
        tokens = torch.cat((self.special + patches.mean(2, keepdim=True), patches), dim=2)
        x = tokens.flatten(1, 2)
        for layer, attention in enumerate(self.attentions):
            x = x + (attention(x) if attend is None else attend(layer, x))
        tokens = x.unflatten(1, (views, -1))
        offsets = self.point_head(tokens[:, :, 1:]).mT.reshape(batch * views, -1, *grid)
        offsets = F.pixel_shuffle(offsets, PATCH).unflatten(0, (batch, views))
        points = (8 * images - 4 + 0.1 * offsets).permute(0, 1, 3, 4, 2)
        centers = self.camera_head(tokens[:, :, 0])
        eye = torch.eye(3).to(centers)
        depth = points[..., 2]
        return Predictions(
            world_from_cam=pose_from(eye, centers),
            intrinsics=eye.expand(batch, views, 3, 3),
            depth=depth,
            depth_confidence=torch.ones_like(depth),
            world_points=points,
            point_confidence=1 + images.mean(2),
        )


def tiny_scene(dtype: torch.dtype = torch.float64) -> tuple[TinyModel, Tensor, TokenLayout]:
    model = TinyModel().to(dtype)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(1, 3, 3, 8, 12, generator=generator, dtype=dtype)
    return model, images, model.token_layout(images)


def both_errors(predictions: Predictions) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    sim3 = Sim3(scale=0.5, rotation=torch.eye(3), translation=torch.tensor([0.1, 0.0, 0.2]))
    centers = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    cloud = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    point = point_error(
        predictions.world_points.flatten(0, -2),
        NearestNeighbors(cloud),
        sim3,
        inlier_threshold=0.4,
    )
    assert 0.2 < point.inlier_share < 0.95
    centers = camera_error(predictions.world_from_cam[0, :, :3, 3], centers, sim3)
    return {"camera": centers, "point": point.error}


# --- errors ----------------------------------------------------------------------------------


def test_camera_error_is_half_the_mean_squared_distance_of_centres():
    shift = Sim3(scale=2.0, rotation=torch.eye(3), translation=torch.tensor([1.0, 0.0, 0.0]))
    pred = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    gt = torch.tensor([[1.0, 3.0, 0.0], [3.0, 0.0, 4.0]])  # off by 3 and by 4
    assert camera_error(pred, gt, shift).item() == pytest.approx((9 + 16) / (2 * 2))
    with pytest.raises(LayoutError, match=r"\[N, 3\]"):
        camera_error(pred, gt[:1], shift)


def test_point_error_on_a_cloud_with_known_distances():
    gt = NearestNeighbors(torch.tensor([[0.0, 0.0, 0.0], [10.0, 0.0, 0.0]]))
    pred = torch.tensor([[0.1, 0.0, 0.0], [9.8, 0.0, 0.0], [10.0, 0.3, 0.0]], requires_grad=True)
    by_square = point_error(pred, gt, Sim3.identity())  # squares .01 .04 .09 against .05
    assert by_square.inlier_mask.tolist() == [True, True, False]
    assert by_square.inlier_share == pytest.approx(2 / 3)
    assert by_square.error.item() == pytest.approx((0.01 + 0.04) / (2 * 2), rel=1e-5)
    (gradient,) = torch.autograd.grad(by_square.error, pred)
    # d/dp of |p - nearest|^2 / (2 * 2), and nothing for the outlier
    expected = torch.tensor([[0.05, 0.0, 0.0], [-0.1, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(gradient, expected)
    by_distance = point_error(
        pred, gt, Sim3.identity(), inlier_on="distance", inlier_threshold=0.15
    )
    assert by_distance.inlier_mask.tolist() == [True, False, False]


def test_point_error_without_inliers_says_what_to_do():
    gt = NearestNeighbors(torch.zeros(1, 3))
    with pytest.raises(AlignmentError, match=r"below 0\.05 \(unit of length: mm\).* is 3;"):
        point_error(torch.tensor([[3.0, 0.0, 0.0]]), gt, Sim3.identity(), unit="mm")
    for bad in ({"inlier_threshold": 0.0}, {"inlier_on": "angle"}):
        with pytest.raises(ConfigError):
            point_error(torch.zeros(1, 3), gt, Sim3.identity(), **bad)


def test_scene_scale_is_the_mean_distance_to_the_first_camera():
    points = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 5.0], [4.0, 4.0, 0.0]])
    assert scene_scale(points, torch.tensor([1.0, 0.0, 0.0])) == pytest.approx((0 + 5 + 5) / 3)
    for points in (torch.zeros(0, 3), torch.zeros(4, 3)):
        with pytest.raises(AlignmentError, match="scale of a scene"):
            scene_scale(points, torch.zeros(3))


# --- Fisher traces ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["camera", "point"])
def test_traces_equal_squared_gradients_of_explicit_head_weights(name):
    model, images, layout = tiny_scene()
    heads, width = model.num_heads, model.attentions[0].head_dim
    leaves: dict[tuple[int, int, int], Tensor] = {}  # (projection, layer, head) -> W [width, C]
    for layer, attention in enumerate(model.attentions):
        for row, weight in enumerate(attention.qkv.weight.detach().split(width)):
            leaves[row // heads, layer, row % heads] = weight.clone().requires_grad_()

    def attend(layer: int, x: Tensor) -> Tensor:
        attention = model.attentions[layer]
        biases = attention.qkv.bias.view(3, heads, width)
        outputs = []
        for head in range(heads):
            q, k, v = (x @ leaves[p, layer, head].mT + biases[p, head] for p in range(3))
            outputs.append((q @ k.mT / width**0.5).softmax(-1) @ v)
        return attention.proj(torch.cat(outputs, -1))

    error = both_errors(model(images, attend))[name]
    gradients = torch.autograd.grad(error, list(leaves.values()))
    with fisher_probe(model) as probe:
        found = probe.traces(both_errors(model(images))[name], layout, last=True)
    assert found.traces.shape == (3, 2, 2)
    for key, gradient in zip(leaves, gradients, strict=True):
        written_out = sum(g**2 for g in gradient.flatten().tolist())
        assert found.traces[key].item() == pytest.approx(written_out, rel=1e-9), key
        assert written_out > 0


@pytest.mark.parametrize("name", ["camera", "point"])
def test_traces_agree_with_finite_differences(name):
    model, images, layout = tiny_scene()
    with fisher_probe(model) as probe:
        found = probe.traces(both_errors(model(images))[name], layout, last=True)
    step, layer, head, width = 1e-5, 0, 1, model.attentions[0].head_dim
    weight = model.attentions[layer].qkv.weight.detach()
    for projection in range(3):
        first = (projection * model.num_heads + head) * width
        trace = 0.0
        for row in range(first, first + width):
            for column in range(weight.shape[1]):
                values = []
                for sign in (1, -1):
                    weight[row, column] += sign * step
                    with torch.no_grad():
                        values.append(both_errors(model(images))[name].item())
                    weight[row, column] -= sign * step
                trace += ((values[0] - values[1]) / (2 * step)) ** 2
        assert found.traces[projection, layer, head].item() == pytest.approx(trace, rel=1e-6)


@pytest.mark.parametrize("name", ["camera", "point"])
def test_patch_rows_and_special_rows_add_up_to_the_whole_gradient(name):
    model, images, layout = tiny_scene()
    heads = model.num_heads
    with fisher_probe(model) as probe:
        found = probe.traces(both_errors(model(images))[name], layout, last=True)

    def query_gradients(rows: Tensor | None) -> list[Tensor]:
        """Gradient of W_Q when only ``rows`` of the queries are computed with it."""
        masters = [a.qkv.weight.detach().clone().requires_grad_() for a in model.attentions]

        def attend(layer: int, x: Tensor) -> Tensor:
            attention = model.attentions[layer]
            live = F.linear(x, masters[layer], attention.qkv.bias)
            if rows is not None:
                keep = torch.zeros(x.shape[1], 1, dtype=torch.bool)
                keep[rows] = True
                frozen = F.linear(x, masters[layer].detach(), attention.qkv.bias)
                live = torch.where(keep, live, frozen)
            q, k, v = live.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v)
            return attention.proj(out.transpose(1, 2).flatten(2))

        gradients = torch.autograd.grad(both_errors(model(images, attend))[name], masters)
        return [g.view(3, heads, -1)[0] for g in gradients]

    whole = query_gradients(None)
    patch, special = query_gradients(layout.patch_index), query_gradients(layout.special_index)
    for layer in range(2):
        torch.testing.assert_close(patch[layer] + special[layer], whole[layer])
        torch.testing.assert_close(found.patch_traces[layer], patch[layer].square().sum(-1))
        torch.testing.assert_close(found.traces[0, layer], whole[layer].square().sum(-1))
    if name == "camera":  # cameras read special tokens, so in the last layer nothing else counts
        assert (found.patch_traces[-1] == 0).all()
        assert (found.patch_traces[0] > 0).all()


def test_one_forward_serves_both_errors():
    model, images, layout = tiny_scene(torch.float32)
    separate = {}
    for name in ("camera", "point"):
        with fisher_probe(model) as probe:
            separate[name] = probe.traces(both_errors(model(images))[name], layout, last=True)
    with fisher_probe(model) as probe:
        errors = both_errors(model(images))
        camera = probe.traces(errors["camera"], layout, last=False)
        point = probe.traces(errors["point"], layout, last=True)
    assert torch.equal(camera.traces, separate["camera"].traces)
    assert torch.equal(point.patch_traces, separate["point"].patch_traces)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_model_is_left_as_it_was(dtype):
    model = TinyModel().to(dtype)
    model.train()
    model.attentions[0].eval()
    model.embed.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    state = {n: t.clone() for n, t in model.state_dict().items()}

    def calibrate_and_be_interrupted() -> None:
        with fisher_probe(model):
            assert not model.training
            assert model.recompute
            assert not any(p.requires_grad for p in model.parameters())
            widest = max(dtype, torch.float32, key=lambda d: d.itemsize)
            assert model.embed.weight.dtype == widest
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_and_be_interrupted()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert not model.recompute
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, state[name])
    assert not any(m._forward_hooks for m in model.modules())


def test_a_layer_that_the_error_does_not_depend_on_has_trace_zero():
    model, images, layout = tiny_scene()
    outputs = []

    def attend(layer: int, x: Tensor) -> Tensor:
        outputs.append(model.attentions[layer](x))
        return outputs[-1]

    with fisher_probe(model) as probe:
        model(images, attend)
        found = probe.traces(outputs[0].square().sum(), layout, last=True)
    assert (found.traces[:, 0] > 0).all()
    assert (found.traces[:, 1] == 0).all()
    assert (found.patch_traces[1] == 0).all()


def test_probe_refuses_what_it_cannot_measure():
    model, images, layout = tiny_scene()
    with fisher_probe(model) as probe:
        with torch.no_grad():
            dead = both_errors(model(images))["camera"]
        with pytest.raises(ConfigError, match="no gradient"):
            probe.traces(dead, layout, last=True)
        probe.clear()
        error = both_errors(model(images))["camera"]
        other = TokenLayout(num_views=3, grid_h=2, grid_w=4, num_special=1)
        with pytest.raises(LayoutError, match="expected 27 tokens"):
            probe.traces(error, other, last=True)
        model(images)  # a second forward on top of the first
        with pytest.raises(LayoutError, match="must run once"):
            probe.traces(error, layout, last=True)
        probe.clear()
        model(images)
        elsewhere = torch.ones((), requires_grad=True)
        with pytest.raises(ConfigError, match="depends on no global layer"):
            probe.traces(elsewhere.square(), layout, last=True)
        probe.clear()
        model(torch.cat((images, images)))
        with pytest.raises(LayoutError, match="for one scene"):
            probe.traces(error, layout, last=True)
    model.attentions = nn.ModuleList()
    with pytest.raises(ConfigError, match="no global attention"), fisher_probe(model):
        pass


# --- memory ----------------------------------------------------------------------------------


@pytest.fixture
def vggt() -> VGGT:
    """A small VGGT with every part that the public one has, and influential layers."""
    config = VGGTConfig(
        image_size=24,
        patch_size=8,
        dim=16,
        depth=4,
        num_heads=2,
        layer_scale=1.0,
        vit_depth=1,
        camera_trunk_depth=1,
        camera_heads=2,
        dense_layers=(0, 1, 2, 3),
        dpt_features=8,
        dpt_out_channels=(4, 4, 8, 8),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VGGT(config).double()


def photos(views: int = 10) -> Tensor:
    """More views than heads and encoder take at a time."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(1, views, 3, 16, 24, generator=generator, dtype=torch.float64)


def sizes_of(predictions: Predictions) -> dict[str, Tensor]:
    """Any two errors: how far the cameras and the points are from the origin."""
    return {
        "camera": predictions.world_from_cam[0, :, :3, 3].square().mean(),
        "point": predictions.world_points.square().mean(),
    }


@pytest.mark.parametrize("recompute", [True, False])
def test_vggt_is_measured_in_one_forward_as_by_plain_gradients(vggt, recompute):
    images = photos()
    layout = vggt.token_layout(images)
    vggt.eval().requires_grad_(False)
    weights = [site.module.qkv.weight.requires_grad_() for site in vggt.global_attention_sites()]
    errors = sizes_of(vggt(images))
    expected = {
        name: torch.autograd.grad(error, weights, retain_graph=True)
        for name, error in errors.items()
    }
    with fisher_probe(vggt, recompute=recompute) as probe:
        errors = sizes_of(vggt(images))
        found = {
            name: probe.traces(error, layout, last=name == "point")
            for name, error in errors.items()
        }
        vggt(images)
        with pytest.raises(LayoutError, match="must run once"):
            probe.traces(sizes_of(vggt(images))["camera"], layout, last=True)  # the second run
    for name, gradients in expected.items():
        for layer, gradient in enumerate(gradients):
            slices = gradient.view(3, vggt.num_heads, -1).square().sum(-1)
            assert (slices > 0).all()
            torch.testing.assert_close(found[name].traces[:, layer], slices, rtol=1e-9, atol=0)


@pytest.mark.parametrize("recompute", [True, False])
def test_nothing_but_squared_norms_is_stored(vggt, recompute):
    images = photos()
    records_graph = {}

    def watch(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _args, output: records_graph.update({name: output.requires_grad})

    aggregator = vggt.aggregator
    for name, module in {
        "encoder": aggregator.patch_embed,
        "first frame block": aggregator.frame_blocks[0],
        "first global block": aggregator.global_blocks[0],
    }.items():
        module.register_forward_hook(watch(name))
    with fisher_probe(vggt, recompute=recompute) as probe:
        errors = sizes_of(vggt(images))
        assert records_graph == {
            "encoder": False,
            "first frame block": False,
            "first global block": True,
        }
        probe.traces(errors["point"], vggt.token_layout(images), last=True)
        assert all(p.grad is None for p in vggt.parameters())


class SavedBytes:
    """Bytes that the graph holds for the backward pass, weights left out, each storage once."""

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self._weights = {t.untyped_storage().data_ptr() for t in tensors}
        self._saved: weakref.WeakSet[SavedBytes.Saved] = weakref.WeakSet()

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def pack(self, tensor: Tensor) -> "SavedBytes.Saved":
        saved = self.Saved(tensor)
        self._saved.add(saved)
        return saved

    def total(self) -> int:
        storages = [saved.tensor.untyped_storage() for saved in self._saved]
        sizes = {s.data_ptr(): s.nbytes() for s in storages}
        return sum(size for pointer, size in sizes.items() if pointer not in self._weights)


def test_of_a_recomputed_block_only_the_input_is_held(vggt):
    images = photos()
    tokens = vggt.token_layout(images).num_tokens
    width, depth = vggt.config.dim, vggt.config.depth
    held = {}
    for recompute in (True, False):
        saved = SavedBytes(vggt)
        with (
            fisher_probe(vggt, recompute=recompute),
            torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda s: s.tensor),
        ):
            kept = vggt.tokens(images)
            assert kept[depth - 1][1].requires_grad  # and holds the graph until here
            held[recompute] = saved.total()
    # One tensor of float64 tokens per block but the first, which comes before the graph.
    inputs = (2 * depth - 1) * tokens * width * 8
    assert held[True] == inputs
    # Otherwise at least two normalised copies, q, k, v, their result and the MLP's hidden layer.
    assert held[False] > (2 + 4 + 4) * inputs


def test_inputs_of_the_measured_layers_are_made_anew_too(vggt):
    seen: list[weakref.ref[torch.UntypedStorage]] = []
    for site in vggt.global_attention_sites():
        site.module.qkv.register_forward_pre_hook(
            lambda _module, args: seen.append(weakref.ref(args[0].untyped_storage()))
        )
    for recompute in (True, False):
        seen.clear()
        with fisher_probe(vggt, recompute=recompute):
            kept = vggt.tokens(photos())
            assert [storage() is not None for storage in seen] == 4 * [not recompute]
        del kept


def test_weight_norms_are_those_of_the_slices():
    model = TinyModel()
    norms = weight_norms(model)
    q, k, v = model.attentions[1].qkv.weight.detach().double().chunk(3)
    for index, weight in enumerate((q, k, v)):
        for head, rows in enumerate(weight.chunk(2)):
            assert norms[index, 1, head].item() == pytest.approx(rows.norm().item() ** 2)
    assert norms.shape == (len(PROJECTIONS), 2, 2)


# --- scores ----------------------------------------------------------------------------------

CAMERA = torch.tensor([[1.0, 3.0], [2.0, 2.0]], dtype=torch.float64)
POINT = torch.tensor([[10.0, 10.0], [90.0, 10.0]], dtype=torch.float64)


def scores(normalization: str, camera_weight: float = 0.25) -> Tensor:
    return head_scores(CAMERA, POINT, camera_weight=camera_weight, normalization=normalization)


def test_scores_of_known_traces():
    def expect(found: Tensor, rows: list[list[float]]) -> None:
        torch.testing.assert_close(found, torch.tensor(rows, dtype=torch.float64))

    expect(scores("trace"), [[0.25 * 0.25 + 0.375, 0.25 * 0.75 + 0.375], [0.8, 0.2]])
    expect(scores("raw"), [[7.75 / 16, 8.25 / 16], [68 / 76, 8 / 76]])
    soft = (
        torch.tensor([0.5, 1.5]).double().softmax(0),
        torch.tensor([1.8, 0.2]).double().softmax(0),
    )
    expect(scores("softmax", 1.0)[:1], [soft[0].tolist()])
    expect(scores("softmax", 0.0)[1:], [soft[1].tolist()])
    logs = torch.tensor([2.8, 1.2]).double().log()
    expect(scores("log", 0.0)[1:], [(logs / logs.sum()).tolist()])
    expect(scores("log", 0.0)[:1], [[0.5, 0.5]])


positive = st.floats(1e-12, 1e6)


@given(
    st.lists(st.tuples(positive, positive), min_size=2, max_size=8),
    st.sampled_from(["trace", "raw", "softmax", "log"]),
    st.floats(0, 1),
)
@settings(max_examples=50, deadline=None)
def test_rows_sum_to_one_and_order_follows_the_trace(pairs, normalization, camera_weight):
    camera, point = (torch.tensor([row], dtype=torch.float64) for row in zip(*pairs, strict=True))
    score = head_scores(camera, point, camera_weight=camera_weight, normalization=normalization)
    assert score.sum().item() == pytest.approx(1.0)
    assert (score >= 0).all()
    alone = head_scores(camera, None, camera_weight=1.0, normalization=normalization)
    order = camera[0].argsort()
    assert (alone[0][order].diff() >= -1e-12).all()


def test_only_raw_depends_on_the_unit_of_an_error():
    for normalization in ("trace", "softmax", "log"):
        scaled = head_scores(CAMERA, 1e6 * POINT, camera_weight=0.5, normalization=normalization)
        torch.testing.assert_close(scaled, scores(normalization, 0.5))
    scaled = head_scores(CAMERA, 1e6 * POINT, camera_weight=0.5, normalization="raw")
    torch.testing.assert_close(scaled, scores("raw", 0.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("normalization", ["trace", "raw", "softmax", "log"])
def test_an_error_no_head_influences_leaves_the_layer_to_the_other(normalization):
    dead = CAMERA.clone()
    dead[1] = 0.0
    both = head_scores(dead, POINT, camera_weight=0.5, normalization=normalization)
    torch.testing.assert_close(both[1], scores(normalization, 0.0)[1])
    alone = head_scores(dead, None, camera_weight=1.0, normalization=normalization)
    assert alone[1].tolist() == [0.5, 0.5]


@given(exponent=st.floats(0.1, 3.0))
def test_an_exponent_tempers_scores_within_each_layer(exponent: float):
    plain = head_scores(CAMERA, POINT, camera_weight=0.5)
    raised = head_scores(CAMERA, POINT, camera_weight=0.5, exponent=exponent)
    assert torch.allclose(raised.sum(-1), torch.ones(len(raised), dtype=torch.float64))
    # Ratios of heads are what an exponent acts on.
    assert torch.allclose(raised / raised[:, :1], (plain / plain[:, :1]) ** exponent)


@pytest.mark.parametrize("exponent", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_exponent_is_refused(exponent: float):
    with pytest.raises(ConfigError, match="exponent"):
        head_scores(CAMERA, POINT, camera_weight=0.5, exponent=exponent)


def test_scores_refuse_bad_parameters():
    with pytest.raises(ConfigError, match="camera_weight"):
        scores("trace", 1.5)
    with pytest.raises(ConfigError, match="normalization"):
        scores("linear")
    with pytest.raises(LayoutError, match="missing"):
        head_scores(CAMERA, None, camera_weight=0.5)


def test_scenes_are_averaged_or_the_median_taken_without_the_absent():
    traces = torch.tensor([[[1.0]], [[2.0]], [[torch.nan]], [[9.0]], [[4.0]]]).double()
    assert aggregate_scenes(traces).item() == 4.0
    assert aggregate_scenes(traces, "median").item() == 3.0
    assert aggregate_scenes(traces[2:3]) is None
    with pytest.raises(ConfigError, match="aggregate"):
        aggregate_scenes(traces, "max")


def test_concentration_counts_the_scenes_that_matter():
    equal = scene_concentration(torch.ones(8, 2, 3))
    assert equal.effective_scenes == pytest.approx(8)
    assert equal.largest_share == pytest.approx(1 / 8)
    heavy = torch.tensor([1.0, 7.0, 1.0, 1.0, torch.nan])[:, None].expand(5, 3)
    found = scene_concentration(heavy)
    assert found.effective_scenes == pytest.approx(100 / 52)
    assert found.largest_share == pytest.approx(0.7)
    assert (found.largest_scene, found.num_scenes) == (1, 4)
    assert scene_concentration(torch.full((2, 1), torch.nan)) is None
