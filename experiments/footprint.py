"""Memory and time of full-size VGGT-1B and pi3 with random weights, predicted and measured.

    python experiments/footprint.py -o results/footprint/footprint.jsonl
    python experiments/footprint.py -o results/footprint/cuda.jsonl --device cuda

Each case runs in a process of its own and gives a row; a stopped run continues. Predictions come
from ``hess.footprint``. Measured are the bytes of all live tensors (the same on every machine) and
what the process takes beyond what it had before the model was built: the resident set on a CPU,
torch's allocations on a GPU. Each case takes a few minutes on a CPU.

glibc keeps freed blocks of less than 32 MiB in its heap, where they leave holes. Calibration is
therefore run a second time with a threshold of 1 MiB (``malloc``).
"""

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hess.calibration import calibrate
from hess.datasets.scene import Scene
from hess.evaluation.provenance import provenance
from hess.files import write_atomically
from hess.footprint import Footprint, estimate_footprint, measure_throughput
from hess.footprint.live_bytes import LiveBytes, weight_bytes
from hess.models.base import Model
from hess.models.loading import empty_model
from hess.models.random_weights import fill_randomly

MODELS = ("facebook/VGGT-1B", "yyfz233/Pi3")
FORWARD = ((2, 392, 518), (4, 392, 518), (6, 294, 294))
CALIBRATION = ((2, 294, 518), (4, 294, 294))
ON_GPU = ((20, 518, 518), (20, 392, 518), (100, 392, 518))
SMALL_THRESHOLD = "MALLOC_MMAP_THRESHOLD_=1048576"
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is run: N views of H x W pixels; ``malloc`` is set in the environment, if at all."""

    model: str
    mode: str
    dtype: str
    num_views: int
    height: int
    width: int
    malloc: str = ""


def cases(device: str) -> list[Case]:
    forward, calibration = (FORWARD, CALIBRATION) if device == "cpu" else (ON_GPU, ON_GPU[:2])
    mallocs = ("", SMALL_THRESHOLD) if device == "cpu" else ("",)
    runs = [("forward", dtype, s, "") for dtype in ("bfloat16", "float32") for s in forward]
    runs += [("calibration", "float32", s, malloc) for s in calibration for malloc in mallocs]
    return [
        Case(model=model, mode=mode, dtype=dtype, num_views=n, height=h, width=w, malloc=malloc)
        for model in MODELS
        for mode, dtype, (n, h, w), malloc in runs
    ]


@dataclass(frozen=True)
class OneScene:
    """A data set of random photos with random but possible cameras and depths."""

    case: Case
    name: str = "random"
    provenance: str = "random"

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Scene:
        n, height, width = self.case.num_views, self.case.height, self.case.width
        generator = torch.Generator().manual_seed(SEED)
        poses = torch.eye(4).repeat(n, 1, 1)
        poses[:, :3, 3] = torch.randn(n, 3, generator=generator)
        focal = float(width)
        intrinsics = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
        return Scene(
            name="random",
            images=torch.rand(n, 3, height, width, generator=generator),
            world_from_cam=poses,
            intrinsics=intrinsics.repeat(n, 1, 1),
            depth=1 + torch.rand(n, height, width, generator=generator),
        )


def measure(case: Case, device: torch.device, threads: int) -> dict[str, Any]:
    """Run one case in this process: what was predicted and what was found."""
    torch.set_num_threads(threads)
    dtype = getattr(torch, case.dtype)
    used = {dtype, torch.float32}
    throughput = {kind: measure_throughput(device, kind, seconds=1.0) for kind in used}
    before = resident_bytes(device)
    model = fill_randomly(empty_model(case.model), seed=SEED, dtype=dtype, device=device)
    footprint = estimate_footprint(
        model,
        num_views=case.num_views,
        height=case.height,
        width=case.width,
        mode="calibration" if case.mode == "calibration" else "forward",
    )
    run = task(case, model, device)
    if device.type == "cuda":
        run()  # kernels are chosen and libraries loaded on the first call
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with LiveBytes() as live:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {
        "predicted_bytes": footprint.peak,
        "predicted_terms": terms(footprint),
        "predicted_seconds": footprint.seconds(throughput),
        "live_bytes": weight_bytes(model) + live.peak,
        "process_bytes": peak_bytes(device) - before,
        "seconds": seconds,
        "flops": footprint.flops,
        "throughput": {str(kind): vars(rates) for kind, rates in throughput.items()},
    }


def task(case: Case, model: Model, device: torch.device) -> Callable[[], None]:
    """The work itself, its input images included."""
    data = OneScene(case)

    def forward() -> None:
        with torch.inference_mode():
            predictions = model(data[0].images.unsqueeze(0).to(device))
        assert predictions.world_points.isfinite().all()

    def calibration() -> None:
        assert not calibrate(model, data).failed

    return calibration if case.mode == "calibration" else forward


def terms(footprint: Footprint) -> dict[str, int]:
    fields = {k: v for k, v in vars(footprint).items() if isinstance(v, int)}
    return fields | {f"stage_{name}": size for name, size in footprint.stages.items()}


def resident_bytes(device: torch.device) -> int:
    """What the process has now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_bytes(device: torch.device) -> int:
    """The most that the process ever had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.case is not None:
        print(json.dumps(measure(Case(**json.loads(args.case)), device, args.threads)))
        return
    lines = args.output.read_text().splitlines() if args.output.is_file() else []
    done = [json.loads(line) for line in lines]
    torch.set_num_threads(args.threads)
    origin = provenance(device).as_dict()
    origin |= {"seed": SEED, "command": shlex.join(["python", *sys.argv])}
    planned = cases(args.device)
    rows = {case: row for case in planned for row in done if row.items() >= asdict(case).items()}
    for case in planned:
        if case not in rows:
            rows[case] = asdict(case) | in_own_process(case, args) | origin
            in_order = [json.dumps(rows[case]) for case in planned if case in rows]
            write_atomically(args.output, "".join(f"{line}\n" for line in in_order).encode())
        show(rows[case])


def in_own_process(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "-o", str(args.output), "--device", args.device]
    command += ["--threads", str(args.threads), "--case", json.dumps(asdict(case))]
    name, _, value = case.malloc.partition("=")
    environment = dict(os.environ) | ({name: value} if name else {})
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(found.stdout)


def show(row: dict[str, Any]) -> None:
    sizes = [row[f"{name}_bytes"] / 2**30 for name in ("predicted", "live", "process")]
    print(
        f"{row['model']:17} {row['mode']:11} {row['dtype']:8} {row['num_views']:3} views "
        f"{row['width']}x{row['height']}: predicted {sizes[0]:5.2f} GiB, live {sizes[1]:5.2f}, "
        f"process {sizes[2]:5.2f}; predicted {row['predicted_seconds']:4.0f} s, "
        f"took {row['seconds']:4.0f} {row['malloc']}",
        flush=True,
    )


if __name__ == "__main__":
    main()
