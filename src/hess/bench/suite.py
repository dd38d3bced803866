"""The benchmarks that settle the targets: steps that each give rows, for a GPU and for a CPU."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product

import torch

from hess.attention.block_sparse import resolve_backend
from hess.attention.layout import TokenLayout
from hess.bench.attention import bench_attention
from hess.bench.model import MadeUpScores, bench_model, sharpen
from hess.bench.report import BREAK_EVEN_STEP
from hess.bench.rows import Outcome
from hess.bench.selection import bench_choosing, bench_selection
from hess.bench.workload import Budgets, Lists, Source, Workload
from hess.models.base import Model
from hess.models.loading import empty_model, load_model
from hess.models.random_weights import fill_randomly
from hess.models.vggt import VGGT, VGGTConfig
from hess.policies.base import Policy
from hess.policies.dense import Dense
from hess.policies.hess import HeSS
from hess.policies.hess_plus import HessPlus
from hess.policies.scored import ScoreSource
from hess.policies.uniform import Uniform
from hess.sensitivity.profile import load_profile

SPARSITIES = (0.5, 0.75, 0.9)
SETTINGS = ((0.5, 0.9), (0.8, 0.4), (0.75, None))
"""Sparse ratio and CDF threshold: the paper's two, and a ratio alone, which makes HeSS and uniform
drop exactly as much."""

Step = Callable[[torch.device], Iterator[Outcome]]
"""Yields what it found bit by bit, so that nothing is lost if it is stopped."""


def policies(source: ScoreSource) -> list[Policy]:
    """Dense, uniform and HeSS at :data:`SETTINGS`, and HeSS+ at the last."""
    found: list[Policy] = [Dense()]
    for ratio, threshold in SETTINGS:
        found.append(Uniform(sparse_ratio=ratio, cdf_threshold=threshold))
        found.append(HeSS(source, sparse_ratio=ratio, cdf_threshold=threshold))
    ratio, threshold = SETTINGS[-1]
    return [*found, HessPlus(source, sparse_ratio=ratio, cdf_threshold=threshold)]


def _full(device: torch.device) -> tuple[Model, ScoreSource]:
    """VGGT-1B in bf16 with random weights."""
    model = empty_model("facebook/VGGT-1B")
    fill_randomly(model, seed=0, dtype=torch.bfloat16, device=device)
    return sharpen(model), MadeUpScores.of(model)


def _small(device: torch.device) -> tuple[Model, ScoreSource]:
    """A VGGT of a sixth of the depth and a quarter of the width, with random weights."""
    config = VGGTConfig(
        image_size=224,
        dim=256,
        num_heads=4,
        depth=4,
        vit_depth=2,
        camera_trunk_depth=1,
        camera_heads=4,
        dense_layers=(0, 1, 2, 3),
        dpt_features=32,
        dpt_out_channels=(32, 32, 32, 32),
    )
    with torch.device("meta"):
        model = VGGT(config, "small VGGT")
    return sharpen(fill_randomly(model, seed=0, device=device)), MadeUpScores.of(model)


def _nano(device: torch.device) -> tuple[Model, ScoreSource]:
    """The bundled model with its profile."""
    return load_model("nano", device=device), load_profile("nano")


MODELS: dict[str, tuple[Callable[[torch.device], tuple[Model, ScoreSource]], int]] = {
    "nano": (_nano, 48),
    "small": (_small, 224),
    "full": (_full, 518),
}
"""What builds a model with the scores of its heads, and the side of its photos in pixels."""


def usual_backend(work: Workload, device: torch.device) -> str:
    """What "auto" means here."""
    example = torch.empty(1, 1, 0, work.head_dim, dtype=work.dtype, device=device)
    return resolve_backend("auto", work.layout, example, example, example)


def attention_step(
    device: torch.device,
    *,
    work: Workload,
    source: Source = "pooled",
    sparsities: tuple[float, ...] = SPARSITIES,
    backends: tuple[str, ...] = (),
    seconds: float,
) -> Iterator[Outcome]:
    """Equal, HeSS-like and, on a GPU, wrongly ordered heads, and full lists."""
    budgets: list[Budgets] = ["equal", "hess"]
    if device.type == "cuda":
        budgets.append("reversed")
    variants = [Lists(sparsity=s, budgets=b, source=source) for s in sparsities for b in budgets]
    if device.type == "cuda":
        variants.insert(0, Lists(sparsity=0.0, source=source))
    backends = tuple(usual_backend(work, device) if b == "auto" else b for b in backends)
    yield bench_attention(work, variants, device, backends=backends, seconds=seconds)


def selection_step(
    device: torch.device, *, works: tuple[Workload, ...], seconds: float
) -> Iterator[Outcome]:
    for work in works:
        yield bench_selection(work, device, seconds=seconds)


def choosing_step(device: torch.device, *, works: tuple[Workload, ...]) -> Iterator[Outcome]:
    """Choosing alone, over sequences that are too long for the rest."""
    for work in works:
        yield bench_choosing(work, device)


def break_even_step(
    device: torch.device, *, tokens: tuple[int, ...], dtype: torch.dtype, seconds: float
) -> Iterator[Outcome]:
    """Short sequences, where choosing may take longer than it saves."""
    for number in tokens:
        work = Workload.tokens(number, dtype=dtype)
        lists, backends = [Lists(sparsity=0.75)], (usual_backend(work, device),)
        yield bench_attention(work, lists, device, backends=backends, seconds=seconds)


def model_step(
    device: torch.device,
    *,
    name: str,
    views: tuple[int, ...],
    rounds: Callable[[int], int],
) -> Iterator[Outcome]:
    """One of :data:`MODELS` at growing numbers of views."""
    build, size = MODELS[name]
    model, source = build(device)
    for num_views in views:
        yield bench_model(
            model,
            policies(source),
            num_views=num_views,
            height=size,
            width=size,
            rounds=rounds(num_views),
        )


def gpu_steps() -> Mapping[str, Step]:
    """All rows of one GPU; about seven minutes on an H200."""
    bf16 = partial(Workload.views, dtype=torch.bfloat16)
    return {
        "attention, 20 views": partial(attention_step, work=bf16(20), seconds=5),
        "attention, 50 views": partial(attention_step, work=bf16(50), seconds=10),
        "attention, 100 views": partial(attention_step, work=bf16(100), seconds=25),
        "attention, 50 views, random lists": partial(
            attention_step, work=bf16(50), source="random", sparsities=(0.75,), seconds=5
        ),
        "selection": partial(
            selection_step, works=tuple(bf16(n) for n in (20, 50, 100, 200)), seconds=4
        ),
        "choosing alone, 1,000 views": partial(choosing_step, works=(bf16(1000, heads=4),)),
        BREAK_EVEN_STEP: partial(
            break_even_step, tokens=(1024, 2048, 4096, 8192), dtype=torch.bfloat16, seconds=1
        ),
        "full-size VGGT": partial(
            model_step,
            name="full",
            views=(8, 20, 50, 100, 200),
            rounds=lambda views: 5 if views <= 20 else 3 if views <= 50 else 1,
        ),
    }


def cpu_steps() -> Mapping[str, Step]:
    """All rows of a CPU; about twelve minutes on two cores."""
    steps: dict[str, Step] = {}
    for views, dtype in product((6, 12), (torch.float32, torch.bfloat16)):
        work = Workload.views(views, dtype=dtype)
        steps[f"attention, {views} views, {work.precision}"] = partial(
            attention_step, work=work, backends=("auto",), seconds=4 * views
        )
    one = partial(
        attention_step, work=Workload.views(6, dtype=torch.float32), sparsities=(0.75,), seconds=10
    )
    steps["attention, random lists"] = partial(one, source="random", backends=("auto",))
    steps["attention, all backends"] = partial(one, backends=())
    works = tuple(Workload.views(n, dtype=torch.float32) for n in (6, 12))
    steps["selection"] = partial(selection_step, works=works, seconds=10)
    long = tuple(Workload.views(n, dtype=torch.bfloat16, heads=4) for n in (250, 500, 1000))
    steps["choosing alone, up to 1,000 views"] = partial(choosing_step, works=long)
    steps[BREAK_EVEN_STEP] = partial(
        break_even_step, tokens=(512, 1024, 2048, 4096), dtype=torch.float32, seconds=2
    )
    steps["nano"] = partial(model_step, name="nano", views=(20, 50), rounds=lambda views: 5)
    steps["small VGGT"] = partial(
        model_step, name="small", views=(8, 20, 50), rounds=lambda views: 7 if views <= 20 else 3
    )
    return steps


def tiny_steps() -> Mapping[str, Step]:
    """The same kinds of steps at sizes that mean nothing: shows that all of it runs."""
    layout = TokenLayout(num_views=2, grid_h=12, grid_w=12, num_special=5)
    work = Workload(layout=layout, dtype=torch.float32, heads=4, head_dim=16)
    return {
        "attention": partial(
            attention_step, work=work, sparsities=(0.5,), backends=("auto",), seconds=0.05
        ),
        "selection": partial(selection_step, works=(work,), seconds=0.05),
        "choosing": partial(choosing_step, works=(work,)),
        BREAK_EVEN_STEP: partial(
            break_even_step, tokens=(256,), dtype=torch.float32, seconds=0.05
        ),
        "model": partial(model_step, name="nano", views=(2, 3), rounds=lambda views: 1),
    }


SUITES: dict[str, Callable[[], Mapping[str, Step]]] = {
    "cpu": cpu_steps,
    "gpu": gpu_steps,
    "tiny": tiny_steps,
}
