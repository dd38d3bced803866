"""Our Pi3 against outputs of the public reference implementation on tiny random weights."""

import copy
import json
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file

from hess.calibration import calibrate
from hess.errors import ConfigError, LayoutError
from hess.geometry.projection import intrinsics_from_points
from hess.models.layers import use_precision
from hess.models.pi3 import Pi3, Pi3Config
from hess.policies import Uniform
from hess.sparsification import sparsify
from test_backbone import assert_equal_to_golden
from test_calibrate import Scenes

TINY = {"image_size": 56, "dim": 32, "num_heads": 2, "encoder_depth": 2, "decoder_depth": 4}
PREDICTED = ("world_from_cam", "depth", "world_points", "point_confidence", "intrinsics")


@pytest.fixture(scope="module")
def tiny(request):
    return load_file(request.path.parent / "golden" / "pi3_tiny.safetensors")


@pytest.fixture(scope="module")
def model(tiny):
    model = Pi3(Pi3Config(**TINY, camera_dim=16)).eval()
    weights = {k.removeprefix("weights."): v for k, v in tiny.items() if k.startswith("weights.")}
    model.load_state_dict(weights, strict=True)
    return model


def golden_predictions(tiny):
    return {
        "world_from_cam": tiny["out.camera_poses"],
        "depth": tiny["out.local_points"][..., 2],
        "world_points": tiny["out.points"],
        "point_confidence": tiny["out.conf"][..., 0],
        "depth_confidence": tiny["out.conf"][..., 0],
    }


def largest_difference(actual, expected):
    """Relative to the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# --- parity ----------------------------------------------------------------------------------


def test_equals_the_reference(tiny, model):
    with torch.inference_mode():
        out = model(tiny["images"])
    for name, expected in golden_predictions(tiny).items():
        assert_equal_to_golden(getattr(out, name), expected)


def test_equals_the_reference_in_float64_to_its_last_digits(tiny, model):
    """Tight enough to tell a layer norm's epsilon of 1e-5 from 1e-6 in any part."""
    double = copy.deepcopy(model).double()
    with torch.inference_mode():
        out = double(tiny["images"].double())
    for name, expected in golden_predictions(tiny).items():
        assert largest_difference(getattr(out, name), expected) < 1e-6, name


