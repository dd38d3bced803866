"""Measure policies on a data set: same scenes, same ground truth, paired differences."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from hess.datasets.scene import Dataset, Scene
from hess.errors import AlignmentError, ConfigError, DatasetError
from hess.evaluation.protocol import PROCEDURAL_8, Protocol
from hess.evaluation.provenance import code_digest, provenance
from hess.evaluation.report import PolicyResults, Report, build_report
from hess.evaluation.resume import BatchResult, SceneResult, Sidecar, Store, mixed_units
from hess.evaluation.scene_metrics import SceneTruth, scene_metrics
from hess.models.base import Model, Predictions
from hess.sensitivity.fisher import qkv_layers
from hess.sensitivity.profile import model_fingerprint
from hess.transforms.base import Method, applied

Progress = Callable[[int, int, str], None]
"""Called after each batch of scenes with (done, in all, policy); counted in scenes x policies."""


def evaluate(
    model: Model,
    dataset: Dataset,
    policies: Sequence[Method],
    *,
    protocol: Protocol = PROCEDURAL_8,
    seed: int,
    batch_size: int = 16,
    progress: Progress | None = None,
    rows_path: str | Path | None = None,
    command: str = "",
    sparsify_options: Mapping[str, Any] | None = None,
) -> Report:
    """Run every method on every scene; report means, standard errors and paired differences.

    Scenes of one image shape run together; the ground truth of a scene is prepared once for all
    policies. On the CPU the same arguments give the same rows, bit for bit (``commit``,
    ``dirty`` and ``machine`` aside). A scene on which a policy's prediction is not finite or
    cannot be aligned is left out of that policy's means and named in ``failed_scenes``.

    Args:
        model: dense; its parameters say the device. Sparsified for each policy, then restored.
        dataset: scenes with poses; with depth, point metrics too.
        policies: policies or transforms, all different. Include "uniform" and "dense" for the
            paired differences. Name and ``settings()`` identify one.
        protocol: what is measured.
        seed: that made the data set's scenes; recorded.
        batch_size: scenes per forward pass, at least 1.
        progress: called after each batch.
        rows_path: where the rows go (JSON lines). Beside it, ``<stem>.scenes.jsonl`` keeps the
            results per scene of every policy that was ever asked for: a stopped run continues
            from there, and a policy more costs no more than itself.
        command: command line that was typed; recorded.
        sparsify_options: keyword arguments of :func:`hess.transforms.base.applied` (layers, block
            sizes, backend) as JSON values; recorded.

    Raises:
        ConfigError: no or repeated policies, a batch size below 1, or per-scene results of
            another configuration beside ``rows_path``.
        DatasetError: no scenes, scenes without poses, or scenes outside the protocol.
        AlignmentError: a policy failed on every scene.
    """
    check_batches(dataset, batch_size)
    by_identity = {identity(policy): policy for policy in policies}
    if not policies or len(by_identity) < len(policies):
        raise ConfigError(
            "evaluation needs at least one policy and no policy twice, found "
            f"{[identity(policy) for policy in policies]}"
        )
    options = dict(sparsify_options or {})
    machine = provenance(next(model.parameters()).device).machine
    config = configuration(
        model, dataset, protocol, seed=seed, batch_size=batch_size, sparsify_options=options
    )
    store = Store(config)
    if rows_path is not None:
        store = Sidecar(Path(rows_path).with_suffix(".scenes.jsonl"), config)
    done, total = 0, len(policies) * len(dataset)
    for first in range(0, len(dataset), batch_size):
        missing = [policy for name, policy in by_identity.items() if not store.get(name, first)]
        count = min(batch_size, len(dataset) - first)
        done += count * (len(policies) - len(missing))
        if not missing:
            continue
        scenes = [dataset[index] for index in range(first, first + count)]
        measured = measure_batch(model, scenes, first, missing, protocol, options)
        for policy, result in zip(missing, measured, strict=True):
            store.add(result)
            done += count
            if progress is not None:
                progress(done, total, policy.name)

    results = [
        PolicyResults(name=policy.name, settings=policy.settings(), batches=store.of_policy(name))
        for name, policy in by_identity.items()
    ]
    common = {key: value for key, value in store.header.items() if key != "num_scenes"}
    common |= {"machine": machine, "command": command}
    report = build_report(results, protocol, common)
    if rows_path is not None:
        report.save_jsonl(rows_path)
    return report


def check_batches(dataset: Dataset, batch_size: int) -> None:
    """Raise unless there are scenes (DatasetError) and room for one in a batch (ConfigError)."""
    if batch_size < 1:
        raise ConfigError(f"the batch size must be at least 1 scene, found {batch_size}")
    if len(dataset) == 0:
        raise DatasetError(f"data set {dataset.name!r} has no scenes to evaluate on")


def identity(policy: Method) -> str:
    """What tells a policy from others in a store of results: its name and all its settings."""
    return json.dumps({"name": policy.name, "settings": policy.settings()}, sort_keys=True)


def configuration(
    model: Model,
    dataset: Dataset,
    protocol: Protocol,
    *,
    seed: int,
    batch_size: int,
    sparsify_options: Mapping[str, Any],
) -> dict[str, Any]:
    """All but the policy that decides a result, as JSON values: what a store belongs to."""
    device = next(model.parameters()).device
    origin = provenance(device)
    return {
        "model": model.model_name,
        "model_fingerprint": model_fingerprint(model),
        "dataset": dataset.name,
        "dataset_provenance": dataset.provenance,
        "num_scenes": len(dataset),
        "protocol": protocol.as_dict(),
        "sparsify_options": dict(sparsify_options),
        "batch_size": batch_size,
        "seed": seed,
        "device": device.type,
        "dtype": str(qkv_layers(model)[0].weight.dtype).removeprefix("torch."),
        "code_sha256": code_digest(),
        "commit": origin.commit,
        "dirty": origin.dirty,
    }


def measure_batch(
    model: Model,
    scenes: Sequence[Scene],
    first: int,
    policies: Sequence[Method],
    protocol: Protocol,
    sparsify_options: Mapping[str, Any],
) -> Iterator[BatchResult]:
    """Run policies on some scenes whose ground truth is prepared once; a result per policy.

    Args:
        scenes: neighbours of one image shape share a forward pass.
        first: index of the first scene in its data set.
        model, policies, protocol, sparsify_options: as in :func:`evaluate`.

    Raises:
        DatasetError: scenes without poses, outside the protocol, or of different units.
    """
    truths = [SceneTruth(scene, protocol) for scene in scenes]
    device = next(model.parameters()).device
    groups = groupby((scene.images for scene in scenes), key=lambda images: images.shape)
    stacks = [torch.stack(list(images)).to(device) for _, images in groups]
    units = sorted({truth.unit for truth in truths})
    if len(units) > 1:
        raise DatasetError(mixed_units(units))
    for policy in policies:
        with applied(model, policy, **sparsify_options) as run, torch.inference_mode():
            predictions = [model(images) for images in stacks]
        yield BatchResult(
            policy=identity(policy),
            first=first,
            unit=units[0],
            block_sparsity=run.stats.block_sparsity,
            flop_saving=run.stats.flop_saving,
            backends=run.stats.backends,
            scenes=tuple(_measure(predictions, first, truths, protocol)),
        )


def _measure(
    predictions: Sequence[Predictions],
    first: int,
    truths: Sequence[SceneTruth],
    protocol: Protocol,
) -> Iterator[SceneResult]:
    cameras = [poses for found in predictions for poses in found.world_from_cam.cpu()]
    points = [cloud for found in predictions for cloud in found.world_points.cpu()]
    for i, truth in enumerate(truths):
        metrics, failure = None, None
        try:
            metrics = scene_metrics(cameras[i], points[i], truth, protocol)
        except AlignmentError as error:
            failure = str(error)
        yield SceneResult(index=first + i, scene=truth.name, metrics=metrics, failure=failure)
