"""The adapters to kernels of others, against stand-ins that do what their documentation says."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hess.attention import comparators
from hess.attention.layout import TokenLayout
from hess.attention.reference import reference_attention
from hess.errors import ConfigError
from test_attention import Case, make_large_case, relative_error


def cudnn_stand_in(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    q2k_block_nums: Tensor,
    block_sizes: Tensor,
    sparse_block_size: int,
) -> dict[str, Tensor]:
    """Lists [B, heads, q_blocks, cap] of blocks of 64, ``block_sizes`` keys of each being real."""
    assert sparse_block_size == 64
    assert q.shape[2] % 64 == 0
    assert index.dtype == q2k_block_nums.dtype == block_sizes.dtype == torch.int32
    assert index.shape[:3] == q2k_block_nums.shape == (*q.shape[:2], q.shape[2] // 64)
    assert len(block_sizes) == k.shape[2] // 64
    in_list = torch.arange(index.shape[-1]) < q2k_block_nums[..., None]
    sees = torch.zeros(*index.shape[:3], len(block_sizes), dtype=torch.bool)
    sees = sees.scatter(-1, index.long(), in_list)
    is_key = (torch.arange(64) < block_sizes[:, None]).flatten()
    visible = sees.repeat_interleave(64, 2).repeat_interleave(64, 3) & is_key
    return {"o_tensor": F.scaled_dot_product_attention(q, k, v, attn_mask=visible)}


def sparge_stand_in(q: Tensor, k: Tensor, v: Tensor, *, mask_id: Tensor) -> Tensor:
    """A bool map [B, heads, q_blocks, kv_blocks] of blocks of 128 x 64."""
    visible = mask_id.repeat_interleave(128, 2).repeat_interleave(64, 3)
    assert -(-q.shape[2] // 128) == mask_id.shape[2]
    assert -(-k.shape[2] // 64) == mask_id.shape[3]
    visible = visible[:, :, : q.shape[2], : k.shape[2]]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch) -> None:
    bsa = SimpleNamespace(block_sparse_attention_forward=cudnn_stand_in)
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(BSA=bsa))
    sparge = SimpleNamespace(block_sparse_sage2_attn_cuda=sparge_stand_in)
    monkeypatch.setitem(sys.modules, "spas_sage_attn", sparge)
    for reason in ("why_no_cudnn", "why_no_sparge"):
        monkeypatch.setattr(comparators, reason, lambda q, k, v: None)


LAYOUTS = {
    "odd tails": TokenLayout(num_views=3, grid_h=15, grid_w=17, num_special=5),
    "whole blocks": TokenLayout(num_views=2, grid_h=16, grid_w=16, num_special=32),
    "no specials": TokenLayout(num_views=3, grid_h=15, grid_w=17, num_special=0),
    "half a query block": TokenLayout(num_views=1, grid_h=10, grid_w=15, num_special=1),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_cudnn_gets_the_lists_of_the_mask(layout) -> None:
    case = make_large_case(layout, batch=2)
    out = comparators.cudnn_attention(*case)
    assert relative_error(out, reference_attention(*case).double()) <= 1e-6


def with_the_mixed_block(case: Case) -> Case:
    """Selected everywhere: the key block in which the patches end; full: the row where they do."""
    q, k, v, mask, layout, *sizes = case
    dense = mask.to_dense()
    dense[..., layout.num_patch_tokens // 64 :] = True
    dense[:, :, layout.num_patch_tokens // 128 :] = True
    return q, k, v, type(mask).from_dense(dense), layout, *sizes


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_sparge_gets_the_map_and_the_mixed_block(layout) -> None:
    case = make_large_case(layout, batch=2)
    out = comparators.sparge_attention(*case)
    expected = reference_attention(*with_the_mixed_block(case))
    assert relative_error(out, expected.double()) <= 1e-6


def test_blocks_that_do_not_fit_are_refused() -> None:
    *qkv_mask_layout, _, _ = make_large_case()
    with pytest.raises(ConfigError, match="key blocks of 64, found 128 x 32"):
        comparators.cudnn_attention(*qkv_mask_layout, 128, 32)
    with pytest.raises(ConfigError, match=r"\(128, 64\), found \(64, 64\)"):
        comparators.sparge_attention(*qkv_mask_layout, 64, 64)
