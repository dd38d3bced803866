"""Sentences on what was found, made from the numbers by rule."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import groupby
from typing import Literal

from hess.reproduce.experiment import Expectation, Experiment, MethodSpec
from hess.reproduce.sweep import Comparison, Row, State, find_number, paper_change
from hess.reproduce.tables import count_text, number_text
from hess.viz.style import METRIC_LABELS, higher_is_better

FEWEST_SCENES = 8
"""Below so many scenes the standard error itself is too uncertain to say anything."""

PAPER_SPARSE_RATIO = 0.8
"""The highest of the paper; settings beyond it are our addition, and no verdict counts them."""

UNEQUAL = 0.01
"""Block sparsities of one setting that are farther apart are pointed out."""

_Stand = State | Literal["mixed"]
_AGREES: dict[Expectation, State] = {"better": "ahead", "worse": "behind", "same": "level"}
_WORDS: dict[_Stand, str] = {
    "ahead": "better", "level": "no clear difference", "behind": "worse", "mixed": "mixed",
}  # fmt: skip


def rule_text(comparisons: Sequence[Comparison]) -> str:
    """What the words mean; empty where none are said."""
    scenes = _scenes(comparisons)
    if scenes < FEWEST_SCENES:
        return ""
    return (
        "A method is ahead (behind) where it is better (worse) by more than two standard errors "
        f"of the paired difference over {scenes} scenes (not corrected for the many comparisons), "
        "else level; mixed where several draws at one setting do not agree."
    )


def findings(
    experiment: Experiment, rows: Sequence[Row], comparisons: Sequence[Comparison]
) -> list[str]:
    """For each metric and method where it stands beside the reference, and failures."""
    sentences = []
    if comparisons and _scenes(comparisons) < FEWEST_SCENES:
        sentences.append(
            f"Too few scenes to say where a method is ahead or behind ({_scenes(comparisons)})."
        )
    elif comparisons:
        for metric in experiment.metrics:
            for spec in experiment.methods:
                found = [
                    c for c in comparisons if (c.row["label"], c.metric) == (spec.label, metric)
                ]
                if _by_sparsity(found):
                    stands = _stands(spec.label, experiment.reference, metric, found)
                    sentences.append(f"{stands}.{_verdict(experiment, spec, metric, found)}")
    sentences += _unequal(experiment, comparisons)
    for row in rows:
        failed = row["failed_scenes"]
        if failed:
            left_out = "is" if len(failed) == 1 else "are"
            sentences.append(
                f"{row['label']} at block sparsity {row['block_sparsity']:.2f} failed on "
                f"{count_text(len(failed), 'scene')}, which {left_out} left out: "
                f"{', '.join(failed)}."
            )
    return sentences


def _scenes(comparisons: Sequence[Comparison]) -> int:
    return max((c.row["n_scenes"] for c in comparisons), default=0)


def _stands(label: str, reference: str, metric: str, found: Sequence[Comparison]) -> str:
    runs = [
        (stand, [sparsity for sparsity, _ in run])
        for stand, run in groupby(_by_sparsity(found), key=lambda item: item[1])
    ]
    parts = [f"{stand} at {_span(sparsities)}" for stand, sparsities in runs]
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


def _by_sparsity(found: Sequence[Comparison]) -> list[tuple[float, _Stand]]:
    """Block sparsity and state, ascending; several draws at one setting are mixed or agree."""
    groups: dict[object, list[Comparison]] = defaultdict(list)
    for comparison in found:
        row = comparison.row
        pair = row["sparse_ratio"], row["cdf_threshold"]
        groups[row["block_sparsity"] if pair == (None, None) else pair].append(comparison)
    stands: list[tuple[float, _Stand]] = []
    for group in groups.values():
        known = {c.state for c in group if c.state is not None}
        if known:
            sparsity = sum(c.row["block_sparsity"] for c in group) / len(group)
            stands.append((sparsity, known.pop() if len(known) == 1 else "mixed"))
    return sorted(stands)


def _span(sparsities: Sequence[float]) -> str:
    first, last = f"{sparsities[0]:.2f}", f"{sparsities[-1]:.2f}"
    return first if first == last else f"{first}–{last}"


def _verdict(
    experiment: Experiment, spec: MethodSpec, metric: str, found: Sequence[Comparison]
) -> str:
    """How that fits the paper, only where the paper has numbers or says something."""
    if any(number.label == spec.label for number in experiment.paper):
        return _beside_numbers(experiment, spec, metric, found)
    return _beside_words(spec.expect[metric], found) if metric in spec.expect else ""


def _beside_numbers(
    experiment: Experiment, spec: MethodSpec, metric: str, found: Sequence[Comparison]
) -> str:
    """Direction of our change and the paper's at each setting that the paper has."""
    sign = 1 if higher_is_better(metric) else -1
    pairs = []
    for comparison in found:
        setting = comparison.row["sparse_ratio"], comparison.row["cdf_threshold"]
        number = find_number(experiment, spec.label, setting)
        theirs = None if number is None else paper_change(experiment, number, metric)
        if theirs:
            pairs.append((sign * theirs > 0, sign * comparison.difference > 0, comparison.state))
    if not pairs:
        return ""
    better = sum(theirs for theirs, _, _ in pairs)
    agree = [state for theirs, ours, state in pairs if ours == theirs]
    against = [state for theirs, ours, state in pairs if ours != theirs]
    settings = count_text(len(pairs), "setting")
    return (
        f" The paper has it better at {better} and worse at {len(pairs) - better} of {settings}; "
        f"here the direction agrees at {len(agree)} ({_clear(agree)} beyond two standard errors) "
        f"and is the other at {len(against)} ({_clear(against)})."
    )


