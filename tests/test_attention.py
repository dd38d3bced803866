"""Block-sparse attention: the reference against loops, the backends against the reference."""

import inspect
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hess.attention import gather, native
from hess.attention.block_mask import BlockMask
from hess.attention.block_sparse import (
    AUTO,
    BACKENDS,
    GATHER_TOKENS,
    block_sparse_attention,
    check_backend,
    resolve_backend,
)
from hess.attention.dense import NATIVE_TOKENS, dense_attention
from hess.attention.layout import TokenLayout
from hess.attention.pooling import num_blocks
from hess.attention.reference import reference_attention, token_mask
from hess.attention.sparsity import block_sparsity, flop_saving, work_saving
from hess.errors import BackendUnavailableError, ConfigError, LayoutError

Case = tuple[Tensor, Tensor, Tensor, BlockMask, TokenLayout, int, int]

LAYOUTS = {
    "one view": TokenLayout(num_views=1, grid_h=5, grid_w=7, num_special=1),
    "odd grid": TokenLayout(num_views=3, grid_h=9, grid_w=7, num_special=5),
    "many views": TokenLayout(num_views=9, grid_h=3, grid_w=4, num_special=2),
}
CPU_BACKENDS = ["reference", "masked", "gather", "native"]
"""The others have tests of their own: ``test_triton``, ``test_flex``."""
KERNELS = ["gather", "native"]
BLOCK_SIZES = [(1, 1), (6, 6), (7, 5), (16, 16), (5, 7), (64, 1), (1, 64), (500, 500)]


def random_mask(
    layout: TokenLayout, size_q: int, size_kv: int, *, batch: int, heads: int, seed: int
) -> BlockMask:
    """Heads of very different density: the first is empty, the last full."""
    patches = layout.num_patch_tokens
    shape = (batch, heads, num_blocks(patches, size_q), num_blocks(patches, size_kv))
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    density = torch.linspace(0, 1, heads) if heads > 1 else torch.tensor([0.4])
    return BlockMask.from_dense(noise < density[:, None, None])


