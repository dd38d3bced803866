"""Rows as tables: lists of cells, of which the first line is the header."""

from collections.abc import Callable, Sequence
from itertools import groupby

from hess.bench.model import STAGES, scaling_exponent
from hess.bench.rows import Row
from hess.bench.targets import TARGETS, uniform_beside

Table = list[list[str]]

BREAK_EVEN_STEP = "attention, short sequences"
"""Of the suite; its rows have a table of their own."""


def targets_table(rows: Sequence[Row]) -> Table:
    """Every target with the worst of the measured ratios."""
    table = [["ratio", "must", "aim", "worst", "median", "rows", "verdict"]]
    for target in TARGETS:
        found = sorted(target.values(rows))
        line = [target.what, f"{target.must:.2f}", f"{target.aim:.2f}"]
        if not found:
            table.append([*line, "–", "–", "0", "**not measured**"])
            continue
        worst, middle = found[-1], found[len(found) // 2]
        verdict = "missed"
        if worst <= target.must:
            verdict = "aim reached" if worst <= target.aim else "must reached"
        table.append([*line, f"{worst:.3f}", f"{middle:.3f}", str(len(found)), verdict])
    return table


def attention_table(rows: Sequence[Row]) -> Table:
    """Sparse attention beside the best dense kernel."""
    header = ["backend", "type", "tokens", "heads", "budgets", "s", "ms", "dense ms"]
    header += ["ratio to ideal", "selection", "peak MiB", "least ms: matrix, exp, memory"]
    table = [header]
    for row in rows:
        if row["op"] != "attention" or row.get("step") == BREAK_EVEN_STEP:
            continue
        floor = row["roofline_ms"]
        table.append(
            [
                row["backend"] + ("" if row["auto"] else " (not the default)"),
                row["dtype"],
                f"{row['tokens']:,}",
                str(row["heads"]),
                f"{row['budgets']}, {row['lists']}",
                f"{row['work_saving']:.3f}",
                f"{row['ms_p50']:.4g}",
                f"{row['dense_ms_p50']:.4g} ({row['dense_backend']})",
                f"{row['ratio_to_ideal']:.2f}",
                f"{row['selection_share']:.1%}",
                _mebibytes(row["peak_bytes"]),
                "–" if floor is None else ", ".join(f"{ms:.3g}" for ms in floor.values()),
            ]
        )
    return table


def selection_table(rows: Sequence[Row]) -> Table:
    """What it costs to choose the blocks."""
    header = ["tokens", "heads", "device", "rule", "pool ms", "select ms", "pack ms"]
    header += ["attention ms", "share", "peak MiB"]
    table = [header]
    for row in rows:
        if row["op"] == "selection":
            table.append(
                [
                    f"{row['tokens']:,}",
                    str(row["heads"]),
                    row["device"],
                    row["rule"],
                    f"{row['pool_ms_p50']:.3g}",
                    f"{row['select_ms_p50']:.3g}",
                    "–" if row["pack_ms_p50"] is None else f"{row['pack_ms_p50']:.3g}",
                    f"{row['attention_ms_p50']:.4g}",
                    f"{row['selection_share']:.1%}",
                    _mebibytes(row["peak_bytes"]),
                ]
            )
    return table


def choosing_table(rows: Sequence[Row]) -> Table:
    """Choosing the blocks of sequences that are too long for the rest."""
    table = [["views", "tokens", "heads", "device", "seconds", "peak MiB", "lists MiB", "map MiB"]]
    for row in rows:
        if row["op"] == "choosing":
            sizes = (_mebibytes(row[name]) for name in ("peak_bytes", "list_bytes", "map_bytes"))
            table.append(
                [
                    f"{row['views']:,}",
                    f"{row['tokens']:,}",
                    str(row["heads"]),
                    row["device"],
                    f"{row['ms'] / 1000:.2f}",
                    *sizes,
                ]
            )
    return table


def break_even_table(rows: Sequence[Row]) -> Table:
    """Sparse attention with the choice of its blocks beside dense attention, short sequences."""
    table = [
        ["tokens", "device", "type", "s", "choose ms", "attend ms", "dense ms", "both to dense"]
    ]
    for row in rows:
        if row["op"] == "attention" and row["auto"] and row.get("step") == BREAK_EVEN_STEP:
            both = row["select_ms_p50"] + row["ms_p50"]
            table.append(
                [
                    f"{row['tokens']:,}",
                    row["device"],
                    row["dtype"],
                    f"{row['work_saving']:.3f}",
                    f"{row['select_ms_p50']:.3g}",
                    f"{row['ms_p50']:.3g}",
                    f"{row['dense_ms_p50']:.3g}",
                    f"{both / row['dense_ms_p50']:.2f}",
                ]
            )
    return table


def model_table(rows: Sequence[Row]) -> Table:
    """Whole models under each policy."""
    header = ["model", "views", "policy", "ρ, τ", "block sparsity", "seconds", "to dense"]
    table = [[*header, "to uniform", "peak MiB"]]
    models = [row for row in rows if row["op"] == "model"]
    for row in models:
        dense = next(r for r in models if r["policy"] == "dense" and _same_run(r, row))
        scored = row["policy"] in ("hess", "hess+")
        uniform = uniform_beside(row, models) if scored else None
        table.append(
            [
                *_model_cells(row),
                f"{row['block_sparsity']:.3f}",
                f"{row['seconds']:.3g}",
                f"{row['seconds'] / dense['seconds']:.2f}",
                "" if uniform is None else f"{row['seconds'] / uniform['seconds']:.3f}",
                _mebibytes(row["peak_bytes"]),
            ]
        )
    return table


def stages_table(rows: Sequence[Row]) -> Table:
    """Where the seconds of whole models go."""
    table = [["model", "views", "policy", "ρ, τ", *STAGES]]
    for row in rows:
        if row["op"] == "model":
            seconds = (f"{row['stage_seconds'][stage]:.3g}" for stage in STAGES)
            table.append([*_model_cells(row), *seconds])
    return table


def scaling_table(rows: Sequence[Row]) -> Table:
    """How the time of a model grows with the number of views."""
    table = [["model", "views", "policy", "ρ, τ", "seconds ∝ views to the power of"]]

    def series(row: Row) -> tuple[str, ...]:
        names = ("model", "dtype", "device", "policy", "sparse_ratio", "cdf_threshold")
        return tuple(str(row[name]) for name in names)

    models = sorted((row for row in rows if row["op"] == "model"), key=series)
    for _, group in groupby(models, series):
        found = sorted(group, key=lambda row: row["views"])
        if len({row["views"] for row in found}) < 2:
            continue
        model, _, *policy = _model_cells(found[0])
        views = f"{found[-2]['views']} to {found[-1]['views']}"
        table.append([model, views, *policy, f"{scaling_exponent(found):.2f}"])
    return table


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    "targets": targets_table,
    "attention": attention_table,
    "selection": selection_table,
    "choosing": choosing_table,
    "break_even": break_even_table,
    "model": model_table,
    "stages": stages_table,
    "scaling": scaling_table,
}


def narrowed(table: Table) -> tuple[str, Table]:
    """The columns that differ between lines, and one line of text for those that do not."""
    header, *body = table
    same = [len({line[i] for line in body}) == 1 for i in range(len(header))]
    if len(body) < 2 or all(same):
        return "", table
    caption = ", ".join(
        f"{name}: {cell}"
        for name, cell, constant in zip(header, body[0], same, strict=True)
        if constant and cell not in ("", "–")
    )
    kept = [i for i, constant in enumerate(same) if not constant]
    return caption, [[line[i] for i in kept] for line in table]


def _same_run(one: Row, other: Row) -> bool:
    names = ("model", "dtype", "device", "views", "command", "machine")
    return all(one[name] == other[name] for name in names)


def _model_cells(row: Row) -> list[str]:
    """Model, views, policy, and sparse ratio with CDF threshold, of which dense has neither."""
    setting = row["sparse_ratio"], row["cdf_threshold"]
    return [
        f"{row['model']}, {row['dtype']}, {row['device']}",
        str(row["views"]),
        row["policy"],
        ", ".join("–" if value is None else f"{value:g}" for value in setting),
    ]


def _mebibytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:,.0f}"
