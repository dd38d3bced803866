"""Load a model by name or from a weight file, without ever running code from the file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hess.errors import BackendUnavailableError, CheckpointError, ConfigError
from hess.files import write_atomically
from hess.models.layers import use_precision
from hess.models.vggt import VGGT, VGGTConfig

BUNDLED = ("nano",)


def load_model(
    name_or_path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
) -> VGGT:
    """A model in eval mode, ready for :func:`hess.reconstruct`.

    Args:
        name_or_path: "nano" (bundled), or a ``.safetensors`` file that ``hess train-nano`` wrote.
        device: where the weights live.
        dtype: their precision, as a torch type or one of its names ("bfloat16").

    Raises:
        BackendUnavailableError: the device is not there.
        ConfigError: not a floating-point type.
        CheckpointError: no such file, a damaged file, or weights that do not fit the
            architecture the file names.
    """
    precision = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(precision, torch.dtype) or not precision.is_floating_point:
        raise ConfigError(
            f"dtype must be a floating-point type such as 'float32' or 'bfloat16', found {dtype!r}"
        )
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"device {str(device)!r} was asked for, but torch {torch.__version__} sees no CUDA "
            "device; use device='cpu' or a CUDA build of torch"
        )
    with _weight_file(name_or_path) as path:
        model = _load(path)
    use_precision(model, model.backbone_parts(), precision)
    return model.to(device)


def save_model(model: VGGT, path: Path, training: dict[str, Any]) -> None:
    """Write weights in float16 with the configuration and how they were made in the header."""
    weights = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    metadata = {
        "format": "hess-vggt",
        "config": json.dumps(model.config.as_dict()),
        "training": json.dumps(training),
    }
    write_atomically(path, save(weights, metadata))


def read_training_record(name_or_path: str | Path) -> dict[str, Any]:
    """How the weights of a bundled model or in a file of :func:`save_model` were made.

    Raises:
        CheckpointError: no such file, or not such a file.
    """
    with _weight_file(name_or_path) as path:
        return _read(path)[1]["training"]


@contextmanager
def _weight_file(name_or_path: str | Path) -> Iterator[Path]:
    if str(name_or_path) in BUNDLED:
        with as_file(files("hess") / "assets" / f"{name_or_path}.safetensors") as path:
            yield path
        return
    path = Path(name_or_path)
    if not path.is_file():
        raise CheckpointError(
            f"no model named {str(name_or_path)!r} and no such file; bundled models: "
            f"{', '.join(BUNDLED)}; a trained model is a .safetensors file"
        )
    yield path


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and the header's "config" and "training" as JSON values."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}); download or train it again"
        ) from error
    if metadata.get("format") != "hess-vggt":
        raise CheckpointError(
            f"{path} does not say which architecture it holds (no 'hess-vggt' header); "
            "use a file that `hess train-nano` wrote"
        )
    try:
        header = {key: json.loads(metadata[key]) for key in ("config", "training")}
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} has a damaged header ({error!r}); download or train it again"
        ) from error
    return weights, header


def _load(path: Path) -> VGGT:
    weights, header = _read(path)
    config = _config_from(header["config"], path)
    # The initial weights are drawn at random, which must not be felt outside.
    with torch.random.fork_rng(devices=[]):
        model = VGGT(config, model_name=path.stem)
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in weights.items()}
    if expected != found:
        both = expected.keys() | found.keys()
        wrong = sorted(key for key in both if expected.get(key) != found.get(key))
        raise CheckpointError(
            f"{path} does not fit the architecture in its own header: {len(wrong)} tensors are "
            f"missing, unexpected or of another shape, the first is {wrong[0]!r} (expected "
            f"{expected.get(wrong[0])}, found {found.get(wrong[0])})"
        )
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def _config_from(values: Any, path: Path) -> VGGTConfig:
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} must name its settings, found {values!r}; download or train it again"
        )
    unknown = values.keys() - {f.name for f in fields(VGGTConfig)}
    if unknown:
        raise CheckpointError(
            f"{path} was made by another version of this package: it names the settings "
            f"{sorted(unknown)}, which this version does not know"
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return VGGTConfig(**values)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path} holds an impossible configuration: {error}") from error
