"""What ``hess doctor`` looks at: memory, GPU, backends, libraries, downloaded models."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hess

if TYPE_CHECKING:
    import torch

LIBRARIES = {
    "pillow-heif": ("HEIC photos", 'pip install "hess-vggt[heic]"'),
    "av": ("videos", "pip install av"),
    "pycolmap": ("COLMAP models", "pip install pycolmap"),
    "trimesh": ("GLB scenes", "pip install trimesh"),
    "triton": ("sparse attention on GPUs", "pip install triton"),
}
"""What each library is for, and how to get it."""


def machine_facts() -> dict[str, Any]:
    """Versions, CPU and GPU as JSON values; sizes in bytes, None for what is unknown."""
    import torch

    total, free = memory(torch.device("cpu"))
    gpu: dict[str, Any] | None = None
    if torch.cuda.is_available():
        gpu_total, gpu_free = memory(torch.device("cuda"))
        gpu = {
            "name": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "memory": gpu_total,
            "free_memory": gpu_free,
        }
    return {
        "hess": hess.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": total,
        "free_memory": free,
        "gpu": gpu,
        "why_no_gpu": None if gpu else why_no_gpu(),
    }


def memory(device: "torch.device") -> tuple[int | None, int | None]:
    """Bytes in all and free on ``device``; None where the system does not tell."""
    import torch

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    # What the page cache gives back counts as free; only Linux tells.
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    found = [kilobytes.get(name) for name in ("MemTotal", "MemAvailable")]
    total_kb, free_kb = found
    if total_kb is None and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    return (
        None if total_kb is None else 1024 * total_kb,
        None if free_kb is None else 1024 * free_kb,
    )


def why_no_gpu() -> str:
    """Why torch cannot use a GPU here."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} finds no GPU, or no driver that suits it"


def try_backends(device: "torch.device") -> dict[str, dict[str, Any]]:
    """Run each attention backend on a small problem.

    Returns:
        Per name, "max_error" to the reference, or "why_not".
    """
    import torch

    from hess.attention.block_mask import BlockMask
    from hess.attention.block_sparse import BACKENDS, block_sparse_attention
    from hess.attention.layout import TokenLayout
    from hess.errors import HessError

    layout = TokenLayout(num_views=2, grid_h=8, grid_w=12, num_special=5)
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, 2, layout.num_tokens, 64)
    q, k, v = torch.randn(shape, generator=generator).to(device)
    chosen = torch.rand(1, 2, 12, 12, generator=generator) < 0.5
    mask = BlockMask.from_dense(chosen.to(device))
    results: dict[str, dict[str, Any]] = {}
    expected = block_sparse_attention(q, k, v, mask, layout, 16, 16, backend="reference")
    for name in BACKENDS:
        try:
            found = block_sparse_attention(q, k, v, mask, layout, 16, 16, backend=name)
        except (HessError, RuntimeError) as error:
            results[name] = {"max_error": None, "why_not": str(error)}
        else:
            largest = (found - expected).abs().max().item()
            results[name] = {"max_error": largest, "why_not": None}
    return results


def library_versions() -> dict[str, str | None]:
    """Installed version of each of :data:`LIBRARIES`, or None."""
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def downloaded_models() -> dict[str, int | None]:
    """Bytes in the Hugging Face cache of each model that can be loaded by name, or None."""
    import huggingface_hub
    from huggingface_hub.errors import CacheNotFound

    from hess.models.catalog import BUNDLED, known_models

    try:
        repositories = huggingface_hub.scan_cache_dir().repos
    except CacheNotFound:
        repositories = frozenset()
    sizes = {repo.repo_id: repo.size_on_disk for repo in repositories if repo.repo_type == "model"}
    return {name: sizes.get(name) for name in known_models() if name not in BUNDLED}
