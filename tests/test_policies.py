"""Policies: the same blocks, given to different heads."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hess.attention.pooled_scores import PooledScores
from hess.attention.selection import baseline_counts, select_blocks
from hess.errors import ConfigError, ProfileError
from hess.policies import Dense, HeSS, NoReallocation, RandomScores, Reverse, Uniform
from selection_oracle import scores_of
from stand_ins import FixedScores

LAYERS, HEADS = 3, 4


SCORES = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
PROFILE = FixedScores(SCORES)


def random_logits(seed: int = 0, heads: int = HEADS, rows: int = 6, blocks: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.linspace(0.5, 4, heads)[:, None, None]
    return sharpness * torch.randn(2, heads, rows, blocks, generator=generator)


def random_scores(seed: int = 0) -> PooledScores:
    return scores_of(random_logits(seed))


def head_budgets(policy, pooled: PooledScores, layer_idx: int = 0) -> Tensor:
    return policy.block_mask(pooled, layer_idx).check().counts.sum(-1)


ratios = st.none() | st.floats(0, 1)


def test_dense_has_no_mask() -> None:
    assert Dense().block_mask(random_scores(), 0) is None
    assert not Dense.needs_scores


@given(st.floats(0, 1), ratios, st.integers(0, 99))
def test_uniform_keeps_the_baseline(sparse_ratio, cdf_threshold, seed) -> None:
    pooled = random_scores(seed)
    mask = Uniform(sparse_ratio=sparse_ratio, cdf_threshold=cdf_threshold).block_mask(pooled, 0)
    expected = baseline_counts(pooled, sparse_ratio, cdf_threshold)
    assert torch.equal(mask.counts, expected)


@given(st.floats(0, 1), ratios, st.integers(0, LAYERS - 1), st.integers(0, 99))
def test_score_driven_policies_spend_what_uniform_spends(ratio, tau, layer_idx, seed) -> None:
    pooled = random_scores(seed)
    settings = {"sparse_ratio": ratio, "cdf_threshold": tau}
    total = head_budgets(Uniform(**settings), pooled).sum(-1)
    for policy in (
        HeSS(PROFILE, **settings),
        HeSS(PROFILE, **settings, row_rule="map", min_row_blocks=1),
        Reverse(PROFILE, **settings),
        RandomScores(PROFILE, seed=seed, **settings),
    ):
        assert torch.equal(head_budgets(policy, pooled, layer_idx).sum(-1), total)
    lossy = NoReallocation(PROFILE, **settings)
    assert (head_budgets(lossy, pooled, layer_idx).sum(-1) <= total).all()


def test_budgets_follow_the_scores_and_caps_of_the_layer() -> None:
    pooled = random_scores()  # 6 x 9 = 54 blocks per head
    policy = HeSS(PROFILE, sparse_ratio=0.5)  # 4 of 9 blocks per row: 24 per head, 96 in all
    # .7 .2 .1 0 of 96 = 67.2 19.2 9.6: 13.2 too many, shared 2 : 1
    assert head_budgets(policy, pooled, 0).tolist() == [[54, 28, 14, 0]] * 2
    # 9.6 19.2 28.8 38.4, two blocks left after flooring: .8 and .6 remain
    assert head_budgets(policy, pooled, 1).tolist() == [[10, 19, 29, 38]] * 2
    assert head_budgets(policy, pooled, 2).tolist() == [[24, 24, 24, 24]] * 2


def test_each_scene_has_its_own_total() -> None:
    logits = random_logits()
    logits[1] *= 4  # sharper, so the threshold is met sooner
    policy = HeSS(PROFILE, cdf_threshold=0.8)
    both = policy.block_mask(scores_of(logits), 0)
    sums = both.head_blocks.sum(-1)
    assert sums[0] > sums[1]
    for b in range(2):
        alone = policy.block_mask(scores_of(logits[b : b + 1]), 0)
        assert torch.equal(both.to_dense()[b : b + 1], alone.to_dense())


@given(st.integers(0, 99), st.floats(0, 1))
def test_equal_scores_are_uniform(seed, sparse_ratio) -> None:
    pooled = random_scores(seed)
    hess = HeSS(FixedScores(torch.ones(1, HEADS)), sparse_ratio=sparse_ratio)
    uniform = Uniform(sparse_ratio=sparse_ratio)
    assert torch.equal(
        hess.block_mask(pooled, 0).to_dense(), uniform.block_mask(pooled, 0).to_dense()
    )


def test_blend_leads_from_the_score_to_equal_budgets() -> None:
    pooled = random_scores()
    half = HeSS(PROFILE, sparse_ratio=0.75, blend=0.5)
    assert half.scores[0].tolist() == pytest.approx([0.475, 0.225, 0.175, 0.125])
    full = HeSS(PROFILE, sparse_ratio=0.75, blend=1)
    assert head_budgets(full, pooled, 0).tolist() == [[12] * 4] * 2


def test_zero_scores_mean_equal_budgets() -> None:
    policy = HeSS(FixedScores(torch.zeros(1, HEADS)), sparse_ratio=0.75)
    assert head_budgets(policy, random_scores()).tolist() == [[12] * 4] * 2


def test_floor_keeps_a_block_in_every_row() -> None:
    pooled = random_scores()
    for row_rule in ("equal", "proportional", "map"):
        paper = HeSS(PROFILE, sparse_ratio=0.8, row_rule=row_rule)
        floored = HeSS(PROFILE, sparse_ratio=0.8, row_rule=row_rule, min_row_blocks=1)
        assert paper.block_mask(pooled, 0).counts.min() == 0
        assert floored.block_mask(pooled, 0).counts.min() == 1


def test_row_rule_reaches_the_selection() -> None:
    pooled = random_scores()
    baseline = baseline_counts(pooled, 0.6, 0.7)
    for row_rule in ("equal", "proportional", "map"):
        policy = HeSS(PROFILE, sparse_ratio=0.6, cdf_threshold=0.7, row_rule=row_rule)
        mask = policy.block_mask(pooled, 1)
        expected = select_blocks(pooled, mask.counts.sum(-1), baseline, row_rule)
        assert torch.equal(mask.to_dense(), expected.to_dense())


def test_without_reallocation_the_surplus_is_lost() -> None:
    policy = NoReallocation(PROFILE, sparse_ratio=0.5)
    # 67.2 is cut to 54; 54 + 19.2 + 9.6 = 82.8 makes 82 whole blocks of the 96
    assert head_budgets(policy, random_scores(), 0).tolist() == [[54, 19, 9, 0]] * 2


def test_reverse_turns_the_ranking_round() -> None:
    reverse = Reverse(FixedScores(torch.tensor([[0.1, 0.6, 0.05, 0.25]])), sparse_ratio=0.5)
    assert reverse.scores.tolist() == [pytest.approx([0.25, 0.05, 0.6, 0.1])]


@given(st.integers(0, 2**32))
def test_random_permutes_within_layers_and_repeats_by_seed(seed) -> None:
    policy = RandomScores(PROFILE, seed=seed, sparse_ratio=0.5)
    again = RandomScores(PROFILE, seed=seed, sparse_ratio=0.5)
    assert torch.equal(policy.scores, again.scores)
    torch.testing.assert_close(
        policy.scores.sort(-1).values.float(), SCORES.sort(-1).values, rtol=1e-6, atol=1e-7
    )


def test_random_seeds_differ_and_leave_the_global_generator_alone() -> None:
    wide = FixedScores(torch.rand(2, 16, generator=torch.Generator().manual_seed(0)))
    state = torch.get_rng_state()
    first, second = (RandomScores(wide, seed=s, sparse_ratio=0.5).scores for s in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)
    moved = first.argsort(-1) - wide.table.argsort(-1)
    assert not torch.equal(moved[0], moved[1])  # every layer has its own permutation


def test_profile_is_asked_for_the_wanted_scores() -> None:
    profile = FixedScores(SCORES)
    HeSS(profile, sparse_ratio=0.5)
    assert profile.asked == (None, "query", "trace", "mean", "all", False)
    HeSS(
        profile,
        sparse_ratio=0.5,
        camera_weight=0.3,
        projection="key",
        normalization="log",
        aggregate="median",
        scale_free=True,
    )
    assert profile.asked == (0.3, "key", "log", "median", "all", True)


def test_settings_are_json_and_name_every_parameter() -> None:
    policy = RandomScores(PROFILE, seed=7, sparse_ratio=0.8, cdf_threshold=0.4)
    found = json.loads(json.dumps(policy.settings()))
    other = RandomScores(PROFILE, seed=8, sparse_ratio=0.8, cdf_threshold=0.4)
    assert found.pop("scores_sha256") != other.settings()["scores_sha256"]
    assert found == {
        "sparse_ratio": 0.8,
        "cdf_threshold": 0.4,
        "cdf_rule": "sparsevggt",
        "camera_weight": None,
        "projection": "query",
        "normalization": "trace",
        "aggregate": "mean",
        "rows": "all",
        "scale_free": False,
        "row_rule": "equal",
        "min_row_blocks": 0,
        "blend": 0.0,
        "seed": 7,
    }
    assert Uniform(sparse_ratio=0.5).settings() == {
        "sparse_ratio": 0.5,
        "cdf_threshold": None,
        "cdf_rule": "sparsevggt",
    }
    assert Dense().settings() == {}


def test_names_are_distinct() -> None:
    names = [p.name for p in (Dense, Uniform, HeSS, NoReallocation, Reverse, RandomScores)]
    assert names == ["dense", "uniform", "hess", "no_reallocation", "reverse", "random"]


@pytest.mark.parametrize(
    "bad",
    [
        {"sparse_ratio": None},
        {"sparse_ratio": 1.5},
        {"cdf_threshold": -1.0},
        {"cdf_rule": "at_most"},
        {"row_rule": "best"},
        {"min_row_blocks": -1},
        {"blend": 1.5},
        {"blend": float("nan")},
        {"camera_weight": 2.0},
    ],
)
def test_bad_parameters_are_refused(bad) -> None:
    with pytest.raises(ConfigError):
        HeSS(PROFILE, **{"sparse_ratio": 0.5, **bad})


@pytest.mark.parametrize(
    "table", [torch.ones(4), -SCORES, torch.full((1, 4), torch.nan), torch.full((1, 4), torch.inf)]
)
def test_bad_scores_are_refused(table) -> None:
    with pytest.raises(ProfileError, match="finite scores"):
        HeSS(FixedScores(table), sparse_ratio=0.5)
