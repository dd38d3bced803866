"""Gains of blocks and joint ranking against brute force, and the policies that go by them."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hess.attention import gains
from hess.attention.gains import gain_counts, joint_counts, ranked_gains
from hess.attention.pooled_scores import PooledScores
from hess.errors import ConfigError
from hess.policies import HeSS, HessPlus, JointRanking, LayerBudgets, Uniform
from selection_oracle import scores_of
from stand_ins import FixedScores
from test_policies import HEADS, LAYERS, PROFILE, SCORES, head_budgets, random_logits

seeds = st.integers(0, 10**6)


def harm(logits: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """sum of weight * m^2 of one layer [heads, rows, blocks], from its definition."""
    probs = logits.double().softmax(-1).sort(dim=-1, descending=True).values
    kept = torch.arange(logits.shape[-1]) < counts[..., None]
    missed = 1 - (probs * kept).sum(-1)
    return (weights[:, None] * missed.square()).sum()


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 11))
def test_the_best_blocks_by_gain_leave_the_least_harm(seed, total) -> None:
    """Against all ways to divide a budget among two heads of two rows."""
    logits = random_logits(seed, heads=2, rows=2, blocks=3)[:1].double()
    weights = torch.rand(1, 2, generator=torch.Generator().manual_seed(seed)).double() + 0.01
    counts = gain_counts(scores_of(logits), weights, torch.tensor([total]))
    assert counts.sum() == total
    ways = [w for w in itertools.product(range(4), repeat=4) if sum(w) == total]
    best = min(harm(logits[0], weights[0], torch.tensor(w).view(2, 2)) for w in ways)
    assert harm(logits[0], weights[0], counts[0]) <= best + 1e-12


@given(seeds)
def test_gains_fall_within_a_row_and_add_up_to_all_harm(seed) -> None:
    logits = random_logits(seed).double()
    weights = torch.rand(2, HEADS, generator=torch.Generator().manual_seed(seed)).double()
    found = ranked_gains(logits, weights)
    assert (found.diff(dim=-1) <= 1e-15).all()
    torch.testing.assert_close(found.sum(-1), weights[..., None].expand(found.shape[:3]))


def test_a_layer_too_large_to_sort_is_sampled(monkeypatch) -> None:
    pooled = scores_of(random_logits(0, rows=500, blocks=40))
    weights, total = torch.rand(2, HEADS).double() + 0.1, torch.tensor([20_000, 30_000])
    exact = gain_counts(pooled, weights, total)
    assert exact.sum((1, 2)).tolist() == total.tolist()
    monkeypatch.setattr(gains, "SAMPLED_ENTRIES", 2 * HEADS * 40 * 100)
    sampled = gain_counts(pooled, weights, total)
    assert ((sampled.sum((1, 2)) / total - 1).abs() < 0.02).all()
    assert (sampled - exact).abs().max() <= 2


@given(seeds, st.integers(0, 36))
def test_joint_ranking_takes_the_largest_products(seed, total) -> None:
    logits = random_logits(seed).double()
    weights = SCORES[0].double()
    totals = torch.full((2, 6), total)
    counts = joint_counts(scores_of(logits), weights, totals)
    worth = logits.softmax(-1) * weights[:, None, None]
    for b, row in itertools.product(range(2), range(6)):
        flat = worth[b, :, row].flatten()
        expected = flat.sort(descending=True).values[:total].sum()
        taken = worth[b, :, row].sort(dim=-1, descending=True).values
        kept = torch.arange(9) < counts[b, :, row, None]
        torch.testing.assert_close((taken * kept).sum(), expected)
        assert kept.sum() == total


@pytest.mark.parametrize("make", [HessPlus, JointRanking])
@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.none() | st.floats(0, 1), st.integers(0, LAYERS - 1), seeds)
def test_they_spend_what_uniform_spends(make, ratio, tau, layer_idx, seed) -> None:
    pooled = scores_of(random_logits(seed))
    asked = {"sparse_ratio": ratio, "cdf_threshold": tau}
    expected = head_budgets(Uniform(**asked), pooled).sum(-1)
    assert torch.equal(head_budgets(make(PROFILE, **asked), pooled, layer_idx).sum(-1), expected)


@given(seeds, st.permutations(range(HEADS)))
def test_hess_plus_does_not_care_for_the_order_of_heads(seed, order) -> None:
    logits, scores = random_logits(seed), SCORES[:1]
    plain = HessPlus(FixedScores(scores), sparse_ratio=0.6).block_mask(scores_of(logits), 0)
    moved = HessPlus(FixedScores(scores[:, order]), sparse_ratio=0.6)
    found = moved.block_mask(scores_of(logits[:, order]), 0)
    # Remainders that tie go by the index of the head.
    assert (found.counts - plain.counts[:, order]).abs().max() <= 1


def test_hess_plus_gives_a_sensitive_head_no_more_than_it_can_use() -> None:
    """One head looks at one block, the other at all alike; both are as sensitive."""
    focused = torch.zeros(6, 9)
    focused[:, 3] = 12.0
    logits = torch.stack([focused, torch.zeros(6, 9)])[None]
    profile = FixedScores(torch.tensor([[0.9, 0.1]]))
    asked = {"sparse_ratio": 0.5}
    hess = head_budgets(HeSS(profile, **asked), scores_of(logits))[0]
    by_gain = HessPlus(profile, **asked, score_power=100)
    plus = head_budgets(by_gain, scores_of(logits))[0]
    assert hess.tolist() == [43, 5]
    assert plus.tolist() == [6, 42]


def test_hess_plus_with_power_0_divides_as_hess_does() -> None:
    pooled = scores_of(random_logits(7))
    asked = {"sparse_ratio": 0.7, "cdf_threshold": 0.3}
    plus = HessPlus(PROFILE, **asked, score_power=0)
    for layer_idx in range(LAYERS):
        expected = head_budgets(HeSS(PROFILE, **asked), pooled, layer_idx)
        assert torch.equal(head_budgets(plus, pooled, layer_idx), expected)


def test_hess_plus_shares_rows_more_evenly_the_sparser_it_is() -> None:
    pooled = scores_of(random_logits(3, rows=50, blocks=400))
    spread = []
    for ratio in (0.3, 0.9):
        asked = {"sparse_ratio": ratio, "score_exponent": 0.0, "score_power": 100}
        counts = HessPlus(PROFILE, **asked).block_mask(pooled, 2).counts.double()
        wanted = gain_counts(pooled, torch.ones(2, HEADS).double(), counts.sum((1, 2)).long())
        spread.append((counts.std(-1).sum() / wanted.double().std(-1).sum()).item())
    assert spread[0] == pytest.approx(0.7, abs=0.1)
    assert spread[1] == pytest.approx(0.1, abs=0.2)


def test_hess_plus_on_a_single_block_and_on_everything() -> None:
    one = scores_of(torch.zeros(1, HEADS, 1, 1))
    assert head_budgets(HessPlus(PROFILE, sparse_ratio=1.0), one).tolist() == [[1, 1, 1, 1]]
    pooled = scores_of(random_logits(1))
    assert (head_budgets(HessPlus(PROFILE, sparse_ratio=0.0), pooled) == 54).all()


def test_rows_of_chunks_and_samples_are_those_of_the_map() -> None:
    logits = random_logits(5, rows=7, blocks=9)
    pooled = scores_of(logits)
    for entries in (1, 200, 10**6):
        parts = list(pooled.row_chunks(entries))
        assert [i for rows, _ in parts for i in range(rows.start, rows.stop)] == list(range(7))
        torch.testing.assert_close(torch.cat([x for _, x in parts], dim=2), logits)
    torch.testing.assert_close(pooled.sampled_rows(10, 300), logits)
    torch.testing.assert_close(pooled.sampled_rows(1, 300), logits[:, :, 3:4])
    assert isinstance(pooled, PooledScores)


def test_layer_budgets_give_layers_what_they_weigh() -> None:
    pooled = scores_of(random_logits(2))
    profile = FixedScores(SCORES * torch.tensor([[4.0], [1.0], [1.0]]))
    asked = {"sparse_ratio": 0.7}
    uniform = head_budgets(Uniform(**asked), pooled).sum(-1)
    for exponent in (0.0, 0.5, 1.0):
        policy = LayerBudgets(profile, **asked, layer_exponent=exponent)
        layers = torch.stack([head_budgets(policy, pooled, i).sum(-1) for i in range(LAYERS)])
        assert torch.equal(layers.sum(0), LAYERS * uniform)
        assert (layers[0] - layers[1] > 3).all() == (exponent > 0)  # or the remainder of rounding


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_layer_budgets_need_a_ratio_alone(ratio) -> None:
    with pytest.raises(ConfigError, match="not known before the last layer"):
        LayerBudgets(PROFILE, sparse_ratio=ratio, cdf_threshold=0.4)


@pytest.mark.parametrize(
    "wrong",
    [{"score_exponent": 1.5}, {"score_power": -1.0}, {"pool_parts": 0}, {"match_rounds": -1}],
    ids=str,
)
def test_parameters_out_of_range(wrong) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        HessPlus(PROFILE, sparse_ratio=0.5, **wrong)


def test_layer_exponent_out_of_range() -> None:
    with pytest.raises(ConfigError, match="layer_exponent"):
        LayerBudgets(PROFILE, sparse_ratio=0.5, layer_exponent=-1)
