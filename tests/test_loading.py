"""Weight files: what is written comes back, and whatever is wrong with a file is said."""

import json
import logging
import pickle
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hess import from_upstream
from hess.errors import BackendUnavailableError, CheckpointError, ConfigError
from hess.models import loading, weight_file
from hess.models.loading import load_model, read_training_record, save_model
from hess.models.pi3 import Pi3, Pi3Config
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
    double = load_model(str(saved), dtype=torch.float64)
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    for dtype in (torch.bfloat16, "bfloat16"):
        half = load_model(saved, dtype=dtype)
        assert half.aggregator.global_blocks[0].attn.qkv.weight.dtype == torch.bfloat16
        assert half.aggregator.patch_embed.proj.bias.dtype == torch.bfloat16
        assert half.aggregator.global_blocks[0].norm1.weight.dtype == torch.float32
        assert {p.dtype for p in half.camera_head.parameters()} == {torch.float32}
    meta = load_model(saved, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}


@pytest.mark.parametrize(
    "wrong",
    ["half a float", "no_grad", "int32", torch.int64, "float8_e4m3fn", torch.float8_e5m2],
)
def test_other_types_are_refused(saved: Path, wrong: str | torch.dtype) -> None:
    with pytest.raises(ConfigError, match="float32, bfloat16, float16, float64, found"):
        load_model(saved, dtype=wrong)


ABSENT = ["cuda:99", "vulkan", *([] if torch.backends.mps.is_available() else ["mps"])]


@pytest.mark.parametrize("device", ABSENT)
def test_a_missing_device_is_named(saved: Path, device: str) -> None:
    with pytest.raises(BackendUnavailableError, match=rf"{device}.*use device='cpu'"):
        load_model(saved, device=device)


@pytest.mark.parametrize("device", ["xyz", "cuda:x", ""])
def test_what_is_no_device_is_refused(saved: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"such as 'cpu'.*found '{device}'"):
        load_model(saved, device=device)


Weights = dict[str, Tensor]
Header = dict[str, str]


def _set_config(**changes: object) -> Callable[[Weights, Header], None]:
    def change(_: Weights, header: Header) -> None:
        header["config"] = json.dumps({**json.loads(header["config"]), **changes})

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w, h: h.clear(), "does not fit the public VGGT"),
        (lambda w, h: h.update(format="other"), "does not fit the public VGGT"),
        (lambda w, h: h.pop("config"), "damaged header.*train it again"),
        (lambda w, h: h.update(config="{"), "damaged header.*train it again"),
        (lambda w, h: h.update(config="[1]"), "name its settings"),
        (lambda w, h: h.pop("training"), "damaged header"),
        (_set_config(colour=1), r"another version.*\['colour'\]"),
        (_set_config(dim=30), "impossible configuration.*dim"),
        (_set_config(dim="x"), "impossible configuration"),
        (
            _set_config(num_registers=2),
            "0 tensors missing, 0 unexpected, 1 of another.*register_token",
        ),
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


def test_damaged_files_are_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for length in (0, 4, 100, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=rf"\({length} bytes\).*train it again"):
            load_model(saved)


@pytest.mark.parametrize(
    ("name", "similar"),
    [
        ("gigantic", None),
        ("folder/none.safetensors", None),
        ("nanno", "nano"),
        ("vggt", "facebook/VGGT-1B"),
        ("PI3", "yyfz233/Pi3"),
        ("VGGT-1B-comercial", "facebook/VGGT-1B-Commercial"),
    ],
)
def test_unknown_names_are_refused_with_the_closest_known(name: str, similar: str | None) -> None:
    for read in (load_model, read_training_record):
        with pytest.raises(CheckpointError, match="known models: nano, pi3-nano, face") as said:
            read(name)
        assert (f"did you mean {similar}" in str(said.value)) == (similar is not None)
        assert similar is not None or "did you mean" not in str(said.value)


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (torch.save, "would run code.*refused.*safetensors"),
        (lambda x, p: p.write_bytes(pickle.dumps(x)), "not a file that torch.save writes"),
    ],
)
def test_a_pickle_is_refused_without_running_it(
    tmp_path: Path, write: Callable[[object, Path], object], message: str
) -> None:
    mark, path = tmp_path / "mark", tmp_path / "model.pt"
    write({"model": Trap(mark)}, path)
    with pytest.raises(CheckpointError, match=f"(?s){path.name}.*{message}"):
        load_model(path)
    assert not mark.exists()
    torch.load(path, weights_only=False) if write is torch.save else pickle.loads(
        path.read_bytes()
    )
    assert mark.exists()  # the trap works


