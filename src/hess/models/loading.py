"""Load a model by name, from a weight file, or from the object of another package."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from hess.errors import BackendUnavailableError, CheckpointError, ConfigError
from hess.files import write_atomically
from hess.models.base import Model
from hess.models.catalog import BUNDLED, PUBLIC, UNSUPPORTED, known_models, license_notice
from hess.models.layers import use_precision
from hess.models.pi3 import Pi3, Pi3Config
from hess.models.vggt import VGGT, VGGT_1B, VGGTConfig
from hess.models.weight_file import (
    read_weights,
    stream_weights,
    weight_file,
    without_wrapper,
)

_log = logging.getLogger(__name__)

# The first mark that begins a key decides: VGGT-Omega and Pi3X share keys with their ancestors.
_MARKS = {
    "aggregator.inter_frame_blocks.": "VGGT-Omega",
    "aggregator.global_blocks.": "VGGT",
    "metric_token": "Pi3X",
    "register_token": "Pi3",
}
_PUBLIC: dict[str, Callable[[str], Model]] = {
    "VGGT": lambda name: VGGT(VGGT_1B, name),
    "Pi3": lambda name: Pi3(Pi3Config(), name),
}
_OWN: dict[str, tuple[Callable[..., VGGT | Pi3], type[VGGTConfig] | type[Pi3Config]]] = {
    "hess-vggt": (VGGT, VGGTConfig),
    "hess-pi3": (Pi3, Pi3Config),
}
"""By the format in the header of files of :func:`save_model`."""
_UNUSED = "track_head."  # of VGGT
_PRECISIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_model(
    name_or_path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
) -> Model:
    """A model in eval mode, ready for :func:`hess.reconstruct`.

    Tensors are read one by one and brought to their final type and place at once, so loading
    takes little more memory than the model itself. The licence of weights that others published,
    and what of them is skipped, is logged in one line at level WARNING.

    Args:
        name_or_path: "nano" or "pi3-nano" (bundled), a Hugging Face id such as
            "facebook/VGGT-1B" or "yyfz233/Pi3" (a revision may follow: "facebook/VGGT-1B@main"),
            a folder with a weight file, or a weight file (.safetensors, .pt, .pth, .bin, .ckpt).
            The tensors' names, not the file's, decide the architecture.
        device: where the weights live.
        dtype: their precision, as a torch type or its name: float32, bfloat16, float16 or
            float64. A half precision applies to the matrices of the backbone; the rest stays in
            float32.

    Raises:
        BackendUnavailableError: the device is not there.
        ConfigError: not a device, or not one of these types.
        CheckpointError: no such model, a damaged file, one that would run code, or weights of
            another architecture or size.
        OSError: a file cannot be read, or the download cache not be written.
    """
    precision = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if precision not in _PRECISIONS:
        raise ConfigError(f"dtype must be one of {_listed(_PRECISIONS)}, found {dtype!r}")
    _check_device(device)
    with weight_file(name_or_path) as (path, name):
        weights, header = read_weights(path)
        model: Model
        if header.get("format") in _OWN:
            model = _from_header(header, path, name)
            _check_fit(model, weights, path, "the architecture in its own header")
        else:
            model = _recognise(weights, path, name)
        use_precision(model, model.backbone_parts(), precision)
        empty = model.state_dict()
        return _ready(
            model,
            {
                key: tensor.to(device, empty[key].dtype, copy=True)
                for key, tensor in stream_weights(path, empty)
            },
        )


def empty_model(name: str) -> Model:
    """A model of :func:`known_models` on the meta device: all of it but the weights.

    Nothing is downloaded. It serves to plan with (:mod:`hess.footprint`), or to be filled.

    Raises:
        CheckpointError: not one of these names.
    """
    if name in BUNDLED:
        with weight_file(name) as (path, _):
            return _from_header(read_weights(path)[1], path, name)
    known = PUBLIC.get(name)
    if known is None or known.architecture in UNSUPPORTED:
        raise CheckpointError(
            f"{name!r} is none of the models whose architecture is known beforehand: "
            f"{', '.join(known_models())}"
        )
    with torch.device("meta"):
        return _PUBLIC[known.architecture](name).eval().requires_grad_(False)


def from_upstream(module: nn.Module) -> Model:
    """A model that shares its weights with an object of the upstream ``vggt`` or ``pi3`` package.

    Any module with their state-dict keys will do. Device and precision stay as they are. Tensors
    are shared, not copied; only of a half-precision module those outside the backbone's matrices
    are widened to float32, as the arithmetic here wants. ``module`` itself is not changed.

    Raises:
        ConfigError: it is no torch module.
        CheckpointError: it is of another architecture or size, or lacks a head.
    """
    name = type(module).__name__
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"expected a torch module, found a {name}; for files there is load_model"
        )
    weights = without_wrapper(module.state_dict())
    model = _recognise(weights, f"this {name}", name)
    elements: Counter[torch.dtype] = Counter()
    for tensor in weights.values():
        elements[tensor.dtype] += tensor.numel()
    precision, _ = elements.most_common(1)[0]
    if precision not in _PRECISIONS:
        raise CheckpointError(
            f"this {name} must be in one of {_listed(_PRECISIONS)}, most of it is {precision}; "
            "convert it: module.to(torch.float32)"
        )
    use_precision(model, model.backbone_parts(), precision)
    empty = model.state_dict()
    return _ready(model, {key: weights[key].to(empty[key].dtype) for key in empty})


def save_model(model: Model, path: Path, training: dict[str, Any]) -> None:
    """Write weights in float16 with the configuration and how they were made in the header.

    Raises:
        ConfigError: another model than VGGT or Pi3.
    """
    if isinstance(model, VGGT):
        own = "hess-vggt"
    elif isinstance(model, Pi3):
        own = "hess-pi3"
    else:
        raise ConfigError(f"only VGGT and Pi3 can be saved, found a {type(model).__name__}")
    weights = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    metadata = {
        "format": own,
        "config": json.dumps(model.config.as_dict()),
        "training": json.dumps(training),
    }
    write_atomically(path, save(weights, metadata))


def read_training_record(name_or_path: str | Path) -> dict[str, Any]:
    """How the weights of a bundled model or in a file of :func:`save_model` were made.

    Raises:
        CheckpointError: no such file, or not such a file.
    """
    with weight_file(name_or_path) as (path, _):
        _, header = read_weights(path)
        return _header_value(header, "training", path)


def _header_value(header: dict[str, str], key: str, path: Path) -> Any:
    if header.get("format") not in _OWN:
        raise CheckpointError(f"{path} was not written by `hess train-nano`: it has no header")
    try:
        return json.loads(header[key])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} has a damaged header ({error!r}); download or train it again"
        ) from error


def _from_header(header: dict[str, str], path: Path, name: str) -> Model:
    """An empty model of the configuration that a file of :func:`save_model` names."""
    values = _header_value(header, "config", path)
    _header_value(header, "training", path)
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} must name its settings, found {values!r}; download or train it again"
        )
    architecture, config_type = _OWN[header["format"]]
    unknown = values.keys() - {f.name for f in fields(config_type)}
    if unknown:
        raise CheckpointError(
            f"{path} was made by another version of this package: it names the settings "
            f"{sorted(unknown)}, which this version does not know"
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        config = config_type(**values)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path} holds an impossible configuration: {error}") from error
    with torch.device("meta"):
        return architecture(config, model_name=name)


def _recognise(weights: dict[str, Tensor], source: Path | str, name: str) -> Model:
    """An empty model of the public architecture that the weights belong to."""
    marked = (a for mark, a in _MARKS.items() if any(key.startswith(mark) for key in weights))
    architecture = next(marked, None)
    if architecture is None:
        raise CheckpointError(
            f"{source} has the keys of no supported architecture ({', '.join(_PUBLIC)}); found "
            f"{len(weights)} tensors, the first are {', '.join(map(repr, list(weights)[:3]))}"
        )
    if architecture in UNSUPPORTED:
        raise CheckpointError(
            f"{source} holds {architecture}, which is not supported: {UNSUPPORTED[architecture]}"
        )
    kept = {k: v for k, v in weights.items() if not k.startswith(_UNUSED)}
    with torch.device("meta"):
        model = _PUBLIC[architecture](name)
    _check_fit(model, kept, source, f"the public {architecture}")
    model.weights_license = license_notice(name, architecture)
    skipped = len(weights) - len(kept)
    # A warning, because Python shows nothing less by itself.
    _log.warning(
        "%s%s",
        model.weights_license,
        f"; {_UNUSED}* is skipped ({skipped} tensors): nothing here tracks points"
        if skipped
        else "",
    )
    return model


def _listed(types: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in types)


def _check_device(device: torch.device | str) -> None:
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"device must be one of torch's, such as 'cpu', 'cuda' or 'cuda:1', found {device!r}"
        ) from error
    try:
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, ImportError) as error:  # which one depends on the device
        raise BackendUnavailableError(
            f"device {str(device)!r} was asked for, but torch {torch.__version__} cannot use it "
            f"here ({str(error).partition('. ')[0]}); use device='cpu', or a torch and a machine "
            "that have it"
        ) from error


def _check_fit(
    model: nn.Module, weights: Mapping[str, Tensor], source: Path | str, what: str
) -> None:
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = {
        key: tuple(tensor.shape) if tensor.is_floating_point() else f"of {tensor.dtype}"
        for key, tensor in weights.items()
    }
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    different = [key for key in expected if key in found and expected[key] != found[key]]
    if not (missing or unexpected or different):
        return
    first = "; ".join(
        f"{key!r} (expected {expected.get(key)}, found {found.get(key)})"
        for key in [*different, *missing, *unexpected][:3]
    )
    parts = {key.split(".")[0] for key in missing} - {key.split(".")[0] for key in found}
    if parts:
        cause = f"it was made or saved without {', '.join(sorted(parts))}, which is needed here"
    elif different:
        cause = "another size of this architecture, which is not supported?"
    else:
        cause = "a variant of this architecture, or a damaged copy?"
    raise CheckpointError(
        f"{source} does not fit {what}: {len(missing)} tensors missing, {len(unexpected)} "
        f"unexpected, {len(different)} of another shape or type; the first: {first}; {cause}"
    )


def _ready(model: Model, weights: dict[str, Tensor]) -> Model:
    """An empty model, filled with these very tensors."""
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)
