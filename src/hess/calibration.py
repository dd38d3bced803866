"""Stage 1 of HeSS: measure how sharply a model's errors react to each attention head."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hess
from hess.datasets.scene import Dataset, Scene
from hess.errors import (
    AlignmentError,
    AlreadySparsifiedError,
    ConfigError,
    DatasetError,
    ProfileError,
)
from hess.geometry.alignment import AlignmentResult, align_points, most_confident
from hess.geometry.nearest import NearestNeighbors
from hess.geometry.poses import camera_centers
from hess.geometry.sim3 import umeyama
from hess.models.base import Model, Predictions
from hess.sensitivity.errors import (
    PointError,
    camera_error,
    check_inlier_rule,
    point_error,
    scene_scale,
)
from hess.sensitivity.fisher import FisherProbe, fisher_probe, weight_norms
from hess.sensitivity.profile import HessProfile, SceneRecord, model_fingerprint
from hess.sparsification import SparseAttention

Progress = Callable[[int, int, str], None]
"""Called after each scene with (scenes done, scenes in all, name of the scene)."""


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Settings of :func:`calibrate`; the paper fixes epsilon and ICP, the rest is ours.

    Args:
        inlier_threshold: epsilon of Eq. 3, > 0.
        inlier_on: whether it bounds the "squared_distance" (Eq. 3) or the "distance" (App. B.2).
        normalize_scale: divide ground truth by the mean distance of its points to the first
            camera, so that epsilon means the same in any unit. Scenes without depth divide by
            the mean distance of their cameras to the first.
        point_stride: use every n-th pixel row and column of the prediction, >= 1.
        confidence_keep: share of most confident pixels that Umeyama's pairs keep, in (0, 1].
        icp: whether to refine the alignment by ICP.

    Raises:
        ConfigError: a value is out of range.
    """

    inlier_threshold: float = 0.05
    inlier_on: str = "squared_distance"
    normalize_scale: bool = True
    point_stride: int = 1
    confidence_keep: float = 0.9
    icp: bool = True

    def __post_init__(self) -> None:
        check_inlier_rule(self.inlier_threshold, self.inlier_on)
        if self.point_stride < 1:
            raise ConfigError(f"point_stride must be >= 1, found {self.point_stride}")
        if not 0.0 < self.confidence_keep <= 1.0:
            raise ConfigError(f"confidence_keep must be in (0, 1], found {self.confidence_keep}")


@dataclass(frozen=True, kw_only=True)
class _SceneResult:
    traces: Tensor  # [error, projection, layer, head]
    patch_traces: Tensor  # [error, layer, head]
    record: SceneRecord


