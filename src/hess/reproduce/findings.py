"""Sentences on what was found, made from the numbers by rule."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby

from hess.reproduce.experiment import Expectation, Experiment
from hess.reproduce.sweep import Comparison, Row, State
from hess.reproduce.tables import number_text
from hess.viz.style import METRIC_LABELS

RULE = (
    "A method is ahead (behind) where it is better (worse) by more than two standard errors of "
    "the paired difference, else level."
)
_AGREES: dict[Expectation, State] = {"better": "ahead", "worse": "behind", "same": "level"}


def findings(
    experiment: Experiment, rows: Sequence[Row], comparisons: Sequence[Comparison]
) -> list[str]:
    """For each metric and method where it stands beside the reference, and failures."""
    sentences = []
    for metric in experiment.metrics:
        for spec in experiment.methods:
            found = [c for c in comparisons if (c.row["label"], c.metric) == (spec.label, metric)]
            if found:
                sentence = _stands(spec.label, experiment.reference, metric, found)
                sentences.append(f"{sentence}{_verdict(spec.expect, found)}")
    for row in rows:
        if row["failed_scenes"]:
            sentences.append(
                f"{row['label']} at block sparsity {row['block_sparsity']:.2f} failed on "
                f"{len(row['failed_scenes'])} scenes, which are left out: "
                f"{', '.join(row['failed_scenes'])}."
            )
    return sentences


def _stands(label: str, reference: str, metric: str, found: Sequence[Comparison]) -> str:
    states = _by_sparsity(found)
    if not states:
        return (
            f"{METRIC_LABELS[metric]}, {label} beside {reference}: a single scene has no standard "
            "error, so nothing is said"
        )
    runs = [
        (state, [sparsity for sparsity, _ in run])
        for state, run in groupby(states, key=lambda item: item[1])
    ]
    parts = [f"{state} at {_span(sparsities)}" for state, sparsities in runs]
    last, since = runs[-1]
    if len(runs) > 1 and len(since) > 1:
        parts[-1] = f"{last} from {since[0]:.2f} on"
    elif len(since) > 1:
        parts = [f"{last} at every block sparsity ({_span(since)})"]
    top = max(found, key=lambda c: abs(c.change[0]))
    value, error = top.change
    unit = "points" if metric.startswith("auc_") else "%"
    size = number_text(value, error, 1, sign=True)
    return (
        f"{METRIC_LABELS[metric]}, {label} beside {reference}: {', '.join(parts)}; the largest "
        f"change is {size} {unit} at {top.row['block_sparsity']:.2f}"
    )


def _by_sparsity(found: Sequence[Comparison]) -> list[tuple[float, State]]:
    """Block sparsity and state, ascending; several draws at one setting must agree."""
    groups: dict[object, list[Comparison]] = defaultdict(list)
    for comparison in found:
        row = comparison.row
        pair = row["sparse_ratio"], row["cdf_threshold"]
        groups[row["block_sparsity"] if pair == (None, None) else pair].append(comparison)
    states: list[tuple[float, State]] = []
    for group in groups.values():
        known = {c.state for c in group if c.state is not None}
        if known:
            sparsity = sum(c.row["block_sparsity"] for c in group) / len(group)
            states.append((sparsity, known.pop() if len(known) == 1 else "level"))
    return sorted(states)


def _span(sparsities: Sequence[float]) -> str:
    first, last = f"{sparsities[0]:.2f}", f"{sparsities[-1]:.2f}"
    return first if first == last else f"{first}–{last}"


def _verdict(expect: Expectation | None, found: Sequence[Comparison]) -> str:
    """How that fits what the paper finds."""
    states = [state for _, state in _by_sparsity(found)]
    if expect is None or not states:
        return "."
    counts = {state: states.count(state) for state in ("ahead", "level", "behind")}
    agree = counts.pop(_AGREES[expect])
    words = {"ahead": "better", "level": "no clear difference", "behind": "worse"}
    others = [f", {words[state]} at {count}" for state, count in counts.items() if count]
    finds = {"better": "it better", "worse": "it worse", "same": "no difference"}[expect]
    return (
        f". The paper finds {finds}; here so at {agree} of {len(states)} settings"
        f"{''.join(others)}."
    )
