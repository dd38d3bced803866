"""An experiment as data: what the paper shows, which methods are measured, what is drawn.

Each is a TOML file in ``experiments/``. Keys are the fields of :class:`Experiment`;
``like = "NAME"`` takes those that are not given from another experiment.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from itertools import product
from typing import Any, Literal, get_args

from hess.errors import ConfigError
from hess.viz.style import METRIC_LABELS, policy_style

FigureKind = Literal[
    "tradeoff", "differences", "calibrations", "clouds", "heatmap", "runtime", "merging", "guard"
]
Expectation = Literal["better", "worse", "same"]

NAMES = (
    "fig1", "fig4", "fig5", "fig6", "fig7", "fig8", "fig9", "fig10", "fig11",
    "figS1", "figS2", "figS3", "table1", "table2", "tableS1", "tableS2", "merging", "readings",
)  # fmt: skip
"""The paper's experiments and two beside them."""

BEYOND = (
    *(f"beyond-{what}-{model}-{views}" for what in ("plus", "labels") for model in ("nano", "pi3")
      for views in (8, 16)),
    "beyond-policies", "beyond-scores", "beyond-blocks", "beyond-convergence", "beyond-guard",
)  # fmt: skip
"""Experiments on what goes beyond the paper, see docs/beyond.md."""

GROUPS = {"all": NAMES, "beyond": BEYOND}
"""Names that stand for several experiments."""

UNMEASURED: tuple[FigureKind, ...] = ("heatmap", "runtime", "guard")
"""Kinds that need no results per scene."""


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """One line of a figure: a method, and its settings beside the experiment's pairs.

    Args:
        method: name of a policy or transform.
        label: name in tables and legends; the experiment's labels differ.
        color: of its line, see :mod:`hess.reproduce.sweep`; None takes the policy's.
        expect: how the paper's text finds it beside the reference, by metric; metrics that it
            says nothing of are left out. Where the paper has numbers, those count instead.
        profile: key of the experiment's profiles; None takes the main one.
        options: lists of values by parameter; every combination is measured.
    """

    method: str
    label: str
    color: str | None = None
    expect: Mapping[str, Expectation] = field(default_factory=dict)
    profile: str | None = None
    options: Mapping[str, tuple[Any, ...]]

    def combinations(self) -> list[dict[str, Any]]:
        """All combinations of the options, the last changing fastest."""
        values = product(*self.options.values())
        return [dict(zip(self.options, chosen, strict=True)) for chosen in values]


@dataclass(frozen=True, kw_only=True)
class ProfileSpec:
    """A profile made for an experiment: another calibration, or the start of the main one.

    Args:
        first: only the first scenes of the main profile; the rest then means nothing.
        bundled: the bundled profile of the model with this behind its name; likewise.
        score_exponent: power of the scores of a bundled profile; None: its own.
        data, scenes, views, seed: what to calibrate on, see ``open_dataset``.
        inlier_on: see ``CalibrationConfig``.
        probes: draws of noise per scene of a calibration without ground truth, see
            ``ProbeConfig``; None calibrates with ground truth.
    """

    first: int | None = None
    bundled: str | None = None
    score_exponent: float | None = None
    data: str = "procedural"
    scenes: int = 40
    views: int = 20
    seed: int | None = None
    inlier_on: str = "squared_distance"
    probes: int | None = None


@dataclass(frozen=True, kw_only=True)
class PaperNumber:
    """What the paper gives for one method at one setting.

    Args:
        label: of the method.
        sparse_ratio, cdf_threshold: the setting; None for dense models.
        block_sparsity: as the paper states it.
        values: by metric.
    """

    label: str
    sparse_ratio: float | None
    cdf_threshold: float | None
    block_sparsity: float | None
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class CloudsSpec:
    """Which scenes a figure of clouds shows, and how.

    Args:
        scenes: indices in the data set.
        color: "photo", or "error": points farther from the truth than a threshold in green.
        threshold_mm: that distance for data in millimetres.
    """

    scenes: tuple[int, ...]
    color: Literal["photo", "error"]
    threshold_mm: float = 5.0


