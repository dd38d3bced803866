"""Predicted memory and work against what runs really allocate and compute."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from hess.calibration import calibrate
from hess.datasets.scene import Scene
from hess.errors import ConfigError, LayoutError
from hess.footprint import (
    Footprint,
    Throughput,
    estimate_footprint,
    measure_throughput,
    most_views,
)
from hess.footprint.live_bytes import LiveBytes, peak_live_bytes, weight_bytes
from hess.models.base import Model
from hess.models.layers import TOKENS_PER_CHUNK, use_precision
from hess.models.loading import empty_model, load_model
from hess.models.pi3 import Pi3, Pi3Config
from hess.models.random_weights import fill_randomly
from hess.models.vggt import VGGT, VGGTConfig
from hess.policies import Uniform
from hess.sparsification import sparsify

# Small, with about as many pixels per token and channel as the public models have.
COMMON = {"dim": 64, "num_heads": 4, "image_size": 64, "patch_size": 4}
SMALL_VGGT = COMMON | {
    "depth": 4,
    "vit_depth": 2,
    "camera_heads": 4,
    "camera_trunk_depth": 1,
    "camera_iterations": 1,
    "dense_layers": (0, 1, 2, 3),
    "dpt_features": 32,
    "dpt_out_channels": (16, 32, 64, 64),
}
SMALL = {
    "vggt": lambda: VGGT(VGGTConfig(**SMALL_VGGT)),
    "linear heads": lambda: VGGT(VGGTConfig(**SMALL_VGGT | {"dense_head": "linear"})),
    "no encoder": lambda: VGGT(
        VGGTConfig(**SMALL_VGGT | {"dense_head": "linear", "patch_embed": "conv"})
    ),
    "pi3": lambda: Pi3(
        Pi3Config(**COMMON, encoder_depth=2, decoder_depth=6, head_depth=3, camera_dim=32)
    ),
}
PUBLIC = ("facebook/VGGT-1B", "yyfz233/Pi3")
GIB = 2**30


def small(name: str) -> Model:
    with torch.device("meta"):
        model = SMALL[name]()
    return fill_randomly(model, seed=0)


def temporaries(model: Model, **case: object) -> int:
    """Predicted bytes beside the weights, which are known anyway."""
    footprint = estimate_footprint(model, **case)
    return footprint.peak - footprint.weights


# Memory


def test_live_bytes_counts_storages_while_they_live() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        view = a[10:].view(-1)
        b = torch.zeros(500, dtype=torch.float64) + 1  # two of 4000 for a moment
        assert live.current == 8000
        del a
        assert live.current == 8000
        del view
        b += 1
        assert (live.current, live.peak) == (4000, 12000)
    outside = torch.zeros(5000)
    assert (live.current, live.peak) == (4000, 12000)
    weights = torch.nn.Linear(10, 10)
    assert weight_bytes(torch.nn.ModuleList([weights, weights])) == 440
    assert peak_live_bytes(weights, lambda: outside + 1) == 440 + 20000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("num_views", "height", "width"), [(2, 48, 64), (11, 48, 48)])
def test_memory_of_a_forward_pass(
    name: str, dtype: torch.dtype, num_views: int, height: int, width: int
) -> None:
    model = small(name)
    use_precision(model, model.backbone_parts(), dtype)
    with torch.inference_mode(), LiveBytes() as live:
        model(torch.rand(1, num_views, 3, height, width))
    predicted = temporaries(model, num_views=num_views, height=height, width=width)
    assert predicted == pytest.approx(live.peak, rel=0.05)


@dataclass(frozen=True)
class OneScene:
    """Random photos with random cameras and depths."""

    num_views: int
    height: int
    width: int
    name: ClassVar[str] = "random"
    provenance: ClassVar[dict[str, object]] = {}

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Scene:
        n, h, w = self.num_views, self.height, self.width
        generator = torch.Generator().manual_seed(0)
        poses = torch.eye(4).repeat(n, 1, 1)
        poses[:, :3, 3] = torch.randn(n, 3, generator=generator)
        intrinsics = torch.tensor([[w, 0, w / 2], [0, w, h / 2], [0, 0, 1.0]])
        return Scene(
            name="random",
            images=torch.rand(n, 3, h, w, generator=generator),
            world_from_cam=poses,
            intrinsics=intrinsics.repeat(n, 1, 1),
            depth=1 + torch.rand(n, h, w, generator=generator),
        )


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("num_views", [3, 11])
def test_memory_of_calibration(name: str, num_views: int) -> None:
    model = small(name)
    with LiveBytes() as live:
        profile = calibrate(model, OneScene(num_views, 48, 48))
    assert not profile.failed
    predicted = temporaries(model, num_views=num_views, height=48, width=48, mode="calibration")
    assert predicted == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_memory_of_sparse_attention(sparsity: float) -> None:
    """Blocks of one token make the attention map the largest thing there is."""
    model = small("pi3")
    policy = Uniform(sparse_ratio=sparsity, cdf_threshold=0.0)
    with sparsify(model, policy, block_size_q=1, block_size_kv=1) as run:
        with torch.inference_mode(), LiveBytes() as live:
            model(torch.rand(1, 12, 3, 48, 48))
        found = run.stats.block_sparsity
    model.block_size_q = model.block_size_kv = 1
    case = {"num_views": 12, "height": 48, "width": 48}
    predicted = temporaries(model, **case, block_sparsity=found)
    assert predicted > 2 * temporaries(model, **case)
    assert predicted == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PUBLIC)
def test_memory_of_the_public_models_at_many_views(name: str, dtype: torch.dtype) -> None:
    """Tensors without data go through the very code that a CPU would run."""
    num_views, height, width = 24, 392, 518
    model = empty_model(name)
    use_precision(model, model.backbone_parts(), dtype)
    layout = model.token_layout(torch.empty(1, num_views, 3, height, width, device="meta"))
    assert layout.num_tokens > TOKENS_PER_CHUNK  # so that blocks run over chunks
    predicted = temporaries(model, num_views=num_views, height=height, width=width)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model.to_empty(device="cpu")
        with LiveBytes() as live:
            model(torch.rand(1, num_views, 3, height, width))
    assert predicted == pytest.approx(live.peak, rel=0.05)


def test_weights_of_the_public_models() -> None:
    """Parameters as published: 1.19 and 0.96 billion, tracking head aside."""
    case = {"num_views": 1, "height": 392, "width": 518}
    for name, billions in zip(PUBLIC, (1.19, 0.96), strict=True):
        model = empty_model(name)
        parameters = sum(p.numel() for p in model.parameters())
        assert parameters / 1e9 == pytest.approx(billions, abs=0.01)
        full = estimate_footprint(model, **case)
        assert full.weights == pytest.approx(4 * parameters, rel=1e-4)
        use_precision(model, model.backbone_parts(), torch.bfloat16)
        half = estimate_footprint(model, **case)
        assert 0.5 * full.weights < half.weights < 0.7 * full.weights
        calibration = estimate_footprint(model, **case, mode="calibration")
        assert calibration.weights == full.weights


@pytest.mark.parametrize("mode", ["forward", "calibration"])
@pytest.mark.parametrize("name", PUBLIC)
def test_grows_with_the_views_and_the_most_of_them_just_fit(name: str, mode: str) -> None:
    model = empty_model(name)
    size = {"height": 392, "width": 518, "mode": mode}
    counts = [1, 2, 7, 8, 9, 16, 31, 32, 33, 64, 200]
    footprints = [estimate_footprint(model, num_views=n, **size) for n in counts]
    for fewer, more in pairwise(footprints):
        assert more.peak > fewer.peak
        assert all(more.flops[stage] > flops for stage, flops in fewer.flops.items())
    most = most_views(model, 24 * GIB, **size)
    assert most > 20
    assert estimate_footprint(model, num_views=most, **size).peak <= 24 * GIB
    assert estimate_footprint(model, num_views=most + 1, **size).peak > 24 * GIB
    assert most_views(model, 2 * GIB, **size) == 0


# Work


def of_kind(footprint: Footprint, kind: str) -> float:
    return sum(work.flops for work in footprint.work if work.kind == kind)


@pytest.mark.parametrize("name", [*PUBLIC, "nano"])
def test_work_is_what_torch_counts(name: str) -> None:
    model = empty_model(name)
    size = {"height": 48, "width": 48} if name == "nano" else {"height": 392, "width": 518}
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 9, 3, *size.values(), device="meta"))
    footprint = estimate_footprint(model, num_views=9, **size)
    counts = counter.get_flop_counts()
    left_out = sum(counts.get("VGGT.camera_head", {}).values())
    total = counter.get_total_flops() - left_out
    assert left_out < 0.06 * total
    assert sum(footprint.flops.values()) == pytest.approx(total, rel=0.01)
    counted = {str(op): flops for op, flops in counts["Global"].items()}
    found = of_kind(footprint, "convolutions"), of_kind(footprint, "attention")
    assert found[0] == counted.get("aten.convolution", 0)
    assert found[1] == pytest.approx(counted["aten.bmm"], rel=0.01)


def test_work_of_calibration_is_what_torch_counts() -> None:
    model = small("vggt")
    with FlopCounterMode(display=False) as counter:
        calibrate(model, OneScene(12, 48, 48))
    footprint = estimate_footprint(model, num_views=12, height=48, width=48, mode="calibration")
    # Torch does not count the fused attention of CPUs.
    predicted = of_kind(footprint, "blocks") + of_kind(footprint, "convolutions")
    assert predicted == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_sparsity_saves_global_attention_only() -> None:
    model = empty_model("facebook/VGGT-1B")
    case = {"num_views": 50, "height": 392, "width": 518}
    dense = estimate_footprint(model, **case).flops
    sparse = estimate_footprint(model, **case, block_sparsity=0.75).flops
    assert sparse.pop("global attention") / dense.pop("global attention") == pytest.approx(
        1 - 0.75 * 1036 / 1041
    )
    assert sparse == dense


def test_seconds_follow_the_throughput_of_each_kind_and_precision() -> None:
    model = small("vggt")
    use_precision(model, model.backbone_parts(), torch.bfloat16)
    footprint = estimate_footprint(model, num_views=2, height=48, width=48)
    half = Throughput(blocks=1e9, attention=2e9, convolutions=1.0)
    full = Throughput(blocks=1.0, attention=1.0, convolutions=1e8)
    flops = footprint.flops
    attention = of_kind(footprint, "attention")
    blocks = sum(flops.values()) - attention - flops["heads"]
    expected = blocks / 1e9 + attention / 2e9 + flops["heads"] / 1e8
    seconds = footprint.seconds({torch.bfloat16: half, torch.float32: full})
    assert seconds == pytest.approx(expected)
    with pytest.raises(ConfigError, match="float32"):
        footprint.seconds({torch.bfloat16: half})


def test_throughput_is_measured_without_a_trace() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    found = measure_throughput("cpu", torch.bfloat16, seconds=0.01)
    assert min(vars(found).values()) > 1e8
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


# Refusals and helpers


def test_refusals() -> None:
    model = small("pi3")
    size = {"num_views": 2, "height": 48, "width": 48}
    for wrong in (
        {"mode": "training"},
        {"block_sparsity": 1.5},
        {"block_sparsity": 0.5, "mode": "calibration"},
    ):
        with pytest.raises(ConfigError):
            estimate_footprint(model, **size, **wrong)
    with pytest.raises(LayoutError, match="multiples of 4"):
        estimate_footprint(model, num_views=2, height=50, width=48)
    with pytest.raises(ConfigError, match="anatomy"):
        Model.anatomy(model)


def test_random_weights() -> None:
    for name in SMALL:
        model = small(name)
        assert not {t.device.type for t in (*model.parameters(), *model.buffers())} - {"cpu"}
        assert not any(p.requires_grad for p in model.parameters())
        again, other = small(name).state_dict(), fill_randomly(SMALL[name](), seed=1).state_dict()
        assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
        assert any(not torch.equal(value, other[key]) for key, value in again.items())
        with torch.inference_mode():
            assert model(torch.rand(1, 2, 3, 48, 48)).world_points.isfinite().all()
    assert torch.equal(small("pi3").image_mean, SMALL["pi3"]().image_mean)


def test_an_empty_model_is_the_loaded_one_without_its_weights() -> None:
    empty, loaded = empty_model("nano"), load_model("nano")
    assert {key: value.shape for key, value in empty.state_dict().items()} == {
        key: value.shape for key, value in loaded.state_dict().items()
    }
    case = {"num_views": 4, "height": 48, "width": 48}
    assert estimate_footprint(empty, **case) == estimate_footprint(loaded, **case)
