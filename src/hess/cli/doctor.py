"""``hess doctor``: what this machine can do, and whether a model fits on it."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.markup import escape
from rich.table import Table

from hess.cli.console import Dtype, Json, console, print_json, print_table
from hess.errors import BackendUnavailableError, ConfigError

if TYPE_CHECKING:
    import torch

    from hess.models.base import Model

RESERVE = 0.1
"""Share of the free memory that a model should leave to the allocator and to others."""

_TYPICAL_PHOTO = (4000, 3000)


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Tell what this machine can do; with --views, whether a model fits and how long it takes.

    Nothing is downloaded. Memory follows from the model's architecture, time from its work and a
    measurement of this machine, which takes some seconds.

    Example: hess doctor --views 20 --size 518x392 --model facebook/VGGT-1B
    """

    views: int | None = None
    """Photos of one scene."""
    size: Annotated[str | None, tyro.conf.arg(metavar="WxH")] = None
    """The model's input in pixels; default: what the model makes of 4:3 photos."""
    model: Annotated[str, tyro.conf.arg(metavar="NAME")] = "facebook/VGGT-1B"
    """facebook/VGGT-1B, yyfz233/Pi3, nano, ..."""
    dtype: Dtype = "bfloat16"
    device: Literal["cpu", "cuda"] | None = None
    """Default: cuda where there is one."""
    block_sparsity: float = 0.75
    """Of the sparse attention to compare with, 0 to 1."""
    json: Json = False

    def run(self) -> None:
        import torch

        from hess.cli import machine

        if self.views is None and self.size is not None:
            raise ConfigError("--size goes with --views; say how many photos there are")
        if self.views is not None and self.views < 1:
            raise ConfigError(f"--views must be at least 1, found {self.views}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise BackendUnavailableError(
                f"device 'cuda' was asked for, but {machine.why_no_gpu()}"
            )
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        fit = None if self.views is None else self._fit(self.views, device)
        report = {
            "machine": machine.machine_facts(),
            "backends": machine.try_backends(device),
            "libraries": machine.library_versions(),
            "models": machine.downloaded_models(),
            "fit": fit,
        }
        if self.json:
            print_json(report)
            return
        _print_machine(report)
        if fit is not None:
            _print_fit(fit)

    def _fit(self, views: int, device: "torch.device") -> dict[str, Any]:
        import torch

        from hess.cli.machine import memory
        from hess.footprint import estimate_footprint, measure_throughput, most_views
        from hess.models.layers import use_precision
        from hess.models.loading import empty_model

        model = empty_model(self.model)
        width, height = input_size(self.size, model)
        use_precision(model, model.backbone_parts(), getattr(torch, self.dtype))
        cases: dict[str, dict[str, Any]] = {
            "reconstruct, dense": {"mode": "forward"},
            f"reconstruct, block sparsity {self.block_sparsity:g}": {
                "mode": "forward",
                "block_sparsity": self.block_sparsity,
            },
            "calibrate on one scene, float32": {"mode": "calibration"},
        }
        size: dict[str, Any] = {"height": height, "width": width}
        footprints = {
            name: estimate_footprint(model, num_views=views, **size, **case)
            for name, case in cases.items()
        }
        dtypes = {work.dtype for f in footprints.values() for work in f.work if work.flops}
        throughput = {dtype: measure_throughput(device, dtype) for dtype in dtypes}
        _, free = memory(device)
        usable = None if free is None else round((1 - RESERVE) * free)
        rows = {}
        for name, footprint in footprints.items():
            rows[name] = {
                "peak_memory": footprint.peak,
                "fits": None if usable is None else footprint.peak <= usable,
                "most_views": None
                if usable is None
                else most_views(model, usable, **size, **cases[name]),
                "seconds": footprint.seconds(throughput),
                "flops": footprint.flops,
            }
        return {
            "model": self.model,
            "views": views,
            **size,
            "dtype": self.dtype,
            "device": device.type,
            "free_memory": free,
            "weights": footprints["reconstruct, dense"].weights,
            "teraflops": {
                str(dtype).removeprefix("torch."): {k: v / 1e12 for k, v in vars(rates).items()}
                for dtype, rates in throughput.items()
            },
            "cases": rows,
        }


