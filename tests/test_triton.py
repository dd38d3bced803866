"""The Triton backend: interpreted on a CPU, compiled for every architecture, run on a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hess.attention import packing
from hess.attention.block_sparse import block_sparse_attention, resolve_backend
from hess.attention.layout import TokenLayout
from hess.attention.triton_backend import (
    LaunchConfig,
    attend_lists,
    launch_configs,
    query_tile,
)
from hess.attention.triton_packing import pack_keys, pool_queries
from hess.errors import BackendUnavailableError
from triton_in_interpreter import Case, attend_by_lists, make_case, relative_error

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    """Everything in ``triton_in_interpreter.py``."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "triton_in_interpreter.py"],
        cwd=TESTS,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d+ passed", run.stdout), run.stdout
    assert not re.search(r"skipped|xfailed", run.stdout), run.stdout


def test_on_a_cpu_it_says_why_it_cannot_run(monkeypatch) -> None:
    case = make_case(density=(0.5,))
    with pytest.raises(BackendUnavailableError, match="needs tensors on a CUDA device, found cpu"):
        block_sparse_attention(*case, backend="triton")
    monkeypatch.setattr("hess.attention.triton_backend.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match="triton is not installed"):
        block_sparse_attention(*case, backend="triton")


def test_auto_never_means_triton_on_a_cpu() -> None:
    q, k, v, _, layout, *_ = make_case(density=(0.5,))
    assert resolve_backend("auto", layout, q, k, v) == "native"
    assert resolve_backend("triton", layout, q, k, v) == "triton"


# Compiled without a GPU: what the assembler says about registers and shared memory.

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}
"""Bytes that one program may use, by architecture (CUDA C++ Programming Guide)."""

TRITON_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

COMPILED = [
    *((arch, torch.bfloat16, 64) for arch in SHARED_MEMORY),
    (80, torch.float16, 16),
    (86, torch.bfloat16, 128),
    (90, torch.bfloat16, 128),
    (90, torch.float16, 32),
    (80, torch.float32, 64),
    (86, torch.float32, 128),
]


@pytest.fixture(autouse=True)
def _own_triton_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_kernel(kernel, arch: int, types: dict[str, str], constants: dict, **options):
    """The kernel as a launch with aligned pointers and strides compiles it."""
    from triton import compile as compile_source
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = [
        (index,)
        for index, name in enumerate(kernel.arg_names)
        if (name.endswith("_ptr") and name != "heads_ptr") or "stride" in name
    ]
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {index: [["tt.divisibility", 16]] for index in aligned},
    )
    return compile_source(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile_attention(arch: int, dtype: torch.dtype, dim: int, config: LaunchConfig):
    from hess.attention.triton_kernels import attention_kernel

    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*" + TRITON_TYPES[dtype])
    types |= {"lse_ptr": "*fp32", "row_offsets_ptr": "*i64", "heads_ptr": "*i64"}
    types |= {"indices_ptr": "*i32", "every_block_ptr": "*i32", "qk_scale": "fp32"}
    constants = {
        "HEAD_DIM": dim,
        "BLOCK_Q": 128,
        "BLOCK_KV": 64,
        "TILE_Q": query_tile(128, dtype, dim),
        "TILE_KV": config.tile_kv,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return compile_kernel(attention_kernel, arch, types, constants, **options)


def stack_bytes(compiled, folder: Path) -> int:
    """Memory per thread for what the registers do not hold."""
    import triton

    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "--dump-resource-usage", binary]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", report)[1])


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype", "dim"), COMPILED, ids=str)
def test_attention_compiles_without_spills(arch, dtype, dim, tmp_path) -> None:
    for config in launch_configs(divmod(arch, 10), dtype, dim):
        compiled = compile_attention(arch, dtype, dim, config)
        assert stack_bytes(compiled, tmp_path) == 0, config
        assert compiled.metadata.shared <= SHARED_MEMORY[arch], config
        if dtype != torch.float32:
            matrix_unit = "wgmma.mma_async" if arch == 90 else "mma.sync"
            assert matrix_unit in compiled.asm["ptx"], config
            assert "cp.async" in compiled.asm["ptx"], "key loads are not pipelined"


def test_a_spill_would_be_seen(tmp_path) -> None:
    compiled = compile_attention(80, torch.bfloat16, 64, LaunchConfig(64, 2, 2))
    assert stack_bytes(compiled, tmp_path) > 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_packing_compiles_to_wide_loads(arch, tmp_path) -> None:
    from hess.attention.triton_kernels import pack_kernel

    types = {"x_ptr": "*bf16", "packed_ptr": "*bf16", "mean_ptr": "*fp32"}
    constants = {"HEAD_DIM": 64, "BLOCK": 64, "TILE": 64, "COPY": True, "AVERAGE": True}
    compiled = compile_kernel(pack_kernel, arch, types, constants)
    assert stack_bytes(compiled, tmp_path) == 0
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
    assert "st.global.v4.b32" in compiled.asm["ptx"]


# On a GPU, at the sizes of a model.


@pytest.fixture
def cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")
    return "cuda"


def large_case(dtype: torch.dtype, dim: int = 64) -> Case:
    layout = TokenLayout(num_views=7, grid_h=37, grid_w=37, num_special=5)
    return make_case(layout, dtype=dtype, dim=dim, density=(0.1, 1.0, 0.5, 0.02), device="cuda")


def torch_error(case: Case, expected: torch.Tensor) -> float:
    """Error of torch's own dense attention in this type, on the full head."""
    q, k, v, *_ = (x[:, 1:2] if torch.is_tensor(x) else x for x in case)
    return relative_error(F.scaled_dot_product_attention(q, k, v), expected[:, 1:2])


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gpu_error_is_that_of_the_type(cuda, dtype, dim) -> None:
    case = large_case(dtype, dim)
    expected, expected_lse = attend_by_lists(case)
    limit = 1e-5 if dtype == torch.float32 else 2 * torch_error(case, expected)
    out = block_sparse_attention(*case, backend="triton")
    q, k, v, mask, layout, *sizes = case
    listed, lse = attend_lists(q, pack_keys(k, v, layout, sizes[1]), mask, layout, *sizes)
    for h in range(mask.num_heads):
        assert relative_error(out[:, h], expected[:, h]) <= limit
        assert relative_error(listed[:, h], expected[:, h]) <= limit
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-2)