# --- Files with the keys of a public checkpoint


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Weights:
    """Weights with VGGT's keys, for as long as a public VGGT is taken to be tiny."""
    monkeypatch.setitem(loading._PUBLIC, "VGGT", lambda name: VGGT(TINY, name))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VGGT(TINY).state_dict() | {
            "track_head.norm.weight": torch.zeros(4),
            "track_head.norm.bias": torch.zeros(4),
        }


def assert_holds(model: nn.Module, weights: Weights) -> None:
    """The model has exactly these weights, on the CPU, and is ready to use."""
    kept = {k: v for k, v in weights.items() if not k.startswith("track_head.")}
    assert model.state_dict().keys() == kept.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, kept[key]), key
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + key: value for key, value in weights.items()}


@pytest.mark.parametrize(
    ("suffix", "wrap"),
    [
        (".safetensors", lambda w: w),
        (".safetensors", lambda w: prefixed("module.", w)),
        (".pt", lambda w: w),
        (".pth", lambda w: {"model": w, "epoch": 3, "optimizer": {"lr": [1.0]}}),
        (".bin", lambda w: {"model": prefixed("module.", w)}),
        (".ckpt", lambda w: {"state_dict": prefixed("model.", w)}),
        (".pt", lambda w: {"model": {"state_dict": prefixed("_orig_mod.", w)}}),
    ],
)
def test_the_keys_say_what_a_file_holds(
    tmp_path: Path, small: Weights, suffix: str, wrap: Callable[[Weights], Weights]
) -> None:
    path = tmp_path / f"pi3{suffix}"  # the name says nothing
    (save_file if suffix == ".safetensors" else torch.save)(wrap(small), path)
    model = load_model(path)
    assert isinstance(model, VGGT)
    assert model.model_name == "pi3"
    assert_holds(model, small)
    assert model(torch.zeros(1, 2, 3, 16, 16)).world_points.isfinite().all()


