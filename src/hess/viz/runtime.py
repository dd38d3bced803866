"""Time of whole models by method (paper, Table 2), and quality against time."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from hess.errors import ConfigError
from hess.viz.figure import new_figure, style_axes
from hess.viz.style import LIGHT, PolicyStyle, Theme, metric_label, policy_style

Row = Mapping[str, Any]


def runtime_figure(
    rows: Sequence[Row], *, styles: Mapping[str, PolicyStyle] | None = None, theme: Theme = LIGHT
) -> Figure:
    """A bar per method and setting: seconds of one forward pass.

    Args:
        rows: with ``label``, ``policy``, ``block_sparsity`` and ``seconds``.
        styles: looks by label; others have the look of their policy.

    Raises:
        ConfigError: no rows.
    """
    if not rows:
        raise ConfigError("a runtime figure needs at least one row, found none")
    figure = new_figure(6.0, 0.9 + 0.42 * len(rows), theme)
    axes = figure.add_subplot()
    style_axes(axes, theme)
    axes.grid(False)
    axes.grid(True, axis="x", color=theme.grid, linewidth=0.8)
    for place, row in enumerate(rows):
        style = (styles or {}).get(row["label"], policy_style(row["policy"]))
        axes.barh(place, row["seconds"], color=style.color, height=0.62)
        axes.annotate(
            f" {row['seconds']:.2f}", (row["seconds"], place), va="center", fontsize=9,
            color=theme.text,
        )  # fmt: skip
    labels = [f"{row['label']}, block sparsity {row['block_sparsity']:.2f}" for row in rows]
    axes.set_yticks(range(len(rows)), labels=labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("seconds per scene ↓", fontsize=10)
    return figure


def time_figure(
    rows: Sequence[Row],
    *,
    metrics: Sequence[str],
    styles: Mapping[str, PolicyStyle] | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """A panel per metric: mean ± 1 standard error against seconds, a line per label.

    Args:
        rows: with ``label``, ``policy``, ``block_sparsity``, ``seconds``, metrics and their
            ``_se``.
        metrics, styles, theme: as for a trade-off.

    Raises:
        ConfigError: no metrics, or no row holds one of them.
    """
    if not metrics:
        raise ConfigError("a figure of quality against time needs at least one metric")
    figure = new_figure(4.6 * len(metrics), 4.3, theme)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        style_axes(axes, theme)
        lines: dict[str, list[Row]] = {}
        for row in rows:
            if row.get(metric) is not None:
                lines.setdefault(row["label"], []).append(row)
        if not lines:
            raise ConfigError(f"no row holds {metric!r}, so there is nothing to draw")
        for label, line in lines.items():
            style = (styles or {}).get(label, policy_style(line[0]["policy"]))
            line = sorted(line, key=lambda row: row["block_sparsity"])
            axes.errorbar(
                [row["seconds"] for row in line],
                [row[metric] for row in line],
                yerr=[row[f"{metric}_se"] or 0.0 for row in line],
                color=style.color,
                marker=style.marker or "*",
                markersize=6 if style.marker else 11,
                linewidth=1.6,
                capsize=2.5,
                label=style.label,
            )
        axes.set_ylabel(metric_label(metric), fontsize=10)
        axes.set_xlabel("seconds per scene ↓", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=min(len(labels), 5), frameon=False,
        fontsize=9, labelcolor=theme.text,
    )  # fmt: skip
    return figure
