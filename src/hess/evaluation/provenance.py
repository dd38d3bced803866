"""Where a result came from: source commit, package version, machine."""

import hashlib
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import hess

_SOURCE_FOLDER = Path(__file__).resolve().parents[1]
_PRESENTATION = {"bench", "cli", "export", "footprint", "reproduce", "training", "viz"}


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Recorded with every result.

    Args:
        commit: git commit of the source, or "unknown" outside a checkout.
        dirty: whether tracked files differ from that commit; None when it is unknown.
        machine: platform, CPU count, device, versions of torch and of this package.
    """

    commit: str
    dirty: bool | None
    machine: dict[str, object]

    def as_dict(self) -> dict[str, object]:
        """JSON values of all fields."""
        return asdict(self)


def provenance(device: torch.device) -> Provenance:
    """Provenance of the running package on this machine, working on ``device``."""
    commit, dirty = "unknown", None
    # The package may be installed inside somebody else's repository: only its own tracked files
    # make a commit speak for it.
    if _git("ls-files", "--error-unmatch", "errors.py") is not None:
        commit = _git("rev-parse", "HEAD") or "unknown"
        status = _git("status", "--porcelain", "--untracked-files=no")
        dirty = None if status is None else bool(status)
    machine: dict[str, object] = {
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "package": hess.__version__,
    }
    return Provenance(commit=commit, dirty=dirty, machine=machine)


def code_digest() -> str:
    """SHA-256 over the source files of this package that decide what is measured.

    Those that only show results are left out, so that stored results outlive a change of a page.
    """
    digest = hashlib.sha256()
    for path in sorted(_SOURCE_FOLDER.rglob("*.py")):
        parts = path.relative_to(_SOURCE_FOLDER).parts
        if parts[0] not in _PRESENTATION:
            digest.update("/".join(parts).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _git(*arguments: str) -> str | None:
    """Output of a git command on the source folder; None when git is absent or refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(_SOURCE_FOLDER), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
