"""Weights from Hugging Face: the cache is honoured, and whatever goes wrong names its fix."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file
from torch import nn

from hess.errors import CheckpointError
from hess.models import loading
from hess.models.catalog import PUBLIC, UNSUPPORTED, license_notice
from hess.models.loading import load_model
from hess.models.vggt import VGGT, VGGTConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> VGGT:
    """A public VGGT is taken to be this one."""
    config = VGGTConfig(
        image_size=16, patch_size=8, dim=32, depth=2, num_heads=4, patch_embed="conv",
        camera_trunk_depth=1, camera_heads=4, dense_head="linear", dense_layers=(0, 1),
    )  # fmt: skip
    monkeypatch.setitem(loading._PUBLIC, "VGGT", lambda name: VGGT(config, name))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VGGT(config)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def cached(cache: Path, name: str, ref: str = "main") -> Path:
    """The folder where the cache holds the files of repository ``name`` at ``ref``."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / ref).write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return snapshot


def write_pieces(model: VGGT, folder: Path) -> list[str]:
    """Save a model as two files; gives their names."""
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weights = model.state_dict()
    for i, name in enumerate(names):
        save_file({key: weights[key] for key in list(weights)[i::2]}, folder / name)
    (folder / "model.safetensors.index.json").write_text("{}")
    return names


def assert_same(model: nn.Module, other: nn.Module) -> None:
    expected = other.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "name", ["facebook/VGGT-1B", "facebook/VGGT-1B-Commercial", "some-one/my_vggt.v2"]
)
@pytest.mark.parametrize("file", ["model.safetensors", "model.pt", "vggt_1B_commercial.pt"])
def test_a_cached_file_needs_no_network(cache: Path, tiny: VGGT, name: str, file: str) -> None:
    write = torch.save if file.endswith(".pt") else save_file
    folder = cached(cache, name)
    write(tiny.state_dict(), folder / file)
    (folder / "config.json").write_text("{}")
    cached(cache, "other/model").joinpath("model.safetensors").write_bytes(b"not this one")
    model = load_model(name)
    assert model.model_name == name
    assert model.weights_license == license_notice(name, "VGGT")
    assert_same(model, tiny)


def test_cached_pieces_need_no_network(cache: Path, tiny: VGGT) -> None:
    write_pieces(tiny, cached(cache, "some/model"))
    assert_same(load_model("some/model"), tiny)


def test_safetensors_are_preferred(cache: Path, tiny: VGGT) -> None:
    folder = cached(cache, "facebook/VGGT-1B")
    save_file(tiny.state_dict(), folder / "model.safetensors")
    (folder / "model.pt").write_bytes(b"not this one")
    load_model("facebook/VGGT-1B")


def test_a_revision_is_honoured(cache: Path, tiny: VGGT) -> None:
    save_file(tiny.state_dict(), cached(cache, "facebook/VGGT-1B", "v2") / "model.safetensors")
    model = load_model("facebook/VGGT-1B@v2")
    assert model.model_name == "facebook/VGGT-1B@v2"
    assert "CC BY-NC 4.0" in model.weights_license
    with pytest.raises(CheckpointError, match="not in the cache"):
        load_model("facebook/VGGT-1B")


