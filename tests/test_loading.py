"""Weight files: what is written comes back, and whatever is wrong with a file is said."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hess.errors import BackendUnavailableError, CheckpointError, ConfigError
from hess.models.loading import load_model, read_training_record, save_model
from hess.models.vggt import VGGT, VGGTConfig

TINY = VGGTConfig(
    image_size=16, patch_size=8, dim=32, depth=2, num_heads=4, num_registers=1,
    patch_embed="conv", camera_trunk_depth=1, camera_heads=4, camera_iterations=1,
    dense_head="linear", dense_layers=(0, 1), block_size_q=2, block_size_kv=2,
)  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_model(VGGT(TINY), path, {"command": "typed", "final": {"auc": 0.5}})
    return path


def test_the_bundled_model_is_ready_to_use() -> None:
    first, second = load_model("nano"), load_model("nano")
    assert first.model_name == "nano"
    assert not first.training
    assert not any(p.requires_grad for p in first.parameters())
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    images = torch.rand(1, 2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        a, b = first(images), second(images)
    assert torch.equal(a.world_points, b.world_points)
    assert torch.equal(a.world_from_cam, b.world_from_cam)
    assert a.world_points.isfinite().all()


def test_the_bundled_model_says_how_it_was_made() -> None:
    record = read_training_record("nano")
    assert record["command"]
    assert {"steps", "seed", "matching"} <= record["config"].keys()


def test_loading_leaves_the_global_random_numbers_alone(saved: Path) -> None:
    before = torch.get_rng_state()
    load_model(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_round_trip_in_half_precision(saved: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        original = VGGT(TINY).state_dict()
    with safe_open(saved, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    loaded = load_model(saved)
    assert loaded.config == TINY
    assert loaded.model_name == "tiny"
    assert loaded.state_dict().keys() == original.keys()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, original[key].half().float()), key
    # A second trip changes nothing any more.
    again = tmp_path / "again.safetensors"
    save_model(loaded, again, read_training_record(saved))
    for key, value in load_model(again).state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    assert read_training_record(again) == {"command": "typed", "final": {"auc": 0.5}}


def test_device_and_dtype_are_honoured(saved: Path) -> None:
    for dtype in (torch.float64, torch.bfloat16, "bfloat16"):
        model = load_model(str(saved), dtype=dtype)
        expected = torch.bfloat16 if dtype == "bfloat16" else dtype
        assert {p.dtype for p in model.parameters()} == {expected}
    meta = load_model(saved, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}


@pytest.mark.parametrize("wrong", ["half a float", "no_grad", "int32", torch.int64])
def test_other_types_are_refused(saved: Path, wrong: str | torch.dtype) -> None:
    with pytest.raises(ConfigError, match="bfloat16"):
        load_model(saved, dtype=wrong)


def test_a_missing_device_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match=r"cuda:1.*use device='cpu'"):
        load_model(saved, device="cuda:1")


Weights = dict[str, Tensor]
Header = dict[str, str]


def _set_config(**changes: object) -> Callable[[Weights, Header], None]:
    def change(_: Weights, header: Header) -> None:
        header["config"] = json.dumps({**json.loads(header["config"]), **changes})

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w, h: h.clear(), "hess train-nano"),
        (lambda w, h: h.update(format="other"), "hess train-nano"),
        (lambda w, h: h.pop("config"), "damaged header.*train it again"),
        (lambda w, h: h.update(config="{"), "damaged header.*train it again"),
        (lambda w, h: h.update(config="[1]"), "name its settings"),
        (lambda w, h: h.pop("training"), "damaged header"),
        (_set_config(colour=1), r"another version.*\['colour'\]"),
        (_set_config(dim=30), "impossible configuration.*dim"),
        (_set_config(dim="x"), "impossible configuration"),
        (_set_config(num_registers=2), "1 tensors.*register_token"),
        (lambda w, h: w.pop("point_head.norm.weight"), r"norm.weight.*found None"),
        (lambda w, h: w.update(extra=torch.zeros(1)), "'extra'.*expected None"),
        (
            lambda w, h: w.update({"aggregator.camera_token": torch.zeros(3)}),
            r"camera_token.*found \(3,\)",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(
    saved: Path, spoil: Callable[[Weights, Header], None], message: str
) -> None:
    with safe_open(saved, "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = dict(file.metadata())
    spoil(weights, header)
    save_file(weights, saved, header or None)
    with pytest.raises(CheckpointError, match=f"(?s){saved.name}.*{message}"):
        load_model(saved)


def test_damaged_and_missing_files_are_refused(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    for length in (0, 4, 100, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="download or train it again"):
            load_model(saved)
    for missing in ("gigantic", tmp_path / "none.safetensors", tmp_path):
        for read in (load_model, read_training_record):
            with pytest.raises(CheckpointError, match="bundled models: nano"):
                read(missing)


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("write", [torch.save, lambda x, p: p.write_bytes(pickle.dumps(x))])
def test_a_pickle_is_refused_without_running_it(
    tmp_path: Path, write: Callable[[object, Path], object]
) -> None:
    mark, path = tmp_path / "mark", tmp_path / "model.pt"
    write({"model": Trap(mark)}, path)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_model(path)
    assert not mark.exists()
    torch.load(path, weights_only=False) if write is torch.save else pickle.loads(
        path.read_bytes()
    )
    assert mark.exists()  # the trap works