def _clear(states: Sequence[State | None]) -> int:
    return sum(state in ("ahead", "behind") for state in states)


def _beside_words(expect: Expectation, found: Sequence[Comparison]) -> str:
    """At how many settings of the paper's range it is as the paper's text says."""
    within = [c for c in found if (c.row["sparse_ratio"] or 0.0) <= PAPER_SPARSE_RATIO]
    counts = Counter(stand for _, stand in _by_sparsity(within))
    if not counts:
        return ""
    settings = count_text(counts.total(), "setting")
    agree = counts.pop(_AGREES[expect], 0)
    others = [f", {word} at {counts[stand]}" for stand, word in _WORDS.items() if counts[stand]]
    finds = {"better": "it better", "worse": "it worse", "same": "no difference"}[expect]
    return f" The paper finds {finds}; here so at {agree} of {settings}{''.join(others)}."


def _unequal(experiment: Experiment, comparisons: Sequence[Comparison]) -> list[str]:
    """Methods that drop more or fewer blocks than the reference at the same setting."""
    sentences = []
    for spec in experiment.methods:
        gaps: dict[tuple[float, float], tuple[float, float]] = {}
        for comparison in comparisons:
            row, reference = comparison.row, comparison.reference
            setting = row["sparse_ratio"], row["cdf_threshold"]
            there = reference["sparse_ratio"], reference["cdf_threshold"]
            if row["label"] == spec.label and setting == there != (None, None):
                gaps[setting] = row["block_sparsity"], reference["block_sparsity"]
        for word, sign in (("more", 1), ("fewer", -1)):
            apart = [pair for pair in gaps.values() if sign * (pair[0] - pair[1]) > UNEQUAL]
            if apart:
                most = max(apart, key=lambda pair: abs(pair[0] - pair[1]))
                sentences.append(
                    f"{spec.label} drops {word} blocks than {experiment.reference} at "
                    f"{len(apart)} of {count_text(len(gaps), 'setting')} (at most "
                    f"{most[0]:.2f} beside {most[1]:.2f}): there block sparsity is not equal, and "
                    "a part of the difference comes from that."
                )
    return sentences
