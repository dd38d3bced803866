"""What ranks rows: Triton's kernels on a CPU, and their twins. ``test_triton_selection`` runs it
with TRITON_INTERPRET=1, which Triton reads when it is imported.
"""

import pytest
import torch
from torch import Tensor

from hess.attention import native_selection, selection, torch_selection, triton_selection
from hess.attention.selection import ROW_RULES, baseline_counts, select_blocks, select_top
from selection_oracle import Ranked, scores_of

RUNS = {"torch": torch_selection, "native": native_selection, "triton": triton_selection}
ALL = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
KINDS = pytest.mark.parametrize("kind", ["gauss", "bf16", "constant", "peaky", "signed zeros"])
WIDTHS = (1, 13, 37)


@pytest.fixture(autouse=True)
def _several_tiles_per_row(monkeypatch) -> None:
    monkeypatch.setattr(triton_selection, "MAX_TILE", 16)


def make_rows(kind: str, width: int, rows: int = 3) -> Tensor:
    noise = torch.randn(rows, width, generator=torch.Generator().manual_seed(width))
    if kind == "bf16":  # many ties
        return (2 * noise).bfloat16().float()
    if kind == "signed zeros":  # 0.0 and -0.0 are ties
        return noise.round().clamp(-1, 1)
    return noise * {"gauss": 2, "constant": 0, "peaky": 30}[kind]


@ALL
@KINDS
@pytest.mark.parametrize("mass", [0, 0.3, 0.5, 0.97, 1])
def test_counts_are_those_of_a_stable_sort(run, kind, mass) -> None:
    for width in WIDTHS:
        logits = make_rows(kind, width)
        expected = (Ranked(logits).probs.cumsum(-1) <= mass + 1e-5).sum(-1)
        assert torch.equal(run.count_within(logits, mass + 1e-5), expected), width


@ALL
@KINDS
def test_probabilities_are_those_of_a_stable_sort(run, kind) -> None:
    for width in WIDTHS:
        logits = make_rows(kind, width)
        ranks = torch.tensor([0, width // 3, width - 1])
        expected = Ranked(logits).probs.gather(-1, ranks[:, None])[:, 0].float()
        found = run.probability_at(logits, ranks)
        torch.testing.assert_close(found, expected, rtol=3e-6, atol=1e-37)


@ALL
@KINDS
def test_lists_are_those_of_a_stable_sort_for_every_count(run, kind) -> None:
    for width in WIDTHS:
        counts = torch.arange(0, width + 1, 1 if width < 20 else 6)
        logits = make_rows(kind, width)[torch.arange(len(counts)) % 3]
        before, after = 3, 2  # what else is in the lists must stay as it is
        row_offsets = torch.cat([torch.zeros(1).long(), counts.cumsum(0)]) + before
        indices = torch.full((int(row_offsets[-1]) + after,), -7, dtype=torch.int32)
        run.write_lists(logits, row_offsets, indices)
        chosen = Ranked(logits).mask(counts).nonzero()[:, 1].int()
        assert torch.equal(indices[before:-after], chosen), width
        assert (indices[:before] == -7).all()
        assert (indices[-after:] == -7).all()


@ALL
@pytest.mark.parametrize("row_rule", sorted(ROW_RULES))
@pytest.mark.parametrize("chunk", [50, 10**6])
def test_whole_masks(run, row_rule, chunk, monkeypatch) -> None:
    logits = torch.randn(2, 2, 3, 21, generator=torch.Generator().manual_seed(0))
    pooled, ranked = scores_of(logits), Ranked(logits)
    monkeypatch.setattr(selection, "row_functions", lambda pooled: run)
    for module in {torch_selection, run}:
        monkeypatch.setattr(module, "ENTRIES_AT_ONCE", chunk)
    baseline = baseline_counts(pooled, 0.8, 0.4, "cover")
    expected = ranked.baseline(4, 0.4, "cover")
    assert torch.equal(baseline, expected)
    assert torch.equal(select_top(pooled, baseline).check().to_dense(), ranked.mask(expected))
    budget = torch.tensor([[63, 37], [0, 8]])
    mask = select_blocks(pooled, budget, baseline, row_rule).check()
    counts = ranked.row_counts(budget, expected, row_rule, 0)
    assert torch.equal(mask.to_dense(), ranked.mask(counts))