def test_a_download_that_was_cut_is_refused(cache: Path, tiny: VGGT) -> None:
    file = cached(cache, "facebook/VGGT-1B") / "model.safetensors"
    save_file(tiny.state_dict(), file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*download"):
        load_model("facebook/VGGT-1B")


def test_without_network_and_cache_the_way_out_is_said(cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE.*hf download some/model.*HF_HOME"):
        load_model("some/model")


class Hub:
    """Stands in for the network: what repositories hold, and what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.revision: str | None = None
        self.downloaded: list[str] = []

    def model_info(
        self, repository: str, *, revision: str | None, timeout: float
    ) -> SimpleNamespace:
        assert timeout > 0
        self.revision = revision
        files = [f for f in (self.folder / repository).rglob("*") if f.is_file()]
        names = [f.relative_to(self.folder / repository).as_posix() for f in files]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def hf_hub_download(self, repository: str, filename: str, *, revision: str | None) -> str:
        assert revision == self.revision
        self.downloaded.append(filename)
        return str(self.folder / repository / filename)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "model_info", stand_in.model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", stand_in.hf_hub_download)
    (tmp_path / "some" / "model" / "more").mkdir(parents=True)
    return stand_in


@pytest.mark.parametrize(
    ("taken", "others"),
    [
        ("model.safetensors", ["model.pt", "other.ckpt"]),
        ("model.pt", ["vggt_1B_commercial.pt", "more/model.safetensors"]),
        ("vggt_1B_commercial.pt", ["README.md", "config.json"]),
        ("more/weights.bin", ["model.onnx"]),
    ],
)
def test_the_file_that_the_repository_has_is_taken(
    hub: Hub, tiny: VGGT, taken: str, others: list[str]
) -> None:
    folder = hub.folder / "some" / "model"
    (save_file if taken.endswith(".safetensors") else torch.save)(
        tiny.state_dict(), folder / taken
    )
    for other in others:
        (folder / other).write_bytes(b"not this one")
    assert_same(load_model("some/model@v2"), tiny)
    assert hub.downloaded == [taken]
    assert hub.revision == "v2"


def test_all_pieces_are_fetched(hub: Hub, tiny: VGGT) -> None:
    names = write_pieces(tiny, hub.folder / "some" / "model")
    assert_same(load_model("some/model"), tiny)
    assert hub.downloaded == names
    assert hub.revision is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["README.md"], "found none; .*download it first"),
        (["a.pt", "b.ckpt"], r"found a\.pt, b\.ckpt; .*download it first"),
    ],
)
def test_a_repository_without_one_weight_file_is_refused(
    hub: Hub, names: list[str], message: str
) -> None:
    for name in names:
        (hub.folder / "some" / "model" / name).touch()
    with pytest.raises(
        CheckpointError, match=f"some/model on Hugging Face must hold model.* {message}"
    ):
        load_model("some/model")
    assert not hub.downloaded


def response(status: int) -> SimpleNamespace:
    return SimpleNamespace(status_code=status, headers={}, request=None)


NOT_FOUND = errors.RepositoryNotFoundError("404 Client Error", response=response(404))
GATED = errors.GatedRepoError("403 Client Error", response=response(403))
NO_REVISION = errors.RevisionNotFoundError("404 Client Error", response=response(404))
BROKEN = errors.HfHubHTTPError("500 Server Error", response=response(500))
FAILURES = [
    (
        "facebook/VGGT-1B-Commercial", GATED,
        "accept its terms at https://huggingface.co/facebook/VGGT-1B-Commercial, "
        "then run `hf auth login`",
    ),
    ("facebok/vggt-1b", NOT_FOUND, "no repository .*did you mean facebook/VGGT-1B"),
    ("photos/of-mine", NOT_FOUND, "no file or folder 'photos/of-mine'.*check the spelling"),
    ("facebook/VGGT-1B@v9", NO_REVISION, "no revision 'v9'; .*VGGT-1B/commits"),
    ("some/model", BROKEN, r"could not be fetched \(500 Server Error\); try again"),
    ("some/model", errors.HTTPError("no route"), "cannot be reached.*hf download some/model --l"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "raised", "message"),
    [
        *FAILURES,
        ("bad--name/x", errors.HFValidationError("bad"), "no repository .*check the spelling"),
        ("some/model", errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
        ("some/model", ConnectionError("no route"), "cannot be reached"),
        ("some/model", ValueError("<html>Please log in"), "cannot be reached"),
    ],
)
def test_a_repository_that_cannot_be_listed_names_the_fix(
    cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, raised: Exception, message: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "model_info", raising(raised))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    with pytest.raises(CheckpointError, match=message):
        load_model(name)


@pytest.mark.parametrize(
    "raised", [GATED, NOT_FOUND, BROKEN, ConnectionError("no route"), errors.HTTPError("no route")]
)
def test_what_is_cached_is_taken_if_the_list_is_not_to_be_had(
    cache: Path, tiny: VGGT, monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    save_file(tiny.state_dict(), cached(cache, "some/model") / "mine.safetensors")
    monkeypatch.setattr(huggingface_hub, "model_info", raising(raised))
    assert_same(load_model("some/model"), tiny)


@pytest.mark.parametrize(
    ("name", "raised", "message"),
    [
        *FAILURES,
        ("some/model", errors.LocalEntryNotFoundError("gone"), "cannot be reached"),
    ],
)
def test_a_download_that_fails_names_the_fix(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str, raised: Exception, message: str
) -> None:
    file = hub.folder / name.partition("@")[0] / "model.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", raising(raised))
    with pytest.raises(CheckpointError, match=message):
        load_model(name)


def test_a_full_disk_is_not_disguised(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    (hub.folder / "some" / "model" / "model.safetensors").touch()
    full = OSError(28, "No space left on device", "model.safetensors")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", raising(full))
    with pytest.raises(OSError, match=r"No space left on device: 'model\.safetensors'"):
        load_model("some/model")


@pytest.mark.parametrize(
    "name", [name for name, known in PUBLIC.items() if known.architecture in UNSUPPORTED]
)
def test_known_misfits_are_refused_before_the_download(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "model_info", None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    with pytest.raises(CheckpointError, match=f"{name} is not supported: .*; use "):
        load_model(name)


def test_the_documentation_lists_every_checkpoint_with_its_licence() -> None:
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    rows = [row for row in page.splitlines() if row.startswith("| ")]
    for name, known in PUBLIC.items():
        [row] = [row for row in rows if f"[`{name}`]" in row and known.license in row]
        assert known.allows in row
        assert ("gated" in row) == known.gated
