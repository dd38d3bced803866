"""Measuring on several CPU cores: processes that each load the model once and take batches."""

import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from hess.datasets.scene import Dataset
from hess.errors import HessError
from hess.evaluation.evaluate import measure_batch
from hess.evaluation.protocol import Protocol
from hess.evaluation.resume import BatchResult
from hess.models.base import Model
from hess.reproduce.case import Case
from hess.transforms.base import Method


@dataclass(frozen=True, kw_only=True)
class Task:
    """One batch of scenes of a case under some methods.

    Args:
        case: model, data and protocol.
        first: index of the first scene.
        methods: what to run on them.
    """

    case: Case
    first: int
    methods: Sequence[Method]

    def results(self, model: Model, dataset: Dataset, protocol: Protocol) -> Iterator[BatchResult]:
        """A result per method, one after the other."""
        last = min(self.first + self.case.batch_size, len(dataset))
        scenes = [dataset[index] for index in range(self.first, last)]
        options = self.case.sparsify_options
        return measure_batch(model, scenes, self.first, self.methods, protocol, options)


def run_tasks(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, BatchResult]]:
    """Run tasks in ``jobs`` processes of one thread each; results come as they are made.

    Raises:
        HessError: what a task raises, or that a process died.
    """
    # Forked processes would inherit the thread pools of torch in a state in which they can hang.
    context = get_context("spawn")
    waiting = deque(tasks)
    processes = []
    busy: dict[Any, Task] = {}
    try:
        for _ in range(min(jobs, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            with _no_interrupts():
                process.start()
            theirs.close()
            processes.append(process)
            busy[ours] = waiting.popleft()
            _send(ours, busy[ours])
        while busy:
            for connection in wait(list(busy)):
                try:
                    message = _receive(connection)
                except (EOFError, OSError) as error:
                    raise HessError(
                        "a worker process died, perhaps for want of memory; run the same command "
                        "again to continue, with --jobs 1 or fewer scenes"
                    ) from error
                if isinstance(message, BatchResult):
                    yield busy[connection], message
                elif isinstance(message, BaseException):
                    raise message
                elif waiting:
                    busy[connection] = waiting.popleft()
                    _send(connection, busy[connection])
                else:
                    del busy[connection]
    finally:
        for process in processes:
            process.terminate()
            process.join()


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Processes begun in here ignore Ctrl-C, which is their parent's to handle."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(connection: Connection) -> None:
    """What a process does: answer each task by its results, or an error, and then None."""
    torch.set_num_threads(1)
    case: Case | None = None
    try:
        while True:
            task = _receive(connection)
            try:
                if task.case != case:
                    case, model = task.case, task.case.load()
                    dataset, protocol = case.open(model)
                for result in task.results(model, dataset, protocol):
                    _send(connection, result)
            except (HessError, OSError, RuntimeError, MemoryError) as error:
                _send(connection, error)
            _send(connection, None)
    except (EOFError, ConnectionError):
        # The parent is gone.
        os._exit(0)


def _send(connection: Any, value: object) -> None:
    # As plain bytes: torch would otherwise pass tensors through shared memory.
    connection.send_bytes(pickle.dumps(value))


def _receive(connection: Any) -> Any:
    return pickle.loads(connection.recv_bytes())
