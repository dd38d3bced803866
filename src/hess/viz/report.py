"""The HTML report: one self-contained page with pictures, numbers and their provenance."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from hess.errors import ConfigError
from hess.files import write_atomically
from hess.viz.heatmap import head_heatmap
from hess.viz.page import GLOSSARY, PAGE, STYLE
from hess.viz.picture import Picture, picture_html, themed_picture
from hess.viz.style import metric_label
from hess.viz.table import results_table, signed, verdict
from hess.viz.tradeoff import metric_figure, paired_figure

Row = Mapping[str, Any]
DEFAULT_INTRO = (
    "A transformer that turns photos into cameras and a 3D point map spends most of its time in "
    "global attention. Here much of that attention is skipped, once by the same rule for every "
    "head (uniform) and once by how sensitive each head is (HeSS)."
)


def write_report(path: str | Path, **parts: Any) -> Path:
    """Write :func:`report_html` of the same arguments to ``path`` in one piece."""
    return write_atomically(path, report_html(**parts).encode())


def report_html(
    *,
    title: str,
    rows: Sequence[Row],
    camera_score: ArrayLike | None = None,
    point_score: ArrayLike | None = None,
    camera_weight: float | None = None,
    pictures: Sequence[Picture] = (),
    intro: str = DEFAULT_INTRO,
    metrics: Sequence[str] = ("auc_30", "chamfer_mean"),
) -> str:
    """The page: key numbers, heat map, trade-off plots, table, pictures, glossary, provenance.

    Args:
        title, intro: plain text.
        rows: results of :func:`hess.evaluation.evaluate.evaluate`.
        camera_score, point_score: [layers, heads] for the heat map; both None leave it out.
        camera_weight: as :func:`hess.viz.heatmap.head_heatmap`.
        pictures: renderings and contact sheets, in order.
        metrics: metrics to plot; those without a value in any row are left out.

    Raises:
        ConfigError: no rows, a row without policy or provenance, or nothing to plot.
        LayoutError: scores are not what they should be.
    """
    _check_rows(rows)
    sections = []
    if camera_score is not None or point_score is not None:
        sections.append(_heatmap_section(camera_score, point_score, camera_weight))
    sections.append(_tradeoff_section(rows, metrics))
    sections.append(_table_section(rows))
    if pictures:
        figures = "\n".join(picture_html(picture) for picture in pictures)
        sections.append(
            '<section aria-labelledby="looks"><h2 id="looks">What it looks like</h2>'
            f'<div class="grid">{figures}</div></section>'
        )
    return PAGE.substitute(
        title=escape(title),
        style=STYLE,
        intro=escape(intro),
        cards=_cards(rows),
        sections="\n".join(sections),
        glossary=_definitions(GLOSSARY),
        provenance=_definitions(_provenance(rows)),
    )


def _check_rows(rows: Sequence[Row]) -> None:
    if not rows:
        raise ConfigError("a report needs at least one results row, found none")
    needed = ("policy", "block_sparsity", "n_scenes", "model", "commit", "seed", "protocol")
    for row in rows:
        missing = [key for key in needed if key not in row]
        if missing:
            raise ConfigError(f"a results row lacks {missing}; rows come from hess evaluate")


def _cards(rows: Sequence[Row]) -> str:
    """One card per setting: HeSS against uniform, with a verdict in words."""
    cards = []
    for row in sorted(rows, key=lambda row: row["block_sparsity"]):
        change = row.get("paired_auc_30_vs_uniform")
        if row["policy"] != "hess" or change is None:
            continue
        error = row.get("paired_auc_30_vs_uniform_se")
        word = verdict("auc_30", change, error)
        cards.append(
            f'<li><div class="what">block sparsity {row["block_sparsity"]:.2f}</div>'
            f'<div class="value {word}">{signed(change, error, 3)}</div>'
            f'<div class="what">AUC@30, HeSS − uniform: {_WORDS[word]}</div></li>'
        )
    return f'<ul class="cards">{"".join(cards)}</ul>' if cards else ""


_WORDS = {"better": "clearly better", "worse": "clearly worse", "unclear": "no clear difference"}


def _heatmap_section(
    camera_score: ArrayLike | None, point_score: ArrayLike | None, camera_weight: float | None
) -> str:
    picture = themed_picture(
        partial(head_heatmap, camera_score, point_score, camera_weight=camera_weight),
        title="Head sensitivity.",
        caption="One pair of columns per global attention layer, one row per head. Darker heads "
        "carry more: Cam for cameras, PC for the point cloud. Every column sums to 1.",
        alt="Heat map of the sensitivity score of every head in every global attention layer.",
    )
    return (
        '<section aria-labelledby="heads"><h2 id="heads">Which heads carry the geometry</h2>'
        f"{picture_html(picture, wide=True)}</section>"
    )


def _tradeoff_section(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    present = [metric for metric in metrics if any(row.get(metric) is not None for row in rows)]
    if not present:
        raise ConfigError(f"no row holds any of {list(metrics)}, so there is nothing to plot")
    pictures = []
    for metric in present:
        label = metric_label(metric)
        pictures.append(
            themed_picture(
                partial(metric_figure, rows, metric),
                title=label,
                caption="against the share of blocks skipped. Bars: ± 1 standard error over "
                "scenes.",
                alt=f"Line plot of {label} against block sparsity, one line per policy. The "
                "values are in the table below.",
            )
        )
        if any(row.get(f"paired_{metric}_vs_uniform") is not None for row in rows):
            pictures.append(
                themed_picture(
                    partial(paired_figure, rows, metric),
                    title=f"{label}, difference to uniform",
                    caption="on the same scenes at the same setting. Band: ± 1 standard error.",
                    alt=f"Line plot of the paired difference in {label} between each policy and "
                    "uniform against block sparsity. The values are in the table below.",
                )
            )
    figures = "\n".join(picture_html(picture) for picture in pictures)
    return (
        '<section aria-labelledby="tradeoff"><h2 id="tradeoff">What skipping costs</h2>'
        f'<div class="grid">{figures}</div></section>'
    )


def _table_section(rows: Sequence[Row]) -> str:
    scenes = {row["n_scenes"] for row in rows}
    count = f"{min(scenes)}" if len(scenes) == 1 else f"{min(scenes)} to {max(scenes)}"
    failed = sorted({name for row in rows for name in row.get("failed_scenes") or ()})
    note = f" Left out where a policy failed: {escape(', '.join(failed))}." if failed else ""
    return (
        '<section aria-labelledby="numbers"><h2 id="numbers">The numbers</h2>'
        f'<p class="quiet">Means over {count} scenes ± one standard error. '
        f"Δ: paired difference on the same scenes.{note}</p>"
        f"{results_table(rows)}</section>"
    )


def _provenance(rows: Sequence[Row]) -> dict[str, str]:
    row = rows[0]
    backends = sorted({name for each in rows for name in each.get("backends") or ()})
    dirty = {True: " (with uncommitted changes)", None: "", False: ""}[row.get("dirty")]
    values = {
        "Model": row["model"],
        "Data set": row.get("dataset"),
        "Seed": row["seed"],
        "Protocol": row["protocol"],
        "Commit": f"{row['commit']}{dirty}",
        "Command": row.get("command"),
        "Machine": row.get("machine"),
        "Attention backend": ", ".join(backends),
        "Length unit": row.get("unit"),
    }
    return {name: _plain(value) for name, value in values.items() if value not in (None, "")}


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')}: {_plain(x)}" for key, x in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _definitions(words: Mapping[str, str]) -> str:
    return "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in words.items())
