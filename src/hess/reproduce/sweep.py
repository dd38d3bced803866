"""Results of an experiment's methods as rows, each compared with the reference, scene by scene."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hess.evaluation.evaluate import identity
from hess.evaluation.protocol import Protocol
from hess.evaluation.report import PolicyResults, build_report
from hess.evaluation.resume import Store
from hess.reproduce.experiment import Experiment, PaperNumber
from hess.reproduce.methods import Line
from hess.viz.style import higher_is_better
from hess.viz.tradeoff import column_name

Row = dict[str, Any]
State = Literal["ahead", "level", "behind"]

NEAR = 0.05
"""Methods without a common setting are compared up to this difference of block sparsity."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One metric of one row beside that of the reference, on the scenes that both have.

    Args:
        row, reference: the rows.
        metric: name.
        difference, error: row minus reference, paired over scenes, and its standard error (None
            for one scene).
    """

    row: Row
    reference: Row
    metric: str
    difference: float
    error: float | None

    @property
    def state(self) -> State | None:
        """Ahead or behind if better or worse by more than two standard errors; None: unknown."""
        if self.error is None:
            return None
        gain = self.difference if higher_is_better(self.metric) else -self.difference
        if gain > 2 * self.error:
            return "ahead"
        return "behind" if gain < -2 * self.error else "level"

    @property
    def change(self) -> tuple[float, float | None]:
        """The difference and its error: in points of AUC, or in % of the reference's error."""
        scale = change_scale(self.metric, self.reference[self.metric])
        return scale * self.difference, None if self.error is None else scale * self.error


def change_scale(metric: str, reference: float) -> float:
    """What makes a difference a change that data in other units can be compared with."""
    return 100.0 if higher_is_better(metric) else 100.0 / reference


def paper_change(experiment: Experiment, number: PaperNumber, metric: str) -> float | None:
    """How a number of the paper differs from its reference at the same setting, as a change."""
    reference = find_number(
        experiment, experiment.reference, (number.sparse_ratio, number.cdf_threshold)
    )
    if reference is None or metric not in number.values or metric not in reference.values:
        return None
    base = reference.values[metric]
    return change_scale(metric, base) * (number.values[metric] - base)


def find_number(
    experiment: Experiment, label: str, setting: tuple[float | None, float | None]
) -> PaperNumber | None:
    """The paper's number for a method at a setting."""
    for number in experiment.paper:
        if number.label == label and (number.sparse_ratio, number.cdf_threshold) == setting:
            return number
    return None


def measured_rows(
    experiment: Experiment,
    lines: Sequence[Line],
    store: Store,
    protocol: Protocol,
    common: Mapping[str, Any],
) -> tuple[list[Row], list[Comparison]]:
    """A row per line with paired differences to the reference, and the comparisons behind them.

    A method that failed on every scene has a row without metrics. The reference of a row is the
    reference method at the same setting, or else the one of nearest block sparsity, if that is not
    farther away than :data:`NEAR`; a dense reference is everyone's.
    """
    results = [
        PolicyResults(
            name=line.method.name,
            settings=line.method.settings(),
            batches=store.of_policy(identity(line.method)),
        )
        for line in lines
    ]
    rows: list[Row] = [
        {"label": line.spec.label} | _row(result, protocol, common)
        for line, result in zip(lines, results, strict=True)
    ]
    candidates = [
        i for i, line in enumerate(lines)
        if line.spec.label == experiment.reference and results[i].succeeded
    ]  # fmt: skip
    comparisons = []
    for i, line in enumerate(lines):
        if i in candidates or line.spec.method == "dense" or not candidates:
            continue
        same = [j for j in candidates if lines[j].setting == line.setting]
        nearest = min(
            same or candidates,
            key=lambda j: abs(rows[j]["block_sparsity"] - rows[i]["block_sparsity"]),
        )
        gap = abs(rows[nearest]["block_sparsity"] - rows[i]["block_sparsity"])
        if not same and lines[nearest].spec.method != "dense" and gap > NEAR:
            continue
        for metric in protocol.metrics:
            ours, theirs = results[i].values(metric), results[nearest].values(metric)
            pairs = {scene: ours[scene] - theirs[scene] for scene in ours if scene in theirs}
            if not pairs:
                continue
            difference, error = results[i].mean(metric, pairs, protocol.mean)
            name = f"paired_{metric}_vs_{column_name(experiment.reference)}"
            rows[i] |= {name: difference, f"{name}_se": error}
            comparisons.append(
                Comparison(
                    row=rows[i],
                    reference=rows[nearest],
                    metric=metric,
                    difference=difference,
                    error=error,
                )
            )
    return rows, comparisons


def _row(result: PolicyResults, protocol: Protocol, common: Mapping[str, Any]) -> Row:
    if result.succeeded:
        (row,) = build_report([result], protocol, common).rows
        # The report pairs with baselines by the names of policies; here the experiment says.
        return {key: value for key, value in row.items() if "paired_" not in key}
    empty = {key: None for metric in protocol.metrics for key in (metric, f"{metric}_se")}
    ratio, threshold = result.setting
    return {
        "policy": result.name,
        "settings": dict(result.settings),
        "sparse_ratio": ratio,
        "cdf_threshold": threshold,
        "block_sparsity": result.realised("block_sparsity"),
        "flop_saving": result.realised("flop_saving"),
        **empty,
        "n_scenes": 0,
        "failed_scenes": [scene.scene for scene in result.scenes],
        **common,
    }
