"""How fast sparse attention and sparse models are, from the rows of ``hess bench``."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from hess.errors import ConfigError
from hess.viz.figure import new_figure, style_axes
from hess.viz.style import LIGHT, Theme, policy_style

Row = Mapping[str, Any]

_BUDGETS = {"equal": "uniform", "hess": "hess"}
_LABELS = {"equal": "equal heads", "hess": "HeSS-like heads"}


def attention_figure(rows: Sequence[Row], *, theme: Theme = LIGHT) -> Figure:
    """Time of sparse attention over that of dense attention, against the share that is dropped.

    A panel for each device and precision; the dotted line is the ideal, where every dropped block
    is saved time.

    Args:
        rows: of op "attention"; those of the default backend on pooled lists are drawn.

    Raises:
        ConfigError: there are none.
    """
    drawn = [r for r in rows if r["op"] == "attention" and r["auto"] and r["lists"] == "pooled"]
    drawn = [row for row in drawn if row["budgets"] in _BUDGETS]
    kinds = sorted({(row["device"], row["dtype"]) for row in drawn}, reverse=True)
    if not kinds:
        raise ConfigError("no row of op 'attention' is of the default backend on pooled lists")
    figure = new_figure(4.4 * len(kinds), 4.2, theme)
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        style_axes(axes, theme)
        axes.plot([0, 1], [1, 0], ":", color=theme.muted, label="ideal")
        found = [row for row in drawn if (row["device"], row["dtype"]) == kind]
        lengths = sorted({row["tokens"] for row in found})
        for tokens in lengths:
            for budgets, policy in _BUDGETS.items():
                line = [r for r in found if (r["tokens"], r["budgets"]) == (tokens, budgets)]
                line.sort(key=lambda row: row["work_saving"])
                style = policy_style(policy)
                axes.plot(
                    [row["work_saving"] for row in line],
                    [row["ms_p50"] / row["dense_ms_p50"] for row in line],
                    color=style.color,
                    marker=style.marker,
                    linewidth=1.0 + lengths.index(tokens),
                    label=f"{_LABELS[budgets]}, {tokens:,} tokens",
                )
        axes.set_title(f"{kind[0].upper()}, {kind[1]}", fontsize=10, color=theme.text)
        axes.set_xlabel("dropped share of the tiles", fontsize=10)
        axes.set_ylabel("time / dense time", fontsize=10)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, None)
        axes.legend(frameon=False, fontsize=8, labelcolor=theme.text)
    return figure


def model_figure(
    rows: Sequence[Row], *, setting: tuple[float, float] = (0.8, 0.4), theme: Theme = LIGHT
) -> Figure:
    """Seconds of whole models against the number of views; a panel for each model.

    Args:
        rows: of op "model".
        setting: sparse ratio and CDF threshold of the sparse policies.

    Raises:
        ConfigError: there are none.
    """
    drawn = [
        row
        for row in rows
        if row["op"] == "model"
        and (row["sparse_ratio"], row["cdf_threshold"]) in (setting, (None, None))
    ]
    models = list(dict.fromkeys((row["model"], row["dtype"], row["device"]) for row in drawn))
    if not models:
        raise ConfigError(f"no row of op 'model' is dense or has the setting {setting}")
    figure = new_figure(4.4 * len(models), 4.0, theme)
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        style_axes(axes, theme)
        for policy in ("dense", "uniform", "hess"):
            line = [row for row in drawn if row["policy"] == policy]
            line = [r for r in line if (r["model"], r["dtype"], r["device"]) == model]
            line.sort(key=lambda row: row["views"])
            style = policy_style(policy)
            axes.plot(
                [row["views"] for row in line],
                [row["seconds"] for row in line],
                color=style.color,
                marker=style.marker or ".",
                label=style.label,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        views = sorted({row["views"] for row in drawn if row["model"] == model[0]})
        axes.set_xticks(views, [str(n) for n in views])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_title(", ".join(model), fontsize=10, color=theme.text)
        axes.set_xlabel("views", fontsize=10)
        axes.set_ylabel("seconds per forward pass", fontsize=10)
        axes.legend(frameon=False, fontsize=9, labelcolor=theme.text)
    return figure
