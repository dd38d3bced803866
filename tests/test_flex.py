"""The FlexAttention backend: compiled on this machine, or a clear reason why not."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hess.attention import flex
from hess.attention.block_mask import BlockMask
from hess.attention.block_sparse import block_sparse_attention
from hess.attention.layout import TokenLayout
from hess.attention.pooling import num_blocks
from hess.errors import BackendUnavailableError
from test_attention import Case, attend_by_lists, relative_error


def attend(case: Case) -> Tensor | None:
    """The backend's output; where it cannot run, None, after a look at the error."""
    if flex.why_unavailable(*case[:3]) is None:
        return block_sparse_attention(*case, backend="flex")
    with pytest.raises(BackendUnavailableError, match=r"needs a C\+\+ compiler|AVX2"):
        block_sparse_attention(*case, backend="flex")
    return None


def make_case(layout: TokenLayout, size_q: int, size_kv: int, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, layout.num_tokens, 16, generator=generator).to(dtype)
    patches = layout.num_patch_tokens
    size = 2, 3, num_blocks(patches, size_q), num_blocks(patches, size_kv)
    selected = torch.rand(size, generator=generator) < torch.tensor([0.2, 0.6, 1])[:, None, None]
    selected[..., 0] |= layout.num_special == 0
    return q, k, v, BlockMask.from_dense(selected), layout, size_q, size_kv


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("layout", "size_q", "size_kv"),
    [
        (TokenLayout(num_views=3, grid_h=9, grid_w=7, num_special=5), 32, 16),
        (TokenLayout(num_views=1, grid_h=10, grid_w=16, num_special=1), 128, 64),
        (TokenLayout(num_views=2, grid_h=8, grid_w=8, num_special=0), 64, 64),
    ],
)
def test_equals_attention_over_the_lists(layout, size_q, size_kv) -> None:
    """Odd tails, special blocks, whole blocks only, with nothing to mask."""
    case = make_case(layout, size_q, size_kv, torch.float32)
    out = attend(case)
    assert out is None or relative_error(out, attend_by_lists(case)) <= 1e-6


@pytest.mark.slow
@torch.inference_mode()
def test_golden_outputs(golden: Path) -> None:
    data = load_file(golden / "sparsevggt_selection.safetensors")
    layout = TokenLayout(num_views=5, grid_h=13, grid_w=14, num_special=5)
    q, k, v = (data[name] for name in ("q", "k", "v"))
    for setting in range(5):
        mask = BlockMask.from_dense(data[f"mask.{setting}"])
        expected = data[f"out.{setting}"]
        out = attend((q, k, v, mask, layout, 128, 64))
        assert out is None or (out - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
@torch.no_grad()
def test_more_layouts_than_torch_recompiles_for() -> None:
    """Beyond eight, torch would compute the whole map, or with "fullgraph" raise."""
    for views in range(1, 10):
        layout = TokenLayout(num_views=views, grid_h=2, grid_w=3, num_special=1)
        case = make_case(layout, 16, 16, torch.float32)
        out = attend(case)
        assert out is None or relative_error(out, attend_by_lists(case)) <= 1e-6


def test_says_why_it_cannot_run(monkeypatch) -> None:
    layout = TokenLayout(num_views=2, grid_h=3, grid_w=3, num_special=1)
    q, k, v, *rest = make_case(layout, 16, 16, torch.float32)
    with pytest.raises(BackendUnavailableError, match="one type in"):
        block_sparse_attention(q.double(), k.double(), v.double(), *rest, backend="flex")
    with pytest.raises(BackendUnavailableError, match="at least 16, found 8"):
        block_sparse_attention(q[..., :8], k[..., :8], v[..., :8], *rest, backend="flex")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BackendUnavailableError, match="needs a C\\+\\+ compiler"):
        block_sparse_attention(q, k, v, *rest, backend="flex")