def make_case(
    layout: TokenLayout,
    size_q: int,
    size_kv: int,
    *,
    batch: int = 2,
    heads: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    # As a model makes them: views of one tensor in which the heads are not contiguous.
    qkv = torch.randn(batch, layout.num_tokens, 3, heads, 8, generator=generator, dtype=dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    mask = random_mask(layout, size_q, size_kv, batch=batch, heads=heads, seed=seed)
    return 2 * q, k, v, mask, layout, size_q, size_kv


def attend_by_loops(case: Case) -> Tensor:
    """Oracle: one query at a time, with the list of keys it may see."""
    q, k, v, mask, layout, size_q, size_kv = case
    is_special = [i % layout.tokens_per_view < layout.num_special for i in range(q.shape[2])]
    patches = [i for i, special in enumerate(is_special) if not special]
    dense = mask.to_dense()
    out = torch.full_like(v, torch.nan)
    for b, h, i in (
        (b, h, i) for b in range(len(q)) for h in range(q.shape[1]) for i in range(q.shape[2])
    ):
        keys = list(range(q.shape[2]))
        if not is_special[i]:
            row = dense[b, h, patches.index(i) // size_q]
            keys = [j for j in keys if is_special[j] or row[patches.index(j) // size_kv]]
        scores = torch.stack([q[b, h, i] @ k[b, h, j] for j in keys]) / q.shape[-1] ** 0.5
        weights = (scores - scores.max()).exp()
        out[b, h, i] = sum(
            w * v[b, h, j] for w, j in zip(weights / weights.sum(), keys, strict=True)
        )
    return out


@pytest.mark.parametrize(("size_q", "size_kv"), [(4, 3), (6, 6)])
def test_reference_is_attention_over_the_visible_keys(size_q, size_kv) -> None:
    layout = TokenLayout(num_views=2, grid_h=3, grid_w=3, num_special=2)
    case = make_case(layout, size_q, size_kv, batch=1, heads=3)
    torch.testing.assert_close(reference_attention(*case), attend_by_loops(case))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("setting", range(5))
def test_golden_outputs(backend, setting, golden: Path) -> None:
    """Exact attention under SparseVGGT's masks, special tokens always visible."""
    data = load_file(golden / "sparsevggt_selection.safetensors")
    layout = TokenLayout(num_views=5, grid_h=13, grid_w=14, num_special=5)
    mask = BlockMask.from_dense(data[f"mask.{setting}"])
    expected = data[f"out.{setting}"].double()
    if backend != "native":
        exact = (data[name].double() for name in ("q", "k", "v"))
        out = block_sparse_attention(*exact, mask, layout, 128, 64, backend=backend)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)

    # The logits reach 158, where fp32 is spaced by 1.5e-5: there, 1e-5 of the output's range.
    single = (data[name] for name in ("q", "k", "v"))
    out = block_sparse_attention(*single, mask, layout, 128, 64, backend=backend)
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("backend", ["masked", "gather", "native"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize(("size_q", "size_kv"), BLOCK_SIZES)
def test_backends_equal_the_reference(backend, layout, size_q, size_kv) -> None:
    exact = make_case(layout, size_q, size_kv)
    expected = block_sparse_attention(*exact, backend="reference")
    if backend != "native":
        out = block_sparse_attention(*exact, backend=backend)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)

    # In fp32: at most twice the error that the reference itself makes there.
    single = (*(x.float() for x in exact[:3]), *exact[3:])
    error = (block_sparse_attention(*single, backend=backend) - expected).abs().max()
    own = (block_sparse_attention(*single, backend="reference") - expected).abs().max()
    assert error <= 2 * own + 1e-7


# The kernels: small blocks above, and here those of a real model.


def make_large_case(
    layout: TokenLayout | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    dim: int = 64,
    spread: float = 1.0,
    batch: int = 1,
) -> Case:
    """Heads with one block per row, a third of them (the last row half), all but one, all."""
    layout = layout or TokenLayout(num_views=4, grid_h=15, grid_w=17, num_special=5)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, batch, 4, layout.num_tokens, dim, generator=generator)
    q, k, v = qkv.to(dtype)
    patches = layout.num_patch_tokens
    size = batch, 4, num_blocks(patches, 128), num_blocks(patches, 64)
    rank = torch.rand(size, generator=generator).argsort(-1).argsort(-1)
    count = torch.tensor([1, size[-1] // 3, size[-1] - 1, size[-1]])[:, None].repeat(1, size[2])
    count[1, -1] = size[-1] // 2
    mask = BlockMask.from_dense(rank < count[..., None])
    return q * spread, k * spread, v, mask, layout, 128, 64


def attend_by_lists(case: Case) -> Tensor:
    """Oracle in float64, from the lists themselves: a query block at a time."""
    q, k, v, mask, layout, size_q, size_kv = case
    q, k, v = q.double(), k.double(), v.double()
    patch_blocks = layout.patch_index.split(size_kv)
    out = F.scaled_dot_product_attention(q, k, v)
    out[:, :, layout.patch_index] = torch.nan
    for row in range(mask.counts.numel()):
        head, i = divmod(row, mask.num_q_blocks)
        b, h = divmod(head, mask.num_heads)
        listed = mask.indices[mask.row_offsets[row] : mask.row_offsets[row + 1]].tolist()
        keys = torch.cat([*(patch_blocks[block] for block in listed), layout.special_index])
        queries = layout.patch_index[i * size_q : (i + 1) * size_q]
        scores = q[b, h, queries] @ k[b, h, keys].T / q.shape[-1] ** 0.5
        out[b, h, queries] = scores.softmax(-1) @ v[b, h, keys]
    return out


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


LARGE_LAYOUTS = {
    "odd tails": TokenLayout(num_views=4, grid_h=15, grid_w=17, num_special=5),
    "one view": TokenLayout(num_views=1, grid_h=37, grid_w=23, num_special=5),
    "no specials": TokenLayout(num_views=2, grid_h=16, grid_w=32, num_special=0),
    "two parts of keys": TokenLayout(num_views=9, grid_h=15, grid_w=17, num_special=5),
    "many specials": TokenLayout(num_views=5, grid_h=15, grid_w=17, num_special=500),
}


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("layout", LARGE_LAYOUTS.values(), ids=LARGE_LAYOUTS.keys())
def test_kernels_equal_attention_over_the_lists(backend, layout) -> None:
    case = make_large_case(layout, batch=2)
    out = block_sparse_attention(*case, backend=backend)
    assert relative_error(out, attend_by_lists(case)) <= 1e-6


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 2.0, 3.0, 8.0])
@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", KERNELS)
def test_precision_is_that_of_torch_however_wide_the_scores(backend, dtype, dim, spread) -> None:
    """Spread 8 makes scores of 500. In half precision: twice the error of torch's attention."""
    case = make_large_case(dtype=dtype, dim=dim, spread=spread)
    expected = attend_by_lists(case)
    q, k, v, *rest = case
    visible = token_mask(*rest)
    limit = 1e-5
    if dtype != torch.float32:
        torchs = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        limit = 2 * relative_error(torchs, expected)
    out = block_sparse_attention(*case, backend=backend)
    assert relative_error(out, expected) <= limit


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts back how many threads torch uses."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", KERNELS)
def test_the_result_does_not_depend_on_threads(backend, dtype) -> None:
    case = make_large_case(dtype=dtype)
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        with torch.inference_mode(number == 2):
            results.append(block_sparse_attention(*case, backend=backend))
        with ThreadPoolExecutor(1) as pool:  # what other threads begin with is as before, too
            assert pool.submit(torch.get_num_threads).result() == number
        assert torch.get_num_threads() == number
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


IN_A_FORK = """
import os, sys, torch
from hess.attention.block_sparse import block_sparse_attention
from test_attention import make_large_case

torch.set_num_threads(1)  # torch's own threads do not survive a fork
case = make_large_case()
torch.set_num_threads(2)
block_sparse_attention(*case, backend=sys.argv[1])
child = os.fork()
if child == 0:
    block_sparse_attention(*case, backend=sys.argv[1])
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", KERNELS)
def test_a_forked_process_starts_threads_of_its_own(backend) -> None:
    command = [sys.executable, "-c", IN_A_FORK, backend]
    run = subprocess.run(command, cwd=Path(__file__).parent, timeout=60, capture_output=True)
    assert run.stdout.split() == [b"7"], run.stderr


@pytest.mark.usefixtures("threads")
def test_an_error_in_a_thread_is_raised(monkeypatch) -> None:
    def fail(*args: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(gather, "_attend", fail)
    torch.set_num_threads(2)
    with pytest.raises(MemoryError, match="no room"):
        gather.gather_attention(*make_large_case())
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("backend", KERNELS)
def test_the_result_does_not_depend_on_the_order_of_heads(backend, monkeypatch) -> None:
    case = make_large_case()
    expected = block_sparse_attention(*case, backend=backend)
    assert case[3].head_order.tolist() == [3, 2, 1, 0]
    monkeypatch.setattr(BlockMask, "head_order", torch.tensor([1, 0, 3, 2]))
    assert torch.equal(block_sparse_attention(*case, backend=backend), expected)


@pytest.mark.parametrize("max_keys", [1, 60, 10**6])
def test_the_result_does_not_depend_on_how_rows_share_calls(max_keys, monkeypatch) -> None:
    case = make_case(LAYOUTS["odd grid"], 7, 5)
    expected = reference_attention(*case)
    monkeypatch.setattr(gather, "SPARSE_KEYS", max_keys)
    torch.testing.assert_close(gather.gather_attention(*case), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_does_not_depend_on_which_heads_are_copied_together(dtype, monkeypatch) -> None:
    case = make_case(LAYOUTS["odd grid"], 7, 5, dtype=dtype)
    expected = native.native_attention(*case)
    monkeypatch.setattr(native, "COPIED_BYTES", 1)
    assert torch.equal(native.native_attention(*case), expected)


def test_the_native_kernel_reads_tensors_as_they_lie() -> None:
    """Heads apart, tokens apart, numbers apart, and heads that start anywhere."""
    q, k, v, *rest = make_case(LAYOUTS["odd grid"], 7, 5, dtype=torch.float32)
    expected = native.native_attention(q, k, v, *rest)
    for dims in ((0, 1, 2, 3), (0, 2, 1, 3), (3, 2, 1, 0)):
        back = [dims.index(i) for i in range(4)]
        moved = [x.permute(dims).contiguous().permute(back) for x in (q, k, v)]
        assert torch.equal(native.native_attention(*moved, *rest), expected)
    odd = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (q, k, v)]
    assert torch.equal(native.native_attention(*odd, *rest), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_native_says_what_it_cannot_compute(dtype) -> None:
    q = torch.zeros(1, 1, 4, 8 if dtype == torch.float64 else 12, dtype=dtype)
    reason = "float32" if dtype == torch.float64 else "head_dim that is a multiple of 8, found 12"
    with pytest.raises(BackendUnavailableError, match=reason):
        check_backend("native", q)
    layout = TokenLayout(num_views=1, grid_h=1, grid_w=GATHER_TOKENS, num_special=1)
    assert resolve_backend("auto", layout, q, q, q) == "gather"


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New tensors that are not filled hold NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("backend", KERNELS)
def test_every_output_is_written(backend, layout) -> None:
    for case in (make_case(layout, 6, 6, dtype=torch.float32), make_large_case()):
        assert torch.isfinite(block_sparse_attention(*case, backend=backend)).all()


@pytest.mark.parametrize("backend", KERNELS)
def test_keys_that_are_not_selected_are_never_touched(backend) -> None:
    small = make_case(LAYOUTS["odd grid"], 6, 6, heads=1, dtype=torch.float32)
    for case in (small, make_large_case(), make_large_case(dtype=torch.bfloat16)):
        q, k, v, mask, layout, size_q, size_kv = case
        dense = mask.to_dense()
        dense[..., 3] = False
        hidden = layout.patch_index[3 * size_kv : 4 * size_kv]
        k[:, :, hidden] = torch.nan
        v[:, :, hidden] = torch.nan
        args = (q, k, v, BlockMask.from_dense(dense), layout, size_q, size_kv)
        out = block_sparse_attention(*args, backend=backend)
        assert torch.isfinite(out[:, :, layout.patch_index]).all()
        assert torch.isnan(out[:, :, layout.special_index]).all()


@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_are_refused_and_auto_keeps_them(backend) -> None:
    q, k, v, *rest = make_large_case()
    v.requires_grad_()
    with pytest.raises(
        BackendUnavailableError, match=r"no backward pass; run under torch\.no_grad"
    ):
        block_sparse_attention(q, k, v, *rest, backend=backend)
    block_sparse_attention(q, k, v, *rest).sum().backward()
    assert v.grad is not None
    with torch.no_grad():
        assert not block_sparse_attention(q, k, v, *rest, backend=backend).requires_grad


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_full_mask_is_dense_attention_and_an_empty_one_sees_special_tokens(backend) -> None:
    layout = LAYOUTS["odd grid"]
    dtype = torch.float32 if backend == "native" else torch.float64
    q, k, v, mask, *rest = make_case(layout, 16, 16, dtype=dtype)
    full = BlockMask.from_dense(torch.ones(mask.shape, dtype=torch.bool))
    out = block_sparse_attention(q, k, v, full, *rest, backend=backend)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))

    empty = BlockMask.from_dense(torch.zeros(mask.shape, dtype=torch.bool))
    out = block_sparse_attention(q, k, v, empty, *rest, backend=backend)
    special, patches = layout.special_index, layout.patch_index
    torch.testing.assert_close(
        out[:, :, patches],
        F.scaled_dot_product_attention(q[:, :, patches], k[:, :, special], v[:, :, special]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 3, 129, 16), (2, 2, NATIVE_TOKENS, 64)])
def test_dense_attention_is_that_of_torch(shape, dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    batch, heads, tokens, dim = shape
    qkv = torch.randn(batch, tokens, 3, heads, dim, generator=generator).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    limit = 1e-6
    if dtype != torch.float32:
        limit = 2 * relative_error(F.scaled_dot_product_attention(q, k, v), expected)
    for attend in (native.native_dense_attention, dense_attention):
        with torch.no_grad():
            out = attend(q, k, v)
        assert out.dtype == dtype
        assert relative_error(out, expected) <= limit


def test_traced_tensors_are_left_to_torch() -> None:
    """The kernel would compute on what is not there yet."""
    x = torch.randn(1, 2, NATIVE_TOKENS, 8)
    compiled = torch.compile(dense_attention, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, x, x), F.scaled_dot_product_attention(x, x, x))
    with FakeTensorMode() as fake, torch.no_grad():
        there = fake.from_tensor(x)
        assert dense_attention(there, there, there).shape == x.shape
        with pytest.raises(BackendUnavailableError, match="plain tensors, found FakeTensor"):
            native.native_dense_attention(there, there, there)


def test_dense_attention_goes_by_the_number_of_tokens(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(native, "native_dense_attention", lambda *qkv: seen.append(qkv[0].shape))
    x = torch.randn(1, 1, NATIVE_TOKENS, 8)
    dense_attention(x, x, x)
    dense_attention(*[x[:, :, 1:]] * 3)
    dense_attention(*[x.double()] * 3)
    dense_attention(x, x, x.requires_grad_()).sum().backward()
    assert seen == [(1, 1, NATIVE_TOKENS, 8)]
    assert x.grad is not None


@st.composite
def layouts(draw: st.DrawFn, min_special: int = 1) -> tuple[TokenLayout, int, int]:
    layout = TokenLayout(
        num_views=draw(st.integers(1, 5)),
        grid_h=draw(st.integers(1, 6)),
        grid_w=draw(st.integers(1, 6)),
        num_special=draw(st.integers(min_special, 5)),
    )
    return layout, draw(st.integers(1, 40)), draw(st.integers(1, 40))


@given(layouts(), st.integers(0, 999))
def test_special_tokens_see_all_and_are_seen_by_all(problem, seed) -> None:
    layout, size_q, size_kv = problem
    mask = random_mask(layout, size_q, size_kv, batch=1, heads=3, seed=seed)
    visible = token_mask(mask, layout, size_q, size_kv)
    assert visible[:, :, layout.is_special].all()
    assert visible[:, :, :, layout.is_special].all()
    assert visible.any(-1).all()


@given(layouts(), st.integers(0, 999))
def test_backends_agree_in_every_layout(problem, seed) -> None:
    layout, size_q, size_kv = problem
    q, k, v, *rest = make_case(layout, size_q, size_kv, batch=1, heads=3, seed=seed)
    expected = reference_attention(q, k, v, *rest)
    for backend in ("masked", "gather"):
        out = block_sparse_attention(q, k, v, *rest, backend=backend)
        torch.testing.assert_close(out, expected)
    single = (x.float() for x in (q, k, v))
    out = block_sparse_attention(*single, *rest, backend="native")
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)


@given(layouts(min_special=0), st.integers(0, 999))
def test_work_saving_counts_the_tiles_that_hold_no_visible_pair(problem, seed) -> None:
    layout, size_q, size_kv = problem
    mask = random_mask(layout, size_q, size_kv, batch=2, heads=3, seed=seed)
    visible = token_mask(mask, layout, size_q, size_kv)

    def groups(block_size: int) -> list[torch.Tensor]:
        return [*layout.patch_index.split(block_size), *layout.special_index.split(block_size)]

    tiles = [
        visible[:, :, rows][..., columns].flatten(2).any(-1)
        for rows in groups(size_q)
        for columns in groups(size_kv)
        if len(rows) > 0 and len(columns) > 0
    ]
    dropped = (~torch.stack(tiles)).double().mean(0)
    torch.testing.assert_close(work_saving(mask, layout, size_q, size_kv), dropped)


@given(layouts(min_special=0), st.integers(0, 999))
def test_sparsity_counts_what_the_token_mask_drops(problem, seed) -> None:
    layout, size_q, size_kv = problem
    mask = random_mask(layout, size_q, size_kv, batch=2, heads=3, seed=seed)
    visible = token_mask(mask, layout, size_q, size_kv)
    dropped_pairs = (~visible).double().mean((-1, -2))
    torch.testing.assert_close(flop_saving(mask, layout, size_q, size_kv), dropped_pairs)

    special_blocks = num_blocks(layout.num_special_tokens, size_kv)
    special_part = torch.ones(*mask.shape[:3], special_blocks, dtype=torch.bool)
    whole_map = torch.cat([mask.to_dense(), special_part], dim=-1)
    dropped_blocks = (~whole_map).double().mean((-1, -2))
    torch.testing.assert_close(block_sparsity(mask, layout, size_kv), dropped_blocks)


def test_auto_goes_by_the_number_of_tokens() -> None:
    def layout(tokens: int) -> TokenLayout:
        return TokenLayout(num_views=1, grid_h=1, grid_w=tokens - 1, num_special=1)

    q = k = v = torch.zeros(1, 1, 1, 8)
    assert resolve_backend("auto", layout(10), q, k, v) == "native"
    q = k = v = q.double()
    assert resolve_backend("auto", layout(GATHER_TOKENS), q, k, v) == "gather"
    assert resolve_backend("auto", layout(GATHER_TOKENS - 1), q, k, v) == "masked"
    assert resolve_backend("reference", layout(GATHER_TOKENS), q, k, v) == "reference"
    with pytest.raises(ConfigError, match="backend must be one of"):
        resolve_backend("flash", layout(10), q, k, v)


def test_auto_runs_what_it_resolves_to() -> None:
    small = make_case(LAYOUTS["odd grid"], 7, 5)
    auto = block_sparse_attention(*small)
    assert torch.equal(auto, block_sparse_attention(*small, backend="masked"))
    single = make_case(LAYOUTS["odd grid"], 7, 5, dtype=torch.float32)
    auto = block_sparse_attention(*single)
    assert torch.equal(auto, block_sparse_attention(*single, backend="native"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("triton", "needs tensors on a CUDA device"),
        ("cudnn", "pip install nvidia-cudnn-frontend"),
        ("sparge", "pip install --no-build-isolation"),
    ],
)
def test_a_backend_that_cannot_run_says_so_before_and_when_asked_to(name, reason) -> None:
    with pytest.raises(BackendUnavailableError, match=reason):
        check_backend(name, torch.zeros(1, 1, 0, 64))
    with pytest.raises(BackendUnavailableError, match=reason):
        block_sparse_attention(*make_case(LAYOUTS["one view"], 6, 6), backend=name)


def test_comparators_are_never_chosen() -> None:
    assert not {"cudnn", "sparge"} & {name for names in AUTO.values() for name in names}


def test_backends_share_one_signature() -> None:
    names = {tuple(inspect.signature(run.attend).parameters) for run in BACKENDS.values()}
    assert names == {("q", "k", "v", "mask", "layout", "block_size_q", "block_size_kv")}


def test_mismatched_shapes_are_refused() -> None:
    q, k, v, mask, layout, size_q, size_kv = make_case(LAYOUTS["one view"], 6, 6)
    with pytest.raises(LayoutError, match="share one shape"):
        block_sparse_attention(q, k[:, :2], v, mask, layout, size_q, size_kv)
    short = [x[:, :, :-1] for x in (q, k, v)]
    with pytest.raises(LayoutError, match="expected 36 tokens"):
        block_sparse_attention(*short, mask, layout, size_q, size_kv)
    with pytest.raises(LayoutError, match="need a mask of shape"):
        block_sparse_attention(q, k, v, mask, layout, 5, size_kv)
    with pytest.raises(LayoutError, match="need a mask of shape"):
        block_sparse_attention(q[:1], k[:1], v[:1], mask, layout, size_q, size_kv)


def test_a_query_without_any_key_is_an_error_not_nan() -> None:
    layout = TokenLayout(num_views=2, grid_h=3, grid_w=4, num_special=0)
    q, k, v, _, *rest = make_case(layout, 6, 6, batch=1, heads=1)
    dense = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    block_sparse_attention(q, k, v, BlockMask.from_dense(dense), *rest)
    dense[0, 0, 2] = False
    with pytest.raises(LayoutError, match="min_row_blocks=1"):
        block_sparse_attention(q, k, v, BlockMask.from_dense(dense), *rest)
