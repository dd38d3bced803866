"""Does the quality guard hold what it promises? Its choice, checked on all views of each scene."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from hess.datasets.scene import Dataset
from hess.errors import AlignmentError
from hess.guard import choose_sparsity, drift_of
from hess.models.base import Model
from hess.policies.base import Policy
from hess.reproduce.sweep import Row
from hess.reproduce.tables import markdown_table
from hess.sparsification import sparsify

Progress = Callable[[int, int, str], None]

LIMITS = (0.02, 0.05, 0.1)
"""Limits of drift that are asked for."""


def guard_rows(
    model: Model,
    dataset: Dataset,
    policy_at: Callable[[float], Policy],
    progress: Progress | None = None,
) -> list[Row]:
    """A row per scene and limit: what the guard chose on some views, and the drift on all."""
    rows: list[Row] = []
    for index in range(len(dataset)):
        scene = dataset[index]
        images = scene.images[None].to(next(model.parameters()).device)
        with torch.inference_mode():
            dense = model(images)
        for limit in LIMITS:
            choice = choose_sparsity(model, scene.images, policy_at, limit)
            row: Row = {
                "scene": scene.name,
                "views": scene.num_views,
                "probe_views": choice.num_views,
                "max_drift": limit,
                "sparse_ratio": choice.sparse_ratio,
                "block_sparsity": 0.0,
                "probe_drift": 0.0 if choice.chosen is None else choice.chosen.size,
                "drift": 0.0,
            }
            if choice.sparse_ratio is not None:
                with sparsify(model, policy_at(choice.sparse_ratio)) as run:
                    with torch.inference_mode():
                        sparse = model(images)
                    row["block_sparsity"] = run.stats.block_sparsity
                try:
                    row["drift"] = drift_of(dense, sparse).largest
                except AlignmentError:
                    row["drift"] = None
            row["held"] = row["drift"] is not None and row["drift"] <= limit
            rows.append(row)
        if progress is not None:
            progress(index + 1, len(dataset), f"guard: {scene.name}")
    return rows


def guard_table(rows: Sequence[Row]) -> str:
    """What was chosen and held, by limit."""
    body = []
    for limit in LIMITS:
        found = [row for row in rows if row["max_drift"] == limit]
        sparsities = [row["block_sparsity"] for row in found]
        drifts = [row["drift"] for row in found if row["drift"] is not None]
        body.append(
            [
                f"{limit:.0%}",
                str(len(found)),
                f"{np.mean([row['held'] for row in found]):.1%}",
                f"{np.mean([row['sparse_ratio'] is None for row in found]):.1%}",
                f"{np.mean(sparsities):.2f}",
                f"{min(sparsities):.2f}–{max(sparsities):.2f}",
                f"{np.median(drifts):.2%}",
                f"{max(drifts):.2%}",
            ]
        )
    header = ["limit", "scenes", "held", "left dense", "block sparsity, mean", "range"]
    return markdown_table([*header, "drift on all views, median", "largest"], body)


def guard_findings(rows: Sequence[Row]) -> list[str]:
    """How often each limit was held."""
    sentences = []
    for limit in LIMITS:
        found = [row for row in rows if row["max_drift"] == limit]
        held = sum(row["held"] for row in found)
        sparse = [row for row in found if row["sparse_ratio"] is not None]
        sentences.append(
            f"Limit {limit:.0%}: held on {held} of {len(found)} scenes; {len(sparse)} were made "
            f"sparse, at a mean block sparsity of "
            f"{np.mean([row['block_sparsity'] for row in found]):.2f} over all."
        )
    return sentences
