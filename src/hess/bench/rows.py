"""Rows of results: one JSON object per line, each with where it came from."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hess.evaluation.provenance import provenance
from hess.files import write_atomically

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a benchmark found.

    Args:
        rows: one per measurement.
        problems: what was wrong or could not be measured though it was asked for.
        notes: what else is good to know.
    """

    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __iadd__(self, other: "Outcome") -> "Outcome":
        self.rows.extend(other.rows)
        self.problems.extend(other.problems)
        self.notes.extend(other.notes)
        return self


def origin(device: torch.device, command: str) -> Row:
    """Fields that all rows of one command share: commit, machine, versions, load, command."""
    found = provenance(device).as_dict()
    machine = {
        **found["machine"],  # type: ignore[dict-item]
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "driver": _driver() if device.type == "cuda" else None,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    return {"command": command, **found, "machine": machine}


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write ``rows`` as JSON lines in place of what is there."""
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    write_atomically(path, text.encode())


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """All rows of these files."""
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip()
