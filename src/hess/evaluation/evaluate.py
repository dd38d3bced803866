"""Measure policies on a data set: same scenes, same ground truth, paired differences."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hess.datasets.scene import Dataset, Scene
from hess.errors import AlignmentError, ConfigError, DatasetError
from hess.evaluation.protocol import PROCEDURAL_8, Protocol
from hess.evaluation.provenance import provenance
from hess.evaluation.report import PolicyResults, Report, build_report
from hess.evaluation.resume import BatchResult, SceneResult, Sidecar, Store
from hess.evaluation.scene_metrics import SceneTruth, scene_metrics
from hess.models.base import Model, Predictions
from hess.policies.base import Policy
from hess.sensitivity.profile import model_fingerprint
from hess.sparsification import sparsify

Progress = Callable[[int, int, str], None]
"""Called after each batch of scenes with (done, in all, policy); counted in scenes x policies."""


def evaluate(
    model: Model,
    dataset: Dataset,
    policies: Sequence[Policy],
    *,
    protocol: Protocol = PROCEDURAL_8,
    seed: int,
    batch_size: int = 16,
    progress: Progress | None = None,
    rows_path: str | Path | None = None,
    command: str = "",
    sparsify_options: Mapping[str, Any] | None = None,
) -> Report:
    """Run every policy on every scene and report means, standard errors and paired differences.

    Scenes of one image shape run together; the ground truth of a scene is prepared once for all
    policies. On the CPU the same arguments give the same rows, bit for bit (``commit``,
    ``dirty`` and ``machine`` aside). A scene on which a policy's prediction is not finite or
    cannot be aligned is left out of that policy's means and named in ``failed_scenes``.

    Args:
        model: dense; its parameters say the device. Sparsified for each policy, then restored.
        dataset: scenes with poses; with depth, point metrics too.
        policies: all different. Include "uniform" and "dense" for the paired
            differences. Name, ``settings()`` and head scores identify a policy.
        protocol: what is measured.
        seed: that made the data set's scenes; recorded.
        batch_size: scenes per forward pass, at least 1.
        progress: called after each batch.
        rows_path: where the rows go (JSON lines). Beside it, ``<stem>.scenes.jsonl`` keeps the
            results per scene; a stopped run continues from there.
        command: command line that was typed; recorded.
        sparsify_options: keyword arguments of :func:`hess.sparsification.sparsify` (layers, block
            sizes, backend) as JSON values; recorded.

    Raises:
        ConfigError: no or repeated policies, a batch size below 1, or per-scene results of
            another configuration beside ``rows_path``.
        DatasetError: no scenes, scenes without poses, or scenes outside the protocol.
        AlignmentError: a policy failed on every scene.
    """
    if batch_size < 1:
        raise ConfigError(f"the batch size must be at least 1 scene, found {batch_size}")
    if len(dataset) == 0:
        raise DatasetError(f"data set {dataset.name!r} has no scenes to evaluate on")
    by_identity = {_identity(policy): policy for policy in policies}
    if not policies or len(by_identity) < len(policies):
        raise ConfigError(
            "evaluation needs at least one policy and no policy twice, found "
            f"{[_identity(policy) for policy in policies]}"
        )
    options = dict(sparsify_options or {})
    device = next(model.parameters()).device
    origin = provenance(device)
    common = {
        "model": model.model_name,
        "model_fingerprint": model_fingerprint(model),
        "dataset": dataset.name,
        "dataset_provenance": dataset.provenance,
        "protocol": protocol.as_dict(),
        "sparsify_options": options,
        "batch_size": batch_size,
        "seed": seed,
        "commit": origin.commit,
    }
    store = Store()
    if rows_path is not None:
        header = common | {"policies": list(by_identity), "num_scenes": len(dataset)}
        store = Sidecar(Path(rows_path).with_suffix(".scenes.jsonl"), header)
    _run(model, dataset, by_identity, protocol, batch_size, options, store, progress)

    results = [
        PolicyResults(
            name=policy.name, settings=policy.settings(), batches=store.of_policy(identity)
        )
        for identity, policy in by_identity.items()
    ]
    common |= {"dirty": origin.dirty, "machine": origin.machine, "command": command}
    report = build_report(results, protocol.metrics, common)
    if rows_path is not None:
        report.save_jsonl(rows_path)
    return report


def _run(
    model: Model,
    dataset: Dataset,
    policies: Mapping[str, Policy],
    protocol: Protocol,
    batch_size: int,
    options: Mapping[str, Any],
    store: Store,
    progress: Progress | None,
) -> None:
    """Fill ``store`` with what is missing, batch by batch of scenes, all policies on each."""
    first, steps = 0, 0
    while first < len(dataset):
        count = 0
        results = {identity: store.get(identity, first) for identity in policies}
        if None in results.values():
            scenes = _next_batch(dataset, first, batch_size)
            images = torch.stack([scene.images for scene in scenes])
            truths = [SceneTruth(scene, protocol) for scene in scenes]
            _check_unit([truth.unit for truth in truths], store)
        for identity, policy in policies.items():
            result = results[identity]
            if result is None:
                with sparsify(model, policy, **options) as run, torch.inference_mode():
                    predictions = model(images.to(next(model.parameters()).device))
                result = BatchResult(
                    policy=identity,
                    first=first,
                    unit=truths[0].unit,
                    block_sparsity=run.stats.block_sparsity,
                    flop_saving=run.stats.flop_saving,
                    backends=run.stats.backends,
                    scenes=tuple(_measure(predictions, first, truths, protocol)),
                )
                store.add(result)
            count = len(result.scenes)
            steps += count
            if progress is not None:
                progress(steps, len(policies) * len(dataset), policy.name)
        first += count


def _measure(
    predictions: Predictions, first: int, truths: Sequence[SceneTruth], protocol: Protocol
) -> Iterator[SceneResult]:
    cameras, points = predictions.world_from_cam.cpu(), predictions.world_points.cpu()
    for i, truth in enumerate(truths):
        metrics, failure = None, None
        try:
            metrics = scene_metrics(cameras[i], points[i], truth, protocol)
        except AlignmentError as error:
            failure = str(error)
        yield SceneResult(index=first + i, scene=truth.name, metrics=metrics, failure=failure)


def _check_unit(found: Sequence[str], store: Store) -> None:
    units = {*found, *(result.unit for result in store.results)}
    if len(units) > 1:
        raise DatasetError(
            f"the scenes are in different length units ({', '.join(sorted(units))}), so their "
            "errors have no mean; evaluate them apart"
        )


def _identity(policy: Policy) -> str:
    return json.dumps({"name": policy.name, "settings": policy.settings()}, sort_keys=True)


def _next_batch(dataset: Dataset, first: int, batch_size: int) -> list[Scene]:
    scenes = [dataset[first]]
    for index in range(first + 1, min(first + batch_size, len(dataset))):
        scene = dataset[index]
        if scene.images.shape != scenes[0].images.shape:
            break
        scenes.append(scene)
    return scenes
