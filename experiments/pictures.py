"""Draw the pictures of README.md and docs/ from committed results.

python experiments/pictures.py
"""

import json
from pathlib import Path

from hess.files import write_atomically
from hess.models.loading import load_model
from hess.reconstruction import reconstruct
from hess.sensitivity.profile import load_profile
from hess.viz.figure import figure_png, image_png
from hess.viz.heatmap import head_heatmap
from hess.viz.scene import preview
from hess.viz.tradeoff import tradeoff_figure
from hess.viz.training import training_figure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "nano"
SHIPPED = "sweep/match-s0.jsonl"
IMAGES = ROOT / "docs" / "images"


def main() -> None:
    from hess.datasets.open import open_dataset
    from hess.datasets.procedural import Procedural

    model, profile = load_model("nano"), load_profile("nano")
    scores = (profile.scores(camera_weight=weight).numpy() for weight in (1.0, 0.0))
    write_atomically(IMAGES / "heatmap.png", figure_png(head_heatmap(*scores)))
    rows = [json.loads(line) for line in (RESULTS / SHIPPED).read_text().splitlines()]
    figure = tradeoff_figure(rows, metrics=("auc_30", "point_error"))
    write_atomically(IMAGES / "tradeoff.png", figure_png(figure))
    logs = {log.stem: log for log in sorted((RESULTS / "training").glob("*.jsonl"))}
    write_atomically(IMAGES / "training.png", figure_png(training_figure(logs)))
    scenes = {
        "procedural": Procedural(1, 8, "test", seed=1)[0],
        "office": open_dataset("bundled", image_fit=model.image_rule)[0],
    }
    for name, scene in scenes.items():
        picture = preview(reconstruct(model, scene), scene.depth)
        write_atomically(IMAGES / f"{name}.png", image_png(picture))


if __name__ == "__main__":
    main()
