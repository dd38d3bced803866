"""Freed memory is kept for what comes next, where the C library can do so."""

import platform
import subprocess
import sys

import pytest

from hess.heap import keep_freed_memory

FREED = """
import pathlib, sys, torch
from hess.heap import keep_freed_memory

def resident():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) // 1024

print(sys.argv[1] == "keep" and keep_freed_memory())
before = resident()
tensors = [torch.zeros(2**20) for _ in range(100)]
full = resident()
del tensors
print(full - before, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not GNU's")
@pytest.mark.parametrize("mode", ["keep", "usual"])
def test_freed_memory_is_kept_if_asked_to(mode: str) -> None:
    command = [sys.executable, "-c", FREED, mode]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    full, left = map(int, said[1:])
    assert said[0] == str(mode == "keep")
    assert full >= 390
    assert left >= 390 if mode == "keep" else left <= 100


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory()
