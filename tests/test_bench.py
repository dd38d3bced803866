"""The benchmarks measure what they say, refuse what is wrong, and run from end to end."""

import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from hess.attention.block_sparse import BACKENDS, Attend, Backend
from hess.attention.layout import TokenLayout
from hess.attention.masked import masked_sdpa
from hess.attention.pooled_scores import pool_scores
from hess.attention.pooling import block_probs
from hess.attention.selection import baseline_counts, select_top
from hess.attention.sparsity import flop_saving
from hess.bench import suite, timing
from hess.bench.attention import bench_attention, ratio_to_ideal
from hess.bench.gate import SMALL, check_backends, check_lists, what_is_wrong
from hess.bench.model import STAGES, bench_model, scaling_exponent, stage_seconds
from hess.bench.report import BREAK_EVEN_STEP, TABLES, narrowed, targets_table
from hess.bench.roofline import CHIPS, roofline_ms
from hess.bench.rows import origin, read_rows, write_rows
from hess.bench.selection import bench_choosing, bench_selection, selection_share
from hess.bench.targets import TARGETS
from hess.bench.workload import Lists, Workload
from hess.cli.main import main
from hess.errors import ConfigError
from hess.models.loading import load_model
from hess.viz.performance import attention_figure, model_figure

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
LAYOUT = TokenLayout(num_views=4, grid_h=24, grid_w=30, num_special=5)
WORK = Workload(layout=LAYOUT, dtype=torch.float32, head_dim=16)
TINY = replace(WORK, layout=TokenLayout(num_views=2, grid_h=9, grid_w=16, num_special=5), heads=4)


def backend(attend: Attend) -> Backend:
    """One that claims to run everywhere."""
    return Backend(attend, lambda q, k, v: None)


# What is timed


