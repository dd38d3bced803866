"""Fill the tables of README.md and docs/ from the committed results files.

    python experiments/tables.py            rewrite them
    python experiments/tables.py --check    exit with 1 if one is not what its file says

A table stands between ``<!-- table KIND FILE -->`` and ``<!-- end table -->``.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hess.bench.report import TABLES as BENCH_TABLES
from hess.bench.rows import read_rows

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/results.md",
    "docs/deviations.md",
    "docs/models.md",
    "docs/performance.md",
    "docs/beyond.md",
)
BLOCK = re.compile(r"(<!-- table (\w+) (.+?) -->\n).*?(<!-- end table -->)", re.DOTALL)
LABELS = {
    "dense": "dense",
    "uniform": "uniform",
    "hess": "**HeSS**",
    "reverse": "reverse",
    "random": "random scores",
    "no_reallocation": "HeSS, no reallocation",
}
CASE = ("model", "mode", "dtype", "num_views", "height", "width")
Row = dict[str, Any]


def read(path: str) -> list[Row]:
    return [json.loads(line) for line in (ROOT / path).read_text().splitlines()]


def number(row: Row, key: str, *, percent: bool = False, digits: int = 3) -> str:
    """A value with its standard error; differences carry their sign."""
    value, error = row.get(key), row.get(f"{key}_se")
    if value is None:
        return "–"
    scale, digits = (100, 1) if percent else (1, digits)
    sign = "+" if key.startswith("paired") else ""
    text = f"{scale * value:{sign}.{digits}f}"
    text = text if error is None else f"{text} ± {scale * error:.{digits}f}"
    return text.replace("-", "−")


def markdown(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def label(row: Row) -> str:
    text = LABELS[row["policy"]]
    seed = row["settings"].get("seed")
    return text if seed is None else f"{text} {seed + 1}"


def sweep(path: str) -> str:
    """Policies at each block sparsity."""
    header = ["policy", "block sparsity", "FLOP saving", "AUC@30 ↑", "Δ to uniform"]
    header += ["ATE ↓", "chamfer ↓", "point error ↓", "Δ point error to uniform"]
    body = []
    for row in read(path):
        body.append(
            [
                label(row),
                f"{row['block_sparsity']:.3f}",
                f"{row['flop_saving']:.3f}",
                number(row, "auc_30", percent=True),
                number(row, "paired_auc_30_vs_uniform", percent=True),
                number(row, "ate_rmse"),
                number(row, "chamfer_mean", digits=4),
                number(row, "point_error"),
                number(row, "paired_point_error_vs_uniform", digits=4),
            ]
        )
    return markdown(header, body)


def headline(path: str) -> str:
    """One line per block sparsity: what each policy keeps of the dense model's AUC@30."""
    rows = read(path)
    dense = next(row for row in rows if row["policy"] == "dense")
    settings: dict[tuple, dict[str, list[Row]]] = {}
    for row in rows:
        if row["policy"] != "dense":
            key = (row["sparse_ratio"], row["cdf_threshold"])
            settings.setdefault(key, {}).setdefault(row["policy"], []).append(row)
    body = [["0 (dense)", number(dense, "auc_30", percent=True), "", "", "", ""]]
    for policies in settings.values():
        uniform, hess, reverse = (policies[n][0] for n in ("uniform", "hess", "reverse"))
        random = [100 * row["auc_30"] for row in policies["random"]]
        body.append(
            [
                f"{uniform['block_sparsity']:.2f}",
                number(uniform, "auc_30", percent=True),
                number(hess, "auc_30", percent=True),
                number(hess, "paired_auc_30_vs_uniform", percent=True),
                number(reverse, "auc_30", percent=True),
                ", ".join(f"{value:.1f}" for value in random),
            ]
        )
    header = ["block sparsity", "uniform", "HeSS", "HeSS − uniform", "reverse", "random scores"]
    return markdown(header, body)


def models(pattern: str) -> str:
    """Dense accuracy of each trained model, and the main comparison on it."""
    header = ["model", "steps", "AUC@30", "ATE", "point error", "HeSS − uniform at"]
    header[-1:] = ["HeSS − uniform, sparsity 0.56", "0.74", "0.84", "reverse − uniform, 0.74"]
    body = []
    for path in sorted(ROOT.glob(pattern)):
        rows = read(str(path.relative_to(ROOT)))
        training = json.loads((path.parents[1] / "training" / f"{path.stem}.json").read_text())
        dense = next(row for row in rows if row["policy"] == "dense")
        line = [path.stem, f"{training['config']['steps']}", number(dense, "auc_30", percent=True)]
        line += [number(dense, "ate_rmse"), number(dense, "point_error")]
        for policy, setting in (
            ("hess", (0.6, 0.4)),
            ("hess", (0.8, 0.4)),
            ("hess", (0.9, 0.2)),
            ("reverse", (0.8, 0.4)),
        ):
            row = next(
                r
                for r in rows
                if r["policy"] == policy and (r["sparse_ratio"], r["cdf_threshold"]) == setting
            )
            line.append(number(row, "paired_auc_30_vs_uniform", percent=True))
        body.append(line)
    return markdown(header, body)


