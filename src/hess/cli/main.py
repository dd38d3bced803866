"""The ``hess`` command: one verb per module, one way to report, fail and stop."""

import sys
from collections.abc import Callable, Sequence

import tyro
from rich.text import Text

from hess.cli.calibrate import Calibrate
from hess.cli.console import Verb, console
from hess.cli.demo import Demo
from hess.cli.evaluate import Evaluate
from hess.cli.inspect import Inspect
from hess.cli.reconstruct import Reconstruct
from hess.cli.train_nano import TrainNano
from hess.errors import ConfigError, HessError

VERBS: dict[str, Callable[..., Verb]] = {
    "demo": Demo,
    "reconstruct": Reconstruct,
    "calibrate": Calibrate,
    "inspect": Inspect,
    "evaluate": Evaluate,
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
    try:
        verb.run()
    except (HessError, OSError) as error:
        # Wrapped for people only: a program that reads this wants its paths in one piece.
        wrap = console.is_terminal
        console.print("[bold red]hess:[/]", _plain(error), highlight=False, soft_wrap=not wrap)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        console.print("[bold]hess:[/] stopped; finished parts of resumable work are kept")
        return 130
    return 0


def _plain(error: Exception) -> Text:
    if isinstance(error, OSError) and error.filename is not None:
        return Text(f"{error.filename}: {error.strerror}")
    return Text(str(error))


if __name__ == "__main__":
    sys.exit(main())