@pytest.mark.gpu
def test_gpu_every_cut_gives_the_same(cuda) -> None:
    q, k, v, mask, layout, *sizes = case = large_case(torch.bfloat16)
    expected, _ = attend_by_lists(case)
    keys = pack_keys(k, v, layout, sizes[1])
    for config in launch_configs(torch.cuda.get_device_capability(), q.dtype, 64):
        poisoned = torch.full_like(q, torch.nan)
        out, _ = attend_lists(q, keys, mask, layout, *sizes, out=poisoned, config=config)
        assert relative_error(out, expected) <= 5e-3, config


@pytest.mark.gpu
def test_gpu_packing_equals_its_plain_twin(cuda) -> None:
    q, k, v, _, layout, size_q, size_kv = large_case(torch.bfloat16)
    found, expected = pack_keys(k, v, layout, size_kv), packing.pack_keys(k, v, layout, size_kv)
    assert torch.equal(found.k, expected.k)
    assert torch.equal(found.v, expected.v)
    torch.testing.assert_close(found.k_mean, expected.k_mean, rtol=0, atol=1e-5)
    means = pool_queries(q, layout, size_q), packing.pool_queries(q, layout, size_q)
    torch.testing.assert_close(*means, rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_gpu_launches_never_wait_for_the_device(cuda) -> None:
    q, k, v, mask, layout, *sizes = large_case(torch.bfloat16)

    def launch() -> None:
        heads = mask.head_order.to(cuda, non_blocking=True)
        pool_queries(q, layout, sizes[0])
        keys = pack_keys(k, v, layout, sizes[1])
        attend_lists(q, keys, mask, layout, *sizes, heads=heads)

    launch()  # compiles and measures
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_offsets_beyond_31_bits(cuda) -> None:
    """2^31 elements of q, k and v each: only the last head, which lies beyond, is computed."""
    if torch.cuda.get_device_properties(0).total_memory < 75 * 2**30:
        pytest.skip("needs a GPU with 75 GiB")
    layout = TokenLayout(num_views=192, grid_h=37, grid_w=37, num_special=5)
    heads = -(-(2**31) // (layout.num_tokens * 64)) + 1
    case = make_case(layout, dtype=torch.bfloat16, dim=64, density=(0.001,) * heads, device="cuda")
    q, k, v, mask, _, *sizes = case
    keys = pack_keys(k, v, layout, sizes[1])
    assert keys.k[:, :-1].numel() > 2**31
    last = torch.tensor([heads - 1], device="cuda")
    out, _ = attend_lists(q, keys, mask, layout, *sizes, heads=last)
    alone = keys.k[:, -1:].contiguous(), keys.v[:, -1:].contiguous()
    for packed, tokens in zip(alone, (k, v), strict=True):
        assert torch.equal(packed, packing.pack_tokens(tokens[:, -1:], layout))
    special = layout.special_index[:64].to(q.device)
    dense = F.scaled_dot_product_attention(q[:, -1:, special], k[:, -1:], v[:, -1:])
    assert relative_error(out[:, -1:, special], dense.double()) <= 1e-2


@pytest.mark.gpu
def test_gpu_auto_means_triton_where_it_runs(cuda) -> None:
    q, k, v, _, layout, *_ = large_case(torch.bfloat16)
    assert resolve_backend("auto", layout, q, k, v) == "triton"
    assert resolve_backend("auto", layout, *(x.double() for x in (q, k, v))) == "masked"
    assert resolve_backend("auto", layout, q.requires_grad_(), k, v) == "flex"
