"""From names to what must be measured: models, profiles, methods, and where results are kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

from hess.errors import ConfigError
from hess.evaluation.evaluate import check_batches
from hess.evaluation.resume import Sidecar
from hess.reproduce.case import Case, file_name
from hess.reproduce.clouds import check_clouds
from hess.reproduce.experiment import (
    GROUPS,
    NAMES,
    Experiment,
    MethodSpec,
    ProfileSpec,
    load_experiment,
)
from hess.reproduce.methods import Calibrated, Line, calibration_scenes, lines_of
from hess.reproduce.profiles import make_profile
from hess.sensitivity.profile import BUNDLED, HessProfile, load_profile

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What replaces the defaults of the experiments.

    Args:
        model, profile, data, protocol, truth, views, scenes: None leaves what each experiment
            says; ``scenes`` bounds those that an experiment calibrates on, too.
        calibration: further data sets that figS1 calibrates on.
        device, dtype: where and how models run.
        jobs: processes that measure, at least 1; 1 measures in this one.

    Raises:
        ConfigError: a number is out of range.
    """

    model: str | None = None
    profile: str | None = None
    data: str | None = None
    protocol: str | None = None
    truth: str | None = None
    views: int | None = None
    scenes: int | None = None
    calibration: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: str = "float32"
    jobs: int = 1

    def __post_init__(self) -> None:
        for name, least in (("views", 3), ("scenes", 1), ("jobs", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, found {value}")
        if self.truth is not None and self.protocol is None:
            raise ConfigError("a folder of ground truth belongs to a named protocol; name it")

    def case_of(self, experiment: Experiment) -> Case:
        """What an experiment is measured on."""
        return Case(
            model=self.model or experiment.model,
            device=self.device,
            dtype=self.dtype,
            data=self.data or experiment.data,
            views=self.views or experiment.views,
            # A named protocol says itself how many.
            scenes=self.scenes or (experiment.scenes if self.protocol is None else None),
            protocol=self.protocol,
            truth=self.truth,
            block_size=experiment.block_size,
        )


@dataclass(frozen=True, kw_only=True)
class Planned:
    """An experiment that is ready to be measured.

    Args:
        experiment, case: what, and on what.
        calibrated: the model with its profiles.
        lines: all methods at all settings.
        store: results per scene, shared with other experiments on the same case; None if the
            experiment needs none.
    """

    experiment: Experiment
    case: Case
    calibrated: Calibrated
    lines: list[Line]
    store: Sidecar | None


def experiments_named(names: Sequence[str]) -> list[Experiment]:
    """Experiments by name, each once; "all" and "beyond" stand for several.

    Raises:
        ConfigError: no names, or an unknown one.
    """
    if not names:
        raise ConfigError(f"which experiment? these are known: {', '.join([*NAMES, *GROUPS])}")
    wanted = [each for name in names for each in GROUPS.get(name, (name,))]
    return [load_experiment(name) for name in dict.fromkeys(wanted)]


def plan(
    names: Sequence[str], folder: Path, choices: Choices, progress: Progress | None = None
) -> list[Planned]:
    """Load models, profiles and stores, make the profiles that are missing, build all methods.

    Whatever is missing or wrong is found out before the first minute of work.

    Args:
        names: of experiments.
        folder: for results per scene and calibrations.
        choices: what replaces the experiments' defaults.
        progress: called after every scene of a calibration.

    Raises:
        HessError: see :func:`hess.reproduce.run.reproduce`.
    """
    experiments = [_with_calibrations(e, choices.calibration) for e in experiments_named(names)]
    cases = [choices.case_of(experiment) for experiment in experiments]
    bases: dict[str, Calibrated] = {}
    stores: dict[Case, Sidecar] = {}
    for experiment, case in zip(experiments, cases, strict=True):
        if case.model not in bases:
            model = case.load()
            profile = _main_profile(choices.profile, case.model)
            if profile is not None:
                profile.check_model(model)
            bases[case.model] = Calibrated(
                model=model,
                profile=profile,
                others={},
                calibration=calibration_scenes(model, choices.scenes),
                progress=progress,
            )
        if experiment.is_measured and case not in stores:
            model = bases[case.model].model
            check_batches(case.open(model)[0], case.batch_size)
            stores[case] = case.store(folder, model)
        if experiment.clouds is not None:
            check_clouds(experiment.clouds, case.open(bases[case.model].model)[0])

    planned = []
    for experiment, case in zip(experiments, cases, strict=True):
        profiles = folder / file_name(case.model)
        calibrated = _with_profiles(
            experiment, bases[case.model], profiles, choices.scenes, progress
        )
        planned.append(
            Planned(
                experiment=experiment,
                case=case,
                calibrated=calibrated,
                lines=lines_of(experiment, calibrated),
                store=stores.get(case) if experiment.is_measured else None,
            )
        )
    return planned


def _main_profile(given: str | None, model: str) -> HessProfile | None:
    name = given or (model if model in BUNDLED else None)
    return None if name is None else load_profile(name)


def _with_calibrations(experiment: Experiment, sources: Sequence[str]) -> Experiment:
    """The experiment with further calibration sets, if it is about these."""
    if experiment.figure != "calibrations" or not sources:
        return experiment
    profiles, methods = dict(experiment.profiles), list(experiment.methods)
    for source, color in zip(sources, cycle(("purple", "brown", "black")), strict=False):
        key = f"given-{file_name(source)}"
        profiles[key] = ProfileSpec(data=source)
        taken = {method.label for method in methods}
        methods.append(
            MethodSpec(
                method="hess",
                label=source if Path(source).name in taken else Path(source).name,
                color=color,
                expect=dict.fromkeys(experiment.metrics, "same"),
                profile=key,
                options={},
            )
        )
    return replace(experiment, profiles=profiles, methods=tuple(methods))


def _with_profiles(
    experiment: Experiment,
    base: Calibrated,
    folder: Path,
    at_most: int | None,
    progress: Progress | None,
) -> Calibrated:
    """The model with the profiles that the experiment makes for itself."""
    if not experiment.profiles:
        return base
    others = {}
    for key, spec in experiment.profiles.items():
        spec = replace(spec, scenes=min(spec.scenes, at_most or spec.scenes))
        checkpoint = folder / f"{experiment.name}-{key}-{spec.scenes}.hess"
        others[key] = make_profile(spec, base.model, base.profile, checkpoint, progress)
    return replace(base, others=others)
