"""Our VGGT against outputs of the public reference implementation on tiny random weights."""

import copy
import json

import pytest
import torch
from safetensors import safe_open

from hess.errors import ConfigError, LayoutError
from hess.geometry.fit_rules import square_crop, vggt_crop
from hess.geometry.poses import invert_pose
from hess.models import layers
from hess.models.camera_head import decode_cameras, encode_cameras
from hess.models.dinov2 import DinoVisionTransformer
from hess.models.layers import use_precision
from hess.models.vggt import VGGT, VGGT_1B, VGGTConfig
from hess.policies import Uniform
from hess.sparsification import sparsify

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


class Golden:
    def __init__(self, path):
        with safe_open(path, "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def __getitem__(self, key):
        return self.tensors[key]

    def weights(self, part):
        prefix = f"{part}.weights."
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def tiny(request):
    return Golden(request.path.parent / "golden" / "vggt_tiny.safetensors")


@pytest.fixture(scope="module")
def model(tiny):
    c = tiny.config
    model = VGGT(
        VGGTConfig(
            image_size=c["img_size"],
            patch_size=c["patch_size"],
            dim=c["embed_dim"],
            depth=c["depth"],
            num_heads=c["num_heads"],
            patch_embed=c["patch_embed"],
            camera_trunk_depth=c["camera_trunk_depth"],
            camera_heads=c["camera_heads"],
            dense_layers=tuple(c["dpt_layers"]),
            dpt_features=c["dpt_features"],
            dpt_out_channels=tuple(c["dpt_out_channels"]),
        )
    ).eval()
    for part in ("aggregator", "camera_head", "point_head", "depth_head"):
        model.get_submodule(part).load_state_dict(tiny.weights(part), strict=True)
    return model


def assert_equal_to_golden(actual, expected):
    """1e-5 relative to the largest value, in fp32."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks that cut the 6 views and the 51 tokens of a scene, 17 of them per view, unevenly."""
    monkeypatch.setattr(layers, "VIEWS_PER_CHUNK", 4)
    monkeypatch.setattr(layers, "TOKENS_PER_CHUNK", 40)


@pytest.fixture(params=["whole", "chunked"])
def chunks(request):
    if request.param == "chunked":
        request.getfixturevalue("small_chunks")


@pytest.fixture(scope="module")
def tokens(tiny):
    return {i: tiny[f"aggregator.out.{i}"].chunk(2, dim=-1) for i in range(4)}


def test_aggregator(tiny, model, chunks):
    with torch.inference_mode():
        out = model.aggregator(tiny["images"], range(4))
    for i in range(4):
        assert_equal_to_golden(torch.cat(out[i], dim=-1), tiny[f"aggregator.out.{i}"])


def test_aggregator_keeps_only_the_layers_that_are_asked_for(tiny, model):
    with torch.inference_mode():
        assert sorted(model.aggregator(tiny["images"], {1, 3})) == [1, 3]


def test_camera_head_at_every_iteration(tiny, model, tokens):
    with torch.inference_mode():
        encodings = model.camera_encodings(tokens)
    assert len(encodings) == 4
    for i, encoding in enumerate(encodings):
        assert_equal_to_golden(encoding, tiny[f"camera_head.out.{i}"])


@pytest.mark.parametrize("head", ["point_head", "depth_head"])
def test_dense_heads(tiny, model, tokens, head, chunks):
    with torch.inference_mode():
        value, confidence = model.get_submodule(head)(tokens, 5, 56, 42)
    assert_equal_to_golden(value, tiny[f"{head}.out.value"])
    assert_equal_to_golden(confidence, tiny[f"{head}.out.confidence"])


def test_dinov2_encoder_with_interpolated_positions(tiny):
    c = tiny.config["vit"]
    vit = DinoVisionTransformer(
        image_size=c["img_size"],
        patch_size=c["patch_size"],
        dim=c["embed_dim"],
        depth=c["depth"],
        num_heads=c["num_heads"],
        num_registers=c["num_register_tokens"],
        layer_scale=c["init_values"],
    )
    vit.load_state_dict(tiny.weights("dinov2"), strict=True)
    images = tiny["images"].flatten(0, 1)
    expected = tiny["dinov2.out.patch_tokens"]
    with torch.inference_mode():
        assert_equal_to_golden(vit(images), expected)


def test_pose_encoding_both_ways(tiny):
    encoding = encode_cameras(
        tiny["pose_encoding.in.extrinsics"], tiny["pose_encoding.in.intrinsics"], 56, 42
    )
    assert_equal_to_golden(encoding, tiny["pose_encoding.out"])
    extrinsics, intrinsics = decode_cameras(encoding, 56, 42)
    assert_equal_to_golden(extrinsics[..., :3, :], tiny["pose_encoding.in.extrinsics"])
    assert_equal_to_golden(intrinsics, tiny["pose_encoding.in.intrinsics"])


def test_cameras_decode_as_the_reference(tiny):
    extrinsics, intrinsics = decode_cameras(tiny["camera_head.out.3"], 56, 42)
    assert_equal_to_golden(extrinsics[..., :3, :], tiny["camera.extrinsics"])
    # The random weights predict a field of view of zero, which the reference turns into infinite
    # focal lengths; ours stay finite.
    assert torch.equal(intrinsics[..., :2, 2], tiny["camera.intrinsics"][..., :2, 2])
    assert intrinsics.isfinite().all()


def test_forward_joins_the_parts(tiny, model, chunks):
    with torch.inference_mode():
        out = model(tiny["images"])
    extrinsics = torch.eye(4).expand(2, 3, 4, 4).clone()
    extrinsics[..., :3, :] = tiny["camera.extrinsics"]
    assert_equal_to_golden(out.world_from_cam, invert_pose(extrinsics))
    assert_equal_to_golden(out.world_points, tiny["point_head.out.value"])
    assert_equal_to_golden(out.depth, tiny["depth_head.out.value"][..., 0])


@pytest.fixture(scope="module", params=[("vit", "dpt"), ("conv", "linear")], ids=str)
def full(request):
    """Random weights in all parts of a model, encoder included."""
    torch.manual_seed(0)
    patch_embed, dense_head = request.param
    return VGGT(
        VGGTConfig(
            image_size=56,
            dim=32,
            depth=4,
            num_heads=2,
            layer_scale=1.0,
            patch_embed=patch_embed,
            vit_depth=2,
            camera_trunk_depth=1,
            camera_heads=4,
            camera_iterations=2,
            dense_head=dense_head,
            dense_layers=(0, 1, 2, 3),
            dpt_features=16,
            dpt_out_channels=(8, 8, 16, 16),
            block_size_q=6,
            block_size_kv=6,
        )
    ).eval()


def assert_same_predictions(actual, expected, tolerance=1e-5):
    for name, value in vars(expected).items():
        error = (getattr(actual, name) - value).abs().max()
        assert error <= tolerance * value.abs().max(), name


def test_chunks_change_nothing(tiny, full, small_chunks, monkeypatch):
    with torch.inference_mode():
        chunked = full(tiny["images"])
        with sparsify(full, Uniform(sparse_ratio=0.5)):
            sparse_chunked = full(tiny["images"])
        monkeypatch.undo()
        assert_same_predictions(chunked, full(tiny["images"]))
        with sparsify(full, Uniform(sparse_ratio=0.5)):
            assert_same_predictions(sparse_chunked, full(tiny["images"]))


def test_no_layer_sees_more_than_a_chunk(tiny, full, small_chunks):
    seen = {}

    def note(name):
        return lambda _, args: seen.setdefault(name, []).append(args[0].shape[:-1])

    block = full.aggregator.global_blocks[0]
    frame = full.aggregator.frame_blocks[0]
    watched = {
        "encoder": full.aggregator.patch_embed,
        "frame": frame,
        "norm": block.norm1,
        "qkv": block.attn.qkv,
        "mlp": block.mlp.fc1,
        "head": full.point_head.norm,
    }
    hooks = [m.register_forward_pre_hook(note(name)) for name, m in watched.items()]
    with torch.inference_mode():
        full(tiny["images"])
    for hook in hooks:
        hook.remove()
    assert [shape[0] for shape in seen["encoder"]] == [4, 2]
    assert seen["frame"] == [(2, 17)] * 3
    # Two scenes of 51 tokens take turns.
    assert seen["norm"] == seen["qkv"] == seen["mlp"] == [(1, 40), (1, 11)] * 2
    assert {shape[0] for shape in seen["head"]} == {4, 2}


def run_with_gradients(model, images, recompute):
    """Predictions, gradients of all weights, and the bytes held for the backward pass."""
    held = {}

    def pack(x):
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model.recompute = recompute
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model(images)
    sum(value.square().mean() for value in vars(out).values()).backward()
    model.recompute = False
    weights = dict(model.named_parameters())
    gradients = {name: w.grad.clone() for name, w in weights.items() if w.grad is not None}
    return out, gradients, sum(held.values())


def test_recomputed_activations_give_the_same_gradients_and_are_not_held(tiny, full, small_chunks):
    out, gradients, held = run_with_gradients(full, tiny["images"], recompute=False)
    again, recomputed, less = run_with_gradients(full, tiny["images"], recompute=True)
    assert_same_predictions(again, out)
    assert recomputed.keys() == gradients.keys() >= {"aggregator.camera_token"}
    for name, gradient in gradients.items():
        largest = max(gradient.abs().max(), 1e-6)
        assert (recomputed[name] - gradient).abs().max() <= 1e-4 * largest, name
    assert less < 0.5 * held


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_arithmetic_of_autocast(tiny, full, dtype):
    """Bit for bit: both round the same operands of the same products, and nothing else.

    As in the public model, the heads are outside of autocast.
    """
    half = copy.deepcopy(full)
    use_precision(half, half.backbone_parts(), dtype)
    with torch.no_grad():
        tokens = half.tokens(tiny["images"])
        with torch.autocast("cpu", dtype):
            expected = full.tokens(tiny["images"])
        for i, pair in expected.items():
            for actual, value in zip(tokens[i], pair, strict=True):
                assert actual.dtype == torch.float32
                assert torch.equal(actual, value)
        exact = full.tokens(tiny["images"])[3][1]
        assert 0 < (tokens[3][1] - exact).abs().max() < 0.05 * exact.abs().max()
        depth, _ = full.depth_head(expected, full.num_special, 56, 42)
        assert torch.equal(half(tiny["images"]).depth, depth.squeeze(-1))


def test_weights_assigned_to_a_model_without_memory(tiny, full):
    with torch.device("meta"):
        empty = VGGT(full.config)
    empty.load_state_dict(full.state_dict(), assign=True)
    assert not [name for name, _ in full.named_buffers()]
    with torch.inference_mode():
        assert_same_predictions(empty.eval()(tiny["images"]), full(tiny["images"]), tolerance=0)


def test_public_model_shows_photos_in_full_width():
    with torch.device("meta"):
        public, square = VGGT(VGGT_1B), VGGT(VGGTConfig())
    photos = [(640, 480), (480, 640)]
    assert public.image_rule(photos) == vggt_crop(518, 14)(photos)
    assert square.image_rule(photos) == square_crop(518)(photos)


def test_full_size_keys_and_shapes_equal_the_public_checkpoint(golden):
    facts = json.loads((golden / "vggt_1b_state_dict.json").read_text())
    expected = {k: v for k, v in facts.items() if not k.startswith("track_head.")}
    with torch.device("meta"):
        model = VGGT(VGGT_1B)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == expected


def test_images_that_do_not_fit_the_patches_are_refused(model):
    with pytest.raises(LayoutError, match="multiples of 14"):
        model(torch.zeros(1, 2, 3, 55, 42))


@pytest.mark.parametrize(
    "wrong",
    [
        {"dim": 30},
        {"image_size": 50},
        {"dense_layers": (0, 1, 2, 99)},
        {"dense_layers": (-1, 1, 2, 3)},
        {"num_heads": 0},
        {"patch_embed": "covn"},
        {"dense_head": "lin"},
        {"image_rule": "pad"},
        {"camera_heads": 7},
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(wrong):
    with pytest.raises(ConfigError):
        VGGTConfig(**{"image_size": 56, **wrong})
