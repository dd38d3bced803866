"""From per-scene results to rows: means, standard errors, paired differences to a baseline."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hess.errors import AlignmentError, ConfigError
from hess.evaluation.resume import BatchResult, SceneResult
from hess.files import write_atomically

BASELINES = ("uniform", "dense")
"""Policies every row is compared with: uniform at the same setting, dense at any."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Results of one evaluation.

    Args:
        rows: one per policy and setting; JSON values; a metric without ground truth is None.
        scenes: one per policy, setting and scene: its metrics, or why it failed.
    """

    rows: list[dict[str, Any]]
    scenes: list[dict[str, Any]]

    def table(self) -> list[list[str]]:
        """The main numbers as text, header first; "-" where there is none."""
        header = ["policy", "blocks dropped", "FLOPs saved", "AUC@30 ↑", "Δ AUC@30 to uniform"]
        header += ["ATE ↓", "chamfer ↓", "point error ↓"]
        body = [
            [
                row["policy"],
                _number(row["block_sparsity"], 3),
                _number(row["flop_saving"], 3),
                _with_error(row, "auc_30", 3),
                _with_error(row, "paired_auc_30_vs_uniform", 3, sign=True),
                _number(row["ate_rmse"], 3),
                _number(row["chamfer_mean"], 3),
                _number(row["point_error"], 3),
            ]
            for row in self.rows
        ]
        return [header, *body]

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
        return {scene.index for scene in self.scenes if scene.metrics is not None}

    def values(self, metric: str) -> dict[int, float]:
        """Value per scene index, of the scenes that have it."""
        known = {s.index: s.metrics[metric] for s in self.scenes if s.metrics is not None}
        return {index: value for index, value in known.items() if value is not None}

    def realised(self, name: str) -> float:
        """Mean over scenes of ``block_sparsity`` or ``flop_saving``."""
        total = math.fsum(getattr(batch, name) * len(batch.scenes) for batch in self.batches)
        return total / len(self.scenes)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error (None for a single value).

    Raises:
        AlignmentError: no values; the mean over nothing is not a number.
    """
    n = len(values)
    if n == 0:
        raise AlignmentError("there is no value to average: every scene failed")
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def build_report(
    results: Sequence[PolicyResults], metrics: Sequence[str], common: Mapping[str, Any]
) -> Report:
    """Rows and scenes of all policies; ``common`` goes into every row.

    A metric that no scene has ground truth for is None. Paired differences use the scenes on
    which neither policy failed, ``n_paired_vs_<baseline>`` of them.

    Raises:
        AlignmentError: every scene failed under some policy.
        ConfigError: two uniform policies at one setting, or two dense ones.
    """
    baselines = {name: _baselines(results, name) for name in BASELINES}
    rows, scenes = [], []
    for result in results:
        row = _row(result, metrics)
        for name in BASELINES:
            key = result.setting if name == "uniform" else None
            baseline = None if result.name == name else baselines[name].get(key)
            row |= _paired(result, baseline, name, metrics)
        rows.append(row | dict(common))
        scenes += [
            {"policy": result.name, "settings": dict(result.settings), "index": scene.index}
            | {"scene": scene.scene, "metrics": scene.metrics, "failure": scene.failure}
            for scene in result.scenes
        ]
    return Report(rows=rows, scenes=scenes)


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


def _row(result: PolicyResults, metrics: Sequence[str]) -> dict[str, Any]:
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
    for metric in metrics:
        values = list(result.values(metric).values())
        mean, error = mean_and_error(values) if values else (None, None)
        row |= {metric: mean, f"{metric}_se": error}
    row["n_scenes"] = len(result.scenes) - len(failed)
    row["n_scenes_with_points"] = len(result.values("point_error"))
    row["failed_scenes"] = [scene.scene for scene in failed]
    return row


def _paired(
    result: PolicyResults, baseline: PolicyResults | None, name: str, metrics: Sequence[str]
) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for metric in metrics:
        mean, error = None, None
        if baseline is not None:
            ours, theirs = result.values(metric), baseline.values(metric)
            differences = [ours[i] - theirs[i] for i in ours if i in theirs]
            if differences:
                mean, error = mean_and_error(differences)
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
