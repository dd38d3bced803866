"""How the native kernel gets compiled, kept and loaded, and what is said when it cannot be."""

import ctypes
import logging
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hess.attention import native_library as library
from hess.attention.block_sparse import BACKENDS, block_sparse_attention, resolve_backend
from hess.attention.native import native_attention
from hess.attention.native_library import AVX2_FLAGS, AVX512_FLAGS, load_library
from hess.errors import BackendUnavailableError
from test_attention import attend_by_lists, make_large_case, relative_error
from test_matching import check_native_rows

AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, of a process that has loaded nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    library._load.cache_clear()
    yield tmp_path / "caches" / "hess"
    library._load.cache_clear()


def compiler(path: Path, body: str) -> str:
    """A script that may be named by ``CC``."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_it_is_compiled_once(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="hess")
    load_library()
    assert len(caplog.messages) == 1
    assert "compiled the native code" in caplog.text
    (made,) = cache.iterdir()  # nothing half-made is left
    library._load.cache_clear()
    load_library()
    assert len(caplog.messages) == 1
    assert list(cache.iterdir()) == [made]


def test_other_flags_make_another_library(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_library()
    library._load.cache_clear()
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-g"))
    load_library()
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flags", [(), AVX2_FLAGS, AVX512_FLAGS], ids=["128", "256", "512"])
def test_vectors_of_any_width_compute_the_same(
    flags: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if flags == AVX512_FLAGS and not AVX512:
        pytest.skip("this processor has no AVX-512")
    monkeypatch.setattr(library, "_processor_flags", lambda: flags)
    case = make_large_case(dtype=dtype)
    error = relative_error(native_attention(*case), attend_by_lists(case))
    assert error <= (1e-6 if dtype == torch.float32 else 3e-3)
    check_native_rows(split=3, dim=48, num_special=5)


NO_COMPILER = {
    "none installed": ("", "there is no C compiler: install gcc or clang, or name one in"),
    "named, not there": ("/nowhere/cc -O1", "CC names '/nowhere/cc -O1', which is none"),
}


@pytest.mark.parametrize(("named", "reason"), NO_COMPILER.values(), ids=NO_COMPILER)
def test_without_a_compiler(
    named: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", named)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    case = make_large_case()
    with pytest.raises(BackendUnavailableError, match=reason):
        block_sparse_attention(*case, backend="native")
    assert len(caplog.messages) == 1  # however often it is asked for
    assert "runs in plain torch, more slowly: there is no C compiler" in caplog.text
    q, k, v, _, layout, *_ = case
    assert resolve_backend("auto", layout, q, k, v) == "gather"


BROKEN = {
    "says why": ("echo 'cc1: no such flag' >&2; exit 4", "failed: cc1: no such flag"),
    "says nothing": ("exit 4", "failed: exit code 4"),
    "makes nothing": ("exit 0", "could not be made or loaded"),
    "makes no library": (
        '[ "$1" = --version ] && exit; for x; do out=$x; done; echo oops > "$out"',
        "could not be made",
    ),
    "hangs": ("sleep 60", "took more than 1 s"),
}


@pytest.mark.parametrize(("body", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_compiler_that_fails(
    body: str, reason: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path / "cc", body))
    monkeypatch.setattr(library, "SECONDS", 1)
    with pytest.raises(BackendUnavailableError, match=reason):
        load_library()
    q = torch.zeros(1, 1, 4, 8)
    assert reason in (BACKENDS["native"].why_unavailable(q, q, q) or "")
    assert not list(cache.glob("*"))


def test_threads_stop_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they share says that nothing is left to do."""

    class Work(ctypes.Structure):
        _fields_ = (("next", ctypes.c_void_p),)

    def interrupted(do: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(library, "in_threads", interrupted)
    work = Work()
    with pytest.raises(KeyboardInterrupt):
        library.run("hess_attend", work, kept=None)
    assert ctypes.cast(work.next, ctypes.POINTER(ctypes.c_int64))[0] == library.NOTHING_LEFT


def test_a_processor_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(BackendUnavailableError, match="the processor has no AVX2"):
        load_library()


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "caches").write_text("a file, not a folder")
    load_library()
    assert not cache.exists()
    (made,) = Path(library._temporary_folder().name).glob("*.so")
    assert made.stat().st_size > 0
