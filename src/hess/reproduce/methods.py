"""The methods of an experiment: specifications to policies and transforms, ready to run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hess import policies
from hess.datasets.open import PROCEDURAL_SCENES, open_dataset
from hess.datasets.scene import Dataset
from hess.errors import ConfigError
from hess.models.base import Model
from hess.reproduce.experiment import Experiment, MethodSpec
from hess.reproduce.profiles import score_weight
from hess.sensitivity.head_importance import HeadImportance, measure_head_importance
from hess.sensitivity.profile import HessProfile
from hess.transforms import FisherMask, HeadPruning, Method, TokenMerging

Progress = Callable[[int, int, str], None]

_SCORED: Mapping[str, type] = {
    "hess": policies.HeSS,
    "reverse": policies.Reverse,
    "random": policies.RandomScores,
    "no_reallocation": policies.NoReallocation,
    "hess+": policies.HessPlus,
    "joint_ranking": policies.JointRanking,
    "layer_budgets": policies.LayerBudgets,
}
_PRUNING: Mapping[str, type[HeadPruning] | type[FisherMask]] = {
    "head_pruning": HeadPruning,
    "fisher_mask": FisherMask,
}
METHODS = ("dense", "uniform", *_SCORED, *_PRUNING, "token_merging")
TUNING_SCENES = 8
"""Calibration scenes on which Kwon's masks are tuned; the squares there have few unknowns."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One method of an experiment at one setting.

    Args:
        spec: what asked for it.
        setting: sparse ratio and CDF threshold; None for methods without.
        method: ready to run.
    """

    spec: MethodSpec
    setting: tuple[float, float] | None
    method: Method


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A model with all that was calibrated on it.

    Args:
        model: dense.
        profile: the main one, or None; then methods that need scores are refused.
        others: further profiles by key, see ``Experiment.profiles``.
        calibration: scenes that head pruning measures on.
        progress: called while it does.
    """

    model: Model
    profile: HessProfile | None
    others: Mapping[str, HessProfile]
    calibration: Dataset
    progress: Progress | None = None

    @cached_property
    def importance(self) -> HeadImportance:
        """Gradients by head gates, measured when first asked for."""
        return measure_head_importance(
            self.model, self.calibration, recompute=False, progress=self.progress
        )

    @property
    def main_profile(self) -> HessProfile:
        """The main profile; raises ConfigError if there is none."""
        if self.profile is None:
            raise ConfigError(
                "head scores are needed, and no profile is bundled with "
                f"{self.model.model_name!r}; make one with `hess calibrate` and name it with "
                "--profile"
            )
        return self.profile

    def profile_of(self, spec: MethodSpec) -> HessProfile:
        """The profile a method goes by; raises ConfigError if there is none."""
        return self.main_profile if spec.profile is None else self.others[spec.profile]


def calibration_scenes(model: Model, at_most: int | None = None) -> Dataset:
    """Procedural scenes as the bundled profiles were measured on, at the model's size."""
    count = min(PROCEDURAL_SCENES, at_most or PROCEDURAL_SCENES)
    return open_dataset("procedural", image_fit=model.image_rule, num_scenes=count)


def lines_of(experiment: Experiment, calibrated: Calibrated) -> list[Line]:
    """Every method of an experiment at every setting, in the order of its file.

    Raises:
        ConfigError: an unknown method or parameter, or no profile where one is needed.
    """
    lines = []
    for spec in experiment.methods:
        takes_pair = spec.method == "uniform" or spec.method in _SCORED
        settings = experiment.settings if takes_pair else (None,)
        for setting in settings:
            for options in spec.combinations():
                try:
                    method = _build(spec, setting, options, calibrated)
                except TypeError as error:
                    raise ConfigError(
                        f"experiment {experiment.name!r}, method {spec.label!r}: {error}"
                    ) from error
                lines.append(Line(spec=spec, setting=setting, method=method))
    return lines


def _build(
    spec: MethodSpec,
    setting: tuple[float, float] | None,
    options: Mapping[str, Any],
    calibrated: Calibrated,
) -> Method:
    pair: dict[str, Any] = {}
    if setting is not None:
        pair = {"sparse_ratio": setting[0], "cdf_threshold": setting[1]}
    if spec.method == "dense":
        return policies.Dense(**options)
    if spec.method == "uniform":
        return policies.Uniform(**pair, **options)
    if spec.method == "token_merging":
        return TokenMerging(**options)
    if spec.method in _SCORED:
        profile = calibrated.profile_of(spec)
        # Said in numbers, so that the default weight and the same weight asked for are one.
        weight = {"camera_weight": score_weight(profile)}
        return _SCORED[spec.method](profile, **pair, **weight | dict(options))
    if spec.method in _PRUNING:
        pruning = _PRUNING[spec.method](calibrated.importance, **options)
        if isinstance(pruning, FisherMask):
            scenes = calibrated.calibration
            few = [scenes[index] for index in range(min(TUNING_SCENES, len(scenes)))]
            return pruning.tuned(calibrated.model, few)
        return pruning
    raise ConfigError(f"unknown method {spec.method!r}; these are known: {', '.join(METHODS)}")
