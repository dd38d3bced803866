"""How much each variant differs from a reference: points with error bars around a line at zero."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hess.errors import ConfigError
from hess.viz.figure import new_figure, style_axes
from hess.viz.style import LIGHT, Theme, higher_is_better, metric_label
from hess.viz.tradeoff import column_name

Row = Mapping[str, Any]

_BETTER, _WORSE, _LEVEL = "#009e73", "#d55e00", "#7a7a7a"


def differences_figure(
    rows: Sequence[Row], *, metrics: Sequence[str], reference: str, theme: Theme = LIGHT
) -> Figure:
    """A column of panels per metric, a row per setting, a line per variant: variant − reference.

    Bars are two standard errors; green is better and orange worse by more than that.

    Args:
        rows: with ``label``, ``sparse_ratio``, ``cdf_threshold``, ``block_sparsity`` and
            ``paired_<metric>_vs_<reference>``; rows without a difference are not drawn.
        metrics: which to draw.
        reference: label of what is subtracted.

    Raises:
        ConfigError: no metrics, or no row holds a difference.
    """
    name = column_name(reference)
    groups: dict[tuple[Any, Any], list[Row]] = {}
    for row in rows:
        if any(row.get(f"paired_{metric}_vs_{name}") is not None for metric in metrics):
            groups.setdefault((row["sparse_ratio"], row["cdf_threshold"]), []).append(row)
    if not groups:
        raise ConfigError(
            f"no row holds a difference of {list(metrics)} to {reference!r}, so there is nothing "
            "to draw"
        )
    longest = max(len(group) for group in groups.values())
    figure = new_figure(
        2.6 + 2.7 * len(metrics), 0.6 + len(groups) * (0.55 + 0.24 * longest), theme
    )
    panels = figure.subplots(len(groups), len(metrics), squeeze=False)
    for line, ((ratio, threshold), group) in zip(panels, groups.items(), strict=True):
        for axes, metric in zip(line, metrics, strict=True):
            _draw(axes, group, metric, f"paired_{metric}_vs_{name}", theme)
            if axes is line[0]:
                axes.set_yticks(range(len(group)), labels=[row["label"] for row in group])
            else:
                axes.set_yticks(range(len(group)), labels=[])
        sparsity = sum(row["block_sparsity"] for row in group) / len(group)
        line[0].set_title(
            f"ρ = {ratio:g}, τ = {threshold:g} (block sparsity {sparsity:.2f})",
            fontsize=9,
            loc="left",
        )
    for axes, metric in zip(panels[-1], metrics, strict=True):
        label, arrow = metric_label(metric).rsplit(" ", 1)
        axes.set_xlabel(f"{label} {arrow}\nvariant − {reference}", fontsize=9)
    return figure


def _draw(axes: Axes, rows: Sequence[Row], metric: str, name: str, theme: Theme) -> None:
    style_axes(axes, theme)
    axes.grid(False)
    axes.grid(True, axis="x", color=theme.grid, linewidth=0.8)
    axes.axvline(0, color=theme.muted, linewidth=1.2)
    for place, row in enumerate(rows):
        value, error = row.get(name), row.get(f"{name}_se")
        if value is None:
            continue
        reach = 2 * (error or 0.0)
        gain = value if higher_is_better(metric) else -value
        color = _LEVEL if abs(gain) <= reach or error is None else _BETTER if gain > 0 else _WORSE
        axes.errorbar(
            value, place, xerr=reach, color=color, marker="o", markersize=5, capsize=2.5,
            linewidth=1.4,
        )  # fmt: skip
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(4))
