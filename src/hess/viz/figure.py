"""Figures without global state: make one, turn it into the bytes of a PNG file."""

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hess.errors import LayoutError
from hess.viz.style import Theme


def new_figure(width: float, height: float, theme: Theme) -> Figure:
    """An empty figure of ``width`` x ``height`` inches on the Agg canvas."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=theme.background)
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes, theme: Theme) -> None:
    """Quiet axes: thin horizontal grid, no frame on the right and top, theme colours."""
    axes.set_facecolor(theme.background)
    axes.grid(True, axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.muted)
    axes.tick_params(colors=theme.muted, labelsize=9, length=3)
    axes.xaxis.label.set_color(theme.text)
    axes.yaxis.label.set_color(theme.text)
    axes.title.set_color(theme.text)


def figure_png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as a PNG file's bytes; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    # The layout leaves room for the labels of a draw before, which may have had other ticks.
    figure.draw_without_rendering()
    figure.savefig(
        buffer,
        format="png",
        dpi=dpi,
        facecolor=figure.get_facecolor(),
        metadata={"Software": None},
    )
    return buffer.getvalue()


def image_png(image: np.ndarray) -> bytes:
    """An image uint8 [H, W, 3] as a PNG file's bytes.

    Raises:
        LayoutError: another shape or type.
    """
    from PIL import Image

    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise LayoutError(
            f"a PNG needs a uint8 image [H, W, 3], found {image.dtype} {image.shape}"
        )
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png", optimize=True)
    return buffer.getvalue()
