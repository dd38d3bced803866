"""Run a suite of benchmarks, one process per step; it succeeds or says what failed.

    python benchmarks/suite.py gpu     needs one GPU, under 8 minutes on an H200
    python benchmarks/suite.py cpu     about 12 minutes on two cores
    python benchmarks/suite.py tiny    seconds; shows that all of it runs

On a GPU its tests come first; each step checks every backend before it times it. Rows go to
``-o FILE`` as they are found, so what was measured before a failure, or before the time was up, is
kept. Nothing but torch, safetensors and huggingface_hub (and triton and pytest for a GPU) has to
be installed: ``PYTHONPATH=src`` will do.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from hess.bench.report import TABLES, narrowed
from hess.bench.rows import Row, origin, read_rows, write_rows
from hess.bench.suite import SUITES
from hess.heap import keep_freed_memory

ROOT = Path(__file__).parents[1]
MINUTES = {"gpu": 8.0, "cpu": 20.0, "tiny": 5.0}


def run_step(suite: str, step: str, device: torch.device, rows_file: Path) -> int:
    """In a process of its own: rows into a file, problems to standard error."""
    keep_freed_memory()  # as in the command line
    rows: list[Row] = []
    failed = False
    command = shlex.join(["python", "benchmarks/suite.py", suite])
    shared = origin(device, command)
    for outcome in SUITES[suite]()[step](device):
        rows += [row | {"step": step} | shared for row in outcome.rows]
        write_rows(rows_file, rows)
        for note in outcome.notes:
            print(f"  note: {note}")
        for problem in outcome.problems:
            print(f"  PROBLEM: {problem}")
            failed = True
    return 1 if failed else 0


def gpu_tests(seconds: float) -> str | None:
    """Run the tests that need a GPU; what went wrong, if anything."""
    files = [p for p in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in p.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *map(str, sorted(files))]
    try:
        done = subprocess.run(
            command, cwd=ROOT, timeout=seconds, stdout=subprocess.PIPE, text=True
        )
    except subprocess.TimeoutExpired:
        return f"the GPU tests took more than {seconds:.0f} s"
    print(done.stdout)
    if done.returncode != 0:
        return "GPU tests failed"
    return None if re.search(r"\d+ passed", done.stdout) else "no GPU test ran"


def show(rows: list[Row]) -> None:
    """All tables as text."""
    for name, make in TABLES.items():
        if len(whole := make(rows)) > 1:
            caption, table = narrowed(whole)
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            print(f"\n{name}\n  {caption}" if caption else f"\n{name}")
            for line in table:
                print("  " + "  ".join(x.rjust(w) for x, w in zip(line, widths, strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--minutes", type=float, help="stop after so many")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cuda" if args.suite == "gpu" else "cpu")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.step is not None:
        return run_step(args.suite, args.step, device, args.output)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("this suite needs a GPU, and torch finds none")
        return 1

    end = time.monotonic() + 60 * (args.minutes or MINUTES[args.suite])
    problems = []
    if device.type == "cuda":
        problem = gpu_tests(end - time.monotonic())
        problems += [problem] if problem else []
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for step in SUITES[args.suite]():
            begin = time.monotonic()
            print(f"{step}", flush=True)
            part = Path(folder) / "rows.jsonl"
            part.unlink(missing_ok=True)
            child = [sys.executable, __file__, args.suite, "--step", step, "-o", str(part)]
            child += [] if args.threads is None else ["--threads", str(args.threads)]
            try:
                code = subprocess.run(child, timeout=max(0.1, end - begin)).returncode
                if code != 0:
                    problems.append(f"{step}: failed, see above")
            except subprocess.TimeoutExpired:
                problems.append(f"{step}: stopped, the time was up")
            rows += read_rows([part]) if part.is_file() else []
            if args.output is not None:
                write_rows(args.output, rows)
            print(f"  {time.monotonic() - begin:.0f} s", flush=True)
    show(rows)
    print()
    for problem in problems:
        print(f"FAILED: {problem}")
    if args.output is not None:
        print(f"{len(rows)} rows in {args.output}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
