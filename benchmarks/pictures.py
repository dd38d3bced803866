"""Draw the pictures of docs/performance.md from the committed rows.

python benchmarks/pictures.py
"""

from pathlib import Path

from hess.bench.report import BREAK_EVEN_STEP
from hess.bench.rows import read_rows
from hess.files import write_atomically
from hess.viz.figure import figure_png
from hess.viz.performance import attention_figure, model_figure

ROOT = Path(__file__).parents[1]


def main() -> None:
    rows = read_rows(sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")))
    long = [row for row in rows if row["step"] != BREAK_EVEN_STEP]
    images = ROOT / "docs" / "images"
    write_atomically(images / "attention-speed.png", figure_png(attention_figure(long)))
    write_atomically(images / "model-speed.png", figure_png(model_figure(rows)))


if __name__ == "__main__":
    main()
