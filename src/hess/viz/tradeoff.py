"""Quality against block sparsity, one line per method (paper, Fig. 6), and paired differences.

A row with a ``label`` belongs to the line of that label, any other to the line of its policy.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hess.errors import ConfigError
from hess.viz.figure import new_figure, style_axes
from hess.viz.style import LIGHT, PolicyStyle, Theme, metric_label, policy_style

Row = Mapping[str, Any]
Styles = Mapping[str, PolicyStyle]


def tradeoff_figure(
    rows: Sequence[Row],
    *,
    metrics: Sequence[str] = ("auc_30", "chamfer_mean"),
    reference: str | None = "uniform",
    styles: Styles | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """Upper panels: each metric against block sparsity. Lower: paired difference to a reference.

    Args:
        rows: results of :func:`hess.evaluation.evaluate.evaluate`, one per policy and setting.
        metrics: one column of panels each.
        reference: the line that differences are to; None leaves the lower panels out.
        styles: looks by label or policy; others have the look of their policy.
        theme: colours around the data.

    Raises:
        ConfigError: no metrics, or no row holds one of them.
    """
    if not metrics:
        raise ConfigError("a trade-off plot needs at least one metric")
    heights = (3,) if reference is None else (3, 2)
    figure = new_figure(4.6 * len(metrics), 1.2 + 1.08 * sum(heights), theme)
    panels = figure.subplots(
        len(heights), len(metrics), squeeze=False, sharex=True, height_ratios=heights
    )
    for column, metric in zip(panels.T, metrics, strict=True):
        draw_metric(column[0], rows, metric, theme, styles=styles)
        if reference is not None:
            draw_paired_difference(
                column[1], rows, metric, theme, reference=reference, styles=styles
            )
            column[0].set_xlabel("")
    _legend(figure, panels[0, 0], theme)
    return figure


def metric_figure(rows: Sequence[Row], metric: str, *, theme: Theme = LIGHT) -> Figure:
    """One metric against block sparsity; arguments and errors as :func:`tradeoff_figure`."""
    figure = new_figure(5.2, 4.2, theme)
    axes = figure.add_subplot()
    draw_metric(axes, rows, metric, theme)
    _legend(figure, axes, theme)
    return figure


def paired_figure(rows: Sequence[Row], metric: str, *, theme: Theme = LIGHT) -> Figure:
    """Paired difference to uniform of one metric; errors as :func:`tradeoff_figure`."""
    figure = new_figure(5.2, 4.2, theme)
    axes = figure.add_subplot()
    draw_paired_difference(axes, rows, metric, theme)
    _legend(figure, axes, theme)
    return figure


def draw_metric(
    axes: Axes,
    rows: Sequence[Row],
    metric: str,
    theme: Theme = LIGHT,
    *,
    styles: Styles | None = None,
) -> None:
    """Draw a metric's mean ± 1 standard error against block sparsity; dense as a dotted line.

    Rows of one line at one setting (random draws with several seeds) become one point: the
    mean of their values and of their standard errors.

    Raises:
        ConfigError: no row holds the metric.
    """
    style_axes(axes, theme)
    for curve in _curves(rows, metric, f"{metric}_se", styles or {}):
        style = curve.style
        if curve.policy == "dense":
            level, se = curve.value.mean(), np.nan_to_num(curve.se.mean())
            axes.axhline(level, color=style.color, linestyle=":", linewidth=2, label=style.label)
            axes.axhspan(level - se, level + se, color=style.color, alpha=0.12, linewidth=0)
            continue
        axes.errorbar(
            curve.sparsity,
            curve.value,
            yerr=curve.se,
            label=style.label,
            color=style.color,
            marker=style.marker,
            markersize=5.5,
            linewidth=1.8,
            elinewidth=1.2,
            capsize=2.5,
        )
    axes.set_ylabel(metric_label(metric), fontsize=10)
    axes.set_xlabel("block sparsity", fontsize=10)


def draw_paired_difference(
    axes: Axes,
    rows: Sequence[Row],
    metric: str,
    theme: Theme = LIGHT,
    *,
    reference: str = "uniform",
    styles: Styles | None = None,
) -> None:
    """Draw method − reference on the same scenes at the same setting with a ± 1 SE band.

    The rows hold it as ``paired_<metric>_vs_<reference>``, see :func:`column_name`.

    Raises:
        ConfigError: no row holds a paired difference of the metric.
    """
    name = f"paired_{metric}_vs_{column_name(reference)}"
    curves = _curves(rows, name, f"{name}_se", styles or {})
    base = _style(reference, reference, styles or {})
    style_axes(axes, theme)
    axes.axhline(0, color=base.color, linewidth=1.8, label=base.label)
    for curve in curves:
        if curve.policy == "dense" or curve.key == reference:
            continue
        style = curve.style
        axes.plot(
            curve.sparsity, curve.value, color=style.color, marker=style.marker, markersize=5,
            linewidth=1.8, label=style.label,
        )  # fmt: skip
        se = np.nan_to_num(curve.se)
        axes.fill_between(
            curve.sparsity, curve.value - se, curve.value + se, color=style.color, alpha=0.22,
            linewidth=0,
        )  # fmt: skip
    label, arrow = metric_label(metric).rsplit(" ", 1)
    minus = "policy − uniform" if reference == "uniform" else f"method − {base.label}"
    axes.set_ylabel(f"{label} {arrow}\n{minus}", fontsize=10)
    axes.set_xlabel("block sparsity", fontsize=10)


def column_name(label: str) -> str:
    """A label as part of a column's name: "HeSS, λ = 1" gives "hess_λ_1", "HeSS+" "hess_plus"."""
    return re.sub(r"\W+", "_", label.lower().replace("+", " plus")).strip("_")


