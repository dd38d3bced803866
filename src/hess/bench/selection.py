"""What it costs to choose the blocks, beside the attention over them."""

import time
from functools import partial

import torch

from hess.attention.block_mask import BlockMask
from hess.attention.block_sparse import block_sparse_attention, resolve_backend
from hess.attention.fine_scores import parts_of, pool_fine_scores
from hess.attention.pooled_scores import PooledScores, pool_scores
from hess.attention.selection import baseline_counts, select_blocks, select_top
from hess.attention.triton_packing import pack_keys
from hess.bench.gate import what_is_wrong
from hess.bench.model import MadeUpScores
from hess.bench.rows import Outcome
from hess.bench.timing import Neighbours, Run, peak_bytes, time_in_turns
from hess.bench.workload import Lists, Workload
from hess.policies.hess_plus import HessPlus

SPARSE_RATIO, CDF_THRESHOLD = 0.8, 0.4


@torch.inference_mode()
def bench_selection(work: Workload, device: torch.device, *, seconds: float = 5.0) -> Outcome:
    """Time pooling, selection under four rules, and the attention over the lists that result.

    The rules: "ratio" keeps a fifth of every row, "threshold" also what 40 % of the probability
    takes (the paper's setting 0.8, 0.4), "hess" a fifth in all with unequal heads, "hess+" a fifth
    in all with the blocks that match, for which pooling in parts counts as selection.

    Returns:
        Rows of op "selection". The share is that of pooling, selection and packing in all of the
        sparse attention; where the backend packs nothing in a step of its own, "pack_ms_p50" is
        None. No rows if selection or backend are wrong on a small case of the same kind.
    """
    q, k, v = work.inputs(device)
    layout, sizes = work.layout, work.block_sizes
    budgets = Lists(sparsity=SPARSE_RATIO, budgets="hess").head_budgets(work)[None]

    plus = HessPlus(MadeUpScores(1, work.heads), sparse_ratio=SPARSE_RATIO)
    split = parts_of(*sizes, plus.pool_parts)

    def pool() -> PooledScores:
        return pool_scores(q, k, layout, *sizes)

    def ratio() -> BlockMask:
        pooled = pool()
        return select_top(pooled, baseline_counts(pooled, SPARSE_RATIO, None))

    def threshold() -> BlockMask:
        pooled = pool()
        return select_top(pooled, baseline_counts(pooled, SPARSE_RATIO, CDF_THRESHOLD))

    def hess() -> BlockMask:
        pooled = pool()
        return select_blocks(pooled, budgets, baseline_counts(pooled, SPARSE_RATIO, None))

    def hess_plus() -> BlockMask:
        return plus.block_mask(pool_fine_scores(q, k, v, layout, *sizes, split), 0)

    # Pooled anew each time: the scores of a small map are computed once and kept.
    rules = {"ratio": ratio, "threshold": threshold, "hess": hess, "hess+": hess_plus}
    backend = resolve_backend("auto", layout, q, k, v)
    outcome = Outcome(problems=what_is_wrong(work, device, backend))
    if outcome.problems:
        return outcome
    runs: dict[str, Run] = {"pool": pool}
    if backend == "triton":
        runs["pack"] = lambda: pack_keys(k, v, layout, work.block_size_kv)
    for name, choose in rules.items():
        case = choose(), layout, *sizes
        runs[f"{name} pool and select"] = choose
        runs[f"{name} attention"] = partial(
            block_sparse_attention, q, k, v, *case, backend=backend
        )
    neighbours = Neighbours()
    timings = time_in_turns(runs, device, seconds=seconds)
    times = {name: time.p50 for name, time in timings.items()}
    others = neighbours.cores()
    for name in rules:
        choosing = times[f"{name} pool and select"]
        attention = times[f"{name} attention"]
        outcome.rows.append(
            {
                "op": "selection",
                "rule": name,
                "backend": backend,
                **work.as_dict(),
                "device": device.type,
                "cores_of_others": others,
                "pool_ms_p50": times["pool"],
                "select_ms_p50": max(0.0, choosing - times["pool"]),
                "host_ms_p50": timings[f"{name} pool and select"].host_p50,
                "pack_ms_p50": times.get("pack"),
                "attention_ms_p50": attention,
                "selection_share": selection_share(choosing, times.get("pack"), attention),
                "peak_bytes": peak_bytes(runs[f"{name} pool and select"], device),
            }
        )
    return outcome


@torch.inference_mode()
def bench_choosing(work: Workload, device: torch.device) -> Outcome:
    """Pool and choose a fifth of every row once, without the attention over it.

    For sequences over which attention would take too long: a row of op "choosing" with the time
    and the memory beyond queries and keys, and how large a map of the probabilities would be.
    """
    q, k, _ = work.inputs(device)
    listed: list[int] = []
    neighbours = Neighbours()
    begin = time.perf_counter()

    def choose() -> None:
        pooled = pool_scores(q, k, work.layout, *work.block_sizes)
        mask = select_top(pooled, baseline_counts(pooled, SPARSE_RATIO, None))
        listed.append(len(mask.indices))

    peak = peak_bytes(choose, device)
    row = {
        "op": "choosing",
        "rule": "ratio",
        **work.as_dict(),
        "device": device.type,
        "ms": 1000 * (time.perf_counter() - begin),
        "peak_bytes": peak,
        "list_bytes": 4 * sum(listed),
        "map_bytes": 4 * work.heads * work.map_size[0] * work.map_size[1],
        "cores_of_others": neighbours.cores(),
    }
    return Outcome(rows=[row])


def selection_share(choosing_ms: float, pack_ms: float | None, attention_ms: float) -> float:
    """Share of pooling, selection and packing in the whole sparse attention.

    Args:
        choosing_ms: pooling and selection.
        pack_ms: packing, which is part of ``attention_ms``; None: the backend does not pack.
    """
    return (choosing_ms + (pack_ms or 0.0)) / (choosing_ms + attention_ms)
