"""What all verbs share: where text goes, progress bars, JSON, and common options."""

import errno
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from hess.errors import ConfigError

console = Console(stderr=True)
"""People read standard error; standard output carries only what a program would want."""

Json = Annotated[bool, tyro.conf.arg(help="Print the result as JSON on standard output.")]
Device = Annotated[Literal["cpu", "cuda"], tyro.conf.arg(help="Where to run.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"],
    tyro.conf.arg(help="Precision of the backbone's matrix products; heads stay in float32."),
]
Output = Annotated[Path, tyro.conf.arg(aliases=["-o"])]
ModelName = Annotated[
    str,
    tyro.conf.arg(
        help="nano (bundled), a Hugging Face id such as facebook/VGGT-1B or yyfz233/Pi3, "
        "or a weight file or folder.",
        metavar="NAME|PATH",
    ),
]
ProfileName = Annotated[
    str, tyro.conf.arg(help="A bundled profile (nano, pi3-nano) or a file.", metavar="NAME|FILE")
]


class Verb(Protocol):
    """A parsed command."""

    def run(self) -> None: ...


def print_json(value: Any) -> None:
    """The result for programs."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def print_table(rows: Sequence[Sequence[str]], title: str) -> None:
    """A table whose first row is the header; numbers are right-aligned. On a narrow terminal words
    of the header are cut off, and what is still too long goes on in the next line."""
    columns = list(zip(*rows[1:], strict=True))
    for whole_words in (True, False):
        words = [heading.split() if whole_words else [] for heading in rows[0]]
        widths = [
            max(len(Text.from_markup(x)) for x in (*some, *cells))
            for some, cells in zip(words, columns, strict=True)
        ]
        needed = 1 + sum(width + 3 for width in widths)  # with the space around them
        if needed <= console.width:
            break
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    for i, (heading, width) in enumerate(zip(rows[0], widths, strict=True)):
        table.add_column(heading, justify="left" if i == 0 else "right", min_width=width)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table, width=max(console.width, needed), crop=False)


def prepare_file(path: Path) -> Path:
    """Find out before the work, not after it, whether the result can be written there.

    Raises:
        ConfigError: the path is a folder.
        OSError: its folder cannot be made or written.
    """
    if path.is_dir():
        raise ConfigError(f"--output must name a file, {path} is a folder; add a file name")
    prepare_folder(path.parent)
    return path


def prepare_folder(path: Path) -> Path:
    """The folder, made if it is missing.

    Raises:
        ConfigError: the path is a file.
        OSError: it cannot be made or written.
    """
    if path.is_file():
        raise ConfigError(f"expected a folder for the output, {path} is a file; choose another")
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "the folder cannot be written", str(path))
    return path


def check_folder(path: Path) -> None:
    """Find out whether a folder for the output is there or can be made; makes nothing.

    Raises:
        ConfigError: the path is a file.
        OSError: it cannot be made or written.
    """
    if path.is_file():
        raise ConfigError(f"expected a folder for the output, {path} is a file; choose another")
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file, not a folder", str(there))
    if not os.access(there, os.W_OK):
        raise PermissionError(errno.EACCES, "the folder cannot be written", str(there))


def use_threads(threads: int) -> None:
    """Let torch use so many CPU threads.

    Raises:
        ConfigError: less than one.
    """
    import torch

    if threads < 1:
        raise ConfigError(f"--threads must be at least 1, found {threads}")
    torch.set_num_threads(threads)


def _no_terminal() -> bool:
    """A log file wants no blank lines where a bar has been."""
    return not console.is_terminal


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A spinner while something runs that cannot tell how far it is."""
    if _no_terminal():
        yield
        return
    with console.status(what):
        yield


def peak_memory(device: str) -> int | None:
    """Largest memory in use so far, in bytes: of the GPU's allocator, or of this process.

    None where the system does not tell (Windows).
    """
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class Stopwatch:
    """Seconds of named stages, in the order in which they began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


@contextmanager
def progress_bar(task: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error; yields a callback (done, in all, what)."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=_no_terminal()) as progress:
        handle = progress.add_task(task, total=None, what="")

        def update(done: int, total: int, what: str) -> None:
            progress.update(handle, completed=done, total=total, what=what)

        yield update


def command_line() -> str:
    """The command as typed, for provenance."""
    return shlex.join(["hess", *sys.argv[1:]])
