"""Weights from Hugging Face: the cache is honoured, and whatever goes wrong names its fix."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file

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


@pytest.mark.parametrize(
    "name", ["facebook/VGGT-1B", "facebook/VGGT-1B-Commercial", "some-one/my_vggt.v2"]
)
@pytest.mark.parametrize("file", ["model.safetensors", "model.pt"])
def test_a_cached_file_needs_no_network(cache: Path, tiny: VGGT, name: str, file: str) -> None:
    write = torch.save if file.endswith(".pt") else save_file
    write(tiny.state_dict(), cached(cache, name) / file)
    model = load_model(name)
    assert model.model_name == name
    assert model.weights_license == license_notice(name, "VGGT")
    for key, value in model.state_dict().items():
        assert torch.equal(value, tiny.state_dict()[key]), key


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


def response(status: int) -> SimpleNamespace:
    return SimpleNamespace(status_code=status, headers={}, request=None)


NOT_FOUND = errors.RepositoryNotFoundError("404 Client Error", response=response(404))
GATED = errors.GatedRepoError("403 Client Error", response=response(403))
NO_REVISION = errors.RevisionNotFoundError("404 Client Error", response=response(404))
NO_FILE = errors.RemoteEntryNotFoundError("404 Client Error", response=response(404))
BROKEN = errors.HfHubHTTPError("500 Server Error", response=response(500))


@pytest.mark.parametrize(
    ("name", "raised", "message"),
    [
        (
            "facebook/VGGT-1B-Commercial", GATED,
            "accept its terms at https://huggingface.co/facebook/VGGT-1B-Commercial, "
            "then run `hf auth login`",
        ),
        ("facebok/vggt-1b", NOT_FOUND, "no repository .*did you mean facebook/VGGT-1B"),
        ("photos/of-mine", NOT_FOUND, "no file or folder 'photos/of-mine'.*check the spelling"),
        ("bad--name/x", errors.HFValidationError("bad"), "no repository .*check the spelling"),
        ("facebook/VGGT-1B@v9", NO_REVISION, "no revision 'v9'; .*VGGT-1B/commits"),
        ("some/model", NO_FILE, "holds no model.safetensors or model.pt"),
        ("some/model", errors.LocalEntryNotFoundError("gone"), "cannot be reached"),
        ("some/model", errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
        ("some/model", BROKEN, r"could not be fetched \(500 Server Error\); try again"),
    ],
)  # fmt: skip
def test_every_failure_of_the_hub_names_its_fix(
    monkeypatch: pytest.MonkeyPatch, name: str, raised: Exception, message: str
) -> None:
    asked = []

    def fail(
        repository: str, filename: str, *, revision: str | None, local_files_only: bool
    ) -> str:
        asked.append((repository, filename, revision, local_files_only))
        raise raised

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(CheckpointError, match=message):
        load_model(name)
    repository, _, revision = name.partition("@")
    assert asked[0] == (repository, "model.safetensors", revision or None, False)
    # Who has waited for the network once need not wait for it again.
    if "cannot be reached" in message:
        assert asked[1:] == [(repository, "model.pt", None, True)]


def test_a_full_disk_is_not_disguised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(OSError, match=r"No space left on device: 'model\.safetensors'"):
        load_model("facebook/VGGT-1B")


@pytest.mark.parametrize(
    "name", [name for name, known in PUBLIC.items() if known.architecture in UNSUPPORTED]
)
def test_known_misfits_are_refused_before_the_download(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
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
