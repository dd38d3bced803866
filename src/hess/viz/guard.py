"""What the quality guard saw in its probe, and what came of it on all views."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from hess.errors import ConfigError
from hess.viz.figure import new_figure, style_axes
from hess.viz.style import LIGHT, Theme

_COLORS = ("#0072b2", "#009e73", "#d55e00", "#cc79a7", "#e69f00")


def guard_figure(rows: Sequence[Mapping[str, Any]], theme: Theme = LIGHT) -> Figure:
    """A panel per limit: drift on all views against that of the probe, a point per scene.

    Args:
        rows: with ``max_drift``, ``probe_drift``, ``drift`` (None: unknown) and ``sparse_ratio``
            (None: left dense, not drawn).

    Raises:
        ConfigError: no rows.
    """
    limits = sorted({row["max_drift"] for row in rows})
    if not limits:
        raise ConfigError("a figure of the guard needs at least one row, found none")
    figure = new_figure(3.3 * len(limits), 3.2, theme)
    panels = figure.subplots(1, len(limits), squeeze=False)[0]
    for axes, limit, color in zip(panels, limits, _COLORS, strict=False):
        style_axes(axes, theme)
        found = [
            row
            for row in rows
            if row["max_drift"] == limit
            and row["sparse_ratio"] is not None
            and row["drift"] is not None
        ]
        x, y = ([row[name] for row in found] for name in ("probe_drift", "drift"))
        axes.scatter(x, y, s=14, color=color, alpha=0.6, linewidths=0)
        top = max([limit, *x, *y]) * 1.1
        axes.plot([0, top], [0, top], color=theme.muted, linewidth=0.8, linestyle=":")
        axes.axhline(limit, color=theme.text, linewidth=1.2)
        axes.annotate(
            "limit", (0, limit), xytext=(2, 3), textcoords="offset points", fontsize=9,
            color=theme.text,
        )  # fmt: skip
        axes.set_xlim(0, top)
        axes.set_ylim(0, top)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_title(f"limit {limit:.0%}: {len(found)} scenes made sparse", fontsize=10)
        axes.set_xlabel("drift of the probe views", fontsize=10)
    panels[0].set_ylabel("drift of all views", fontsize=10)
    return figure
