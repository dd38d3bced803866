"""Whole models, dense and sparse: seconds per stage, memory, growth with the number of views."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from hess.bench.gate import what_is_wrong
from hess.bench.rows import Outcome, Row
from hess.bench.timing import Neighbours, peak_bytes
from hess.bench.workload import Workload
from hess.models.base import Model
from hess.policies.base import Policy
from hess.sparsification import SparsityStats, sparsify

STAGES = ("encoder", "frame", "global attention", "global rest", "heads", "other")


@dataclass(frozen=True, eq=False)
class MadeUpScores:
    """Head scores for models without a profile: in each layer a few heads matter by far the most.

    Log-normal with sigma 1.5, which gives three heads of sixteen nearly two thirds of the weight.

    Args:
        layers, heads: of the model.
        seed: of the scores.
    """

    layers: int
    heads: int
    seed: int = 0

    @classmethod
    def of(cls, model: Model) -> "MadeUpScores":
        """For the global layers of ``model``."""
        return cls(len(model.global_attention_sites()), model.num_heads)

    def scores(self, *view: object) -> Tensor:
        """Scores [layers, heads], whatever view of them is asked for."""
        generator = torch.Generator().manual_seed(self.seed)
        return (1.5 * torch.randn(self.layers, self.heads, generator=generator)).exp()

    def layer_shares(self, camera_weight: float | None = None) -> Tensor:
        """All layers alike."""
        return torch.full((self.layers,), 1 / self.layers, dtype=torch.float64)

    def check_model(self, model: Model) -> None:
        """Any model of the same size will do."""


@dataclass(frozen=True, kw_only=True)
class StageClock:
    """Time spent inside modules, summed by stage.

    Args:
        device: where the modules run.
        stages: modules by stage; they may lie inside each other.
    """

    device: torch.device
    stages: Mapping[str, Sequence[nn.Module]]
    _spans: dict[str, list[tuple[Any, Any]]] = field(default_factory=lambda: defaultdict(list))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside the block."""
        hooks = []
        for stage, modules in self.stages.items():
            for module in modules:
                begun: list[Any] = []

                def before(*_: object, begun: list[Any] = begun) -> None:
                    begun.append(self._now())

                def after(*_: object, begun: list[Any] = begun, stage: str = stage) -> None:
                    self._spans[stage].append((begun.pop(), self._now()))

                hooks.append(module.register_forward_pre_hook(before))
                hooks.append(module.register_forward_hook(after))
        begin = self._now()
        try:
            yield
        finally:
            self._spans["total"].append((begin, self._now()))
            for hook in hooks:
                hook.remove()

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, and "total". Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return {
                stage: sum(begin.elapsed_time(end) for begin, end in spans) / 1000
                for stage, spans in self._spans.items()
            }
        return {
            stage: sum(end - begin for begin, end in spans) for stage, spans in self._spans.items()
        }

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def stage_seconds(model: Model, images: Tensor) -> dict[str, float]:
    """One forward pass over ``images`` [1, N, 3, H, W]: seconds of all :data:`STAGES` and "total".

    "global attention" is the attention of the global blocks with its projections and the choice
    of the blocks, "global rest" their norms and MLPs, "other" what none of the stages holds.
    """
    anatomy, sites = model.anatomy(), model.global_attention_sites()
    clock = StageClock(
        device=images.device,
        stages={
            "encoder": anatomy.encoder_blocks,
            "frame": anatomy.frame_blocks,
            "global attention": [site.module for site in sites],
            "global rest": [site.parent for site in sites],
            "heads": anatomy.heads,
        },
    )
    with clock.running():
        model(images)
    found = dict.fromkeys(STAGES, 0.0) | clock.seconds()
    found["global rest"] -= found["global attention"]
    found["other"] = found["total"] - sum(found[stage] for stage in STAGES if stage != "other")
    return found


def sharpen(model: Model, gain: float = 2.0) -> Model:
    """Give the norms of queries and keys in the global attentions this weight.

    Random weights of 1 make every query see all keys almost alike; with 2 and the photos below,
    uniform sparsity at (0.5, 0.9) and (0.8, 0.4) drops about what the paper reports.
    """
    for site in model.global_attention_sites():
        for name, weight in site.module.named_parameters():
            if name in ("q_norm.weight", "k_norm.weight"):
                weight.data.fill_(gain)
    return model