def ablations(path: str) -> str:
    """Paired difference of every variant to plain HeSS, per setting."""
    rows = read(path)
    variants: dict[str, dict[float, Row]] = {}
    for row in rows:
        name = row.get("label") or row["variant"]  # as older rows have it
        variants.setdefault(name, {})[row["sparse_ratio"]] = row
    ratios = sorted({row["sparse_ratio"] for row in rows})
    header = ["variant"]
    for ratio in ratios:
        sparsity = variants["HeSS"][ratio]["block_sparsity"]
        header += [f"sparsity (HeSS {sparsity:.2f})", "Δ AUC@30", "Δ point error"]
    body = []
    for name, by_ratio in variants.items():
        line = [name]
        for ratio in ratios:
            row = by_ratio[ratio]
            line.append(f"{row['block_sparsity']:.3f}")
            if name == "HeSS":
                line += [f"({number(row, 'auc_30', percent=True)})"]
                line += [f"({number(row, 'point_error')})"]
            else:
                line.append(number(row, "paired_auc_30_vs_hess", percent=True))
                line.append(number(row, "paired_point_error_vs_hess", digits=4))
        body.append(line)
    return markdown(header, body)


def real(path: str) -> str:
    """Reconstructions of captures that the model was not trained for."""
    header = ["capture", "views", "policy", "block sparsity", "AUC@30", "ATE / path", "chamfer"]
    body = [
        [
            row["capture"],
            str(row["num_views"]),
            row["policy"],
            f"{row['block_sparsity']:.2f}",
            number(row["errors"], "auc_30", percent=True),
            number(row["errors"], "ate_relative"),
            number(row["errors"], "chamfer_mean"),
        ]
        for row in read(path)
    ]
    return markdown(header, body)


def footprint(path: str) -> str:
    """Memory and time of the public models, predicted and measured."""
    header = ["model, task, precision", "views", "predicted", "live tensors", "process"]
    header += ["process, no holes", "predicted time", "measured time"]
    rows = read(path)
    compact = {tuple(row[k] for k in CASE): row for row in rows if row["malloc"]}
    body = []
    for row in rows:
        if row["malloc"]:
            continue
        other = compact.get(tuple(row[k] for k in CASE))
        body.append(
            [
                f"{row['model'].split('/')[1]}, {row['mode']}, {row['dtype']}",
                f"{row['num_views']} of {row['width']} × {row['height']}",
                *(f"{row[f'{k}_bytes'] / 2**30:.2f}" for k in ("predicted", "live", "process")),
                "" if other is None else f"{other['process_bytes'] / 2**30:.2f}",
                f"{row['predicted_seconds']:.0f} s",
                f"{row['seconds']:.0f} s",
            ]
        )
    return markdown(header, body)


def bench(name: str) -> Callable[[str], str]:
    """A table of ``hess bench`` over the rows of all files that match a pattern."""

    def table(pattern: str) -> str:
        header, *body = BENCH_TABLES[name](read_rows(sorted(ROOT.glob(pattern))))
        return markdown(header, body)

    return table


def findings(pattern: str) -> str:
    """What each page of ``hess reproduce`` finds; where it speaks of AUC@30, that alone."""

    def order(path: Path) -> list[int | str]:
        return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", path.parent.name)]

    parts = []
    for path in sorted(ROOT.glob(pattern), key=order):
        text = path.read_text()
        title = text.splitlines()[0].removeprefix("# ")
        name, _, what = title.partition(": ")
        found = text.partition("## What is found here")[2].partition("\n## ")[0]
        sentences = [line for line in found.splitlines() if line.startswith("- ")]
        shown = [line for line in sentences if line.startswith("- AUC@30")] or sentences
        link = f"../{path.relative_to(ROOT).as_posix()}"
        parts.append("\n".join([f"**[{name}]({link}): {what}**", "", *shown, "", ""]))
    return "\n" + "".join(parts)


MAIN_METRICS = {
    "auc_30": "AUC@30",
    "ate_rmse": "ATE",
    "point_error": "point error",
    "chamfer_mean": "chamfer",
}


def by_setting(path: str) -> list[dict[str, Row]]:
    """Rows of each setting by label, in the order of block sparsity."""
    found: dict[tuple[float, float], dict[str, Row]] = {}
    for row in read(path):
        if row["sparse_ratio"] is not None:
            pair = row["sparse_ratio"], row["cdf_threshold"]
            found.setdefault(pair, {})[row["label"]] = row
    return sorted(found.values(), key=lambda rows: min(r["block_sparsity"] for r in rows.values()))


def beyond_errors(row: Row, reference: str, sign: int) -> str:
    """Metrics in which ``row`` is better (1) or worse (-1) than the reference by over two standard
    errors, in words."""
    names = []
    for metric, name in MAIN_METRICS.items():
        key = f"paired_{metric}_vs_{reference}"
        gain = sign * row[key] * (1 if metric == "auc_30" else -1)
        if gain > 2 * row[f"{key}_se"]:
            names.append(f"{name} ({gain / row[f'{key}_se']:.1f} SE)")
    return ", ".join(names)