@dataclass(frozen=True, kw_only=True)
class _Curve:
    key: str  # its label, or else its policy
    policy: str
    style: PolicyStyle
    sparsity: np.ndarray
    value: np.ndarray
    se: np.ndarray


def _curves(rows: Sequence[Row], value: str, se: str, styles: Styles) -> list[_Curve]:
    points: dict[str, dict[object, list[tuple[float, float, float]]]] = defaultdict(dict)
    variants: dict[str, set[str]] = defaultdict(set)
    policies: dict[str, str] = {}
    for row in rows:
        if row.get(value) is None:
            continue
        key = row.get("label", row["policy"])
        policies[key] = row["policy"]
        setting: object = (row.get("sparse_ratio"), row.get("cdf_threshold"))
        if setting == (None, None):
            setting = json.dumps(row.get("settings", {}), sort_keys=True)
        elif "label" not in row:
            varied = ("sparse_ratio", "cdf_threshold", "seed", "scores_sha256")
            kept = {k: v for k, v in row.get("settings", {}).items() if k not in varied}
            variants[key].add(json.dumps(kept, sort_keys=True))
        error = row.get(se)
        point = (row["block_sparsity"], row[value], np.nan if error is None else error)
        points[key].setdefault(setting, []).append(point)
    if not points:
        raise ConfigError(
            f"no row holds {value!r}, so there is nothing to draw; rows hold "
            f"{sorted({key for row in rows for key in row})}"
        )
    mixed = sorted(policy for policy, found in variants.items() if len(found) > 1)
    if mixed:
        raise ConfigError(
            f"a plot draws one variant per policy, found several of {', '.join(mixed)} "
            f"({'; '.join(sorted(variants[mixed[0]]))}); draw their rows apart"
        )
    curves = []
    for key, settings in points.items():
        table = np.array([np.mean(group, axis=0) for group in settings.values()], dtype=float)
        table = table[np.argsort(table[:, 0], kind="stable")]
        curves.append(
            _Curve(
                key=key,
                policy=policies[key],
                style=_style(key, policies[key], styles),
                sparsity=table[:, 0],
                value=table[:, 1],
                se=table[:, 2],
            )
        )
    return sorted(curves, key=lambda curve: (curve.style.order, curve.key))


def _style(key: str, policy: str, styles: Styles) -> PolicyStyle:
    return styles[key] if key in styles else policy_style(policy)


def _legend(figure: Figure, axes: Axes, theme: Theme) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=min(len(labels), 5), frameon=False,
        fontsize=9, labelcolor=theme.text, handlelength=1.8, columnspacing=1.4,
    )  # fmt: skip
