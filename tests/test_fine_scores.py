"""Blocks pooled in parts: against sums written out, and exact where a part is one token."""

import pytest
import torch
from torch import Tensor

from hess.attention.fine_scores import FineScores, parts_of, pool_fine_scores
from hess.attention.layout import TokenLayout
from hess.attention.pooled_scores import pool_scores
from hess.errors import ConfigError
from hess.models.loading import load_model
from hess.policies import HessPlus, Uniform
from hess.sparsification import sparsify
from stand_ins import FixedScores

LAYOUTS = {
    "whole blocks": TokenLayout(num_views=4, grid_h=3, grid_w=4, num_special=2),
    "half a last block": TokenLayout(num_views=3, grid_h=5, grid_w=3, num_special=1),
    "odd last part": TokenLayout(num_views=1, grid_h=7, grid_w=5, num_special=3),
    "less than a part": TokenLayout(num_views=1, grid_h=1, grid_w=1, num_special=0),
}


def tokens(layout: TokenLayout, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, layout.num_tokens, dim, generator=generator).double()
    return 2 * q, 2 * k, v


def probabilities(scores: FineScores) -> Tensor:
    return torch.cat([logits.exp() for _, logits in scores.chunks(10**6)]).view(scores.shape)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_parts_of_one_token_give_the_exact_share_of_a_block(layout) -> None:
    q, k, v = tokens(layout)
    patches = layout.patch_index
    attention = (q[:, :, patches] @ k[:, :, patches].mT / 8**0.5).softmax(-1)
    rows = attention.split(6, dim=-2)
    expected = [[part.sum(-1).mean(-1) for part in row.split(6, dim=-1)] for row in rows]
    expected = torch.stack([torch.stack(row, dim=-1) for row in expected], dim=-2)
    found = probabilities(pool_fine_scores(q, k, v, layout, 6, 6, split=6))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("split", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_probabilities_are_sums_over_parts(layout, split) -> None:
    q, k, v = tokens(layout)
    patches, size = layout.patch_index, 6 // split
    q_parts = q[:, :, patches].split(size, dim=-2)
    k_parts = k[:, :, patches].split(size, dim=-2)
    rows = []
    for first in range(0, len(q_parts), split):
        row = 0
        parts = q_parts[first : first + split]
        for part in parts:
            logits = [(part.mean(-2) * x.mean(-2)).sum(-1) / 8**0.5 for x in k_parts]
            weights = torch.stack(
                [x.exp() * y.shape[-2] for x, y in zip(logits, k_parts, strict=True)], dim=-1
            )
            row = row + part.shape[-2] * weights / weights.sum(-1, keepdim=True)
        rows.append(row / sum(part.shape[-2] for part in parts))
    fine = torch.stack(rows, dim=-2)
    expected = torch.stack([x.sum(-1) for x in fine.split(split, dim=-1)], dim=-1)
    found = probabilities(pool_fine_scores(q, k, v, layout, 6, 6, split=split))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_chunks_rows_and_samples_agree() -> None:
    layout = LAYOUTS["half a last block"]
    scores = pool_fine_scores(*tokens(layout), layout, 6, 6, split=2)
    whole = torch.cat([x for _, x in scores.chunks(10**6)]).view(scores.shape)
    for entries in (1, 100, 300):
        chunks = torch.cat([x for _, x in scores.chunks(entries)]).view(scores.shape)
        torch.testing.assert_close(chunks, whole)
        rows = torch.cat([x for _, x in scores.row_chunks(entries)], dim=2)
        torch.testing.assert_close(rows, whole)
    torch.testing.assert_close(scores.sampled_rows(100, 300), whole)
    torch.testing.assert_close(scores.sampled_rows(1, 300), whole[:, :, 4:5])


def test_a_single_part_is_the_pooled_map_and_the_coarse_one_stays() -> None:
    layout = LAYOUTS["whole blocks"]
    q, k, v = tokens(layout)
    plain = pool_scores(q, k, layout, 6, 6)
    expected = torch.cat([x.softmax(-1) for _, x in plain.chunks(10**6)]).view(plain.shape)
    torch.testing.assert_close(
        probabilities(pool_fine_scores(q, k, v, layout, 6, 6, split=1)), expected
    )
    coarse = pool_fine_scores(q, k, v, layout, 6, 6, split=3).coarse
    assert torch.equal(coarse.q_mean, plain.q_mean)


def test_parts_are_equal() -> None:
    assert [parts_of(6, 6, most) for most in (1, 2, 3, 4, 5, 6)] == [1, 2, 3, 3, 3, 6]
    assert parts_of(128, 64, 4) == 4
    assert parts_of(5, 6, 4) == 1
    layout = LAYOUTS["whole blocks"]
    for wrong in (0, 4):
        with pytest.raises(ConfigError, match="take a divisor of both"):
            pool_fine_scores(*tokens(layout), layout, 6, 6, split=wrong)
    with pytest.raises(ConfigError, match="at least 1 token"):
        parts_of(0, 6, 4)


def test_blocks_that_cannot_be_split_are_named(caplog) -> None:
    model, plus = load_model("nano"), HessPlus(FixedScores(torch.rand(6, 8)), sparse_ratio=0.8)
    for size, policy, warned in (
        (5, plus, True),
        (6, plus, False),
        (5, Uniform(sparse_ratio=0.8), False),
    ):
        caplog.clear()
        sparsify(model, policy, block_size_q=size, block_size_kv=size).restore()
        assert ("blocks of 5 and 5 tokens cannot be split" in caplog.text) == warned


def test_hess_plus_drops_what_uniform_drops_on_a_model() -> None:
    model = load_model("nano")
    images = torch.rand(1, 5, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    dropped = []
    for policy in (
        Uniform(sparse_ratio=0.8),
        HessPlus(FixedScores(torch.rand(6, 8)), sparse_ratio=0.8),
    ):
        with sparsify(model, policy) as run, torch.inference_mode():
            model(images)
        dropped.append(run.stats.block_sparsity)
    assert dropped[0] == pytest.approx(dropped[1], abs=1e-12)
