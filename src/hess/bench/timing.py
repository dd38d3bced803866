"""Time several ways to do the same, in turns, so that a busy or warm machine meets them all."""

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hess.errors import ConfigError

MIN_SAMPLE_MS = 5.0
"""On a CPU, quicker calls are repeated until a sample takes this long."""
MIN_ROUNDS, MAX_ROUNDS = 5, 100
HEAD_START = 10**7
"""Cycles that a GPU idles before a sample (some 5 ms), in which the host launches all of it."""

Run = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds per call.

    Args:
        p50, p20, p80: median, and the fifths at both ends.
        host_p50: on a GPU, median of what the host needs to launch the call.
        samples: how many there are.
    """

    p50: float
    p20: float
    p80: float
    host_p50: float | None
    samples: int


def failing(runs: Mapping[Any, Run], device: torch.device) -> dict[Any, str]:
    """Call each of ``runs`` once; why those that raise an error do."""
    reasons = {}
    for name, run in runs.items():
        try:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        # What torch raises if memory, a kernel or a compiler is missing is no more special.
        except RuntimeError as error:
            reasons[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
    return reasons


def time_in_turns(
    runs: Mapping[Any, Run], device: torch.device, *, seconds: float
) -> dict[Any, Timing]:
    """Time ``runs``, one sample of each per round, for about ``seconds`` in all.

    Each is called once before, which is not counted. A round begins one run further than the
    last, so that none always follows the same neighbour. On a GPU a sample is the time of the
    device: launches are hidden. On a CPU it is wall time.

    Raises:
        ConfigError: ``seconds`` is not positive.
    """
    if seconds <= 0:
        raise ConfigError(f"the time to measure must be positive, found {seconds} s")
    calls, round_ms = {}, 0.0
    for name, run in runs.items():
        ms, _ = _sample(run, 1, device)
        repeated = device.type != "cuda" and ms < MIN_SAMPLE_MS
        calls[name] = round(MIN_SAMPLE_MS / max(ms, 1e-3)) if repeated else 1
        round_ms += ms * calls[name]
    rounds = round(1000 * seconds / max(round_ms, 1e-3))
    rounds = min(max(rounds, MIN_ROUNDS), MAX_ROUNDS)
    samples: dict[Any, list[tuple[float, float | None]]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(_sample(runs[name], calls[name], device))
    return {name: _timing(found) for name, found in samples.items()}


def _timing(samples: list[tuple[float, float | None]]) -> Timing:
    ms = [sample for sample, _ in samples]
    host = [launch for _, launch in samples if launch is not None]
    fifths = statistics.quantiles(ms, n=5, method="inclusive")
    return Timing(
        p50=statistics.median(ms),
        p20=fifths[0],
        p80=fifths[3],
        host_p50=statistics.median(host) if host else None,
        samples=len(ms),
    )


def _sample(run: Run, calls: int, device: torch.device) -> tuple[float, float | None]:
    """Milliseconds per call, and on a GPU those of the launch."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        start.record()
        begin = time.perf_counter()
        run()
        launched = time.perf_counter()
        end.record()
        end.synchronize()
        return start.elapsed_time(end), 1000 * (launched - begin)
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return 1000 * (time.perf_counter() - begin) / calls, None


class Neighbours:
    """How busy other processes keep the CPU from now on: near 0 on a calm machine."""

    def __init__(self) -> None:
        self._begin = _cpu_seconds()

    def cores(self) -> float | None:
        """Cores that others have used on average; None where the system does not tell."""
        begin, end = self._begin, _cpu_seconds()
        if begin is None or end is None or end[0] <= begin[0]:
            return None
        wall, busy, own = (after - before for before, after in zip(begin, end, strict=True))
        return max(0.0, (busy - own) / wall)


def _cpu_seconds() -> tuple[float, float, float] | None:
    """Wall time, CPU time of the machine, CPU time of this process."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    ticks = [int(number) for number in stat.read_text().splitlines()[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    busy = (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), busy, time.process_time()


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """Most memory that one call of ``run`` takes beyond what is there before it.

    Of torch's allocator on a GPU; on a CPU of the whole process, so good for what is larger than
    a few MiB. None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return None
    trim(0)  # else memory that was freed but kept would be used again unseen
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the highest resident set so far
    except OSError:
        return None
    before = _resident("VmRSS")
    run()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])