def test_intrinsics_are_those_of_the_points_each_by_its_certainty(tiny, model):
    with torch.inference_mode():
        found = model(tiny["images"]).intrinsics
    weights = 1 / (1 + (-tiny["out.conf"][..., 0]).exp())
    expected = intrinsics_from_points(tiny["out.local_points"], weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_full_size_keys_and_shapes_equal_the_public_checkpoint(golden):
    expected = json.loads((golden / "pi3_state_dict.json").read_text())
    with torch.device("meta"):
        model = Pi3(Pi3Config())
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == expected
    assert model.camera_weight == 0.0
    sites = model.global_attention_sites()
    assert [site.layer_idx for site in sites] == list(range(18))
    assert [site.module for site in sites] == [block.attn for block in model.decoder[1::2]]


def test_half_precision_weights_are_float32_weights_under_autocast(tiny, model):
    half, reference = copy.deepcopy(model), copy.deepcopy(model)
    use_precision(half, half.backbone_parts(), torch.bfloat16)
    for part in reference.backbone_parts():
        for module in part if isinstance(part, torch.nn.ModuleList) else [part]:
            module.forward = torch.autocast("cpu", torch.bfloat16)(module.forward)
    with torch.inference_mode():
        out, expected, exact = (m(tiny["images"]) for m in (half, reference, model))
    for name in ("world_from_cam", "depth", "world_points", "point_confidence"):
        assert getattr(out, name).dtype == torch.float32
        found = largest_difference(getattr(out, name), getattr(expected, name))
        rounding = largest_difference(getattr(out, name), getattr(exact, name))
        assert found < 1e-6, name
        assert rounding > 1e-4, name


# --- structure -------------------------------------------------------------------------------


def test_global_blocks_see_all_views_each_with_its_specials_first(tiny, model):
    seen = {}
    hooks = [
        block.register_forward_pre_hook(lambda _, args, i=i: seen.update({i: args}))
        for i, block in enumerate(model.decoder)
    ]
    with torch.inference_mode():
        model(tiny["images"])
    for hook in hooks:
        hook.remove()
    layout = model.token_layout(tiny["images"])
    assert (layout.num_views, layout.grid_h, layout.grid_w, layout.num_special) == (3, 4, 3, 5)
    registers = model.register_token[0].expand(3, -1, -1)
    assert torch.equal(seen[0][0][:, :5], registers)
    for i, (x, rope, *rest) in seen.items():
        is_global = i % 2 == 1
        assert x.shape == ((1, layout.num_tokens, 32) if is_global else (3, 17, 32))
        assert (layout in rest) == is_global
        at_origin = (rope[0] == 1).all(-1)
        assert torch.equal(at_origin, layout.is_special if is_global else layout.is_special[:17])


def test_permuting_the_views_permutes_the_predictions(tiny, model):
    double = copy.deepcopy(model).double()
    images, order = tiny["images"].double(), [2, 0, 1]
    with torch.inference_mode():
        out, permuted = double(images), double(images[:, order])
    for field in fields(out):
        expected = getattr(out, field.name)[:, order]
        torch.testing.assert_close(getattr(permuted, field.name), expected, rtol=1e-9, atol=1e-9)


def test_scenes_of_a_batch_do_not_see_each_other(tiny, model):
    images = torch.cat([tiny["images"], tiny["images"].flip(-1)])
    with torch.inference_mode():
        both = model(images)
        for i in range(2):
            alone = model(images[i : i + 1])
            for name in PREDICTED:
                found = getattr(both, name)[i]
                assert largest_difference(found, getattr(alone, name)[0]) < 1e-5, name


def test_certainty_is_the_sigmoid_of_the_logit(model):
    logits = torch.tensor([-2.0, 0.0, 3.0])
    torch.testing.assert_close(model.certainty(logits), 1 / (1 + (-logits).exp()))


def test_photos_fill_the_pixel_budget(model):
    fits = model.image_rule([(4000, 3000), (3000, 4000)])
    assert {(fit.width, fit.height) for fit in fits} == {(574, 434)}


@pytest.mark.parametrize("shape", [(1, 2, 3, 55, 42), (1, 2, 4, 56, 42), (2, 3, 56, 42)])
def test_images_of_another_shape_are_refused(model, shape):
    with pytest.raises(LayoutError, match="multiples of 14"):
        model(torch.zeros(shape))


@pytest.mark.parametrize(
    "wrong",
    [{"dim": 30}, {"image_size": 50}, {"decoder_depth": 5}, {"num_heads": 0}, {"camera_dim": 0}],
)
def test_sizes_that_do_not_fit_together_are_refused(wrong):
    with pytest.raises(ConfigError):
        Pi3Config(**{**TINY, **wrong})


def test_a_configuration_survives_json():
    config = Pi3Config(**TINY)
    assert Pi3Config(**json.loads(json.dumps(config.as_dict()))) == config


# --- memory ----------------------------------------------------------------------------------


def test_chunks_of_views_change_nothing(tiny, model, monkeypatch):
    with torch.inference_mode():
        whole = model(tiny["images"])
        monkeypatch.setattr("hess.models.layers.VIEWS_PER_CHUNK", 2)
        chunked = model(tiny["images"])
    for name in PREDICTED:
        assert largest_difference(getattr(chunked, name), getattr(whole, name)) < 1e-5, name


def test_recomputing_activations_changes_no_gradient(tiny, model, monkeypatch):
    monkeypatch.setattr("hess.models.layers.VIEWS_PER_CHUNK", 2)
    double = copy.deepcopy(model).double()
    weights = [site.module.qkv.weight for site in double.global_attention_sites()]

    def gradients(recompute):
        double.recompute = recompute
        out = double(tiny["images"].double())
        loss = sum((getattr(out, name) * 0.1).tanh().sum() for name in PREDICTED[:-1])
        return torch.autograd.grad(loss, weights)

    for held, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert held.abs().max() > 1e-6
        torch.testing.assert_close(recomputed, held, rtol=1e-9, atol=1e-12)


# --- the method on it ------------------------------------------------------------------------


def test_sparsified_without_dropping_is_dense(tiny, model):
    with torch.inference_mode():
        dense = model(tiny["images"])
        with sparsify(model, Uniform(sparse_ratio=0.0), block_size_q=4, block_size_kv=4) as run:
            sparse = model(tiny["images"])
        with sparsify(model, Uniform(sparse_ratio=0.5), block_size_q=4, block_size_kv=4):
            dropped = model(tiny["images"])
    assert run.stats.layers == (0, 1)
    assert run.stats.block_sparsity == 0.0
    for name in PREDICTED:
        assert largest_difference(getattr(sparse, name), getattr(dense, name)) < 1e-5, name
    assert largest_difference(dropped.world_points, dense.world_points) > 1e-5


def test_calibration_measures_every_head():
    torch.manual_seed(0)
    model = Pi3(
        Pi3Config(
            image_size=16,
            patch_size=4,
            dim=16,
            num_heads=2,
            encoder_depth=1,
            decoder_depth=6,
            head_depth=1,
            camera_dim=8,
            layer_scale=1.0,
        )
    )
    profile = calibrate(model, Scenes(2))
    assert profile.failed == ()
    assert profile.scores().shape == (3, 2)
    assert (profile.traces > 0).all()
