"""Reproduce experiments: measure what is missing, write each one's folder."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hess.evaluation.evaluate import identity
from hess.evaluation.provenance import provenance
from hess.evaluation.resume import BatchResult, Sidecar
from hess.files import write_atomically
from hess.models.base import Model
from hess.reproduce.case import Case
from hess.reproduce.page import make_page
from hess.reproduce.plan import Choices, Planned, Progress, plan
from hess.reproduce.product import Measured, make_product
from hess.reproduce.sweep import Comparison, Row, measured_rows
from hess.reproduce.workers import Task, run_tasks
from hess.transforms.base import Method

STORE = ".store"
"""Folder beside those of the experiments: results per scene, and calibrations."""


@dataclass(frozen=True, kw_only=True)
class Reproduced:
    """What came of an experiment: its folder, the files in it, and what was found."""

    name: str
    title: str
    folder: Path
    files: tuple[str, ...]
    findings: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """JSON values of all fields."""
        lists = {"files": list(self.files), "findings": list(self.findings)}
        return asdict(self) | {"folder": str(self.folder)} | lists


def reproduce(
    names: Sequence[str],
    output: Path,
    choices: Choices | None = None,
    *,
    command: str = "",
    progress: Progress | None = None,
) -> list[Reproduced]:
    """Measure experiments and write ``output/NAME/``: rows.jsonl, pictures, page.md.

    Results per scene are shared: each method runs once per model, data and protocol, whichever
    experiments ask for it and in however many commands. A stopped run continues.

    Args:
        names: of experiments, or "all".
        output: folder.
        choices: what replaces the experiments' defaults.
        command: command line that was typed; recorded.
        progress: called with (done, in all, what): scenes while calibrating, then scenes x
            methods over all experiments.

    Raises:
        ConfigError: an unknown name, a parameter out of range, or results of another
            configuration in ``output``.
        CheckpointError, ProfileError, DatasetError: a model, profile or data set is missing or
            unfit; found out before anything is measured.
        HessError: a process that measured died.
    """
    choices = choices or Choices()
    planned = plan(names, output / STORE, choices, progress)
    _measure(planned, choices.jobs, progress)
    return [_write(_measured(each, command), output / each.experiment.name) for each in planned]


def _measure(planned: Sequence[Planned], jobs: int, progress: Progress | None) -> None:
    """Fill the stores with what is missing, batch by batch, all methods on each."""
    stores: dict[Case, Sidecar] = {}
    methods: dict[Case, dict[str, Method]] = {}
    models: dict[Case, Model] = {}
    for each in planned:
        if each.store is not None:
            stores[each.case], models[each.case] = each.store, each.calibrated.model
            wanted = {identity(line.method): line.method for line in each.lines}
            methods.setdefault(each.case, {}).update(wanted)
    tasks = [
        Task(case=case, first=first, methods=missing)
        for case, store in stores.items()
        for first in range(0, _num_scenes(store), case.batch_size)
        if (missing := [m for name, m in methods[case].items() if not store.get(name, first)])
    ]
    total = sum(
        len(task.methods) * min(task.case.batch_size, _num_scenes(stores[task.case]) - task.first)
        for task in tasks
    )
    done = 0
    for task, result in run_tasks(tasks, jobs) if jobs > 1 else _run_here(tasks, models):
        stores[task.case].add(result)
        done += len(result.scenes)
        if progress is not None:
            progress(done, total, f"{task.case.model}, from scene {task.first + 1}")


def _num_scenes(store: Sidecar) -> int:
    return int(store.header["num_scenes"])


def _run_here(
    tasks: Sequence[Task], models: dict[Case, Model]
) -> Iterator[tuple[Task, BatchResult]]:
    for task in tasks:
        model = models[task.case]
        for result in task.results(model, *task.case.open(model)):
            yield task, result


def _measured(planned: Planned, command: str) -> Measured:
    experiment, store = planned.experiment, planned.store
    model = planned.calibrated.model
    dataset, protocol = planned.case.open(model)
    common: dict[str, Any] = {"experiment": experiment.name, "model": model.model_name}
    if store is not None:
        common |= {key: value for key, value in store.header.items() if key != "num_scenes"}
    origin = provenance(next(model.parameters()).device).as_dict()
    common = origin | common | {"command": command}  # the commit that measured counts
    rows: list[Row] = []
    comparisons: list[Comparison] = []
    if store is not None:
        rows, comparisons = measured_rows(experiment, planned.lines, store, protocol, common)
        # Data without depth has no point metrics, and a protocol may leave some out.
        known = tuple(m for m in experiment.metrics if any(row.get(m) is not None for row in rows))
        experiment = replace(experiment, metrics=known)
    return Measured(
        experiment=experiment,
        calibrated=planned.calibrated,
        dataset=dataset,
        protocol=protocol,
        lines=planned.lines,
        rows=rows,
        comparisons=comparisons,
        common=common,
    )


def _write(measured: Measured, folder: Path) -> Reproduced:
    product = make_product(measured)
    lines = [json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in product.rows]
    contents = {
        **product.pictures,
        "rows.jsonl": "".join(lines).encode(),
        "page.md": make_page(measured, product).encode(),
    }
    for name, data in contents.items():
        write_atomically(folder / name, data)
    return Reproduced(
        name=measured.experiment.name,
        title=measured.experiment.title,
        folder=folder,
        files=tuple(contents),
        findings=tuple(product.findings),
    )
