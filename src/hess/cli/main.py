"""The ``hess`` command: one verb per module, one way to report, fail and stop."""

import sys
from collections.abc import Callable, Sequence

import tyro
from rich.text import Text

from hess.cli.bench import Bench
from hess.cli.calibrate import Calibrate
from hess.cli.console import Verb, console
from hess.cli.demo import Demo
from hess.cli.doctor import Doctor
from hess.cli.evaluate import Evaluate
from hess.cli.inspect import Inspect
from hess.cli.reconstruct import Reconstruct
from hess.cli.reproduce import Reproduce
from hess.cli.train_nano import TrainNano
from hess.errors import ConfigError, HessError
from hess.heap import keep_freed_memory

VERBS: dict[str, Callable[..., Verb]] = {
    "demo": Demo,
    "reconstruct": Reconstruct,
    "calibrate": Calibrate,
    "inspect": Inspect,
    "evaluate": Evaluate,
    "reproduce": Reproduce,
    "doctor": Doctor,
    "bench": Bench,
    "train-nano": TrainNano,
}

DESCRIPTION = """VGGT-like 3D reconstruction with sparse attention: find out once which attention
heads carry the geometry (calibrate), then skip most attention blocks of the others (reconstruct,
evaluate).

Try: hess demo"""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0 (done), 1 (failed), 2 (misused) or 130 (Ctrl-C)."""
    verb = tyro.extras.subcommand_cli_from_dict(
        VERBS, prog="hess", description=DESCRIPTION, args=args
    )
    keep_freed_memory()
    try:
        verb.run()
    except (HessError, OSError) as error:
        # Wrapped for people only: a program that reads this wants its paths in one piece.
        wrap = console.is_terminal
        console.print("[bold red]hess:[/]", _plain(error), highlight=False, soft_wrap=not wrap)
        return 2 if isinstance(error, ConfigError) else 1
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        console.print(
            "[bold red]hess:[/] out of memory; use fewer views (--max-views), --dtype bfloat16, "
            "or ask `hess doctor --views N` what fits",
            highlight=False,
        )
        return 1
    except KeyboardInterrupt:
        console.print("[bold]hess:[/] stopped; finished parts of resumable work are kept")
        return 130
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    """Torch has a type for GPUs only, and only when torch is there to be asked."""
    on_gpu = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or on_gpu or "can't allocate memory" in str(error)


def _plain(error: Exception) -> Text:
    if isinstance(error, OSError) and error.filename is not None:
        return Text(f"{error.filename}: {error.strerror}")
    return Text(str(error))


if __name__ == "__main__":
    sys.exit(main())
