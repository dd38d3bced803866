"""What an experiment becomes: rows, pictures, tables and sentences, by its kind of figure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hess.datasets.scene import Dataset
from hess.evaluation.protocol import Protocol
from hess.policies import HessPlus
from hess.reproduce.clouds import WrongShare, cloud_panels
from hess.reproduce.experiment import Experiment, FigureKind, MethodSpec
from hess.reproduce.findings import findings
from hess.reproduce.guarding import guard_findings, guard_rows, guard_table
from hess.reproduce.heads import head_findings, head_rows, head_scores_of
from hess.reproduce.methods import Calibrated, Line
from hess.reproduce.profiles import rank_correlation
from hess.reproduce.sweep import Comparison, Row
from hess.reproduce.tables import count_text, markdown_table, metric_table, number_text
from hess.reproduce.timing import runtime_findings, runtime_rows, runtime_table, seconds_of
from hess.viz.differences import differences_figure
from hess.viz.error_clouds import cloud_grid
from hess.viz.figure import figure_png
from hess.viz.guard import guard_figure
from hess.viz.heatmap import head_heatmap
from hess.viz.runtime import runtime_figure, time_figure
from hess.viz.style import PolicyStyle, metric_label, policy_style
from hess.viz.tradeoff import tradeoff_figure

COLORS = {
    "red": "#d55e00", "blue": "#0072b2", "green": "#009e73", "pink": "#cc79a7",
    "orange": "#e69f00", "sky": "#56b4e9", "purple": "#7e57c2", "brown": "#8c564b",
    "black": "#1c1f24",
}  # fmt: skip
_MARKERS = "osv^DPX*"


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """An experiment with all that its product is made of.

    Args:
        experiment: what was asked for; its metrics are those that the data has.
        calibrated: the model and what was calibrated on it.
        dataset, protocol: what was measured on.
        lines, rows, comparisons: the results; empty for kinds that need none.
        common: what every row holds of its origin.
    """

    experiment: Experiment
    calibrated: Calibrated
    dataset: Dataset
    protocol: Protocol
    lines: Sequence[Line]
    rows: list[Row]
    comparisons: Sequence[Comparison]
    common: Mapping[str, Any]

    @property
    def styles(self) -> dict[str, PolicyStyle]:
        """Look of every method by its label."""
        return {
            spec.label: _style(spec, place) for place, spec in enumerate(self.experiment.methods)
        }


@dataclass(frozen=True, kw_only=True)
class Product:
    """What is written into an experiment's folder.

    Args:
        rows: JSON values, one line each.
        pictures: PNG files by name.
        findings: sentences.
        tables: Markdown by heading.
    """

    rows: Sequence[Row]
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    findings: Sequence[str] = ()
    tables: Mapping[str, str] = field(default_factory=dict)


def make_product(measured: Measured) -> Product:
    """The product of an experiment."""
    return _KINDS[measured.experiment.figure](measured)


def _tradeoff(measured: Measured) -> Product:
    experiment = measured.experiment
    figure = tradeoff_figure(
        measured.rows,
        metrics=experiment.metrics,
        reference=experiment.reference,
        styles=measured.styles,
    )
    return _compared(measured, figure_png(figure))


def _differences(measured: Measured) -> Product:
    experiment = measured.experiment
    figure = differences_figure(
        measured.rows, metrics=experiment.metrics, reference=experiment.reference
    )
    return _compared(measured, figure_png(figure))


def _calibrations(measured: Measured) -> Product:
    product = _tradeoff(measured)
    specs = [spec for spec in measured.experiment.methods if spec.method == "hess"]
    profiles = [measured.calibrated.profile_of(spec) for spec in specs]
    correlation = [[rank_correlation(one, other) for other in profiles] for one in profiles]
    table = markdown_table(
        ["profile", "scenes", *(spec.label for spec in specs)],
        [
            [spec.label, str(len(profile.scenes)), *(number_text(x, None, 2) for x in line)]
            for spec, profile, line in zip(specs, profiles, correlation, strict=True)
        ],
    )
    lowest = min(range(1, len(specs)), key=lambda i: correlation[0][i])
    sentence = (
        f"Rank correlation of the head scores with {specs[0].label} (Spearman's within a layer, "
        f"mean over layers): from {correlation[0][lowest]:.2f} ({specs[lowest].label}) to "
        f"{max(correlation[0][1:]):.2f}."
    )
    tables = {"Rank correlation of head scores": table, **product.tables}
    return replace(product, findings=[sentence, *product.findings], tables=tables)


def _clouds(measured: Measured) -> Product:
    model = measured.calibrated.model
    panels, shares = cloud_panels(measured.experiment, model, measured.dataset, measured.lines)
    product = _compared(measured, figure_png(cloud_grid(panels)))
    if not shares:
        return product
    header = ["scene", "method", "ρ, τ", "threshold", "points beyond it"]
    table = markdown_table(
        header,
        [[s.scene, s.label, s.setting, f"{s.threshold:.4g}", f"{s.share:.1%}"] for s in shares],
    )
    return replace(
        product,
        findings=[_green_sentence(shares), *product.findings],
        tables={"Points in green": table, **product.tables},
    )


def _green_sentence(shares: Sequence[WrongShare]) -> str:
    """Mean share of green points of each method at each setting."""
    groups: dict[tuple[str, str], list[float]] = {}
    for each in shares:
        groups.setdefault((each.setting, each.label), []).append(each.share)
    parts = [
        f"{label} {f'({setting}) ' if setting != '–' else ''}{sum(found) / len(found):.1%}"
        for (setting, label), found in groups.items()
    ]
    scenes = count_text(len({each.scene for each in shares}), "scene")
    return f"Points beyond the threshold, mean of {scenes} shown: {', '.join(parts)}."


def _heatmap(measured: Measured) -> Product:
    profile = measured.calibrated.main_profile
    scores = head_scores_of(profile)
    figure = head_heatmap(scores.get("camera"), scores.get("point"))
    return Product(
        rows=[row | dict(measured.common) for row in head_rows(profile)],
        pictures={f"{measured.experiment.name}.png": figure_png(figure)},
        findings=head_findings(profile),
    )


def _runtime(measured: Measured) -> Product:
    experiment = measured.experiment
    rows = runtime_rows(experiment, measured.calibrated.model, measured.lines, measured.dataset)
    figure = runtime_figure(rows, styles=measured.styles)
    return Product(
        rows=[row | dict(measured.common) for row in rows],
        pictures={f"{experiment.name}.png": figure_png(figure)},
        findings=runtime_findings(experiment, rows),
        tables={"Seconds per scene": runtime_table(experiment, rows)},
    )


def _guard(measured: Measured) -> Product:
    experiment, calibrated = measured.experiment, measured.calibrated
    (spec,) = (spec for spec in experiment.methods if spec.method == "hess+")
    profile = calibrated.profile_of(spec)
    rows = guard_rows(
        calibrated.model,
        measured.dataset,
        lambda ratio: HessPlus(profile, sparse_ratio=ratio),
        calibrated.progress,
    )
    return Product(
        rows=[row | dict(measured.common) for row in rows],
        pictures={f"{experiment.name}.png": figure_png(guard_figure(rows))},
        findings=guard_findings(rows),
        tables={"What was chosen, and what held": guard_table(rows)},
    )


def _merging(measured: Measured) -> Product:
    experiment = measured.experiment
    images = measured.dataset[0].images[None]
    methods = [line.method for line in measured.lines]
    seconds = seconds_of(measured.calibrated.model, methods, images)
    rows = [row | {"seconds": found} for row, found in zip(measured.rows, seconds, strict=True)]
    figure = time_figure(rows, metrics=experiment.metrics, styles=measured.styles)
    product = _compared(measured, figure_png(figure))
    header = ["method", "block sparsity", "FLOP saving", "seconds"]
    table = markdown_table(
        [*header, *map(metric_label, experiment.metrics)],
        [
            [row["label"], f"{row['block_sparsity']:.2f}", f"{row['flop_saving']:.2f}",
             f"{row['seconds']:.3f}",
             *(number_text(row[m], row[f"{m}_se"], 3) for m in experiment.metrics)]
            for row in rows
        ],
    )  # fmt: skip
    return replace(product, rows=rows, tables={"Geometry and time": table, **product.tables})


def _compared(measured: Measured, picture: bytes) -> Product:
    experiment = measured.experiment
    return Product(
        rows=measured.rows,
        pictures={f"{experiment.name}.png": picture},
        findings=findings(experiment, measured.rows, measured.comparisons),
        tables={
            metric_label(metric): metric_table(
                experiment, metric, measured.rows, measured.comparisons
            )
            for metric in experiment.metrics
        },
    )


def _style(spec: MethodSpec, place: int) -> PolicyStyle:
    style = replace(policy_style(spec.method), label=spec.label, order=place)
    if spec.color is None:
        return style
    return replace(style, color=COLORS[spec.color], marker=_MARKERS[place % len(_MARKERS)])


_KINDS: Mapping[FigureKind, Callable[[Measured], Product]] = {
    "tradeoff": _tradeoff,
    "differences": _differences,
    "calibrations": _calibrations,
    "clouds": _clouds,
    "heatmap": _heatmap,
    "runtime": _runtime,
    "merging": _merging,
    "guard": _guard,
}
