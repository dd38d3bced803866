"""What the rows must show: ratios within one run, never times."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hess.bench.attention import ratio_to_ideal
from hess.bench.rows import Row

LONG = 64_000
LONG_ON_CPU = 8_000
EQUAL_SPARSITY = 0.005
"""Two policies compare if their block sparsities differ by no more."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A ratio to stay below.

    Args:
        what: what is compared, in words.
        must, aim: bounds of the largest value.
        values: the ratios in some rows; none if nothing suitable was measured.
    """

    what: str
    must: float
    aim: float
    values: Callable[[Sequence[Row]], Iterator[float]]


def _sparse(rows: Sequence[Row], device: str, dtype: str, tokens: int) -> Iterator[Row]:
    """Rows of the default backend at work, at VGGT's head size."""
    for row in rows:
        if (
            row["op"] == "attention"
            and row["auto"]
            and row["budgets"] != "reversed"
            and row["sparsity_asked"] > 0
            and row["head_dim"] == 64
            and (row["device"], row["dtype"]) == (device, dtype)
            and row["tokens"] >= tokens
            and (device == "cpu" or "H200" in row["machine"]["device"])
        ):
            yield row


def _against_flash(rows: Sequence[Row]) -> Iterator[float]:
    for row in _sparse(rows, "cuda", "bfloat16", LONG):
        if "flash" in row["dense_ms"]:
            flash_ms = row["dense_ms"]["flash"]
            yield ratio_to_ideal(row["ms_p50"], row["work_saving"], flash_ms)


def _against_best(rows: Sequence[Row]) -> Iterator[float]:
    for row in _sparse(rows, "cuda", "bfloat16", 0):
        if row["sparsity_asked"] <= 0.75:
            yield row["ratio_to_ideal"]


def _on_cpu(dtype: str) -> Callable[[Sequence[Row]], Iterator[float]]:
    return lambda rows: (row["ratio_to_ideal"] for row in _sparse(rows, "cpu", dtype, LONG_ON_CPU))


def _unequal(device: str, dtype: str, tokens: int) -> Callable[[Sequence[Row]], Iterator[float]]:
    """HeSS-like against equal budgets, all else alike."""

    def values(rows: Sequence[Row]) -> Iterator[float]:
        alike = ("machine", "command", "tokens", "heads", "lists", "sparsity_asked")
        found = list(_sparse(rows, device, dtype, tokens))
        for hess in (row for row in found if row["budgets"] == "hess"):
            for equal in (row for row in found if row["budgets"] == "equal"):
                if all(hess[name] == equal[name] for name in alike):
                    yield hess["ms_p50"] / equal["ms_p50"]

    return values


def _selection(least: int, most: int) -> Callable[[Sequence[Row]], Iterator[float]]:
    return lambda rows: (
        row["selection_share"]
        for row in _sparse(rows, "cuda", "bfloat16", 0)
        if least <= row["views"] <= most
    )


def _end_to_end(device: str) -> Callable[[Sequence[Row]], Iterator[float]]:
    def values(rows: Sequence[Row]) -> Iterator[float]:
        found = [row for row in rows if row["op"] == "model" and row["device"] == device]
        for hess in (row for row in found if row["policy"] == "hess"):
            uniform = uniform_beside(hess, found)
            if uniform is not None:
                yield hess["seconds"] / uniform["seconds"]

    return values


def uniform_beside(hess: Row, rows: Sequence[Row]) -> Row | None:
    """The row of the uniform policy that was timed in turns with ``hess`` and dropped as much."""
    alike = ("model", "dtype", "views", "sparse_ratio", "cdf_threshold", "machine", "command")
    for row in rows:
        gap = abs(row["block_sparsity"] - hess["block_sparsity"])
        same = all(row[name] == hess[name] for name in alike)
        if row["policy"] == "uniform" and same and gap <= EQUAL_SPARSITY:
            return row
    return None


TARGETS = (
    Target(
        what="H200, bf16, S ≥ 64k: against FlashAttention-2, times (1 − s)",
        must=0.95,
        aim=0.80,
        values=_against_flash,
    ),
    Target(
        what="H200, bf16, s ≤ 0.75: against the best dense kernel, times (1 − s)",
        must=1.30,
        aim=1.10,
        values=_against_best,
    ),
    Target(
        what="H200, bf16: HeSS-like against equal budgets, same number of blocks",
        must=1.05,
        aim=1.00,
        values=_unequal("cuda", "bfloat16", 0),
    ),
    Target(
        what="H200, bf16, ≥ 50 views: share of pooling, selection and packing",
        must=0.05,
        aim=0.03,
        values=_selection(50, 10**9),
    ),
    Target(
        what="H200, bf16, 20 views: share of pooling, selection and packing",
        must=0.10,
        aim=0.05,
        values=_selection(20, 20),
    ),
    Target(
        what="CPU, fp32, S ≥ 8k: against fp32 SDPA, times (1 − s)",
        must=1.25,
        aim=1.10,
        values=_on_cpu("float32"),
    ),
    Target(
        what="CPU, bf16, S ≥ 8k: against bf16 SDPA, times (1 − s)",
        must=0.60,
        aim=0.45,
        values=_on_cpu("bfloat16"),
    ),
    Target(
        what="CPU, fp32, S ≥ 8k: HeSS-like against equal budgets, same number of blocks",
        must=1.05,
        aim=1.00,
        values=_unequal("cpu", "float32", LONG_ON_CPU),
    ),
    Target(
        what="CPU, bf16, S ≥ 8k: HeSS-like against equal budgets, same number of blocks",
        must=1.05,
        aim=1.00,
        values=_unequal("cpu", "bfloat16", LONG_ON_CPU),
    ),
    Target(
        what="GPU, whole model: HeSS against uniform at equal block sparsity",
        must=1.02,
        aim=1.00,
        values=_end_to_end("cuda"),
    ),
    Target(
        what="CPU, whole model: HeSS against uniform at equal block sparsity",
        must=1.02,
        aim=1.00,
        values=_end_to_end("cpu"),
    ),
)
