"""Blocks that match the output of a row: against sums written out block by block."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from hess.attention import matching, pooled_scores
from hess.attention.fine_scores import FineScores, pool_fine_scores
from hess.attention.layout import TokenLayout
from hess.attention.matching import select_matching
from hess.attention.native_matching import can_match, match_rows
from hess.attention.reference import reference_attention
from hess.attention.selection import select_top
from hess.policies import HessPlus
from stand_ins import FixedScores
from test_fine_scores import LAYOUTS, tokens

SIZE = 6


def random_counts(scores: FineScores, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(scores.shape[3] + 1, scores.shape[:3], generator=generator)


class Row:
    """A row of queries [n, d] of one head with the keys and values of ``layout``."""

    def __init__(
        self, queries: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, split: int
    ) -> None:
        size = SIZE // split
        k_parts, v_parts = (x[layout.patch_index].split(size) for x in (k, v))
        special = layout.special_index
        self.num_blocks = -(-layout.num_patch_tokens // SIZE)
        self.parts = []
        for part in queries.split(size):
            query = part.mean(0) / math.sqrt(k.shape[1])
            at_special = (k[special] @ query).exp()
            sums = [(at_special.sum(), at_special @ v[special])]
            for block in range(self.num_blocks):
                here = range(block * split, min((block + 1) * split, len(k_parts)))
                weights = [len(k_parts[i]) * (query @ k_parts[i].mean(0)).exp() for i in here]
                values = [w * v_parts[i].mean(0) for w, i in zip(weights, here, strict=True)]
                sums.append((sum(weights), sum(values)))
            self.parts.append((len(part), sums))

    def probability(self, block: int) -> float:
        return self._mean(lambda sums: sums[block + 1][0] / sum(w for w, _ in sums))

    def error(self, kept: list[int]) -> float:
        """Squared distance of the output over ``kept`` from the whole one, mean over queries."""

        def of_part(sums: list[tuple[Tensor, Tensor]]) -> Tensor:
            some = [sums[0], *(sums[block + 1] for block in kept)]
            whole, over = (sum(x for _, x in s) / sum(w for w, _ in s) for s in (sums, some))
            return (over - whole).square().sum()

        return self._mean(of_part)

    def _mean(self, of_part) -> float:
        total = sum(of_part(sums) * number for number, sums in self.parts)
        return float(total / sum(number for number, _ in self.parts))

    def matching(self, count: int, rounds: int) -> list[int]:
        first = int(count * math.sqrt(count / self.num_blocks))
        everything = range(self.num_blocks)
        kept = sorted(everything, key=lambda block: -self.probability(block))[:first]
        for i in range(1, rounds + 1):
            upto = first + math.ceil((count - first) * i / rounds)
            left = [block for block in everything if block not in kept]
            left.sort(key=lambda block: self.error([*kept, block]))
            kept += left[: upto - len(kept)]
        return sorted(kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("split", "rounds"), [(2, 1), (2, 4), (3, 2), (6, 100)])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_rows_are_filled_with_what_brings_their_output_nearest(
    layout, split, rounds, dtype
) -> None:
    q, k, v = tokens(layout, dim=16)
    scores = pool_fine_scores(*(x.to(dtype) for x in (q, k, v)), layout, SIZE, SIZE, split)
    assert can_match(scores) == (dtype == torch.float32 and split <= 4)
    counts = random_counts(scores, seed=split)
    found = select_matching(scores, counts, rounds).check()
    assert torch.equal(found.counts, counts)
    rows = q[:, :, layout.patch_index].split(SIZE, dim=2)
    every = torch.cartesian_prod(*(torch.arange(n) for n in counts.shape))
    for b, h, i in every[:: 1 + len(every) // 12].tolist():
        row = Row(rows[i][b, h], k[b, h], v[b, h], layout, split)
        expected = row.matching(int(counts[b, h, i]), rounds)
        assert found.to_dense()[b, h, i].nonzero().flatten().tolist() == expected


def check_native_rows(split: int, dim: int, num_special: int) -> None:
    """They are those of the plain twin."""
    layout = TokenLayout(num_views=5, grid_h=13, grid_w=17, num_special=num_special)
    qkv = (x.float() for x in tokens(layout, dim))
    scores = pool_fine_scores(*qkv, layout, 12, 12, split)
    counts = random_counts(scores, seed=split)
    row_offsets = torch.cat([counts.new_zeros(1), counts.flatten().cumsum(0)])
    found, expected = (f(scores, row_offsets, 4) for f in (match_rows, matching._match_rows))
    assert can_match(scores)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("split", "dim"), [(1, 64), (2, 32), (3, 48), (4, 64)])
@pytest.mark.parametrize("num_special", [0, 5])
def test_native_rows_equal_their_plain_twin(split, dim, num_special) -> None:
    check_native_rows(split, dim, num_special)


def test_blocks_that_balance_are_kept_instead_of_the_most_probable() -> None:
    """Two blocks pull the output one way, one the other way; the special token pulls nowhere."""
    layout = TokenLayout(num_views=1, grid_h=3, grid_w=6, num_special=1)
    share = torch.tensor([0.1, 0.36, 0.32, 0.22])
    values = torch.tensor([0.0, 1.0, 1.0, -3.0])
    which = torch.tensor([0] + [1] * 6 + [2] * 6 + [3] * 6)
    tokens_of = torch.tensor([1.0, 6.0, 6.0, 6.0])
    k = (share / tokens_of).log()[which].view(1, 1, -1, 1)
    v, q = values[which].view(1, 1, -1, 1), torch.ones(1, 1, 19, 1)
    scores = pool_fine_scores(q, k, v, layout, 6, 6, split=2)
    counts = torch.full((1, 1, 3), 2)
    probable = select_top(scores, counts).to_dense()[0, 0]
    assert probable.tolist() == [[True, True, False]] * 3
    found = select_matching(scores, counts, 2).to_dense()[0, 0]
    assert found.tolist() == [[True, False, True]] * 3


@pytest.mark.parametrize("kept", [0.1, 0.3])
def test_with_parts_of_one_token_the_output_is_nearer(kept) -> None:
    layout = TokenLayout(num_views=6, grid_h=8, grid_w=9, num_special=2)
    q, k, v = tokens(layout)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    scores = pool_fine_scores(q, k, v, layout, SIZE, SIZE, split=6)
    counts = torch.full(scores.shape[:3], int(kept * scores.shape[3]))
    off = []
    for mask in (select_matching(scores, counts, 4), select_top(scores, counts)):
        out = reference_attention(q, k, v, mask, layout, SIZE, SIZE)
        off.append((out - dense).square().sum())
    assert off[0] < 0.8 * off[1]


def test_chunks_do_not_change_what_is_kept(monkeypatch) -> None:
    layout = LAYOUTS["half a last block"]
    scores = pool_fine_scores(*tokens(layout), layout, SIZE, SIZE, split=3)
    counts = random_counts(scores, seed=0)
    whole = select_matching(scores, counts, 3)
    for entries in (1, 500, 3000):
        monkeypatch.setattr(pooled_scores, "ENTRIES_AT_ONCE", entries)
        chunked = select_matching(scores, counts, 3)
        assert torch.equal(chunked.indices, whole.indices)
        assert torch.equal(chunked.row_offsets, whole.row_offsets)


def test_half_precision_around_it_does_not_matter() -> None:
    layout = TokenLayout(num_views=4, grid_h=6, grid_w=9, num_special=2)
    for dim in (8, 16):
        qkv = (x.float() for x in tokens(layout, dim))
        scores = pool_fine_scores(*qkv, layout, SIZE, SIZE, split=3)
        counts = random_counts(scores, seed=0)
        expected = select_matching(scores, counts, 4)
        with torch.autocast("cpu", torch.bfloat16):
            found = select_matching(scores, counts, 4)
        assert torch.equal(found.indices, expected.indices)


@pytest.mark.parametrize("num_special", [0, 2])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e30, -1e30])
def test_strange_numbers_leave_lists_in_order(wrong, num_special) -> None:
    layout = TokenLayout(num_views=2, grid_h=5, grid_w=5, num_special=num_special)
    for which, dim in product(range(3), (8, 16)):
        qkv = [x.float() for x in tokens(layout, dim)]
        qkv[which][:, :, 7] = wrong
        scores = pool_fine_scores(*qkv, layout, SIZE, SIZE, split=2)
        counts = random_counts(scores, seed=1)
        assert torch.equal(select_matching(scores, counts, 3).check().counts, counts)


def test_keys_that_no_query_looks_for() -> None:
    """Probabilities below the smallest number are 0; rows are filled nevertheless."""
    layout = TokenLayout(num_views=2, grid_h=6, grid_w=6, num_special=0)
    for dim, count in product((8, 16), range(13)):
        q, k, v = (x.float() for x in tokens(layout, dim))
        scores = pool_fine_scores(q, 1e4 * k, v, layout, SIZE, SIZE, split=2)
        counts = torch.full(scores.shape[:3], count)
        assert torch.equal(select_matching(scores, counts, 4).check().counts, counts)


@pytest.mark.gpu
def test_gpu_keeps_the_same_blocks() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    layout = TokenLayout(num_views=6, grid_h=8, grid_w=9, num_special=2)
    policy = HessPlus(FixedScores(torch.rand(1, 3)), sparse_ratio=0.8, cdf_threshold=0.3)
    masks = [
        policy.block_mask(
            pool_fine_scores(*(x.to(device) for x in tokens(layout)), layout, 6, 6, 3), 0
        )
        for device in ("cpu", "cuda")
    ]
    assert torch.equal(masks[1].check().row_offsets.cpu(), masks[0].row_offsets)
    assert torch.equal(masks[1].indices.cpu(), masks[0].indices)
