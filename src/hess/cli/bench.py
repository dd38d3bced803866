"""``hess bench``: how fast sparse attention is on this machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from hess.cli.console import (
    Device,
    Dtype,
    Json,
    busy,
    command_line,
    console,
    prepare_file,
    print_json,
    print_table,
    use_threads,
)
from hess.errors import BackendUnavailableError, ConfigError, HessError

if TYPE_CHECKING:
    import torch

    from hess.bench.rows import Outcome
    from hess.bench.workload import Workload


@dataclass(frozen=True, kw_only=True)
class _Common:
    """What all benchmarks share."""

    device: Device = "cpu"
    threads: int | None = None
    """CPU threads; default: one per core."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="JSONL")] = None
    """Write the rows, one JSON object per line."""
    json: Json = False

    def _device(self) -> "torch.device":
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise BackendUnavailableError("this torch finds no CUDA device; use --device cpu")
        if self.output is not None:
            prepare_file(self.output)
        if self.threads is not None:
            use_threads(self.threads)
        return torch.device(self.device)

    def _finish(self, outcome: "Outcome", origin: dict[str, object], *tables: str) -> None:
        """Write and print what was found.

        Raises:
            HessError: something was wrong.
        """
        from hess.bench.report import TABLES, narrowed
        from hess.bench.rows import write_rows

        rows = [row | origin for row in outcome.rows]
        if self.output is not None:
            write_rows(self.output, rows)
        if self.json:
            print_json(rows)
        else:
            for name in tables if rows else ():
                caption, table = narrowed(TABLES[name](rows))
                if len(table) > 1:  # one number of views says nothing of growth
                    print_table(table, f"{name}\n[dim]{caption}[/]")
        for note in outcome.notes:
            console.print(note, highlight=False, soft_wrap=True)
        if outcome.problems:
            raise HessError("; ".join(outcome.problems))


@dataclass(frozen=True, kw_only=True)
class _AttentionSizes(_Common):
    """Sizes of one attention; VGGT's by default."""

    views: tuple[int, ...] = ()
    """Views of 1,369 patches and 5 special tokens; a benchmark for each number."""
    tokens: tuple[int, ...] = ()
    """Or so many patches without special tokens."""
    heads: int = 16
    head_dim: int = 64
    dtype: Dtype = "float32"
    seconds: float = 10.0
    """About how long to measure each size."""
    seed: int = 0

    def _works(self) -> "list[Workload]":
        import torch

        from hess.bench.workload import Workload

        if min((*self.views, self.heads, self.head_dim)) < 1 or min(self.tokens, default=2) < 2:
            raise ConfigError("views, heads and head_dim must be at least 1, tokens at least 2")
        sizes = {
            "dtype": getattr(torch, self.dtype),
            "heads": self.heads,
            "head_dim": self.head_dim,
            "seed": self.seed,
        }
        views = self.views or (() if self.tokens else (6,))
        works = [Workload.views(number, **sizes) for number in views]
        return works + [Workload.tokens(number, **sizes) for number in self.tokens]


@dataclass(frozen=True, kw_only=True)
class BenchAttention(_AttentionSizes):
    """Sparse attention against the best dense kernel, after a check that it is right.

    Example: hess bench attention --views 20 50 --device cuda --dtype bfloat16
    """

    sparsity: tuple[float, ...] = (0.5, 0.75, 0.9)
    """Shares of the attention products to drop."""
    budgets: tuple[Literal["equal", "hess", "reversed"], ...] = ("equal", "hess")
    """Equal heads; 3 of 16 nearly dense; these in the wrong order (triton only)."""
    lists: Literal["pooled", "random"] = "pooled"
    """The best blocks of a pooled attention map, or any."""
    backends: tuple[str, ...] = ()
    """By name; default: all that can run."""

    def run(self) -> None:
        from hess.bench.attention import bench_attention
        from hess.bench.rows import Outcome, origin
        from hess.bench.workload import Lists

        device = self._device()
        shared = origin(device, command_line())
        variants = [
            Lists(sparsity=s, budgets=b, source=self.lists)
            for s in self.sparsity
            for b in self.budgets
        ]
        if not variants:
            raise ConfigError("give at least one sparsity and one kind of budgets")
        outcome = Outcome()
        for work in self._works():
            with busy(f"attention over {work.layout.num_tokens:,} tokens"):
                outcome += bench_attention(
                    work, variants, device, backends=self.backends, seconds=self.seconds
                )
        self._finish(outcome, shared, "attention")


@dataclass(frozen=True, kw_only=True)
class BenchSelection(_AttentionSizes):
    """What pooling, choosing the blocks and packing take of sparse attention.

    Example: hess bench selection --views 20 --device cuda --dtype bfloat16
    """

    def run(self) -> None:
        from hess.bench.rows import Outcome, origin
        from hess.bench.selection import bench_selection

        device = self._device()
        shared = origin(device, command_line())
        outcome = Outcome()
        for work in self._works():
            with busy(f"selection over {work.layout.num_tokens:,} tokens"):
                outcome += bench_selection(work, device, seconds=self.seconds)
        self._finish(outcome, shared, "selection")


@dataclass(frozen=True, kw_only=True)
class BenchModel(_Common):
    """Whole models, dense and under uniform and HeSS sparsity: seconds by stage, and memory.

    Example: hess bench model --model small --views 8 20 50
    """

    model: Literal["nano", "small", "full"] = "nano"
    """nano; a small VGGT or VGGT-1B (bf16) with random weights and made-up head scores."""
    views: tuple[int, ...] = (20, 50, 100)
    size: int | None = None
    """Side of the photos in pixels; default: what the model is made for."""
    rounds: int = 3
    """Passes per policy, in turns; the first is left out."""

    def run(self) -> None:
        from hess.bench.model import bench_model
        from hess.bench.rows import Outcome, origin
        from hess.bench.suite import MODELS, policies

        if self.rounds < 1 or min(self.views, default=0) < 1:
            raise ConfigError("give at least one round and numbers of views of at least 1")
        device = self._device()
        shared = origin(device, command_line())
        build, own_size = MODELS[self.model]
        model, scores = build(device)
        size = own_size if self.size is None else self.size
        outcome = Outcome()
        for views in self.views:
            with busy(f"{self.model}, {views} views"):
                outcome += bench_model(
                    model,
                    policies(scores),
                    num_views=views,
                    height=size,
                    width=size,
                    rounds=self.rounds,
                )
        self._finish(outcome, shared, "model", "stages", "scaling")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure how fast sparse attention is on this machine. `make bench-cpu` and `make bench-gpu`
    run all that the documentation reports.

    Example: hess bench attention --views 6
    """

    what: tyro.conf.OmitSubcommandPrefixes[
        Annotated[BenchAttention, tyro.conf.subcommand("attention")]
        | Annotated[BenchSelection, tyro.conf.subcommand("selection")]
        | Annotated[BenchModel, tyro.conf.subcommand("model")]
    ]

    def run(self) -> None:
        self.what.run()
