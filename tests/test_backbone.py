"""Our VGGT against outputs of the public reference implementation on tiny random weights."""

import copy
import json

import pytest
import torch
from safetensors import safe_open

from hess.errors import ConfigError, LayoutError
from hess.geometry.poses import invert_pose
from hess.models.camera_head import decode_cameras, encode_cameras
from hess.models.dinov2 import DinoVisionTransformer
from hess.models.vggt import VGGT, VGGTConfig

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


@pytest.fixture(scope="module")
def tokens(tiny):
    return {i: tiny[f"aggregator.out.{i}"] for i in range(4)}


def test_aggregator(tiny, model):
    with torch.inference_mode():
        out = model.aggregator(tiny["images"], range(4))
    for i in range(4):
        assert_equal_to_golden(out[i], tiny[f"aggregator.out.{i}"])


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
def test_dense_heads(tiny, model, tokens, head):
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


def test_forward_joins_the_parts(tiny, model):
    with torch.inference_mode():
        out = model(tiny["images"])
    extrinsics = torch.eye(4).expand(2, 3, 4, 4).clone()
    extrinsics[..., :3, :] = tiny["camera.extrinsics"]
    assert_equal_to_golden(out.world_from_cam, invert_pose(extrinsics))
    assert_equal_to_golden(out.world_points, tiny["point_head.out.value"])
    assert_equal_to_golden(out.depth, tiny["depth_head.out.value"][..., 0])


def test_half_precision_stays_close(tiny, model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    with torch.inference_mode():
        out, exact = half(tiny["images"]), model(tiny["images"])
    assert out.world_points.isfinite().all()
    difference = (out.world_from_cam.float() - exact.world_from_cam).abs().max()
    assert difference < 0.05 * exact.world_from_cam.abs().max()


def test_full_size_keys_and_shapes_equal_the_public_checkpoint(golden):
    facts = json.loads((golden / "vggt_1b_state_dict.json").read_text())
    expected = {k: v for k, v in facts.items() if not k.startswith("track_head.")}
    with torch.device("meta"):
        model = VGGT(VGGTConfig())
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
        {"camera_heads": 7},
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(wrong):
    with pytest.raises(ConfigError):
        VGGTConfig(**{"image_size": 56, **wrong})
