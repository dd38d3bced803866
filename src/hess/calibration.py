"""Stage 1 of HeSS: measure how sharply a model's errors react to each attention head."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hess
from hess.datasets.scene import Dataset, Scene
from hess.errors import AlignmentError, DatasetError, ProfileError
from hess.models.base import Model
from hess.models.swap import check_dense
from hess.sensitivity.fisher import FisherProbe, FisherTraces, fisher_probe, weight_norms
from hess.sensitivity.profile import HessProfile, SceneRecord, model_fingerprint
from hess.sensitivity.random_errors import (
    CAMERA_WEIGHT,
    SCORE_EXPONENT,
    ProbeConfig,
    random_errors,
)
from hess.sensitivity.scene_errors import CalibrationConfig, scene_errors

Progress = Callable[[int, int, str], None]
"""Called after each scene with (scenes done, scenes in all, name of the scene)."""


@dataclass(frozen=True, kw_only=True)
class _SceneResult:
    traces: Tensor  # [error, projection, layer, head]
    patch_traces: Tensor  # [error, layer, head]
    record: SceneRecord


def calibrate(
    model: Model,
    dataset: Dataset,
    config: CalibrationConfig | ProbeConfig | None = None,
    *,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
    recompute: bool = True,
) -> HessProfile:
    """Measure the Fisher traces of all heads over a data set.

    One forward and one backward per error for each scene, in float32 and evaluation mode; the
    model is left as it was. The result depends on nothing but model, data and settings: on the
    CPU two runs give the same bytes.

    Args:
        model: its device is where the work is done.
        dataset: scenes with poses, images at the model's input size. Scenes without depth give
            the camera error only, and need three views that are not on one line. Where the
            configuration asks for no ground truth, any photos.
        config: settings; a :class:`ProbeConfig` calibrates without ground truth, None is the
            paper's way with its defaults.
        checkpoint: file that holds the partial profile after every scene. A run that finds it
            continues there, and ends with the same bytes as one that was never interrupted.
        progress: called after every scene.
        recompute: hold the inputs of the model's blocks only and make their activations anew for
            each error, which large models need; where memory is no matter, False is a quarter
            quicker. The profile is the same, so it does not record this choice.

    Returns:
        the profile. Scenes that could not be read, aligned or measured are listed in ``failed``.

    Raises:
        ProfileError: the checkpoint belongs to another model, data set or configuration, or
            every scene failed.
        AlreadySparsifiedError: the model is sparsified or transformed.
        DatasetError: the data set is empty.
    """
    config = config or CalibrationConfig()
    check_dense(model)
    if len(dataset) == 0:
        raise DatasetError("calibration needs at least one scene, found an empty data set")
    provenance = _provenance(model, dataset, config)
    norms = weight_norms(model)
    results: list[_SceneResult] = []
    failed: list[tuple[str, str]] = []
    if checkpoint is not None and Path(checkpoint).exists():
        results, failed = _resume(Path(checkpoint), provenance)

    def profile() -> HessProfile:
        return HessProfile(
            traces=torch.stack([r.traces for r in results]),
            patch_traces=torch.stack([r.patch_traces for r in results]),
            weight_norms=norms,
            scenes=tuple(r.record for r in results),
            failed=tuple(failed),
            provenance=provenance,
        )

    with fisher_probe(model, recompute=recompute) as probe:
        for index in range(len(results) + len(failed), len(dataset)):
            name = f"{dataset.name}[{index}]"
            try:
                scene = dataset[index]
                name = scene.name
                if isinstance(config, ProbeConfig):
                    results.append(_measure_probes(model, probe, scene, config, index))
                else:
                    results.append(_measure(model, probe, scene, config))
            except (AlignmentError, DatasetError, ProfileError) as error:
                failed.append((name, str(error)))
            probe.clear()
            if checkpoint is not None and results:
                profile().save(checkpoint)
            if progress is not None:
                progress(index + 1, len(dataset), name)
    if not results:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed[:3])
        raise ProfileError(
            f"all {len(failed)} calibration scenes failed, so there is no profile. {reasons}"
        )
    return profile()


def _measure(
    model: Model, probe: FisherProbe, scene: Scene, config: CalibrationConfig
) -> _SceneResult:
    errors = scene_errors(model, scene, config)
    point, alignment = errors.point, errors.alignment
    measured = [probe.traces(errors.camera, errors.layout, last=point is None)]
    if point is not None:
        measured.append(probe.traces(point.error, errors.layout, last=True))
    traces, patch_traces = _stacked(measured, scene)
    if point is None:
        traces = torch.cat((traces, torch.full_like(traces, torch.nan)))
        patch_traces = torch.cat((patch_traces, torch.full_like(patch_traces, torch.nan)))
    record = SceneRecord(
        name=scene.name,
        num_views=scene.num_views,
        camera_error=errors.camera.item(),
        point_error=None if point is None else point.error.item(),
        inlier_share=None if point is None else point.inlier_share,
        aligned_on="cameras" if alignment is None else "points",
        alignment_scale=errors.world_from_pred.scale,
        icp_used=alignment is not None and alignment.icp_used,
        rmse_before=None if alignment is None else alignment.rmse_before,
        rmse_after=None if alignment is None else alignment.rmse_after,
    )
    return _SceneResult(traces=traces, patch_traces=patch_traces, record=record)


def _measure_probes(
    model: Model, probe: FisherProbe, scene: Scene, config: ProbeConfig, index: int
) -> _SceneResult:
    """Traces of random errors, mean over probes."""
    layout = model.token_layout(scene.images.unsqueeze(0))
    pairs = list(random_errors(model, scene, config, index))
    draws = []
    for number, (camera, point) in enumerate(pairs, 1):
        last = number == len(pairs)
        measured = [probe.traces(camera, layout, last=False)]
        measured.append(probe.traces(point, layout, last=last))
        draws.append(_stacked(measured, scene))
    traces, patch_traces = (torch.stack(parts).mean(0) for parts in zip(*draws, strict=True))
    record = SceneRecord(name=scene.name, num_views=scene.num_views)
    return _SceneResult(traces=traces, patch_traces=patch_traces, record=record)


def _stacked(measured: Sequence[FisherTraces], scene: Scene) -> tuple[Tensor, Tensor]:
    """Traces and patch traces with the errors in dimension 0."""
    traces = torch.stack([m.traces for m in measured])
    patch_traces = torch.stack([m.patch_traces for m in measured])
    if not bool(torch.isfinite(traces).all() & torch.isfinite(patch_traces).all()):
        raise ProfileError(f"scene {scene.name!r}: the gradients are not finite")
    return traces, patch_traces


def _provenance(
    model: Model, dataset: Dataset, config: CalibrationConfig | ProbeConfig
) -> dict[str, Any]:
    """All that decides the profile's content, as JSON values."""
    provenance: dict[str, Any] = {
        "model_name": model.model_name,
        "model_fingerprint": model_fingerprint(model),
        "camera_weight": model.camera_weight,
        "dataset": {"name": dataset.name, "provenance": dataset.provenance},
        "num_scenes": len(dataset),
        "config": asdict(config),
        "device": next(model.parameters()).device.type,
        "versions": {"hess": hess.__version__, "torch": torch.__version__},
    }
    if isinstance(config, ProbeConfig):
        provenance |= {
            "kind": "label-free",
            "camera_weight": CAMERA_WEIGHT,
            "score_exponent": SCORE_EXPONENT,
        }
    # Through JSON, so that it equals what is read back from a checkpoint (tuples become lists).
    try:
        normalised: dict[str, Any] = json.loads(json.dumps(provenance, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise DatasetError(
            f"the provenance of data set {dataset.name!r} must hold JSON values only: {error}"
        ) from error
    return normalised


def _resume(
    checkpoint: Path, provenance: dict[str, Any]
) -> tuple[list[_SceneResult], list[tuple[str, str]]]:
    """Results of an interrupted run, if it was a run of exactly this calibration."""
    partial = HessProfile.load(checkpoint)
    expected, found = _flat(provenance), _flat(partial.provenance)
    different = [
        f"{key}: expected {expected.get(key)!r}, found {found.get(key)!r}"
        for key in sorted(expected.keys() | found.keys())
        if expected.get(key) != found.get(key)
    ]
    if different:
        raise ProfileError(
            f"{checkpoint} belongs to another calibration ({'; '.join(different)}); delete it to "
            "start again, or ask for what it was made with"
        )
    results = [
        _SceneResult(traces=traces, patch_traces=patch_traces, record=record)
        for traces, patch_traces, record in zip(
            partial.traces, partial.patch_traces, partial.scenes, strict=True
        )
    ]
    return results, list(partial.failed)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots, so that a difference is named where it is."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        nested = isinstance(item, dict)
        flat |= _flat(item, f"{prefix}{key}.") if nested else {f"{prefix}{key}": item}
    return flat
