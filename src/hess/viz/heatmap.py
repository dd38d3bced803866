"""The picture of a profile: how sensitive is each head of each global layer (paper, Fig. 4)."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from hess.errors import ConfigError, LayoutError
from hess.viz.figure import new_figure
from hess.viz.style import LIGHT, Theme

_INK = LinearSegmentedColormap.from_list(
    "hess", ("#fffaf2", "#fddbb0", "#f3a25f", "#d55e00", "#8a3200", "#3d1300")
)


def head_heatmap(
    camera_score: ArrayLike | None,
    point_score: ArrayLike | None,
    *,
    camera_weight: float | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """Heat map with two columns (Cam, PC) per global layer and one row per head.

    Darker is more sensitive. Scores sum to 1 over the heads of a layer, so ``1 / heads`` is the
    share of a head in a layer without specialists; the colour bar marks it.

    Args:
        camera_score, point_score: [layers, heads], at least 0; None leaves its column out.
        camera_weight: draw a third column Mix = w * Cam + (1 - w) * PC; 0 to 1.
        theme: colours around the data.

    Raises:
        LayoutError: scores are not finite, non-negative [layers, heads] arrays of one shape.
        ConfigError: no scores, or camera_weight without both scores or outside 0 to 1.
    """
    given = {"Cam": camera_score, "PC": point_score}
    columns = {name: np.asarray(x, float) for name, x in given.items() if x is not None}
    if not columns:
        raise ConfigError("the heat map needs the camera score, the point score, or both")
    shapes = {score.shape for score in columns.values()}
    if len(shapes) > 1 or any(len(shape) != 2 or 0 in shape for shape in shapes):
        raise LayoutError(
            f"the heat map needs scores of one shape [layers, heads], found {sorted(shapes)}"
        )
    if camera_weight is not None:
        if len(columns) < 2 or not 0 <= camera_weight <= 1:
            raise ConfigError(
                "the mixed column needs both scores and a camera_weight between 0 and 1, found "
                f"{list(columns)} and {camera_weight}"
            )
        columns["Mix"] = camera_weight * columns["Cam"] + (1 - camera_weight) * columns["PC"]
    scores = np.stack(list(columns.values()), axis=1)
    if not np.isfinite(scores).all() or (scores < 0).any():
        raise LayoutError("the heat map needs finite scores of at least 0")

    num_layers, per_layer, num_heads = scores.shape
    cell = 0.24 if num_layers * per_layer > 30 else 0.34
    width = max(4.5, num_layers * (per_layer + 0.35) * cell + 1.6)
    figure = new_figure(width, max(2.6, num_heads * cell + 1.2), theme)
    axes = figure.add_subplot()
    top = float(scores.max())
    for layer_idx in range(num_layers):
        left = layer_idx * (per_layer + 0.35)
        mesh = axes.pcolormesh(
            left + np.arange(per_layer + 1.0),
            np.arange(num_heads + 1.0),
            scores[layer_idx].T,
            cmap=_INK,
            vmin=0.0,
            vmax=top if top > 0 else 1.0,
            edgecolors=theme.background,
            linewidth=0.8,
        )
    _label(axes, scores, list(columns), theme)
    bar = figure.colorbar(mesh, ax=axes, fraction=0.04, pad=0.015, aspect=24)
    bar.set_label(
        "share of the layer's sensitivity\n(blue line: equal share)", color=theme.text, fontsize=9
    )
    bar.ax.tick_params(colors=theme.muted, labelsize=8)
    bar.outline.set_visible(False)
    bar.ax.axhline(1 / num_heads, color="#0072b2", linewidth=2)
    return figure


def _label(axes: Axes, scores: NDArray, names: list[str], theme: Theme) -> None:
    num_layers, per_layer, num_heads = scores.shape
    axes.set_facecolor(theme.background)
    starts = np.arange(num_layers) * (per_layer + 0.35)
    axes.set_xticks(
        (starts[:, None] + np.arange(per_layer) + 0.5).ravel(),
        labels=names * num_layers,
        fontsize=7,
        rotation=90 if num_layers * per_layer > 18 else 0,
    )
    step = 1 if num_heads <= 16 else 2
    axes.set_yticks(
        np.arange(0, num_heads, step) + 0.5,
        labels=[f"H{head + 1}" for head in range(0, num_heads, step)],
        fontsize=8,
    )
    for layer_idx, start in enumerate(starts):
        axes.annotate(
            f"{'GA ' if num_layers <= 12 else ''}{layer_idx + 1}",
            (start + per_layer / 2, 0),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=theme.text,
        )
    axes.tick_params(colors=theme.muted, length=0)
    axes.invert_yaxis()
    axes.set_xlabel("global attention layer (in order of execution)", color=theme.text, fontsize=9)
    axes.set_ylabel("head", color=theme.text, fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)