def calibrate(
    model: Model,
    dataset: Dataset,
    config: CalibrationConfig | None = None,
    *,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
    recompute: bool = True,
) -> HessProfile:
    """Measure the Fisher traces of all heads over a data set with ground truth.

    One forward and one backward per error for each scene, in float32 and evaluation mode; the
    model is left as it was. The result depends on nothing but model, data and settings: on the
    CPU two runs give the same bytes.

    Args:
        model: its device is where the work is done.
        dataset: scenes with poses, images at the model's input size. Scenes without depth give
            the camera error only, and need three views that are not on one line.
        config: settings; None takes the defaults.
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
        AlreadySparsifiedError: the model is sparsified.
        DatasetError: the data set is empty.
    """
    config = config or CalibrationConfig()
    if any(isinstance(site.module, SparseAttention) for site in model.global_attention_sites()):
        raise AlreadySparsifiedError(
            "calibration measures the dense model, found a sparsified one; leave sparsify() first"
        )
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
    if scene.world_from_cam is None:
        raise DatasetError(f"scene {scene.name!r} has no poses; calibration needs ground truth")
    device = next(model.parameters()).device
    images = scene.images.unsqueeze(0).to(device)
    layout = model.token_layout(images)
    with torch.autocast(device.type, enabled=False):
        predictions = model(images)
    pred_centers = camera_centers(predictions.world_from_cam[0])
    gt_centers = camera_centers(scene.world_from_cam).double()

    point: PointError | None = None
    alignment: AlignmentResult | None = None
    if scene.has_points:
        gt_centers, point, alignment = _align_on_points(scene, gt_centers, predictions, config)
        world_from_pred = alignment.world_from_pred
    else:
        if config.normalize_scale:
            gt_centers = gt_centers / scene_scale(gt_centers[1:], gt_centers[0])
        world_from_pred = umeyama(pred_centers, gt_centers)
    camera = camera_error(pred_centers, gt_centers, world_from_pred)

    measured = [probe.traces(camera, layout, last=point is None)]
    if point is not None:
        measured.append(probe.traces(point.error, layout, last=True))
    traces = torch.stack([m.traces for m in measured])
    patch_traces = torch.stack([m.patch_traces for m in measured])
    if not bool(torch.isfinite(traces).all() & torch.isfinite(patch_traces).all()):
        raise ProfileError(f"scene {scene.name!r}: the gradients are not finite")
    if point is None:
        traces = torch.cat((traces, torch.full_like(traces, torch.nan)))
        patch_traces = torch.cat((patch_traces, torch.full_like(patch_traces, torch.nan)))
    record = SceneRecord(
        name=scene.name,
        num_views=scene.num_views,
        camera_error=camera.item(),
        point_error=None if point is None else point.error.item(),
        inlier_share=None if point is None else point.inlier_share,
        aligned_on="cameras" if alignment is None else "points",
        alignment_scale=world_from_pred.scale,
        icp_used=alignment is not None and alignment.icp_used,
        rmse_before=None if alignment is None else alignment.rmse_before,
        rmse_after=None if alignment is None else alignment.rmse_after,
    )
    return _SceneResult(traces=traces, patch_traces=patch_traces, record=record)


def _align_on_points(
    scene: Scene, gt_centers: Tensor, predictions: Predictions, config: CalibrationConfig
) -> tuple[Tensor, PointError, AlignmentResult]:
    """Normalised ground-truth centres, the point error and the alignment it rests on."""
    gt_points, valid = scene.point_map()
    gt_points = gt_points.double()
    if config.normalize_scale:
        scale = scene_scale(gt_points[valid], gt_centers[0])
        gt_points, gt_centers = gt_points / scale, gt_centers / scale
    gt_cloud = gt_points[valid]

    # Every pixel of the ground truth stays a target; the stride thins the prediction only.
    step = config.point_stride
    pred_points = predictions.world_points[0, :, ::step, ::step]
    paired = valid[:, ::step, ::step]
    on_device = paired.to(pred_points.device)
    confidence = predictions.point_confidence[0, :, ::step, ::step][on_device]
    kept = most_confident(confidence, config.confidence_keep)
    pred_pairs = pred_points.detach()[on_device][kept]
    gt_pairs = gt_points[:, ::step, ::step][paired][kept.cpu()]

    pred_cloud = pred_points.flatten(0, 2)
    alignment = align_points(pred_cloud.detach(), gt_cloud, pred_pairs, gt_pairs, icp=config.icp)
    point = point_error(
        pred_cloud,
        NearestNeighbors(gt_cloud),
        alignment.world_from_pred,
        inlier_threshold=config.inlier_threshold,
        inlier_on=config.inlier_on,
        unit="mean point distance" if config.normalize_scale else scene.unit,
    )
    return gt_centers, point, alignment


def _provenance(model: Model, dataset: Dataset, config: CalibrationConfig) -> dict[str, Any]:
    """All that decides the profile's content, as JSON values."""
    provenance = {
        "model_name": model.model_name,
        "model_fingerprint": model_fingerprint(model),
        "camera_weight": model.camera_weight,
        "dataset": {"name": dataset.name, "provenance": dataset.provenance},
        "num_scenes": len(dataset),
        "config": asdict(config),
        "device": next(model.parameters()).device.type,
        "versions": {"hess": hess.__version__, "torch": torch.__version__},
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
