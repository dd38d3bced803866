"""Seconds of whole models by method: Table 2, and the time axis of token merging."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from hess.bench.model import bench_model
from hess.bench.timing import time_in_turns
from hess.datasets.scene import Dataset
from hess.errors import ConfigError, HessError
from hess.models.base import Model
from hess.reproduce.experiment import Experiment
from hess.reproduce.methods import Line
from hess.reproduce.sweep import Row, find_number
from hess.reproduce.tables import markdown_table, number_text
from hess.transforms.base import Method, Transform, applied

TIMING_SECONDS = 30.0
"""How long methods are timed in turns, all of them together."""


def runtime_rows(
    experiment: Experiment, model: Model, lines: Sequence[Line], dataset: Dataset
) -> list[Row]:
    """A row per policy, timed in turns by ``hess bench`` at the size of the data's images.

    Raises:
        ConfigError: the experiment does not say what to time.
        HessError: selection or backend are wrong on this machine.
    """
    policies = [line.method for line in lines if not isinstance(line.method, Transform)]
    if experiment.runtime is None or len(policies) < len(lines):
        raise ConfigError(
            f"experiment {experiment.name!r} must say what to time, and time policies only"
        )
    height, width = dataset[0].images.shape[-2:]
    outcome = bench_model(
        model,
        policies,
        num_views=experiment.runtime.views,
        height=height,
        width=width,
        rounds=experiment.runtime.rounds,
    )
    if outcome.problems:
        raise HessError(f"nothing was timed: {'; '.join(outcome.problems)}")
    return [
        {"label": line.spec.label} | row for line, row in zip(lines, outcome.rows, strict=True)
    ]


def runtime_table(experiment: Experiment, rows: Sequence[Row]) -> str:
    """Seconds here and in the paper, and both as a share of the dense model's."""
    dense = next(row for row in rows if row["policy"] == "dense")
    theirs_dense = find_number(experiment, dense["label"], (None, None))
    body = []
    for row in rows:
        pair = row["sparse_ratio"], row["cdf_threshold"]
        number = find_number(experiment, row["label"], pair)
        ours = row["seconds"] / dense["seconds"]
        theirs = None
        if number is not None and theirs_dense is not None:
            theirs = number.values["seconds"] / theirs_dense.values["seconds"]
        body.append(
            [
                row["label"],
                "–" if pair == (None, None) else f"{pair[0]:g}, {pair[1]:g}",
                f"{row['block_sparsity']:.3f}",
                f"{row['seconds']:.3f}",
                f"{ours:.2f}",
                "–" if number is None else number_text(number.values["seconds"], None, 2),
                number_text(theirs, None, 2),
                number_text(None if theirs is None else ours - theirs, None, 2, sign=True),
            ]
        )
    header = ["method", "ρ, τ", "block sparsity", "seconds", "of dense", "paper: seconds"]
    return markdown_table([*header, "paper: of dense", "ours − paper, of dense"], body)


def runtime_findings(experiment: Experiment, rows: Sequence[Row]) -> list[str]:
    """HeSS beside uniform, and both beside dense."""
    dense = next(row for row in rows if row["policy"] == "dense")
    first = rows[0]
    sentences = [
        f"{first['model']} with {first['views']} views of {first['width']} × {first['height']} "
        f"({first['tokens']} tokens) on {first['device']}, median of {first['samples']} rounds in "
        f"turns; other processes used {number_text(first['cores_of_others'], None, 1)} cores."
    ]
    for row in rows:
        if row["policy"] == "hess":
            pair = row["sparse_ratio"], row["cdf_threshold"]
            uniform = next(
                other
                for other in rows
                if other["policy"] == "uniform"
                and (other["sparse_ratio"], other["cdf_threshold"]) == pair
            )
            sentences.append(
                f"At ({pair[0]:g}, {pair[1]:g}), block sparsity {row['block_sparsity']:.2f}, HeSS "
                f"takes {row['seconds'] / uniform['seconds']:.2f} times the time of uniform and "
                f"{row['seconds'] / dense['seconds']:.2f} times that of dense."
            )
    return sentences


def seconds_of(
    model: Model, methods: Sequence[Method], images: Tensor, *, seconds: float = TIMING_SECONDS
) -> list[float]:
    """Median seconds of a forward pass over ``images`` [1, N, 3, H, W] under each method."""
    device = next(model.parameters()).device
    images = images.to(device)
    runs: dict[int, Callable[[], object]] = {
        i: partial(_forward, model, method, images) for i, method in enumerate(methods)
    }
    timings = time_in_turns(runs, device, seconds=seconds)
    return [timings[i].p50 / 1000 for i in runs]


def _forward(model: Model, method: Method, images: Tensor) -> None:
    with applied(model, method), torch.inference_mode():
        model(images)
