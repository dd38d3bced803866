"""Find and read weight files without ever running code from them."""

import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hess.errors import CheckpointError
from hess.models.catalog import BUNDLED, known_models, similar_models
from hess.models.hub import fetch_weights, is_hub_id
from hess.models.weight_names import SUFFIXES, choose_weights, pieces

MAPPED_BYTES = 256 * 2**20
"""How much of a file :func:`stream_weights` keeps in memory."""

_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what torch.save wrote before version 1.6

_WRAPPERS = ("module.", "_orig_mod.", "model.")  # of data parallelism, torch.compile, Lightning

# What torch raises on an archive that was cut or changed; it could be opened, so OSError is one.
_GARBAGE = (
    AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


@contextmanager
def weight_file(name_or_path: str | Path) -> Iterator[tuple[Path, str]]:
    """Path of the weight file that ``name_or_path`` stands for, and the model's name.

    What lies at a path wins over a Hugging Face id of the same spelling. The file may be gone
    when the block ends.

    Raises:
        CheckpointError: there is no such thing, or a folder does not say which file is meant.
    """
    path, name = Path(name_or_path), str(name_or_path)
    if name in BUNDLED:
        with as_file(files("hess") / "assets" / f"{name}.safetensors") as bundled:
            yield bundled, name
    elif path.is_dir():
        names = [entry.name for entry in path.iterdir()]
        yield path / choose_weights(names, str(path)), path.resolve().name
    elif path.exists():
        yield path, path.stem
    elif is_hub_id(name) and path.suffix not in SUFFIXES:
        yield fetch_weights(name), name
    else:
        similar = " or ".join(similar_models(name))
        raise CheckpointError(
            f"no model named {name!r} and no such file or folder; "
            + (f"did you mean {similar}? " if similar else "")
            + f"known models: {', '.join(known_models())}; other models are given by their "
            f"Hugging Face id (organisation/name), a folder, or a file ({', '.join(SUFFIXES)})"
        )


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a weight file, memory-mapped, and its text header (safetensors only).

    This is quick and takes no memory until a tensor is used. A training checkpoint (the state
    dict under "model" or "state_dict") is unwrapped, see also :func:`without_wrapper`. A piece
    ("model-00001-of-00002.safetensors") stands for all of them.

    Raises:
        CheckpointError: not a weight file, a damaged one, one that would run code, or a piece
            without the others.
        OSError: the file cannot be opened.
    """
    if path.suffix not in SUFFIXES:
        raise CheckpointError(
            f"{path} is not a weight file: expected one of {', '.join(SUFFIXES)}"
        )
    parts = [path.with_name(name) for name in pieces(path.name)]
    missing = [part.name for part in parts if not part.exists()]
    if missing and len(parts) > 1:
        raise CheckpointError(
            f"{path} is one of {len(parts)} pieces, which must lie in one folder; "
            f"{len(missing)} are missing, the first is {missing[0]}; download them too"
        )
    weights: dict[str, Tensor] = {}
    header: dict[str, str] = {}
    for part in parts:
        tensors, text = _read_file(part)
        weights |= tensors
        header |= text
    return without_wrapper(weights), header


def stream_weights(path: Path, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of :func:`read_weights`, to be copied one by one.

    What was read of a mapped file counts as the process's memory until the mapping ends, so the
    file is mapped anew after every ``MAPPED_BYTES``.
    """
    weights: Mapping[str, Tensor] = {}
    used = 0
    for key in keys:
        if not weights or used > MAPPED_BYTES:
            weights, _ = read_weights(path)
            used = 0
        used += weights[key].nbytes
        yield key, weights[key]


def without_wrapper(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without the prefix that a wrapper has put before every name."""
    for wrapper in _WRAPPERS:
        if all(key.startswith(wrapper) for key in weights):
            weights = {key.removeprefix(wrapper): value for key, value in weights.items()}
    return dict(weights)


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with path.open("rb") as file:
        start = file.read(len(_LEGACY))
    if path.suffix == ".safetensors":
        if start.startswith(_ZIP):
            raise CheckpointError(f"{path} is what torch.save writes; rename it to .pt")
        return _read_safetensors(path)
    if start.startswith(_ZIP):
        return _read_torch(path), {}
    if start == _LEGACY:
        raise CheckpointError(
            f"{path} is in the format of torch before 1.6, which cannot be memory-mapped; convert "
            "it once: torch.save(torch.load(old, map_location='cpu', weights_only=True), new)"
        )
    if start[8:9] == b"{":  # JSON behind eight bytes of length
        raise CheckpointError(f"{path} is a safetensors file; rename it to .safetensors")
    raise CheckpointError(
        f"{path} ({path.stat().st_size} bytes) is not a file that torch.save writes (it is no zip "
        "archive); download it again"
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return weights, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is not a readable safetensors file ({error}); "
            "download or train it again"
        ) from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors (or is damaged), and reading the rest would run code "
            "from the file, which is refused; get the weights as .safetensors, or have whoever "
            "made the file save the tensors alone: torch.save(model.state_dict(), 'model.pt')"
        ) from error
    except _GARBAGE as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is damaged or not all there "
            f"({str(error).partition('. ')[0]}); download it again"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not _is_state_dict(content):
        raise CheckpointError(
            f"{path} must hold tensors by name, alone or under 'model' or 'state_dict', found "
            f"{_describe(content)}; save the state dict: torch.save(model.state_dict(), ...)"
        )
    return content


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    )


def _describe(content: Any) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    return f"the entries {', '.join(map(repr, list(content)[:5])) or 'of an empty dict'}"