@pytest.mark.parametrize("source", ["pooled", "random"])
@pytest.mark.parametrize("budgets", ["equal", "hess"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_lists_drop_what_is_asked(sparsity: float, budgets: str, source: str) -> None:
    q, k, _ = WORK.inputs(CPU)
    mask = Lists(sparsity=sparsity, budgets=budgets, source=source).select(WORK, q, k).check()
    assert flop_saving(mask, LAYOUT, 128, 64).mean().item() == pytest.approx(sparsity, abs=0.01)
    per_row = mask.counts[0]
    assert (per_row.amax(-1) - per_row.amin(-1)).max() <= 1


def test_unequal_heads_share_as_many_blocks() -> None:
    equal = Lists(sparsity=0.75, budgets="equal").head_budgets(WORK)
    hess = Lists(sparsity=0.75, budgets="hess").head_budgets(WORK)
    assert equal.sum() == hess.sum()
    assert equal.max() - equal.min() <= 1
    size = math.prod(WORK.map_size)
    shares = (hess / size).sort(descending=True).values
    assert 0.85 <= shares[2] <= shares[0] <= 0.95
    assert shares[3] < 0.12
    reverse = Lists(sparsity=0.75, budgets="reversed").head_budgets(WORK)
    assert torch.equal(hess, reverse)


def test_lists_come_from_the_seed() -> None:
    def indices(work: Workload, source: str) -> torch.Tensor:
        q, k, _ = work.inputs(CPU)
        return Lists(sparsity=0.5, source=source).select(work, q, k).indices

    for source in ("pooled", "random"):
        first = indices(WORK, source)
        assert torch.equal(first, indices(WORK, source))
        assert not torch.equal(first, indices(replace(WORK, seed=1), source))
    assert not torch.equal(first, indices(WORK, "pooled"))


def test_pooled_lists_hold_the_attention_and_random_ones_do_not() -> None:
    q, k, _ = WORK.inputs(CPU)
    probs = block_probs(q, k, LAYOUT, 128, 64)

    def mass(source: str) -> torch.Tensor:
        kept = Lists(sparsity=0.75, source=source).select(WORK, q, k).to_dense()
        return (probs * kept).sum(-1).mean(-1)[0]

    assert (mass("pooled") > 1.1 * mass("random")).all()
    assert mass("pooled").max() > 0.5
    assert mass("random").mean().item() == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize(
    "wrong", [{"sparsity": 1.0}, {"sparsity": -0.1}, {"sparsity": 0.5, "budgets": "fair"}]
)
def test_impossible_lists_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Lists(**wrong)


def test_special_tokens_bound_what_can_be_dropped() -> None:
    layout = TokenLayout(num_views=4, grid_h=2, grid_w=2, num_special=4)
    with pytest.raises(ConfigError, match="more than the patches"):
        Lists(sparsity=0.5).head_budgets(replace(WORK, layout=layout))


# Measuring


def test_turns_are_fair(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    run_ms = {"a": 1.0, "b": 50.0, "c": 5.0}

    def sample(run: str, calls: int, device: torch.device) -> tuple[float, None]:
        order.append((run, calls))
        return run_ms[run], None

    monkeypatch.setattr(timing, "_sample", sample)

    class Named(str):
        def __call__(self) -> None: ...

    runs = {name: Named(name) for name in run_ms}
    times = timing.time_in_turns(runs, CPU, seconds=0.6)
    assert {name: (t.p20, t.p50, t.p80) for name, t in times.items()} == {
        name: (ms, ms, ms) for name, ms in run_ms.items()
    }
    assert {t.samples for t in times.values()} == {10}  # 600 ms / (5 x 1 + 50 + 5) ms
    rounds = [order[i : i + 3] for i in range(3, len(order), 3)]
    assert all(sorted(turn) == [("a", 5), ("b", 1), ("c", 1)] for turn in rounds)
    assert {turn[0][0] for turn in rounds} == {"a", "b", "c"}
    with pytest.raises(ConfigError, match="must be positive"):
        timing.time_in_turns(runs, CPU, seconds=0)


def test_timing_is_the_median_and_the_fifths() -> None:
    samples = zip([5.0, 1.0, 2.0, 3.0, 4.0, 100.0], [1.0, 1.0, 2.0, 3.0, 3.0, 9.0], strict=True)
    found = timing._timing(list(samples))
    assert (found.p20, found.p50, found.p80, found.samples) == (2.0, 3.5, 5.0, 6)
    assert found.host_p50 == 2.5
    assert timing._timing([(1.0, None), (2.0, None)]).host_p50 is None


def test_what_fails_at_a_size_is_a_problem_and_the_rest_is_timed(monkeypatch) -> None:
    def only_small(q, k, v, mask, layout, *sizes):
        if layout != SMALL:
            raise RuntimeError("out of memory\nand more")
        return masked_sdpa(q, k, v, mask, layout, *sizes)

    monkeypatch.setitem(BACKENDS, "small", backend(only_small))
    names = ["small", "masked"]
    found = bench_attention(TINY, [Lists(sparsity=0.5)], CPU, backends=names, seconds=0.01)
    assert [row["backend"] for row in found.rows] == ["sdpa", "masked"]
    assert len(found.problems) == 1
    assert found.problems[0].startswith("small failed")
    assert found.problems[0].endswith(": out of memory")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not tell")
def test_peak_memory_is_that_of_the_call() -> None:
    held = torch.ones(2**24)  # 64 MiB that are there before
    assert 60 * 2**20 <= timing.peak_bytes(lambda: held + 1, CPU) <= 100 * 2**20
    assert timing.peak_bytes(lambda: None, CPU) <= 8 * 2**20


# The gate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_lets_the_right_through(dtype: torch.dtype) -> None:
    work = replace(TINY, dtype=dtype)
    assert check_backends(work, "random", CPU, ["masked"])["masked"].passed
    assert what_is_wrong(work, CPU, "auto") == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_a_wrong_backend_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, factor: float
) -> None:
    layouts = []

    def off(q, k, v, mask, layout, *sizes):
        layouts.append(layout)
        return masked_sdpa(q, k, v, mask, layout, *sizes) * factor

    monkeypatch.setitem(BACKENDS, "off", backend(off))
    work = replace(TINY, dtype=dtype)
    found = bench_attention(work, [Lists(sparsity=0.5)], CPU, backends=["off"], seconds=0.01)
    assert [row["op"] for row in found.rows] == ["dense"]
    assert len(found.problems) == 1
    assert "off in" in found.problems[0]
    assert layouts == [SMALL]
    assert len(what_is_wrong(work, CPU, "off")) == 1


def test_a_wrong_backend_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(BACKENDS, "off", backend(lambda *case: masked_sdpa(*case) * 1.01))
    monkeypatch.setitem(BACKENDS, "right", backend(masked_sdpa))
    command = "bench attention --tokens 300 --heads 2 --head-dim 16 --sparsity 0.5 --seconds 0.01"
    command += f" --backends right off --budgets equal --json -o {tmp_path / 'rows.jsonl'}"
    assert main(command.split()) == 1
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [row["backend"] for row in rows] == ["sdpa", "right"]
    assert rows == read_rows([tmp_path / "rows.jsonl"])
    assert "off in float32 was not timed: relative error 1.00e-02, allowed 1.00e-05" in err


def test_what_is_named_must_run() -> None:
    found = bench_attention(TINY, [Lists(sparsity=0.5)], CPU, backends=["triton"], seconds=0.01)
    assert [row["op"] for row in found.rows] == ["dense"]
    assert len(found.problems) == 1
    assert found.problems[0].startswith("triton in float32 was not timed: ")


def test_a_wrong_selection_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_lists(TINY, CPU) <= 0.02
    select = Lists.select

    def shifted(self, work, q, k):
        mask = select(self, work, q, k)
        if q.dtype == torch.float64:
            return mask
        moved = (mask.indices + 1) % mask.num_kv_blocks
        return replace(mask, indices=moved)

    monkeypatch.setattr(Lists, "select", shifted)
    assert check_lists(TINY, CPU) > 0.1
    found = bench_selection(TINY, CPU, seconds=0.01)
    assert found.rows == []
    assert "are not those of float64" in found.problems[0]


# Rows


ATTENTION_FIELDS = {
    *("op", "backend", "device", "dtype", "tokens", "heads", "head_dim", "budgets"),
    *("block_sparsity", "ms_p50", "dense_backend", "dense_ms_p50", "ratio_to_ideal"),
    *("selection_share", "peak_bytes", "seed"),
}


def test_attention_rows() -> None:
    variants = [Lists(sparsity=0.5), Lists(sparsity=0.5, budgets="hess"), Lists(sparsity=0.75)]
    found = bench_attention(TINY, variants, CPU, backends=["gather", "masked"], seconds=0.02)
    rows = [row | origin(CPU, "a command") for row in found.rows if row["op"] == "attention"]
    assert found.problems == []
    assert len(rows) == 2 * len(variants)
    for row in rows:
        assert set(row) >= ATTENTION_FIELDS
        assert row["ratio_to_ideal"] == pytest.approx(
            row["ms_p50"] / ((1 - row["work_saving"]) * row["dense_ms_p50"])
        )
        assert 0 < row["gate_error"] <= row["gate_limit"]
        assert {"commit", "dirty", "command"} <= set(row)
        assert {"platform", "cpu", "torch", "triton", "driver", "load"} <= set(row["machine"])
    json.dumps(rows, allow_nan=False)


def test_ratio_to_ideal() -> None:
    assert ratio_to_ideal(30.0, 0.75, 100.0) == pytest.approx(1.2)
    assert ratio_to_ideal(100.0, 0.0, 100.0) == 1.0


def test_selection_rows() -> None:
    found = bench_selection(TINY, CPU, seconds=0.02)
    assert [row["rule"] for row in found.rows] == ["ratio", "threshold", "hess", "hess+"]
    for row in found.rows:
        assert set(TINY.as_dict()) <= set(row)
        assert 0 < row["selection_share"] < 1
        assert row["pack_ms_p50"] is None


def test_choosing_rows_tell_what_a_map_would_take() -> None:
    (row,) = bench_choosing(TINY, CPU).rows
    pooled = pool_scores(*TINY.inputs(CPU)[:2], TINY.layout, *TINY.block_sizes)
    assert row["map_bytes"] == 4 * math.prod(pooled.shape)
    mask = select_top(pooled, baseline_counts(pooled, 0.8, None))
    assert row["list_bytes"] == 4 * len(mask.indices)
    assert row["ms"] > 0


def test_packing_counts_once_in_the_share() -> None:
    assert selection_share(1.0, None, 9.0) == pytest.approx(0.1)
    assert selection_share(1.0, 2.0, 9.0) == pytest.approx(0.3)


def test_model_rows() -> None:
    model, scores = load_model("nano"), suite.MODELS["nano"][0](CPU)[1]
    found = bench_model(model, suite.policies(scores), num_views=2, height=48, width=48, rounds=2)
    assert [row["policy"] for row in found.rows] == ["dense", *3 * ["uniform", "hess"], "hess+"]
    for row in found.rows:
        assert set(row["stage_seconds"]) == set(STAGES)
        assert row["seconds"] > 0
        assert row["samples"] == 1
    by_ratio = [row for row in found.rows if row["sparse_ratio"] == 0.75]
    uniform, hess, plus = (row["block_sparsity"] for row in by_ratio)
    assert uniform == pytest.approx(hess, abs=1e-3)
    assert uniform == pytest.approx(plus, abs=1e-3)
    assert uniform > 0.6
    assert found.rows[0]["block_sparsity"] == 0


def test_stages_add_up_and_leave_no_hooks() -> None:
    model = load_model("nano")
    with torch.inference_mode():
        seconds = stage_seconds(model, torch.rand(1, 2, 3, 48, 48))
    parts = sum(seconds[stage] for stage in STAGES)
    assert parts == pytest.approx(seconds["total"])
    assert all(seconds[stage] > 0 for stage in STAGES)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_scaling_exponent_is_that_of_the_largest_sizes() -> None:
    rows = [{"views": v, "seconds": s} for v, s in ((8, 5.0), (100, 2.0), (200, 8.0))]
    assert scaling_exponent(rows) == pytest.approx(2.0)


# What the numbers are held against


def test_roofline_of_one_tile() -> None:
    """128 x 64 scores at head size 64: 512 cycles of both units of a Hopper processor."""
    chip = replace(CHIPS["H200"], processors=1, clock=1000.0)  # milliseconds are cycles
    layout = TokenLayout(num_views=1, grid_h=128, grid_w=64, num_special=0)
    work = Workload(layout=layout, dtype=torch.bfloat16, heads=1)
    tiles = 128 * 64 * 128 * 64 / (128 * 64)
    floor = roofline_ms(chip, work, 0.75, 1000)
    assert floor["matrix"] == pytest.approx(512 * tiles / 4)
    assert floor["exp"] == pytest.approx(512 * tiles / 4)
    moved = 8 * 8192 * 64 * 2 + 4 * 1000
    assert floor["memory"] == pytest.approx(1000 * moved / 4.8e12)
    assert roofline_ms(None, work, 0.5, 0) is None
    assert roofline_ms(chip, replace(work, dtype=torch.float32), 0.5, 0) is None
    peak = CHIPS["H200"].processors * CHIPS["H200"].clock * CHIPS["H200"].flops
    assert peak == pytest.approx(989e12, rel=0.01)


def attention_row(**changes: Any) -> dict[str, Any]:
    row = {"op": "attention", "backend": "triton", "auto": True, "device": "cuda"}
    row |= {"dtype": "bfloat16", "views": 50, "tokens": 68_700, "heads": 16, "head_dim": 64}
    row |= {"budgets": "equal", "lists": "pooled", "sparsity_asked": 0.75, "work_saving": 0.75}
    row |= {"ms_p50": 10.0, "dense_ms_p50": 32.0, "dense_backend": "cudnn", "peak_bytes": None}
    row |= {"dense_ms": {"flash": 50.0, "cudnn": 32.0}, "ratio_to_ideal": 1.25}
    row |= {"selection_share": 0.04, "roofline_ms": None, "command": "c"}
    return row | {"machine": {"device": "NVIDIA H200"}} | changes


def model_row(**changes: Any) -> dict[str, Any]:
    row = {"op": "model", "model": "m", "dtype": "float32", "device": "cpu", "views": 8}
    row |= {"policy": "uniform", "sparse_ratio": 0.8, "cdf_threshold": 0.4, "seconds": 1.0}
    row |= {"block_sparsity": 0.7, "stage_seconds": dict.fromkeys(STAGES, 0.1)}
    return row | {"peak_bytes": 2**20, "machine": {}, "command": "c"} | changes


def ratios(rows: list[dict[str, Any]]) -> dict[int, list[float]]:
    found = {i: list(target.values(rows)) for i, target in enumerate(TARGETS)}
    return {i: values for i, values in found.items() if values}


def test_targets_take_the_rows_they_mean() -> None:
    row = attention_row()
    assert ratios([row]) == {0: [pytest.approx(0.8)], 1: [1.25], 3: [0.04]}
    assert ratios([row, attention_row(budgets="hess", ms_p50=10.4)])[2] == [pytest.approx(1.04)]
    assert ratios([row, attention_row(budgets="hess", lists="random")]).keys() == {0, 1, 3}
    assert ratios([attention_row(sparsity_asked=0.9)]).keys() == {0, 3}
    assert ratios([attention_row(tokens=27_480, views=20)]).keys() == {1, 4}
    for other in ({"auto": False}, {"budgets": "reversed"}, {"sparsity_asked": 0.0}):
        assert ratios([attention_row(**other)]) == {}
    assert ratios([attention_row(machine={"device": "NVIDIA A100"})]) == {}
    on_cpu = {"device": "cpu", "dtype": "bfloat16", "tokens": 8244}
    assert ratios([attention_row(**on_cpu)]) == {6: [1.25]}
    assert ratios([attention_row(**on_cpu | {"tokens": 7999})]) == {}
    pair = [model_row(), model_row(policy="hess", seconds=1.03, block_sparsity=0.704)]
    assert ratios(pair) == {10: [pytest.approx(1.03)]}
    assert ratios([pair[0], pair[1] | {"block_sparsity": 0.71}]) == {}


def test_verdicts() -> None:
    def verdict(ratio: float) -> str:
        return targets_table([attention_row(ratio_to_ideal=ratio)])[2][-1]

    assert [verdict(x) for x in (1.10, 1.30, 1.31)] == ["aim reached", "must reached", "missed"]
    assert {line[-1] for line in targets_table([])[1:]} == {"**not measured**"}
    both = [attention_row(ratio_to_ideal=1.0), attention_row(ratio_to_ideal=1.2)]
    assert targets_table(both)[2][3:6] == ["1.200", "1.200", "2"]


def test_tables_and_pictures_of_all_kinds_of_rows() -> None:
    rows = [attention_row(), model_row(policy="dense", sparse_ratio=None, cdf_threshold=None)]
    rows += [model_row(), model_row(policy="hess", seconds=1.1), model_row(views=16, seconds=4.0)]
    rows += [rows[1] | {"views": 16}]
    rows += [r | {"step": "x"} for r in bench_selection(TINY, CPU, seconds=0.01).rows]
    rows += bench_choosing(TINY, CPU).rows
    short = attention_row(step=BREAK_EVEN_STEP, select_ms_p50=0.2)
    for name, table in TABLES.items():
        lines = table([*rows, short])
        assert len(lines) > 1, name
        assert {len(line) for line in lines} == {len(lines[0])}
    scaling = {tuple(line[1:3]): line[4] for line in TABLES["scaling"](rows)[1:]}
    assert scaling["8 to 16", "uniform"] == "2.00"
    assert TABLES["model"](rows)[3][6:8] == ["1.10", "1.100"]
    assert len(attention_figure(rows).axes) == 1
    assert len(model_figure(rows).axes) == 1
    with pytest.raises(ConfigError):
        attention_figure(rows[1:])
    with pytest.raises(ConfigError):
        model_figure(rows[:1])


def test_constant_columns_become_a_line_of_text() -> None:
    table = [["a", "b", "c"], ["1", "x", "–"], ["2", "x", "–"]]
    assert narrowed(table) == ("b: x", [["a"], ["1"], ["2"]])
    assert narrowed(table[:2]) == ("", table[:2])


# The command that settles everything


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("suite_script", ROOT / "benchmarks" / "suite.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / "suite.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_suite_runs_from_end_to_end(tmp_path: Path) -> None:
    done = run_script("tiny", "--threads", "1", "-o", tmp_path / "rows.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    rows = read_rows([tmp_path / "rows.jsonl"])
    ops = {"dense", "attention", "selection", "choosing", "model"}
    assert {row["op"] for row in rows} == ops
    assert all(row["command"] == "python benchmarks/suite.py tiny" for row in rows)
    assert f"{len(rows)} rows in" in done.stdout
    assert "FAILED" not in done.stdout


def test_a_suite_says_what_it_had_no_time_for() -> None:
    done = run_script("tiny", "--minutes", "0.001")
    assert done.returncode == 1
    for step in suite.tiny_steps():
        assert f"FAILED: {step}: stopped, the time was up" in done.stdout


@pytest.fixture
def gpu_script(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, list[str]]:
    """The script as on a GPU machine, but its steps are tiny, on the CPU and in this process."""
    script, done = load_script(), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(suite.SUITES, "gpu", suite.tiny_steps)

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if "pytest" in command:
            done.append("tests")
            return subprocess.CompletedProcess(command, 0, stdout="16 passed, 1 skipped")
        step = command[command.index("--step") + 1]
        done.append(step)
        code = script.run_step("gpu", step, CPU, Path(command[command.index("-o") + 1]))
        return subprocess.CompletedProcess(command, code)

    stand_in = SimpleNamespace(run=run, PIPE=None, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(script, "subprocess", stand_in)
    return script, done


def test_dry_run_of_the_gpu_suite(gpu_script, monkeypatch, tmp_path, capsys) -> None:
    script, done = gpu_script
    output = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["suite.py", "gpu", "-o", str(output)])
    assert script.main() == 0
    assert done == ["tests", *suite.tiny_steps()]
    assert {row["step"] for row in read_rows([output])} == set(done[1:])
    assert "FAILED" not in capsys.readouterr().out


def test_the_gpu_suite_fails_if_anything_does(gpu_script, monkeypatch, tmp_path, capsys) -> None:
    script, _ = gpu_script
    monkeypatch.setattr(script, "gpu_tests", lambda seconds: "GPU tests failed")
    monkeypatch.setitem(BACKENDS, "native", backend(lambda *case: masked_sdpa(*case) * 1.01))
    monkeypatch.setattr(sys, "argv", ["suite.py", "gpu", "-o", str(tmp_path / "rows.jsonl")])
    assert script.main() == 1
    out = capsys.readouterr().out
    assert "FAILED: GPU tests failed" in out
    assert "PROBLEM: native in float32 was not timed" in out
    assert "FAILED: attention: failed, see above" in out
    assert "FAILED: model: failed, see above" in out  # its gate, too
    assert "FAILED: choosing" not in out


@pytest.mark.parametrize(
    ("code", "stdout", "problem"),
    [
        (0, "16 passed, 1 skipped in 40 s", None),
        (1, "15 passed, 1 failed", "GPU tests failed"),
        (0, "17 skipped", "no GPU test ran"),
    ],
)
def test_the_verdict_on_gpu_tests(monkeypatch, code, stdout, problem) -> None:
    script = load_script()
    done = subprocess.CompletedProcess([], code, stdout=stdout)
    monkeypatch.setattr(script.subprocess, "run", lambda *args, **options: done)
    assert script.gpu_tests(60) == problem


def test_without_a_gpu_the_suite_says_so(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["suite.py", "gpu"])
    assert load_script().main() == 1
    assert "needs a GPU, and torch finds none" in capsys.readouterr().out


def test_suites_cover_the_targets() -> None:
    """At the sizes of the targets; that they run is for the machine to show."""
    gpu, cpu = suite.gpu_steps(), suite.cpu_steps()
    works = [step.keywords["work"] for step in gpu.values() if "work" in step.keywords]
    assert {work.layout.num_views for work in works} >= {20, 50, 100}
    assert all(work.dtype == torch.bfloat16 and work.head_dim == 64 for work in works)
    assert gpu["full-size VGGT"].keywords["views"] == (8, 20, 50, 100, 200)
    works = [step.keywords["work"] for step in cpu.values() if "work" in step.keywords]
    assert all(work.layout.num_tokens >= 8000 for work in works)
    assert {work.dtype for work in works} == {torch.float32, torch.bfloat16}


def test_the_script_needs_little_more_than_torch() -> None:
    """A GPU machine may have no network to install the rest from."""
    absent = ["tyro", "faiss", "small_gicp", "plyfile", "trimesh", "pycolmap", "av", "matplotlib"]
    code = f"import sys\nfor name in {absent}: sys.modules[name] = None\n"
    code += "import hess.bench.suite, hess.bench.report; print(len(hess.bench.suite.SUITES))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("3\n", "")


def test_rows_survive_writing(tmp_path: Path) -> None:
    rows = [attention_row(), model_row()]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows([tmp_path / "rows.jsonl"]) == rows
    with pytest.raises(ValueError, match="JSON"):
        write_rows(tmp_path / "rows.jsonl", [{"ms_p50": math.nan}])


@pytest.mark.gpu
def test_gpu_rows() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")
    device = torch.device("cuda")
    work = Workload.views(2, dtype=torch.bfloat16)
    variants = [Lists(sparsity=0.5), Lists(sparsity=0.5, budgets="reversed")]
    found = bench_attention(work, variants, device, backends=["triton"], seconds=0.05)
    assert found.problems == []
    rows = [row for row in found.rows if row["op"] == "attention"]
    assert [row["budgets"] for row in rows] == ["equal", "reversed"]
    assert all(row["peak_bytes"] > 0 for row in rows)
    assert {"flash", "flex"} <= set(rows[0]["dense_ms"])
    chosen = bench_selection(work, device, seconds=0.05)
    assert chosen.problems == []
    assert all(row["pack_ms_p50"] > 0 for row in chosen.rows)
