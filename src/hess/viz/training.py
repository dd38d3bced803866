"""The learning curve of a training run."""

import json
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

from hess.errors import DatasetError
from hess.viz.figure import new_figure, style_axes
from hess.viz.style import LIGHT, Theme

_COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def training_figure(logs: Mapping[str, Path], *, theme: Theme = LIGHT) -> Figure:
    """AUC@30 and point error on validation scenes against training steps, one line per run.

    Args:
        logs: label -> ``log.jsonl`` of ``hess train-nano``.
        theme: colours around the data.

    Raises:
        DatasetError: a log holds no validation yet.
    """
    figure = new_figure(9.0, 3.6, theme)
    panels = figure.subplots(1, 2)
    titles = {"val_auc_30": "AUC@30 ↑", "val_point_error": "Point error ↓"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        style_axes(axes, theme)
        for (label, log), color in zip(logs.items(), cycle(_COLORS), strict=False):
            rows = [json.loads(line) for line in log.read_text().splitlines()]
            known = [(row["step"], row[key]) for row in rows if key in row]
            if not known:
                raise DatasetError(f"{log} holds no validation yet; let the training run on")
            steps, values = zip(*known, strict=True)
            axes.plot(steps, values, color=color, label=label, linewidth=1.8)
        axes.set_xlabel("training step")
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
    if len(logs) > 1:
        panels[0].legend(frameon=False, fontsize=9, labelcolor=theme.text)
    return figure
