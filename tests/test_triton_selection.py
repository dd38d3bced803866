"""Selection in Triton: interpreted on a CPU, compiled for two architectures, run on a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hess.attention import native_selection, torch_selection
from hess.attention.pooled_scores import PooledScores
from hess.attention.selection import baseline_counts, row_functions, select_blocks, select_top
from test_triton import compile_kernel, stack_bytes

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    """Everything in ``selection_in_interpreter.py``."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "selection_in_interpreter.py"],
        cwd=TESTS,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d+ passed", run.stdout), run.stdout
    assert not re.search(r"skipped|xfailed", run.stdout), run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "kernel", ["count_within_kernel", "probability_at_kernel", "write_lists_kernel"]
)
def test_compiles_without_spills(kernel, arch, tmp_path, monkeypatch) -> None:
    from hess.attention import triton_selection

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"logits_ptr": "*fp32", "probs_ptr": "*fp32", "mass": "fp32", "indices_ptr": "*i32"}
    types |= dict.fromkeys(("counts_ptr", "ranks_ptr", "row_offsets_ptr"), "*i64")
    for tile in (16, 512, triton_selection.MAX_TILE):
        compiled = compile_kernel(
            getattr(triton_selection, kernel), arch, types, {"TILE": tile}, num_warps=4
        )
        assert stack_bytes(compiled, tmp_path) == 0, tile
        assert compiled.metadata.shared <= 8192, tile


def test_on_a_cpu_it_is_not_chosen() -> None:
    mean = torch.randn(1, 2, 5, 8)
    assert row_functions(PooledScores(q_mean=mean, k_mean=mean, scale=1.0)) is native_selection
    mean = mean.double()
    assert row_functions(PooledScores(q_mean=mean, k_mean=mean, scale=1.0)) is torch_selection


# On a GPU, at the sizes of a model.


def pooled_scores(q_blocks: int, kv_blocks: int, heads: int = 4) -> PooledScores:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")
    torch.manual_seed(0)
    q = torch.randn(1, heads, q_blocks, 64, device="cuda")
    k = torch.randn(1, heads, kv_blocks, 64, device="cuda")
    return PooledScores(q_mean=q, k_mean=k, scale=0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(214, 428), (70, 4279), (9, 30_001)])
def test_gpu_rows_equal_their_plain_twin(size) -> None:
    from hess.attention import triton_selection

    pooled = pooled_scores(*size)
    assert row_functions(pooled) is triton_selection
    ((_, logits),) = pooled.chunks(2**28)
    found = triton_selection.count_within(logits, 0.7)
    # Sums in fp32 and fp64 may disagree about the one block that crosses.
    assert (found - torch_selection.count_within(logits, 0.7)).abs().max() <= 1
    row_offsets = torch.cat([found.new_zeros(1), found.cumsum(0)])
    lists = [torch.full((int(row_offsets[-1]),), -1, device="cuda").int() for _ in range(2)]
    triton_selection.write_lists(logits, row_offsets, lists[0])
    torch_selection.write_lists(logits, row_offsets, lists[1])
    assert torch.equal(*lists)
    ranks = (found - 1).clamp_min(0)
    torch.testing.assert_close(
        triton_selection.probability_at(logits, ranks),
        torch_selection.probability_at(logits, ranks),
        rtol=1e-5,
        atol=1e-30,
    )


@pytest.mark.gpu
def test_gpu_never_waits_where_the_ratio_sets_the_budget() -> None:
    pooled = pooled_scores(214, 428)

    def select() -> None:
        baseline = baseline_counts(pooled, 0.75, None)
        select_top(pooled, baseline)
        select_blocks(pooled, torch.tensor([[91_592, 100, 5000, 12_345]]), baseline)

    select()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        select()
    finally:
        torch.cuda.set_sync_debug_mode("default")