def _global_qkv(model: Model) -> Tensor:
    """Joint projection of the first global attention, [3 * dim, dim]."""
    return dict(model.global_attention_sites()[0].module.named_parameters())["qkv.weight"]


def _what_is_wrong(model: Model, device: torch.device) -> list[str]:
    qkv = _global_qkv(model)
    work = Workload.views(
        1,
        dtype=qkv.dtype,
        head_dim=qkv.shape[1] // model.num_heads,
        block_size_q=model.block_size_q,
        block_size_kv=model.block_size_kv,
    )
    with torch.inference_mode():
        return what_is_wrong(work, device, "auto")


def _fill_with_seconds(found: dict[str, float], model: Model, images: Tensor) -> None:
    found |= stage_seconds(model, images)


@torch.inference_mode()
def bench_model(
    model: Model,
    policies: Sequence[Policy],
    *,
    num_views: int,
    height: int,
    width: int,
    rounds: int = 3,
    seed: int = 0,
) -> Outcome:
    """Time a model under each policy, in turns; a row of op "model" for each.

    Args:
        model: in its final place and precision.
        policies: in the order in which they run; the first is dense.
        num_views, height, width: the photos, which are random but smooth.
        rounds: passes per policy; the median counts, without the first if there are more.
        seed: of the photos.

    Returns:
        No rows if selection or backend are wrong on a small case of the same kind.
    """
    device = next(model.parameters()).device
    outcome = Outcome(problems=_what_is_wrong(model, device))
    if outcome.problems:
        return outcome
    images = smooth_images(num_views, height, width, seed).to(device)
    passes: list[list[dict[str, float]]] = [[] for _ in policies]
    peaks: dict[int, int | None] = {}
    stats: dict[int, SparsityStats] = {}
    neighbours = Neighbours()
    for _ in range(rounds):
        for i, policy in enumerate(policies):
            with sparsify(model, policy) as run:
                if i in stats:
                    passes[i].append(stage_seconds(model, images))
                else:
                    first: dict[str, float] = {}
                    peaks[i] = peak_bytes(
                        partial(_fill_with_seconds, first, model, images), device
                    )
                    passes[i].append(first)
                    stats[i] = run.stats
    others = neighbours.cores()
    for i, policy in enumerate(policies):
        settings = policy.settings()
        counted = passes[i][1:] or passes[i]
        seconds = {stage: median(found[stage] for found in counted) for stage in counted[0]}
        outcome.rows.append(
            {
                "op": "model",
                "model": model.model_name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "device": device.type,
                "dtype": str(_global_qkv(model).dtype).removeprefix("torch."),
                "views": num_views,
                "height": height,
                "width": width,
                "tokens": model.token_layout(images).num_tokens,
                "policy": policy.name,
                "sparse_ratio": settings.get("sparse_ratio"),
                "cdf_threshold": settings.get("cdf_threshold"),
                "backends": list(stats[i].backends),
                "block_sparsity": stats[i].block_sparsity,
                "flop_saving": stats[i].flop_saving,
                "seconds": seconds.pop("total"),
                "stage_seconds": seconds,
                "samples": len(counted),
                "peak_bytes": peaks[i],
                "seed": seed,
                "cores_of_others": others,
            }
        )
    return outcome


def smooth_images(num_views: int, height: int, width: int, seed: int) -> Tensor:
    """Random colours that change slowly across a view: [1, N, 3, H, W] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num_views, 3, 8, 8, generator=generator)
    size = height, width
    return nn.functional.interpolate(coarse, size, mode="bilinear", align_corners=True)[None]


def scaling_exponent(rows: Sequence[Row]) -> float:
    """The slope of log seconds over log views between the two largest numbers of views.

    Args:
        rows: of one policy, at least two.
    """
    smaller, larger = sorted(rows, key=lambda row: row["views"])[-2:]
    growth = larger["seconds"] / smaller["seconds"]
    return math.log(growth) / math.log(larger["views"] / smaller["views"])