def test_what_is_skipped_and_the_licence_are_said_once(
    tmp_path: Path, small: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mine.safetensors"
    save_file(small, path)
    model = load_model(path)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    licence = (
        "weights of mine: these have the keys of VGGT; their licence is that of where you got"
    )
    assert record.getMessage() == (
        f"{licence} them; track_head.* is skipped (2 tensors): nothing here tracks points"
    )
    assert model.weights_license == f"{licence} them"
    caplog.clear()
    from_upstream(model)
    assert [r.getMessage().endswith("where you got them") for r in caplog.records] == [True]
    caplog.clear()
    assert load_model("nano").weights_license is None
    assert not caplog.records


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_model_does_not_depend_on_its_file(
    tmp_path: Path, small: Weights, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_file, "MAPPED_BYTES", 10_000)
    path = tmp_path / f"mine{suffix}"
    (torch.save if suffix == ".pt" else save_file)(small, path)
    model = load_model(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_holds(model, small)


def test_half_precision_is_for_the_matrices_of_the_backbone(
    tmp_path: Path, small: Weights
) -> None:
    path = tmp_path / "mine.pt"
    torch.save(small, path)
    model = load_model(path, dtype="bfloat16")
    for key, value in model.state_dict().items():
        matrix = any(part in key for part in (".qkv.", ".proj.", ".fc1.", ".fc2."))
        half = key.startswith("aggregator.") and matrix
        assert value.dtype == (torch.bfloat16 if half else torch.float32), key
        assert torch.equal(value, small[key].to(value.dtype)), key


def test_half_precision_files_are_widened(tmp_path: Path, small: Weights) -> None:
    half = {key: value.bfloat16() for key, value in small.items()}
    save_file(half, tmp_path / "mine.safetensors")
    model = load_model(tmp_path / "mine.safetensors")
    assert_holds(model, {key: value.float() for key, value in half.items()})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda w: w.pop("depth_head.norm.weight"),
            r"1 tensors missing, 0 unexpected, 0 of .*'depth_head.norm.weight' "
            r"\(expected \(128,\), found None\); a variant",
        ),
        (
            lambda w: [w.pop(k) for k in list(w) if k.startswith(("point_", "depth_"))],
            "12 tensors missing.*without depth_head, point_head, which is needed",
        ),
        (
            lambda w: w.update({"aggregator.camera_token": torch.zeros(1, 2, 1, 8)}),
            r"1 of another.*\(expected \(1, 2, 1, 32\), found \(1, 2, 1, 8\)\); another size",
        ),
        (lambda w: w.update(extra=torch.zeros(1)), r"1 unexpected.*'extra' \(expected None"),
        (
            lambda w: w.update({"camera_head.token_norm.bias": torch.zeros(64, dtype=torch.int8)}),
            r"found of torch.int8",
        ),
        (lambda w: [w.pop(k) for k in list(w) if "track" not in k], "no supported arch.*VGGT"),
        (
            lambda w: w.update({"aggregator.inter_frame_blocks.0.x": torch.zeros(1)}),
            "holds VGGT-Omega, which is not supported: .*use facebook/VGGT-1B",
        ),
        (
            lambda w: (
                w.clear(),
                w.update(register_token=torch.zeros(1), metric_token=torch.zeros(1)),
            ),
            "holds Pi3X, which is not supported: .*use yyfz233/Pi3",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, small: Weights, spoil: Callable[[Weights], object], message: str
) -> None:
    spoil(small)
    for path, write in ((tmp_path / "a.safetensors", save_file), (tmp_path / "a.pt", torch.save)):
        write(small, path)
        with pytest.raises(CheckpointError, match=f"(?s){path.name}.*{message}"):
            load_model(path)
    with pytest.raises(CheckpointError, match=f"(?s)this Branch.*{message}"):
        from_upstream(as_module(small))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "found a list"),
        ({"epoch": 1}, "found the entries 'epoch'"),
        ({}, "an empty dict"),
        ({"model": {"args": Namespace()}}, "would run code"),
        ({1: torch.zeros(1)}, "found the entries 1"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=f"model.pt.*{message}"):
        load_model(tmp_path / "model.pt")


