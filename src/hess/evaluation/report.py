"""From per-scene results to rows: means, standard errors, paired differences to a baseline."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hess.errors import AlignmentError, ConfigError
from hess.evaluation.means import (
    Mean,
    macro_mean_and_error,
    mean_and_error,
    weighted_mean_and_error,
)
from hess.evaluation.protocol import Protocol
from hess.evaluation.resume import BatchResult, SceneResult
from hess.evaluation.scene_metrics import SceneMetrics
from hess.files import write_atomically

BASELINES = ("uniform", "dense")
"""Policies every row is compared with: uniform at the same setting, dense at any."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Results of one evaluation.

    Args:
        protocol: what was measured.
        rows: one per policy and setting; JSON values; a metric without ground truth is None.
        scenes: one per policy, setting and scene: its metrics, or why it failed.
    """

    protocol: Protocol
    rows: list[dict[str, Any]]
    scenes: list[dict[str, Any]]

    def table(self) -> list[list[str]]:
        """The main numbers as text, header first; "-" where there is none.

        A column about points, or about a baseline, is left out when no row has a number for it.
        """
        columns = {
            "policy": [row["policy"] for row in self.rows],
            "blocks dropped": [_number(row["block_sparsity"], 3) for row in self.rows],
        }
        thresholds = self.protocol.auc_thresholds
        auc = f"auc_{30 if 30 in thresholds else thresholds[-1]}"
        label = auc.upper().replace("_", "@")
        columns[f"{label} ↑"] = [_with_error(row, auc, 3) for row in self.rows]
        for name in BASELINES:
            delta = f"paired_{auc}_vs_{name}"
            texts = [_with_error(row, delta, 3, sign=True) for row in self.rows]
            if set(texts) != {"-"}:
                columns[f"Δ {label} to {name}"] = texts
        columns["ATE ↓"] = [_number(row["ate_rmse"], 3) for row in self.rows]
        for heading, metric in (
            ("chamfer ↓", "chamfer_mean"),
            ("point error ↓", "point_error"),
            ("normals ↑", "normal_consistency"),
            ("acc. share ↑", "accuracy_share"),
            ("comp. share ↑", "completeness_share"),
        ):
            if any(row.get(metric) is not None for row in self.rows):
                columns[heading] = [_number(row[metric], 3) for row in self.rows]
        columns["FLOPs saved"] = [_number(row["flop_saving"], 3) for row in self.rows]
        return [list(columns), *map(list, zip(*columns.values(), strict=True))]

    def notes(self) -> list[str]:
        """What the numbers mean and leave out: the protocol, scenes, failures; one line each."""
        succeeded = ", ".join(map(str, sorted({row["n_scenes"] for row in self.rows})))
        units = ", ".join(sorted({row["unit"] for row in self.rows}))
        lines = [
            f"protocol {self.protocol.describe()}",
            f"scenes: {succeeded}; unit: {units}; "
            "± is one standard error; Δ is paired over scenes",
        ]
        return lines + [
            f"failed, and left out of {row['policy']} ({row['sparse_ratio']}, "
            f"{row['cdf_threshold']}): {', '.join(row['failed_scenes'])}"
            for row in self.rows
            if row["failed_scenes"]
        ]

    def save_jsonl(self, path: str | Path) -> Path:
        """Write the rows, one JSON object per line, in one piece."""
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in self.rows]
        return write_atomically(path, "".join(lines).encode())


@dataclass(frozen=True, kw_only=True)
class PolicyResults:
    """All batches of one policy, in the order of the data set."""

    name: str
    settings: Mapping[str, Any]
    batches: Sequence[BatchResult]

    @property
    def setting(self) -> tuple[float | None, float | None]:
        """Sparse ratio and CDF threshold; None where the policy has none."""
        return self.settings.get("sparse_ratio"), self.settings.get("cdf_threshold")

    @property
    def scenes(self) -> list[SceneResult]:
        return [scene for batch in self.batches for scene in batch.scenes]

    @property
    def succeeded(self) -> set[int]:
        """Indices of the scenes that have metrics."""
        return set(self.metrics)

    @cached_property
    def metrics(self) -> dict[int, SceneMetrics]:
        """Metrics per index, of the scenes that did not fail."""
        return {s.index: s.metrics for s in self.scenes if s.metrics is not None}

    def values(self, metric: str) -> dict[int, float]:
        """Value per scene index, of the scenes that have it."""
        known = {index: metrics.get(metric) for index, metrics in self.metrics.items()}
        return {index: float(value) for index, value in known.items() if value is not None}

    def mean(
        self, metric: str, values: Mapping[int, float], mean: Mean
    ) -> tuple[float, float | None]:
        """Mean and standard error of ``values`` of a metric (or of differences of it)."""
        if mean == "scenes":
            return mean_and_error(list(values.values()))
        scenes = [self.metrics[index] for index in values]
        is_auc = metric.startswith("auc_")
        weights = [float(scene["num_pairs"] or 0) if is_auc else 1.0 for scene in scenes]
        if mean == "pairs":
            return weighted_mean_and_error(list(values.values()), weights)
        categories = [scene["category"] for scene in scenes]
        return macro_mean_and_error(list(values.values()), weights, categories)

    def realised(self, name: str) -> float:
        """Mean over scenes of ``block_sparsity`` or ``flop_saving``."""
        total = math.fsum(getattr(batch, name) * len(batch.scenes) for batch in self.batches)
        return total / len(self.scenes)


def build_report(
    results: Sequence[PolicyResults], protocol: Protocol, common: Mapping[str, Any]
) -> Report:
    """Rows and scenes of all policies; ``common`` goes into every row.

    Values are brought together by the protocol's mean: an AUC by pairs of views where that says
    so, everything else by scenes, and both by category where it says so. A metric that no scene
    has ground truth for is None. Paired differences use the scenes on which neither policy
    failed, ``n_paired_vs_<baseline>`` of them.

    Raises:
        AlignmentError: every scene failed under some policy.
        ConfigError: two uniform policies at one setting, or two dense ones.
    """
    baselines = {name: _baselines(results, name) for name in BASELINES}
    rows, scenes = [], []
    for result in results:
        row = _row(result, protocol)
        for name in BASELINES:
            key = result.setting if name == "uniform" else None
            baseline = None if result.name == name else baselines[name].get(key)
            row |= _paired(result, baseline, name, protocol)
        rows.append(row | dict(common))
        scenes += [
            {"policy": result.name, "settings": dict(result.settings), "index": scene.index}
            | {"scene": scene.scene, "metrics": scene.metrics, "failure": scene.failure}
            for scene in result.scenes
        ]
    return Report(protocol=protocol, rows=rows, scenes=scenes)


def _baselines(results: Sequence[PolicyResults], name: str) -> dict[object, PolicyResults]:
    found: dict[object, PolicyResults] = {}
    for result in results:
        if result.name != name:
            continue
        key = result.setting if name == "uniform" else None
        if key in found:
            raise ConfigError(
                f"paired differences need one {name!r} policy per setting, found two at "
                f"{result.setting}; evaluate them apart"
            )
        found[key] = result
    return found


def _row(result: PolicyResults, protocol: Protocol) -> dict[str, Any]:
    failed = [scene for scene in result.scenes if scene.metrics is None]
    if len(failed) == len(result.scenes):
        raise AlignmentError(
            f"policy {result.name!r} at {result.setting} failed on all {len(failed)} scenes, so "
            f"it has no mean; the first reason: {failed[0].failure}"
        )
    row: dict[str, Any] = {
        "policy": result.name,
        "settings": dict(result.settings),
        "sparse_ratio": result.setting[0],
        "cdf_threshold": result.setting[1],
        "block_sparsity": result.realised("block_sparsity"),
        "flop_saving": result.realised("flop_saving"),
        "backends": sorted({name for batch in result.batches for name in batch.backends}),
        "unit": result.batches[0].unit,
    }
    for metric in protocol.metrics:
        values = result.values(metric)
        mean, error = result.mean(metric, values, protocol.mean) if values else (None, None)
        row |= {metric: mean, f"{metric}_se": error}
    row["n_scenes"] = len(result.scenes) - len(failed)
    row["n_scenes_with_points"] = len(result.values("chamfer_mean"))
    if protocol.mean == "categories":
        row["n_categories"] = len({m["category"] for m in result.metrics.values()})
    row["failed_scenes"] = [scene.scene for scene in failed]
    return row


def _paired(
    result: PolicyResults, baseline: PolicyResults | None, name: str, protocol: Protocol
) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for metric in protocol.metrics:
        mean, error = None, None
        if baseline is not None:
            ours, theirs = result.values(metric), baseline.values(metric)
            differences = {i: ours[i] - theirs[i] for i in ours if i in theirs}
            if differences:
                mean, error = result.mean(metric, differences, protocol.mean)
        row |= {f"paired_{metric}_vs_{name}": mean, f"paired_{metric}_vs_{name}_se": error}
    both = set() if baseline is None else result.succeeded & baseline.succeeded
    row[f"n_paired_vs_{name}"] = len(both)
    return row


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _with_error(row: Mapping[str, Any], name: str, digits: int, *, sign: bool = False) -> str:
    value, error = row.get(name), row.get(f"{name}_se")
    if value is None:
        return "-"
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text if error is None else f"{text}±{error:.{digits}f}"
