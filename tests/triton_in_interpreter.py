"""The Triton kernels on a CPU. Run by ``test_triton``, in a process with TRITON_INTERPRET=1:
Triton reads that variable when it is imported, so no other test may share the process.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from hess.attention import packing, triton_backend
from hess.attention.block_mask import BlockMask
from hess.attention.block_sparse import block_sparse_attention
from hess.attention.layout import TokenLayout
from hess.attention.pooling import num_blocks
from hess.attention.triton_backend import LaunchConfig, attend_lists
from hess.attention.triton_packing import pack_keys, pool_queries
from hess.errors import BackendUnavailableError

Case = tuple[Tensor, Tensor, Tensor, BlockMask, TokenLayout, int, int]

SMALL = TokenLayout(num_views=3, grid_h=7, grid_w=9, num_special=5)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4}


def make_case(
    layout: TokenLayout = SMALL,
    size_q: int = 128,
    size_kv: int = 64,
    *,
    dtype: torch.dtype = torch.float32,
    dim: int = 32,
    batch: int = 1,
    density: tuple[float, ...] = (0.6, 0.0, 1.0),
    device: str = "cpu",
) -> Case:
    """Heads of the given shares of random blocks; q, k, v as a model makes them, strided."""
    torch.manual_seed(0)
    qkv = torch.randn(batch, layout.num_tokens, 3, len(density), dim, device=device)
    q, k, v = qkv.to(dtype).permute(2, 0, 3, 1, 4)
    patches = layout.num_patch_tokens
    blocks = num_blocks(patches, size_q), num_blocks(patches, size_kv)
    noise = torch.rand(batch, len(density), *blocks, device=device)
    chosen = noise < torch.tensor(density, device=device)[:, None, None]
    return 2 * q, k, v, BlockMask.from_dense(chosen), layout, size_q, size_kv


def attend_by_lists(case: Case) -> tuple[Tensor, Tensor]:
    """Oracle: row by row in fp64, with the keys that its list names. Output and log-sum-exp."""
    *qkv, mask, layout, size_q, size_kv = case
    q, k, v = (x.double() for x in qkv)
    patches = layout.patch_index.to(q.device)
    special = layout.special_index.to(q.device)
    ends = mask.row_offsets.tolist()
    out, lse = torch.full_like(v, torch.nan), torch.full_like(v[..., 0], torch.nan)

    def attend(b: int, h: int, queries: Tensor, keys: Tensor) -> None:
        scores = q[b, h, queries] @ k[b, h, keys].T / q.shape[-1] ** 0.5
        out[b, h, queries] = scores.softmax(-1) @ v[b, h, keys]
        lse[b, h, queries] = scores.logsumexp(-1)

    for b in range(mask.batch):
        for h in range(mask.num_heads):
            attend(b, h, special, torch.cat([patches, special]))
            for i in range(mask.num_q_blocks):
                row = (b * mask.num_heads + h) * mask.num_q_blocks + i
                blocks = mask.indices[ends[row] : ends[row + 1]].tolist()
                parts = [patches[j * size_kv : (j + 1) * size_kv] for j in blocks]
                queries = patches[i * size_q : (i + 1) * size_q]
                attend(b, h, queries, torch.cat([*parts, special]))
    return out, lse


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def attend(case: Case, **options) -> tuple[Tensor, Tensor]:
    q, k, v, mask, layout, size_q, size_kv = case
    keys = pack_keys(k, v, layout, size_kv)
    return attend_lists(q, keys, mask, layout, size_q, size_kv, **options)


@pytest.mark.parametrize("dim", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attends_over_the_lists(dim, dtype) -> None:
    case = make_case(dtype=dtype, dim=dim, density=(0.6, 0.0, 1.0))
    expected, expected_lse = attend_by_lists(case)
    out, lse = attend(case)
    assert out.dtype == dtype
    assert relative_error(out, expected) <= TOLERANCE[dtype]
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-4)


ODD_CASES = {
    "one view": (TokenLayout(num_views=1, grid_h=6, grid_w=7, num_special=5), 128, 64),
    "no special tokens": (TokenLayout(num_views=2, grid_h=9, grid_w=9, num_special=0), 64, 64),
    "more special than patches": (
        TokenLayout(num_views=9, grid_h=1, grid_w=3, num_special=5),
        16,
        16,
    ),
    "many special queries": (TokenLayout(num_views=9, grid_h=2, grid_w=2, num_special=16), 16, 32),
    "blocks of one patch": (TokenLayout(num_views=2, grid_h=2, grid_w=4, num_special=1), 1, 1),
    "nano": (TokenLayout(num_views=2, grid_h=4, grid_w=6, num_special=3), 6, 6),
    "not powers of two": (SMALL, 48, 80),
    "queries wider than a tile": (SMALL, 160, 16),
    "one block of all": (SMALL, 500, 500),
}


@pytest.mark.parametrize("name", ODD_CASES)
@pytest.mark.parametrize("tile_kv", [32, 64])
def test_any_layout_and_block_size(name, tile_kv) -> None:
    case = make_case(*ODD_CASES[name], density=(0.5,))
    *qkv, mask, layout, size_q, size_kv = case
    if layout.num_special == 0:
        dense = mask.to_dense()
        dense[..., 0] = True
        case = (*qkv, BlockMask.from_dense(dense), layout, size_q, size_kv)
    out, _ = attend(case, config=LaunchConfig(tile_kv, 4, 2))
    assert relative_error(out, attend_by_lists(case)[0]) <= 1e-6


@pytest.mark.parametrize("tile_kv", [16, 32, 64, 128])
def test_the_cut_does_not_matter(tile_kv) -> None:
    """Tiles of part of a block, of one block, of two; lists of odd and even length."""
    case = make_case(density=(0.8, 0.3))
    out, _ = attend(case, config=LaunchConfig(tile_kv, 4, 2))
    assert relative_error(out, attend_by_lists(case)[0]) <= 1e-6


def test_batch_and_unequal_heads() -> None:
    case = make_case(batch=2, density=(0.1, 1.0, 0.5, 0.0))
    out, _ = attend(case)
    assert relative_error(out, attend_by_lists(case)[0]) <= 1e-6
    assert relative_error(block_sparse_attention(*case, backend="triton"), out.double()) <= 1e-6


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_full_lists_are_dense_attention_and_empty_ones_see_special_tokens(density) -> None:
    case = make_case(density=(density, density))
    q, k, v, *_ = case
    expected = F.scaled_dot_product_attention(q, k, v)
    if density == 0:
        special, patches = SMALL.special_index, SMALL.patch_index
        few = F.scaled_dot_product_attention(q[:, :, patches], k[:, :, special], v[:, :, special])
        expected[:, :, patches] = few
    torch.testing.assert_close(attend(case)[0], expected)
    torch.testing.assert_close(block_sparse_attention(*case, backend="triton"), expected)


def test_full_heads_go_to_the_dense_kernel_and_no_others(monkeypatch) -> None:
    case = make_case(batch=2, density=(0.5, 1.0, 0.0))
    seen = []

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(q)
        return torch.full_like(q, 7)

    monkeypatch.setattr(triton_backend, "dense_attention", dense)
    out = block_sparse_attention(*case, backend="triton")
    assert torch.equal(seen[0][0], case[0][:, 1])
    assert (out[:, 1] == 7).all()
    listed = out[:, [0, 2]], attend_by_lists(case)[0][:, [0, 2]]
    assert relative_error(*listed) <= 1e-6


def test_every_output_is_written_and_only_of_the_heads_asked_for() -> None:
    case = make_case(batch=2, density=(0.5, 0.9))
    poisoned = torch.full_like(case[0], torch.nan)
    out, _ = attend(case, out=poisoned, heads=torch.tensor([3, 0]))
    expected = attend_by_lists(case)[0]
    asked = out[[0, 1], [0, 1]], expected[[0, 1], [0, 1]]
    assert relative_error(*asked) <= 1e-6
    assert out[[0, 1], [1, 0]].isnan().all()


def test_a_row_writes_only_its_own_queries() -> None:
    """Tiles of 64 over blocks of 48; on a GPU the intruder may be the last to write."""
    q, k, v, mask, layout, size_q, size_kv = make_case(SMALL, 48, 80, density=(0.5,))
    first_row = BlockMask.from_dense(mask.to_dense()[:, :, :1])
    poisoned = torch.full_like(q, torch.nan)
    case = (q, k, v, first_row, layout, size_q, size_kv)
    out, _ = attend(case, out=poisoned)
    written = ~out[0, 0].isnan().any(-1)
    expected = torch.cat([layout.patch_index[:48], layout.special_index])
    assert written.nonzero().flatten().tolist() == expected.sort().values.tolist()


def test_nothing_but_the_listed_keys_is_read() -> None:
    """NaN in blocks that are not listed, in other heads, before and after the tensors."""
    q, k, v, mask, layout, size_q, size_kv = make_case(size_kv=16, density=(0.6, 0.6))
    dense = mask.to_dense()
    dense[..., 2] = False
    hidden = layout.patch_index[2 * 16 : 3 * 16]
    for x in (k, v):
        x[:, 0, hidden] = torch.nan
        x[:, 1] = torch.nan
    packed = packing.pack_keys(k, v, layout, size_kv)
    spaced = []
    for x in (packed.k, packed.v):
        room = torch.full((x.numel() + 8192,), torch.nan)
        spaced.append(room[4096:-4096].view_as(x).copy_(x))
    keys = packing.PackedKeys(k=spaced[0], v=spaced[1], k_mean=packed.k_mean)
    listed = BlockMask.from_dense(dense)
    out, lse = attend_lists(q, keys, listed, layout, size_q, size_kv)
    assert torch.isfinite(out[:, 0, layout.patch_index]).all()
    assert torch.isfinite(lse[:, 0, layout.patch_index]).all()
    assert torch.isnan(out[:, 0, layout.special_index]).all()


def test_split_lists_merge_to_the_whole() -> None:
    layout = TokenLayout(num_views=2, grid_h=9, grid_w=9, num_special=0)
    *qkv, mask, _, size_q, size_kv = make_case(layout, 64, 16, density=(0.7, 1.0))
    whole = mask.to_dense()
    whole[..., :2] = True
    even = torch.arange(whole.shape[-1]) % 2 == 0

    def part(chosen: Tensor) -> tuple[Tensor, Tensor]:
        return attend((*qkv, BlockMask.from_dense(chosen), layout, size_q, size_kv))

    expected, expected_lse = part(whole)
    outs, lses = zip(part(whole & even), part(whole & ~even), strict=True)
    share = torch.stack(lses).softmax(0)[..., None]
    torch.testing.assert_close((torch.stack(outs) * share).sum(0), expected)
    torch.testing.assert_close(torch.stack(lses).logsumexp(0), expected_lse)


@pytest.mark.parametrize("setting", range(5))
def test_golden_outputs(setting) -> None:
    folder = Path(__file__).parent / "golden"
    data = load_file(folder / "sparsevggt_selection.safetensors")
    layout = TokenLayout(num_views=5, grid_h=13, grid_w=14, num_special=5)
    mask = BlockMask.from_dense(data[f"mask.{setting}"])
    expected = data[f"out.{setting}"].double()
    qkv = (data[name] for name in ("q", "k", "v"))
    out = block_sparse_attention(*qkv, mask, layout, 128, 64, backend="triton")
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("block_size", [6, 48, 64, 128, 200])
@pytest.mark.parametrize(("special", "dtype"), [(5, torch.float32), (0, torch.float16)])
def test_packing_equals_its_plain_twin(block_size, special, dtype) -> None:
    layout = TokenLayout(num_views=3, grid_h=5, grid_w=11, num_special=special)
    q, k, v, *_ = make_case(layout, dtype=dtype, batch=2, density=(0.5, 0.5))
    found = pack_keys(k, v, layout, block_size)
    expected = packing.pack_keys(k, v, layout, block_size)
    assert torch.equal(found.k, expected.k)
    assert torch.equal(found.v, expected.v)
    torch.testing.assert_close(found.k_mean, expected.k_mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        pool_queries(q, layout, block_size),
        packing.pool_queries(q, layout, block_size),
        rtol=0,
        atol=1e-6,
    )


def test_rows_may_be_strided() -> None:
    case = make_case(density=(0.5,))
    strided = (x.mT.contiguous().mT for x in case[:3])
    assert torch.equal(attend((*strided, *case[3:]))[0], attend(case)[0])


@pytest.mark.parametrize(
    ("dtype", "dim", "reason"),
    [
        (torch.bfloat16, 32, "interpreter computes products in bfloat16 wrongly"),
        (torch.float64, 32, "q, k, v of one type"),
        (torch.float32, 8, "head dimension"),
    ],
)
def test_what_it_cannot_run_it_refuses(dtype, dim, reason) -> None:
    case = make_case(dtype=dtype, dim=dim, density=(0.5,))
    with pytest.raises(BackendUnavailableError, match=reason):
        block_sparse_attention(*case, backend="triton")


def test_it_refuses_to_lose_gradients() -> None:
    q, k, v, *rest = make_case(density=(0.5,))
    with pytest.raises(BackendUnavailableError, match="no backward pass"):
        block_sparse_attention(q, k.requires_grad_(), v, *rest, backend="triton")
    with torch.no_grad():
        block_sparse_attention(q, k, v, *rest, backend="triton")
