"""The results table of the HTML report."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hess.viz.style import higher_is_better, policy_style

Row = Mapping[str, Any]

_COLUMNS = (
    ("Block<br>sparsity", "block_sparsity", 3),
    ("FLOP<br>saving", "flop_saving", 3),
    ("AUC@30 ↑", "auc_30", 3),
    ("Δ AUC@30<br>to uniform", "paired_auc_30_vs_uniform", 3),
    ("Δ AUC@30<br>to dense", "paired_auc_30_vs_dense", 3),
    ("ATE ↓", "ate_rmse", 4),
    ("Chamfer ↓", "chamfer_mean", 4),
    ("Δ chamfer<br>to uniform", "paired_chamfer_mean_vs_uniform", 4),
    ("Point error ↓", "point_error", 4),
)


def results_table(rows: Sequence[Row]) -> str:
    """HTML table: a group of rows per setting, a row per policy; columns without values go.

    Values carry their standard error; "–" marks a value that does not exist.
    """
    columns = [c for c in _COLUMNS if any(row.get(c[1]) is not None for row in rows)]
    head = "".join(f'<th scope="col">{title}</th>' for title, _, _ in columns)
    groups: dict[tuple[Any, Any], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.get("sparse_ratio"), row.get("cdf_threshold")), []).append(row)
    ordered = sorted(groups.items(), key=lambda group: _mean_sparsity(group[1]))
    bodies = "".join(_group(setting, group, columns) for setting, group in ordered)
    return (
        '<div class="scroll" role="region" aria-label="Results table" tabindex="0"><table>'
        f'<thead><tr><th scope="col">Policy</th>{head}</tr></thead>{bodies}</table></div>'
    )


def verdict(metric: str, change: float, error: float | None) -> str:
    """ "better", "worse", or "unclear" when a change is within twice its standard error."""
    if error is None or abs(change) <= 2 * error:
        return "unclear"
    return "better" if (change > 0) == higher_is_better(metric) else "worse"


def signed(change: float, error: float | None, digits: int) -> str:
    """A difference with its sign and standard error, as HTML."""
    text = f"{change:+.{digits}f}".replace("-", "−")
    return text if error is None else f"{text} <small>± {error:.{digits}f}</small>"


def _mean_sparsity(rows: Sequence[Row]) -> float:
    return sum(row["block_sparsity"] for row in rows) / len(rows)


def _group(
    setting: tuple[Any, Any], rows: Sequence[Row], columns: Sequence[tuple[str, str, int]]
) -> str:
    ratio, cdf = setting
    if ratio is None and cdf is None:
        title = "nothing skipped"
    else:
        parts = (("ratio ρ", ratio), ("CDF τ", cdf))
        title = ", ".join(f"{name} = {value:g}" for name, value in parts if value is not None)
    lines = [
        f'<tr><th scope="rowgroup" colspan="{len(columns) + 1}"><span>{title}</span></th></tr>'
    ]
    for row in sorted(rows, key=lambda row: policy_style(row["policy"]).order):
        style = policy_style(row["policy"])
        label = escape(style.label)
        seed = (row.get("settings") or {}).get("seed")
        if seed is not None:
            label += f" (seed {escape(str(seed))})"
        cells = "".join(f"<td{_mark(row, key)}>{_cell(row, key, n)}</td>" for _, key, n in columns)
        ours = ' class="ours"' if row["policy"] == "hess" else ""
        lines.append(
            f'<tr{ours}><th scope="row"><span class="dot" style="background:{style.color}">'
            f"</span>{label}</th>{cells}</tr>"
        )
    return f"<tbody>{''.join(lines)}</tbody>"


def _cell(row: Row, key: str, digits: int) -> str:
    value, error = row.get(key), row.get(f"{key}_se")
    if value is None:
        return "–"
    text = f"{value:.{digits}f}"
    if key.startswith("paired_"):
        text = f"{value:+.{digits}f}".replace("-", "−")
    return text if error is None else f'{text} <span class="se">± {error:.{digits}f}</span>'


def _mark(row: Row, key: str) -> str:
    value = row.get(key)
    if value is None or not key.startswith("paired_"):
        return ""
    metric = key.removeprefix("paired_").rsplit("_vs_", 1)[0]
    word = verdict(metric, value, row.get(f"{key}_se"))
    return "" if word == "unclear" else f' class="{word}"'
