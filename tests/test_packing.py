"""Packed order: patches first, every block in one run of memory, means of the blocks beside it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hess.attention.layout import TokenLayout
from hess.attention.packing import PackedKeys, pack_keys, pack_tokens, pool_queries
from hess.attention.pooling import block_probs, num_blocks
from hess.errors import ConfigError, LayoutError

LAYOUT = TokenLayout(num_views=3, grid_h=3, grid_w=5, num_special=2)


def numbered(layout: TokenLayout) -> torch.Tensor:
    """Tokens [1, 1, S, 1] that carry their position in token order."""
    return torch.arange(layout.num_tokens, dtype=torch.float64).view(1, 1, -1, 1)


def test_packed_order_by_hand() -> None:
    layout = TokenLayout(num_views=2, grid_h=1, grid_w=3, num_special=2)
    packed = pack_tokens(numbered(layout), layout).flatten()
    assert packed.tolist() == [2, 3, 4, 7, 8, 9, 0, 1, 5, 6]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_packed_order_is_patches_then_special_tokens(views, grid_h, grid_w, special) -> None:
    layout = TokenLayout(num_views=views, grid_h=grid_h, grid_w=grid_w, num_special=special)
    packed = pack_tokens(numbered(layout), layout)
    expected = torch.cat([layout.patch_index, layout.special_index]).double()
    assert torch.equal(packed.flatten(), expected)
    assert packed.is_contiguous()


@pytest.mark.parametrize("block_size", [1, 7, 16, 45, 500])
def test_block_means_are_those_of_the_selection(block_size) -> None:
    q, k, v = torch.randn(3, 2, 4, LAYOUT.num_tokens, 8)
    keys = pack_keys(k, v, LAYOUT, block_size)
    q_mean = pool_queries(q, LAYOUT, 6)
    assert keys.k_mean.shape == (2, 4, num_blocks(45, block_size), 8)
    probs = (q_mean @ keys.k_mean.mT * 8**-0.5).softmax(-1)
    assert torch.equal(probs, block_probs(q, k, LAYOUT, 6, block_size))
    assert torch.equal(keys.v, pack_tokens(v, LAYOUT))


def test_means_of_half_precision_are_single() -> None:
    half = torch.randn(1, 1, LAYOUT.num_tokens, 8).half()
    assert pack_keys(half, half, LAYOUT, 16).k_mean.dtype == torch.float32
    assert pool_queries(half.double(), LAYOUT, 16).dtype == torch.float64


def test_wrong_shapes_are_refused() -> None:
    k = torch.randn(1, 2, LAYOUT.num_tokens, 8)
    with pytest.raises(LayoutError, match="expected 51 tokens"):
        pack_tokens(k[:, :, 1:], LAYOUT)
    with pytest.raises(ConfigError, match="at least 1 token"):
        pack_keys(k, k, LAYOUT, 0)
    with pytest.raises(LayoutError, match="contiguous"):
        PackedKeys(k=k.mT, v=k.mT, k_mean=k)
    with pytest.raises(LayoutError, match="share one shape"):
        PackedKeys(k=k, v=k[:, :1].contiguous(), k_mean=k)
    with pytest.raises(LayoutError, match="block means"):
        PackedKeys(k=k, v=k, k_mean=k[:, :1])