def test_what_is_no_weight_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(CheckpointError, match=r"photo.jpg is not a weight file.*\.safetensors"):
        load_model(tmp_path / "photo.jpg")
    for name in ("model.safetensors", "model.pt"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(CheckpointError, match=rf"{name} \(43 bytes\) is not"):
            load_model(tmp_path / name)


@pytest.fixture(params=[".pt", ".safetensors"])
def whole(request: pytest.FixtureRequest, tmp_path: Path, small: Weights) -> Path:
    path = tmp_path / f"whole{request.param}"
    (torch.save if request.param == ".pt" else save_file)(small, path)
    return path


@given(data=st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_or_damaged_file_never_surprises(whole: Path, data: st.DataObject) -> None:
    content, spoiled = bytearray(whole.read_bytes()), whole.with_stem("spoiled")
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        spoiled.write_bytes(content[:place])
        with pytest.raises(CheckpointError, match=rf"{spoiled.name} \({place} bytes\).*again"):
            load_model(spoiled)
        return
    # Most of the file are weights, which may be anything; its ends say what they are.
    place = data.draw(st.sampled_from([place, place % 9000, -1 - place % 9000]))
    content[place] = data.draw(st.integers(0, 255))
    spoiled.write_bytes(content)
    with suppress(CheckpointError):
        load_model(spoiled)


def test_a_folder_holds_one_weight_file(tmp_path: Path, small: Weights) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"my-model must hold model\.safetensors.*found none"
    ):
        load_model(folder)
    torch.save(small, folder / "vggt_1B_commercial.pt")
    assert load_model(folder).model_name == "my-model"
    (folder / "other.bin").touch()
    with pytest.raises(CheckpointError, match=r"found other\.bin, vggt_1B_commercial\.pt"):
        load_model(folder)
    torch.save(small, folder / "model.pt")
    assert_holds(load_model(folder), small)
    (folder / "model.pt").write_bytes(b"not this one")
    save_file(small, folder / "model.safetensors")
    assert_holds(load_model(folder), small)


@pytest.mark.parametrize(
    ("write", "right", "wrong"),
    [(torch.save, ".pt", ".safetensors"), (save_file, ".safetensors", ".pt")],
)
def test_a_wrong_suffix_is_to_be_renamed(
    tmp_path: Path,
    small: Weights,
    write: Callable[[Weights, Path], object],
    right: str,
    wrong: str,
) -> None:
    path = tmp_path / f"mine{wrong}"
    write(small, path)
    with pytest.raises(CheckpointError, match=rf"mine\{wrong} is .*; rename it to \{right}$"):
        load_model(path)
    assert_holds(load_model(path.rename(path.with_suffix(right))), small)


def test_the_old_format_of_torch_is_converted_as_the_message_says(
    tmp_path: Path, small: Weights
) -> None:
    old, new = tmp_path / "old.pt", tmp_path / "new.pt"
    torch.save(small, old, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"old\.pt is in the format of torch before") as said:
        load_model(old)
    advice = str(said.value).partition("convert it once: ")[2]
    assert advice == "torch.save(torch.load(old, map_location='cpu', weights_only=True), new)"
    torch.save(torch.load(old, map_location="cpu", weights_only=True), new)
    assert_holds(load_model(new), small)


@pytest.mark.parametrize(("suffix", "write"), [("bin", torch.save), ("safetensors", save_file)])
def test_weights_in_pieces_are_one(
    tmp_path: Path,
    small: Weights,
    suffix: str,
    write: Callable[[Weights, Path], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weight_file, "MAPPED_BYTES", 10_000)
    (tmp_path / f"model.{suffix}.index.json").write_text("{}")
    pieces = [tmp_path / f"model-0000{i}-of-00003.{suffix}" for i in (1, 2, 3)]
    # Some wrappers are recognised by all keys of all pieces only.
    wrapped = prefixed("model.", small)
    for i, piece in enumerate(pieces):
        write({key: wrapped[key] for key in list(wrapped)[i::3]}, piece)
    assert_holds(load_model(tmp_path), small)
    assert_holds(load_model(pieces[1]), small)
    pieces[0].unlink()
    for path in (tmp_path, pieces[1]):
        with pytest.raises(CheckpointError, match=f"3 pieces.*1 are missing.*{pieces[0].name}"):
            load_model(path)


@pytest.mark.parametrize("name", ["a-00004-of-00003.pt", "a-00000-of-00000.pt", "a-1-of-2.pt"])
def test_what_only_looks_like_a_piece_stands_alone(
    tmp_path: Path, small: Weights, name: str
) -> None:
    torch.save(small, tmp_path / name)
    assert_holds(load_model(tmp_path), small)


def test_a_path_wins_over_an_id(
    tmp_path: Path, small: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "facebook" / "VGGT-1B"
    folder.mkdir(parents=True)
    torch.save(small, folder / "model.pt")
    monkeypatch.chdir(tmp_path)
    model = load_model("facebook/VGGT-1B")
    assert_holds(model, small)
    assert model.model_name == "VGGT-1B"
    assert "where you got them" in model.weights_license


# --- Objects of the upstream packages


class Branch(nn.Module):
    """A module with nothing but children and parameters."""


def as_module(weights: Weights) -> nn.Module:
    """A module whose state dict is ``weights``."""
    root = Branch()
    for key, value in weights.items():
        *parents, name = key.split(".")
        node: nn.Module = root
        for parent in parents:
            if parent not in dict(node.named_children()):
                node.add_module(parent, Branch())
            node = node.get_submodule(parent)
        node.register_parameter(name, nn.Parameter(value, value.is_floating_point()))
    return root


def assert_shared(model: nn.Module, module: nn.Module) -> None:
    theirs = module.state_dict()
    for key, value in model.state_dict().items():
        assert value.data_ptr() == theirs[key].data_ptr(), key


def near(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).abs().max() <= 1e-5 * expected.abs().max())


def test_an_upstream_vggt_shares_its_weights(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(golden / "vggt_tiny.safetensors")
    module = as_module(
        {
            k.replace(".weights.", "."): v
            for k, v in tensors.items()
            if k.split(".")[0].endswith(("aggregator", "_head")) and ".weights." in k
        }
    )
    config = VGGTConfig(
        image_size=56, dim=32, depth=4, num_heads=2, patch_embed="conv", camera_trunk_depth=2,
        camera_heads=4, dense_layers=(0, 1, 2, 3), dpt_features=16,
        dpt_out_channels=(8, 8, 16, 16),
    )  # fmt: skip
    monkeypatch.setitem(loading._PUBLIC, "VGGT", lambda name: VGGT(config, name))
    before = {k: (v.data_ptr(), v.clone()) for k, v in module.state_dict().items()}
    model = from_upstream(module)
    assert_shared(model, module)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    with torch.inference_mode():
        out = model(tensors["images"])
    assert near(out.world_points, tensors["point_head.out.value"])
    assert near(out.depth_confidence, tensors["depth_head.out.confidence"])
    # The module is as it was.
    assert all(p.requires_grad for p in module.parameters())
    assert module.state_dict().keys() == before.keys()
    for key, value in module.state_dict().items():
        assert value.data_ptr() == before[key][0]
        assert torch.equal(value, before[key][1])


@pytest.fixture
def tiny_pi3(golden: Path, monkeypatch: pytest.MonkeyPatch) -> Weights:
    """Reference weights and outputs, for as long as a public Pi3 is taken to be tiny."""
    config = Pi3Config(
        image_size=56, dim=32, num_heads=2, encoder_depth=2, decoder_depth=4, camera_dim=16
    )
    monkeypatch.setitem(loading._PUBLIC, "Pi3", lambda name: Pi3(config, name))
    return load_file(golden / "pi3_tiny.safetensors")


def test_pi3_from_a_file_and_from_an_upstream_object(tmp_path: Path, tiny_pi3: Weights) -> None:
    weights = {
        k.removeprefix("weights."): v for k, v in tiny_pi3.items() if k.startswith("weights.")
    }
    save_file(weights, tmp_path / "vggt.safetensors")
    loaded = load_model(tmp_path / "vggt.safetensors")
    module = as_module(weights)
    shared = from_upstream(module)
    assert_shared(shared, module)
    assert_holds(loaded, weights)
    for model in (loaded, shared):
        with torch.inference_mode():
            out = model(tiny_pi3["images"])
        assert near(out.world_points, tiny_pi3["out.points"])
        assert near(out.world_from_cam, tiny_pi3["out.camera_poses"])


def test_an_upstream_module_in_half_precision_shares_its_matrices(small: Weights) -> None:
    module = as_module({k: v.bfloat16() for k, v in small.items()})
    theirs = module.state_dict()
    model = from_upstream(module)
    for key, value in model.state_dict().items():
        if value.dtype == torch.bfloat16:
            assert value.data_ptr() == theirs[key].data_ptr()
        else:
            assert torch.equal(value, theirs[key].float())
    assert model.aggregator.global_blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert model.aggregator.global_blocks[0].norm1.weight.dtype == torch.float32
    assert model(torch.zeros(1, 2, 3, 16, 16)).world_points.isfinite().all()


def test_an_upstream_module_in_a_quarter_precision_is_refused(small: Weights) -> None:
    module = as_module({k: v.to(torch.float8_e4m3fn) for k, v in small.items()})
    with pytest.raises(CheckpointError, match=r"float8_e4m3fn; convert it"):
        from_upstream(module)
    assert from_upstream(module.to(torch.float32)).aggregator.camera_token.dtype == torch.float32


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"found a dict.*load_model"):
        from_upstream({})


def full_size(golden: Path, name: str) -> Weights:
    """The public checkpoint's tensors, without content."""
    shapes = json.loads((golden / f"{name}_state_dict.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize(
    ("name", "architecture", "layers"), [("vggt_1b", VGGT, 24), ("pi3", Pi3, 18)]
)
def test_the_public_checkpoints_fit(
    golden: Path, name: str, architecture: type, layers: int
) -> None:
    weights = full_size(golden, name)
    model = from_upstream(as_module(weights))
    assert isinstance(model, architecture)
    assert len(model.global_attention_sites()) == layers
    assert all(k in weights for k in model.state_dict())
    wrong = weights | {"camera_head.fc_t.weight": torch.empty(3, 256, device="meta")}
    with pytest.raises(CheckpointError, match=r"fc_t.weight' \(expected .*, found \(3, 256\)\)"):
        from_upstream(as_module(wrong))
