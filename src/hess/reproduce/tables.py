"""Tables of an experiment's page, as Markdown."""

from collections.abc import Sequence

from hess.reproduce.experiment import Experiment
from hess.reproduce.sweep import Comparison, Row, find_number, paper_change
from hess.viz.style import metric_label


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Numbers to the right, the first column to the left."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def metric_table(
    experiment: Experiment, metric: str, rows: Sequence[Row], comparisons: Sequence[Comparison]
) -> str:
    """All methods in one metric, ours and the paper's, and the change each makes in both."""
    by_row = {id(c.row): c for c in comparisons if c.metric == metric}
    is_auc = metric.startswith("auc_")
    unit = "points" if is_auc else "%"
    to = f"to {experiment.reference}"
    numbers = [number for number in experiment.paper if metric in number.values]
    header = ["method", "ρ, τ", "block sparsity", metric_label(metric), f"change {to}, {unit}"]
    if numbers:
        header += ["paper: sparsity", "paper", f"paper: change {to}", "ours − paper, change"]
    body = []
    for row in _in_order(rows):
        comparison = by_row.get(id(row))
        change = None if comparison is None else comparison.change
        line = [
            row["label"],
            setting_text(row),
            f"{row['block_sparsity']:.3f}",
            number_text(row[metric], row[f"{metric}_se"], 3 if is_auc else 4),
            "–" if change is None else number_text(*change, 1, sign=True) + _partner(comparison),
        ]
        if numbers:
            line += _paper_cells(experiment, metric, row, change)
        body.append(line)
    return markdown_table(header, body)


def _partner(comparison: Comparison | None) -> str:
    """The reference's block sparsity where no common setting pairs the two."""
    if comparison is None or comparison.row["sparse_ratio"] is not None:
        return ""
    reference = comparison.reference
    return "" if reference["sparse_ratio"] is None else f" (at {reference['block_sparsity']:.3f})"


def _paper_cells(
    experiment: Experiment, metric: str, row: Row, change: tuple[float, float | None] | None
) -> list[str]:
    """Sparsity, value and change of the paper, and how far our change is from it."""
    pair = row["sparse_ratio"], row["cdf_threshold"]
    paper = find_number(experiment, row["label"], pair)
    if paper is None:
        return ["–"] * 4
    cells = [
        number_text(paper.block_sparsity, None, 2),
        number_text(paper.values.get(metric), None, 4),
    ]
    theirs = paper_change(experiment, paper, metric)
    if change is None or theirs is None:
        return [*cells, "–", "–"]
    difference = number_text(change[0] - theirs, change[1], 1, sign=True)
    return [*cells, number_text(theirs, None, 1, sign=True), difference]


def setting_text(row: Row) -> str:
    """Sparse ratio and CDF threshold, or the one number that a transform varies."""
    if row["sparse_ratio"] is not None or row["cdf_threshold"] is not None:
        return f"{row['sparse_ratio']:g}, {row['cdf_threshold']:g}"
    for name in ("sparsity", "merge_ratio"):
        if name in row["settings"]:
            return f"{name.replace('_', ' ')} {row['settings'][name]:g}"
    return "–"


def count_text(count: int, noun: str) -> str:
    """A number of things."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def number_text(
    value: float | None, error: float | None, digits: int, *, sign: bool = False
) -> str:
    """A number with its standard error, if there is one."""
    if value is None:
        return "–"
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    text = text if error is None else f"{text} ± {error:.{digits}f}"
    return text.replace("-", "−")


def _in_order(rows: Sequence[Row]) -> list[Row]:
    """By setting as the experiment has them, methods of one setting together."""
    pairs: dict[object, int] = {}
    for row in rows:
        pairs.setdefault((row["sparse_ratio"], row["cdf_threshold"]), len(pairs))
    return sorted(rows, key=lambda row: pairs[row["sparse_ratio"], row["cdf_threshold"]])
