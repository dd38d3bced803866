"""A picture on the HTML report: PNG bytes for light and dark pages, words for all readers."""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from matplotlib.figure import Figure

from hess.errors import ConfigError
from hess.viz.figure import figure_png
from hess.viz.style import DARK, LIGHT


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture for the page.

    Args:
        title, caption: shown below it.
        alt: says what it shows to people who cannot see it.
        png: bytes of a PNG file.
        dark_png: the same for dark pages; None uses ``png`` there too.

    Raises:
        ConfigError: the bytes are not a PNG file.
    """

    title: str
    caption: str
    alt: str
    png: bytes
    dark_png: bytes | None = None

    def __post_init__(self) -> None:
        for png in (self.png, self.dark_png):
            if png is not None and not png.startswith(b"\x89PNG"):
                raise ConfigError(f"picture {self.title!r} is not a PNG file")


def themed_picture(draw: Callable[..., Figure], *, title: str, caption: str, alt: str) -> Picture:
    """A picture drawn twice, by ``draw(theme=...)``: for light and for dark pages."""
    light, dark = (figure_png(draw(theme=theme), dpi=130) for theme in (LIGHT, DARK))
    return Picture(title=title, caption=caption, alt=alt, png=light, dark_png=dark)


def picture_html(picture: Picture, *, wide: bool = False) -> str:
    """The picture as a self-contained ``<figure>``; a wide one scrolls on small screens."""
    dark = ""
    if picture.dark_png is not None:
        dark = (
            f'<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(picture.dark_png)}">'
        )
    width, height = (int.from_bytes(picture.png[i : i + 4], "big") for i in (16, 20))
    # A wide picture is scrolled on a small screen instead of shrunk until nothing can be read.
    least = f"min-width:{min(width, max(600, width // 2))}px;" if wide else ""
    image = (
        f'<picture>{dark}<img src="{_data_uri(picture.png)}" alt="{escape(picture.alt)}" '
        f'width="{width}" height="{height}" style="{least}max-width:{width}px"></picture>'
    )
    if wide:
        image = (
            f'<div class="wide" role="region" tabindex="0" aria-label="{escape(picture.title)}">'
            f"{image}</div>"
        )
    full = ' class="full"' if width > 2 * height else ""
    return (
        f"<figure{full}>{image}<figcaption><b>{escape(picture.title)}</b> "
        f"{escape(picture.caption)}</figcaption></figure>"
    )


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