def input_size(size: str | None, model: "Model") -> tuple[int, int]:
    """Width and height in pixels, as typed or as ``model`` fits a typical photo.

    Raises:
        ConfigError: not of the form 518x392, or no multiple of the patch.
    """
    if size is None:
        (fit,) = model.image_rule([_TYPICAL_PHOTO])
        return fit.width, fit.height
    found = re.fullmatch(r"(\d+)x(\d+)", size)
    if found is None:
        raise ConfigError(f"--size must be WIDTHxHEIGHT in pixels such as 518x392, found {size!r}")
    width, height = int(found[1]), int(found[2])
    patch = model.patch_size
    if not width or not height or width % patch or height % patch:
        nearest = "x".join(str(max(1, round(side / patch)) * patch) for side in (width, height))
        raise ConfigError(
            f"--size {size}: {model.model_name} takes images whose sides are multiples of "
            f"{patch}; the nearest is {nearest}"
        )
    return width, height


def _amount(size: int | None) -> str:
    if size is None:
        return "unknown"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _print_facts(title: str, facts: Mapping[str, str]) -> None:
    """Names on the left, what there is to say on the right, wrapped there."""
    table = Table.grid(padding=(0, 2))
    for name, text in facts.items():
        table.add_row(f"  {name}", text)
    console.print(f"[italic]{title}[/]")
    console.print(table, highlight=False)
    console.print()


def _print_machine(report: dict[str, Any]) -> None:
    from hess.cli.machine import LIBRARIES

    facts, gpu = report["machine"], report["machine"]["gpu"]
    machine = {
        "versions": f"hess {facts['hess']}, Python {facts['python']}, torch {facts['torch']}",
        "CPU": f"{facts['cpus']} cores, of which torch uses {facts['threads']}",
        "memory": f"{_amount(facts['free_memory'])} free of {_amount(facts['memory'])}",
        "GPU": f"none: {facts['why_no_gpu']}",
    }
    if gpu is not None:
        machine["GPU"] = f"{gpu['name']}, compute capability {gpu['capability']}"
        machine["GPU memory"] = f"{_amount(gpu['free_memory'])} free of {_amount(gpu['memory'])}"
    _print_facts("This machine", machine)

    backends = {
        name: escape(found["why_not"])
        if found["max_error"] is None
        else f"works, largest error {found['max_error']:.0e}"
        for name, found in report["backends"].items()
    }
    _print_facts(
        "Backends of sparse attention", backends | {"reference": "what others must equal"}
    )

    libraries = {}
    for name, installed in report["libraries"].items():
        purpose, command = LIBRARIES[name]
        state = installed or f"[yellow]missing[/], {escape(command)}"
        libraries[name] = f"{state} ({purpose})"
    _print_facts("Optional libraries", libraries)

    models = {
        name: "not downloaded yet" if size is None else f"{_amount(size)} in the cache"
        for name, size in report["models"].items()
    }
    _print_facts("Models", {"nano": "bundled"} | models)


def _print_fit(fit: dict[str, Any]) -> None:
    rows = [["", "peak memory", "fits", "most views", "time"]]
    for name, case in fit["cases"].items():
        fits = {True: "[green]yes[/]", False: "[red]no[/]", None: "?"}[case["fits"]]
        most = "?" if case["most_views"] is None else str(case["most_views"])
        rows.append([name, _amount(case["peak_memory"]), fits, most, _duration(case["seconds"])])
    title = f"{fit['model']} on {fit['device']}, {fit['views']} views of "
    print_table(rows, title + f"{fit['width']}x{fit['height']}, {fit['dtype']}")
    console.print(
        f"Memory includes {_amount(fit['weights'])} of weights; torch itself takes some more. It "
        f"fits if {RESERVE:.0%} of the {_amount(fit['free_memory'])} that are free now stay free. "
        "Times hold while the machine is as busy as now, and as if sparse attention did as many "
        "operations per second as dense attention.",
        highlight=False,
    )
    if fit["device"] == "cpu" and sys.platform == "linux":
        console.print(
            "Holes in the heap were seen to add 0.4 GiB to reconstruction, 3 GiB to calibration; "
            "MALLOC_MMAP_THRESHOLD_=1048576 in the environment prevents them.",
            highlight=False,
        )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
