"""The code in C as a library: compiled where it is used first, kept in a cache."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch

from hess.attention.threads import in_threads
from hess.errors import BackendUnavailableError

_log = logging.getLogger("hess")

SOURCES = ("native_attention.c", "native_matching.c", "native_selection.c")
HEADERS = ("native_ranks.h", "native_vectors.h")
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC")
AVX2_FLAGS = ("-mavx2", "-mfma")
AVX512_FLAGS = (
    *AVX2_FLAGS,
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
)
NOTHING_LEFT = 2**62
"""As the number of what is to be done next: above all others."""

SECONDS = 120
"""The compiler takes two; one that hangs is stopped."""


def load_library() -> ctypes.CDLL:
    """The library; the second time at once.

    It is made by the compiler that the environment variable ``CC`` names, or else by ``cc``,
    ``gcc`` or ``clang``, for the processor as torch knows it. It is kept in the folder ``hess`` of
    the user's cache (``XDG_CACHE_HOME``, or ``~/.cache``), or where that cannot be written, in one
    of its own until the process ends.

    Raises:
        BackendUnavailableError: there is no compiler, it fails, or the processor is too old.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise BackendUnavailableError(loaded)
    return loaded


def why_no_library() -> str | None:
    """Why :func:`load_library` raises; None if it does not. Compiles it if need be."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def run(
    function: str,
    work: ctypes.Structure,
    *values: ctypes.c_void_p | ctypes.c_double,
    kept: object,
    in_one_thread: bool = False,
) -> None:
    """Call a function of the library in all threads, which take what ``work`` tells to do.

    Args:
        function: its name; it returns 0, or 1 if there is no memory.
        work: its first argument, with a field ``next`` for a number that the threads share: of
            what is to be done next.
        values: its other arguments.
        kept: what all of these point to.

    Raises:
        MemoryError: it returns 1.
    """
    call = getattr(load_library(), function)
    number = torch.zeros(1, dtype=torch.int64)
    work.next = number.data_ptr()
    # Threads may go on for a moment after an interrupt.
    work.kept = number, kept

    def do() -> None:
        if call(ctypes.byref(work), *values) != 0:
            raise MemoryError(f"no memory for {function}")

    try:
        do() if in_one_thread else in_threads(do)
    except BaseException:
        number.fill_(NOTHING_LEFT)
        raise


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none, which is also told as a warning."""
    loaded = _compiled()
    if isinstance(loaded, str):
        _log.warning("attention on this CPU runs in plain torch, more slowly: %s", loaded)
    return loaded


def _compiled() -> ctypes.CDLL | str:
    flags = _processor_flags()
    if flags is None:
        return "the processor has no AVX2"
    compiler = _compiler()
    if compiler is None:
        named = os.environ.get("CC")
        if named:
            return f"there is no C compiler; the variable CC names {named!r}, which is none"
        return "there is no C compiler: install gcc or clang, or name one in the variable CC"
    try:
        return _library(compiler, flags)
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout or "").strip().splitlines()
        said = lines[0] if lines else f"exit code {error.returncode}"
        return f"the C compiler {shlex.join(compiler)} failed: {said}"
    except subprocess.TimeoutExpired:
        return f"the C compiler {shlex.join(compiler)} took more than {SECONDS} s"
    except OSError as error:
        return f"the library of the native code could not be made or loaded: {error}"


def _library(compiler: list[str], flags: Sequence[str]) -> ctypes.CDLL:
    """Loaded from the cache, after compiling it if it is not there."""
    texts = {name: (files(__package__) / name).read_text() for name in (*SOURCES, *HEADERS)}
    command = [*compiler, *FLAGS, *flags, *SOURCES]
    version = _run([*compiler, "--version"])
    kind = "\0".join([*command, version, platform.machine(), *texts.values()])
    name = f"native-{hashlib.sha256(kind.encode()).hexdigest()[:16]}.so"
    cached = _cache_folder() / name
    if cached.is_file():
        return ctypes.CDLL(str(cached))
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(dir=cached.parent, prefix="building-") as folder:
        for file, text in texts.items():
            (Path(folder) / file).write_text(text)
        _run([*command, "-o", name], folder)
        built = Path(folder) / name
        loaded = ctypes.CDLL(str(built))
        built.replace(cached)
    seconds = time.monotonic() - begin
    _log.info("compiled the native code in %.1f s: %s", seconds, shlex.join(command))
    return loaded


def _run(command: list[str], folder: str | None = None) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True, timeout=SECONDS
    )
    return done.stdout


def _compiler() -> list[str] | None:
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]) is not None:
            return command
    return None


def _processor_flags() -> tuple[str, ...] | None:
    """For the instructions that torch found here; None if it found too few.

    Not those of the compiler's ``-march=native``: the cache may be shared by several machines.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ()
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX2":
        return AVX2_FLAGS
    if not capability.startswith("AVX512"):
        return None
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported()
    return (*AVX512_FLAGS, "-mavx512bf16") if has_bfloat16 else AVX512_FLAGS


def _cache_folder() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(caches) / "hess"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(_temporary_folder().name)


@functools.cache
def _temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    """Kept as long as the process, and removed with it."""
    return tempfile.TemporaryDirectory(prefix="hess-")