def plus(path: str) -> str:
    """HeSS+ beside uniform and HeSS at every setting."""
    (dense,) = (row for row in read(path) if row["policy"] == "dense")
    header = ["ρ, τ", "block sparsity", "uniform", "HeSS", "HeSS+", "HeSS+ − uniform"]
    header += ["HeSS+ − HeSS", "loss of HeSS+ / loss of HeSS", "HeSS+ behind by over 2 SE"]
    body = []
    for rows in by_setting(path):
        uniform, hess, ours = rows["Uniform"], rows["HeSS"], rows["HeSS+"]
        lost = [dense["auc_30"] - row["auc_30"] for row in (ours, hess)]
        better = ((r["label"], beyond_errors(r, "hess_plus", 1)) for r in (uniform, hess))
        behind = [f"{metrics} of {rival}" for rival, metrics in better if metrics]
        body.append(
            [
                f"{ours['sparse_ratio']:g}, {ours['cdf_threshold']:g}",
                " / ".join(f"{row['block_sparsity']:.3f}" for row in (uniform, hess, ours)),
                *(number(row, "auc_30", percent=True) for row in (uniform, hess, ours)),
                *(reversed_difference(row) for row in (uniform, hess)),
                f"{lost[0] / lost[1]:.2f}" if lost[1] > 0.02 else "–",
                ", ".join(behind) or "nothing",
            ]
        )
    return f"Dense: AUC@30 {number(dense, 'auc_30', percent=True)}.\n\n" + markdown(header, body)


def reversed_difference(row: Row) -> str:
    """HeSS+ minus ``row`` in AUC@30, in points."""
    key = "paired_auc_30_vs_hess_plus"
    text = f"{-100 * row[key]:+.1f} ± {100 * row[f'{key}_se']:.1f}"
    return text.replace("-", "−")


def label_free(path: str) -> str:
    """HeSS with the profile made without ground truth beside HeSS."""
    header = ["ρ, τ", "block sparsity", *(f"Δ {name}" for name in MAIN_METRICS.values())]
    header.append("behind by over 2 SE")
    body = []
    for rows in by_setting(path):
        row = rows["HeSS, label-free"]
        body.append(
            [
                f"{row['sparse_ratio']:g}, {row['cdf_threshold']:g}",
                f"{row['block_sparsity']:.3f}",
                number(row, "paired_auc_30_vs_hess", percent=True),
                *(
                    number(row, f"paired_{metric}_vs_hess", digits=4)
                    for metric in MAIN_METRICS
                    if metric != "auc_30"
                ),
                beyond_errors(row, "hess", -1) or "nothing",
            ]
        )
    return markdown(header, body)


def variants(path: str) -> str:
    """Paired differences of each row of ``hess reproduce`` to its reference, a column per setting.

    AUC@30 in points and the point error in thousandths of the scene's unit.
    """
    settings = by_setting(path)
    labels = list(dict.fromkeys(row["label"] for row in read(path)))
    header = ["variant"]
    for rows in settings:
        row = next(iter(rows.values()))
        setting = f"{row['sparse_ratio']:g}, {row['cdf_threshold']:g}"
        header += [f"Δ AUC@30 at {setting}", f"Δ point error at {setting}"]
    body = []
    for name in labels:
        line = [name]
        for rows in settings:
            for metric, scale in (("auc_30", 100), ("point_error", 1000)):
                line.append(scaled_difference(rows.get(name, {}), metric, scale))
        body.append(line)
    return markdown(header, body)


def scaled_difference(row: Row, metric: str, scale: float) -> str:
    """The paired difference of a metric times ``scale``; the mean in brackets if there is none."""
    key = next((k for k in row if re.fullmatch(f"paired_{metric}_vs_.*(?<!_se)", k)), None)
    if key is not None and row[key] is not None:
        text = f"{scale * row[key]:+.1f} ± {scale * row[f'{key}_se']:.1f}"
    elif metric in row:
        text = f"({scale * row[metric]:.1f})"
    else:
        text = "–"
    return text.replace("-", "−")


TABLES: dict[str, Callable[[str], str]] = {
    "ablations": ablations,
    "findings": findings,
    "footprint": footprint,
    "headline": headline,
    "label_free": label_free,
    "models": models,
    "plus": plus,
    "real": real,
    "sweep": sweep,
    "variants": variants,
    **{f"bench_{name}": bench(name) for name in BENCH_TABLES},
}


def filled(text: str) -> str:
    """``text`` with every table made anew."""
    return BLOCK.sub(lambda m: m[1] + TABLES[m[2]](m[3]) + m[4], text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for page in PAGES:
        path = ROOT / page
        text = path.read_text()
        if filled(text) != text:
            stale.append(page)
            if not args.check:
                path.write_text(filled(text))
    if stale:
        print("stale tables in" if args.check else "rewrote", ", ".join(stale))
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
