"""Water filling and rounding of head budgets."""

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hess.allocation import allocate, round_budgets, water_fill
from hess.errors import ConfigError


def bisect_level(total: float, weights: list[float], upper: int, lower: int) -> list[float]:
    """Oracle: find the level t with sum clip(t * w, lower, upper) = total by halving."""
    low, high = 0.0, (upper + 1) / min(weights)
    for _ in range(200):
        level = (low + high) / 2
        if sum(min(max(level * w, lower), upper) for w in weights) < total:
            low = level
        else:
            high = level
    return [min(max(high * w, lower), upper) for w in weights]


@st.composite
def problems(draw: st.DrawFn, min_weight: float = 0.0) -> tuple[int, list[float], int, int]:
    """A feasible (total, weights, upper, lower)."""
    weight = st.floats(min_weight, 1.0, allow_subnormal=False)
    weights = draw(st.lists(weight, min_size=1, max_size=12))
    upper = draw(st.integers(1, 400))
    lower = draw(st.integers(0, upper))
    total = draw(st.integers(len(weights) * lower, len(weights) * upper))
    return total, weights, upper, lower


def fill(problem: tuple[int, list[float], int, int]) -> list[float]:
    total, weights, upper, lower = problem
    weights_tensor = torch.tensor(weights, dtype=torch.float64)
    return water_fill(torch.tensor(total), weights_tensor, upper, lower).tolist()


def budgets(problem: tuple[int, list[float], int, int]) -> list[int]:
    total, weights, upper, lower = problem
    weights_tensor = torch.tensor(weights, dtype=torch.float64)
    return allocate(torch.tensor(total), weights_tensor, upper, lower).tolist()


@given(problems())
def test_budgets_add_up_and_respect_cap_and_floor(problem) -> None:
    total, _, upper, lower = problem
    assert sum(fill(problem)) == pytest.approx(total, abs=1e-6)
    assert sum(budgets(problem)) == total
    assert all(lower <= b <= upper for b in budgets(problem))


@given(problems(min_weight=1e-3))
def test_agrees_with_a_bisection_of_the_water_level(problem) -> None:
    assert fill(problem) == pytest.approx(bisect_level(*problem), abs=1e-6)


@given(problems())
def test_rounding_stays_within_one_block(problem) -> None:
    for ideal, budget in zip(fill(problem), budgets(problem), strict=True):
        assert abs(ideal - budget) < 1 + 1e-6


@given(problems())
def test_more_weight_never_means_fewer_blocks(problem) -> None:
    weights = [round(w, 3) for w in problem[1]]
    pairs = sorted(zip(weights, budgets((problem[0], weights, *problem[2:])), strict=True))
    for (w_low, b_low), (w_high, b_high) in pairwise(pairs):
        # Equal weights may differ by one block: remainders go by head index.
        assert b_high >= b_low - (w_low == w_high)


@given(problems(), st.randoms(use_true_random=False))
def test_order_of_heads_does_not_matter(problem, random) -> None:
    total, weights, upper, lower = problem
    order = list(range(len(weights)))
    random.shuffle(order)
    shuffled = (total, [weights[i] for i in order], upper, lower)
    assert fill(shuffled) == pytest.approx([fill(problem)[i] for i in order], abs=1e-6)


@given(problems(), st.sampled_from([1e-12, 1e-3, 7.0, 1e12]))
def test_only_ratios_of_weights_matter(problem, scale) -> None:
    total, weights, upper, lower = problem
    scaled = (total, [w * scale for w in weights], upper, lower)
    assert fill(scaled) == pytest.approx(fill(problem), abs=1e-6)


@given(st.integers(1, 12), st.integers(1, 200), st.floats(0, 1), st.sampled_from([0.0, 0.3, 1.0]))
def test_equal_weights_give_equal_budgets(heads, upper, fullness, weight) -> None:
    total = round(fullness * heads * upper)
    share, leftover = divmod(total, heads)
    expected = [share + (h < leftover) for h in range(heads)]
    assert budgets((total, [weight] * heads, upper, 0)) == expected


def test_surplus_goes_to_open_heads_by_weight() -> None:
    # 30 * (.6 .3 .1) = 18, 9, 3. Cap 10: 8 over, shared 3 : 1 gives 15, 5. Cap again: 5 over.
    assert fill((30, [0.6, 0.3, 0.1], 10, 0)) == pytest.approx([10, 10, 10])
    assert fill((24, [0.6, 0.3, 0.1], 10, 0)) == pytest.approx([10, 10, 4])
    assert fill((18, [0.6, 0.3, 0.1], 10, 0)) == pytest.approx([10, 6, 2])


def test_floor_is_paid_by_the_others_in_proportion() -> None:
    assert fill((20, [0.6, 0.3, 0.1], 20, 5)) == pytest.approx([10, 5, 5])
    assert fill((30, [0.6, 0.3, 0.1], 12, 5)) == pytest.approx([12, 12, 6])


def test_heads_without_weight_take_only_what_nobody_else_can() -> None:
    assert fill((20, [1.0, 0.0, 0.0], 20, 0)) == pytest.approx([20, 0, 0])
    assert fill((30, [1.0, 0.0, 0.0], 20, 0)) == pytest.approx([20, 5, 5])
    assert fill((12, [0.0, 0.0, 0.0], 20, 0)) == pytest.approx([4, 4, 4])


def test_batches_are_independent() -> None:
    weights = torch.tensor([0.5, 0.3, 0.2, 0.0])
    totals = torch.tensor([[0, 3], [17, 39], [40, 25]])
    batched = allocate(totals, weights, upper=10)
    assert batched.shape == (3, 2, 4)
    for index in ((i, j) for i in range(3) for j in range(2)):
        assert batched[index].tolist() == allocate(totals[index], weights, upper=10).tolist()


def test_largest_remainder_first_and_ties_by_head_index() -> None:
    ideal = torch.tensor([2.2, 0.7, 3.6, 1.5], dtype=torch.float64)
    assert round_budgets(ideal, torch.tensor(8), upper=9).tolist() == [2, 1, 4, 1]
    thirds = torch.full((3,), 10 / 3, dtype=torch.float64)
    noisy = thirds + torch.tensor([0.0, 1e-12, 2e-12], dtype=torch.float64)
    assert round_budgets(noisy, torch.tensor(10), upper=9).tolist() == [4, 3, 3]


def test_rounding_survives_float_noise_below_a_whole_number() -> None:
    ideal = torch.tensor([3 - 1e-10, 2 - 1e-10, 1 + 2e-10], dtype=torch.float64)
    assert round_budgets(ideal, torch.tensor(6), upper=3).tolist() == [3, 2, 1]


@given(problems())
def test_too_much_and_too_little_are_refused(problem) -> None:
    _, weights, upper, lower = problem
    with pytest.raises(ConfigError, match="found totals"):
        budgets((len(weights) * upper + 1, weights, upper, lower))
    assume(lower > 0)
    with pytest.raises(ConfigError, match="found totals"):
        budgets((len(weights) * lower - 1, weights, upper, lower))


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_bad_weights_are_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match="finite and not negative"):
        budgets((5, [0.5, bad], 10, 0))


def test_rounding_refuses_a_sum_that_is_off() -> None:
    with pytest.raises(ConfigError, match="add up"):
        round_budgets(torch.tensor([1.0, 2.0]), torch.tensor(5), upper=4)