@dataclass(frozen=True, kw_only=True)
class RuntimeSpec:
    """What is timed: scenes of so many views, and so many rounds of all methods in turns."""

    views: int
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One table or figure.

    Args:
        name, title: of the experiment.
        source: where it is in the paper.
        shows: what the paper shows there.
        differs: why ours may differ, beyond model and data.
        model, data, views, scenes: on what it is measured unless told otherwise.
        block_size: tokens per block, of queries and of keys; None: the model's own.
        figure: what is made of it.
        metrics: to draw and tabulate, the most important first.
        reference: label of the method that others are compared with.
        settings: pairs of sparse ratio and CDF threshold for every block-sparse policy.
        methods: what is measured.
        profiles: made for it, by the key that methods name.
        paper: the paper's numbers.
        clouds, runtime: of figures of that kind.

    Raises:
        ConfigError: the file says something unknown or contradicts itself.
    """

    name: str
    title: str
    source: str
    shows: str
    differs: str = ""
    model: str = "nano"
    data: str = "procedural:test"
    views: int = 8
    scenes: int = 224
    block_size: int | None = None
    figure: FigureKind
    metrics: tuple[str, ...] = ()
    reference: str = ""
    settings: tuple[tuple[float, float], ...] = ()
    methods: tuple[MethodSpec, ...] = ()
    profiles: Mapping[str, ProfileSpec]
    paper: tuple[PaperNumber, ...] = ()
    clouds: CloudsSpec | None = None
    runtime: RuntimeSpec | None = None

    def __post_init__(self) -> None:
        labels = [spec.label for spec in self.methods]
        expectations = {(m, e) for spec in self.methods for m, e in spec.expect.items()}
        problems = {
            f"figure {self.figure!r} is none of {get_args(FigureKind)}": self.figure
            not in get_args(FigureKind),
            f"labels {labels} are not all different": len(set(labels)) < len(labels),
            f"reference {self.reference!r} is none of {labels}": bool(labels)
            and self.reference not in labels,
            f"metrics {self.metrics} are not all known": not set(self.metrics)
            <= METRIC_LABELS.keys(),
            f"expectations {sorted(expectations)} are not all of {get_args(Expectation)} for a "
            "known metric": not expectations <= set(product(METRIC_LABELS, get_args(Expectation))),
            "a method names a profile that is not there": not {
                spec.profile for spec in self.methods if spec.profile is not None
            }
            <= self.profiles.keys(),
            "numbers of the paper for a method that is not measured": not {
                number.label for number in self.paper
            }
            <= set(labels),
        }
        found = [problem for problem, there in problems.items() if there]
        if found:
            raise ConfigError(f"experiment {self.name!r}: {'; '.join(found)}")

    @property
    def is_measured(self) -> bool:
        """Whether it needs results per scene."""
        return self.figure not in UNMEASURED


def load_experiment(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ConfigError: there is none, or its file is wrong.
    """
    if name not in NAMES + BEYOND:
        known = ", ".join([*NAMES, *BEYOND, *GROUPS])
        raise ConfigError(f"unknown experiment {name!r}; these are known: {known}")
    return experiment_from(name, _read(name))


def experiment_from(name: str, table: Mapping[str, Any]) -> Experiment:
    """An experiment from the keys of its file; raises :class:`ConfigError` as that."""
    known = {each.name for each in fields(Experiment)} - {"name"}
    if not table.keys() <= known:
        raise ConfigError(
            f"experiment {name!r}: unknown keys {sorted(table.keys() - known)}; known are "
            f"{sorted(known)}"
        )
    try:
        return Experiment(
            name=name,
            **{key: table[key] for key in table.keys() & _PLAIN},
            shows=" ".join(table["shows"].split()),
            differs=" ".join(table.get("differs", "").split()),
            metrics=tuple(table.get("metrics", ())),
            settings=tuple((ratio, threshold) for ratio, threshold in table.get("settings", ())),
            methods=tuple(_method(entry) for entry in table.get("methods", ())),
            profiles={k: ProfileSpec(**v) for k, v in table.get("profiles", {}).items()},
            paper=tuple(_paper_number(entry) for entry in table.get("paper", ())),
            clouds=_clouds(table.get("clouds")),
            runtime=RuntimeSpec(**table["runtime"]) if "runtime" in table else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"experiment {name!r}: {error!r}") from error


_PLAIN = {
    "title", "source", "model", "data", "views", "scenes", "block_size", "figure", "reference",
}  # fmt: skip


def _read(name: str) -> dict[str, Any]:
    file = files("hess.reproduce") / "experiments" / f"{name}.toml"
    table = tomllib.loads(file.read_text(encoding="utf-8"))
    like = table.pop("like", None)
    return table if like is None else _read(like) | table


def _method(entry: Mapping[str, Any]) -> MethodSpec:
    rest = dict(entry)
    method = rest.pop("method")
    return MethodSpec(
        method=method,
        label=rest.pop("label", policy_style(method).label),
        color=rest.pop("color", None),
        expect=dict(rest.pop("expect", {})),
        profile=rest.pop("profile", None),
        options={k: tuple(v) if isinstance(v, Sequence) and not isinstance(v, str) else (v,)
                 for k, v in rest.items()},
    )  # fmt: skip


def _paper_number(entry: Mapping[str, Any]) -> PaperNumber:
    rest = dict(entry)
    return PaperNumber(
        label=rest.pop("label"),
        sparse_ratio=rest.pop("sparse_ratio", None),
        cdf_threshold=rest.pop("cdf_threshold", None),
        block_sparsity=rest.pop("block_sparsity", None),
        values=rest,
    )


def _clouds(entry: Mapping[str, Any] | None) -> CloudsSpec | None:
    return None if entry is None else CloudsSpec(**{**entry, "scenes": tuple(entry["scenes"])})
