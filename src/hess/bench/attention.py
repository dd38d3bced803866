"""Block-sparse attention against dense attention, on the same inputs and in one run."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from hess.attention.block_mask import BlockMask
from hess.attention.block_sparse import BACKENDS, block_sparse_attention, resolve_backend
from hess.attention.sparsity import block_sparsity, flop_saving, work_saving
from hess.attention.triton_backend import attend_lists, pack_keys
from hess.bench.dense_kernels import dense_kernels
from hess.bench.gate import check_backends
from hess.bench.roofline import chip_of, roofline_ms
from hess.bench.rows import Outcome, Row
from hess.bench.selection import selection_share
from hess.bench.timing import Neighbours, Run, Timing, failing, peak_bytes, time_in_turns
from hess.bench.workload import Lists, Workload

WRITTEN_OUT = ("reference", "masked")
"""Backends that build the whole attention map and are not meant for long sequences."""


@torch.inference_mode()
def bench_attention(
    work: Workload,
    variants: Sequence[Lists],
    device: torch.device,
    *,
    backends: Sequence[str] = (),
    seconds: float = 10.0,
) -> Outcome:
    """Time every backend on every variant beside the dense kernels; a row for each.

    Args:
        work: tokens, heads and precision that all variants share.
        variants: the block lists.
        device: where to run.
        backends: by name, and then they must run; none: all that do.
        seconds: about how long to measure in all.

    Returns:
        Rows of op "attention", and of op "dense" for the dense kernels. A backend that is wrong on
        a small case of the same kind is a problem and is not timed.
    """
    outcome = Outcome()
    asked = list(backends) or [name for name in BACKENDS if name not in WRITTEN_OUT]
    checks = check_backends(work, variants[0].source, device, asked)
    for name, check in checks.items():
        if check.why_not is not None and not backends:
            outcome.notes.append(f"{name}: {check.why_not}")
        elif not check.passed:
            outcome.problems.append(f"{name} in {work.precision} was not timed: {check}")
    right = [name for name, check in checks.items() if check.passed]

    q, k, v = work.inputs(device)
    dense, missing = dense_kernels(q, k, v)
    outcome.notes.extend(f"dense {name}: {reason}" for name, reason in missing.items())
    if not dense:
        outcome.problems.append("no dense kernel runs here, so there is nothing to compare with")
        return outcome
    masks = {lists: lists.select(work, q, k) for lists in variants}
    choices = {lists: partial(lists.select, work, q, k) for lists in variants}
    sparse = {
        (name, lists): _sparse_run(name, lists, mask, work, q, k, v)
        for lists, mask in masks.items()
        for name in right
        if name == "triton" or lists.budgets != "reversed"
    }
    for (name, lists), reason in failing(sparse, device).items():
        outcome.problems.append(f"{name} failed on {work} with {lists}: {reason}")
        del sparse[name, lists]
    packing = {"pack": partial(pack_keys, k, v, work.layout, work.block_size_kv)}
    neighbours = Neighbours()
    times = time_in_turns(
        {**dense, **choices, **sparse, **(packing if "triton" in right else {})},
        device,
        seconds=seconds,
    )

    shared = work.as_dict() | {
        "device": device.type,
        "cores_of_others": neighbours.cores(),
    }
    for name, run in dense.items():
        measured = _measured(times[name], peak_bytes(run, device))
        outcome.rows.append({"op": "dense", "backend": name, **shared, **measured})
    dense_ms = {name: times[name].p50 for name in dense}
    best = min(dense_ms, key=dense_ms.__getitem__)
    auto = resolve_backend("auto", work.layout, q, k, v)
    for (name, lists), run in sparse.items():
        mask, time = masks[lists], times[name, lists]
        kept = block_sparsity(mask, work.layout, work.block_size_kv)
        saved = float(work_saving(mask, work.layout, *work.block_sizes).mean())
        products = float(flop_saving(mask, work.layout, *work.block_sizes).mean())
        select_ms = times[lists].p50
        pack_ms = times["pack"].p50 if name == "triton" else None
        row: Row = {
            "op": "attention",
            "backend": name,
            "auto": name == auto,
            **shared,
            "budgets": lists.budgets,
            "lists": lists.source,
            "sparsity_asked": lists.sparsity,
            "block_sparsity": float(kept.mean()),
            "flop_saving": products,
            "work_saving": saved,
            **_measured(time, peak_bytes(run, device)),
            "dense_backend": best,
            "dense_ms_p50": dense_ms[best],
            "dense_ms": dense_ms,
            "ratio_to_ideal": ratio_to_ideal(time.p50, saved, dense_ms[best]),
            "select_ms_p50": select_ms,
            "selection_share": selection_share(select_ms, pack_ms, time.p50),
            "gate_error": checks[name].error,
            "gate_limit": checks[name].limit,
            "roofline_ms": roofline_ms(chip_of(device), work, products, len(mask.indices)),
        }
        outcome.rows.append(row)
    return outcome


def ratio_to_ideal(ms: float, sparsity: float, dense_ms: float) -> float:
    """Time over that of dense attention on the share of the work that is left: 1 is ideal.

    Args:
        ms, dense_ms: of sparse and of dense attention.
        sparsity: dropped share of the tiles (:func:`work_saving`), in [0, 1).
    """
    return ms / ((1 - sparsity) * dense_ms)


def _sparse_run(
    backend: str, lists: Lists, mask: BlockMask, work: Workload, q: Tensor, k: Tensor, v: Tensor
) -> Run:
    case = mask, work.layout, *work.block_sizes
    if lists.budgets != "reversed":
        return partial(block_sparse_attention, q, k, v, *case, backend=backend)

    def shortest_first() -> None:
        heads = mask.head_order.to(q.device)
        keys = pack_keys(k, v, work.layout, work.block_size_kv)
        attend_lists(q, keys, *case, heads=heads.flip(0))

    return shortest_first


def _measured(time: Timing, peak: int | None) -> Row:
    return {
        "ms_p50": time.p50,
        "ms_p20": time.p20,
        "ms_p80": time.p80,
        "host_ms_p50": time.host_p50,
        "samples": time.samples,
        "peak_bytes": peak,
    }
