"""Profiles that an experiment makes for itself, and how far profiles agree."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from hess.calibration import CalibrationConfig, ProbeConfig, calibrate
from hess.datasets.open import open_dataset
from hess.errors import ConfigError
from hess.models.base import Model
from hess.reproduce.experiment import ProfileSpec
from hess.sensitivity.profile import HessProfile, load_profile

Progress = Callable[[int, int, str], None]


def make_profile(
    spec: ProfileSpec,
    model: Model,
    main: HessProfile | None,
    checkpoint: Path,
    progress: Progress | None = None,
) -> HessProfile:
    """The profile that ``spec`` describes.

    Args:
        spec: another calibration, or the first scenes of the main one.
        model: to calibrate.
        main: the profile of the model.
        checkpoint: where the calibration is kept; one that is there is finished, or taken as is.
        progress: called after every scene.

    Raises:
        ConfigError: the start of a main profile that is not there.
        ProfileError: a bundled profile that is not there.
        HessError: what ``calibrate`` raises.
    """
    if spec.bundled is not None:
        profile = load_profile(f"{model.model_name}{spec.bundled}")
        profile.check_model(model)
        if spec.score_exponent is None:
            return profile
        provenance = profile.provenance | {"score_exponent": spec.score_exponent}
        return replace(profile, provenance=provenance)
    if spec.first is None:
        dataset = open_dataset(
            spec.data,
            image_fit=model.image_rule,
            views_per_scene=spec.views,
            seed=spec.seed,
            num_scenes=spec.scenes,
        )
        config: CalibrationConfig | ProbeConfig = CalibrationConfig(inlier_on=spec.inlier_on)
        if spec.probes is not None:
            config = ProbeConfig(num_probes=spec.probes)
        return calibrate(
            model, dataset, config, checkpoint=checkpoint, recompute=False, progress=progress
        )
    if main is None:
        raise ConfigError(
            f"the first {spec.first} scenes of a profile were asked for, and there is no profile "
            f"of {model.model_name!r}; name one with --profile"
        )
    return replace(
        main,
        traces=main.traces[: spec.first],
        patch_traces=main.patch_traces[: spec.first],
        scenes=main.scenes[: spec.first],
        failed=(),
        provenance=main.provenance | {"num_scenes": min(spec.first, len(main.scenes))},
    )


def score_weight(*profiles: HessProfile) -> float:
    """Lambda for scores of these profiles: the model's, or 1 if one has camera errors only."""
    without_points = any(bool(profile.traces[:, 1].isnan().all()) for profile in profiles)
    return 1.0 if without_points else float(profiles[0].provenance["camera_weight"])


def rank_correlation(one: HessProfile, other: HessProfile) -> float:
    """Spearman's correlation of the head scores of two profiles, mean over layers: in [-1, 1].

    Scores are compared within a layer, as the method does. A layer whose scores are all alike in
    one of them counts as 0.
    """
    from scipy.stats import spearmanr

    weight = score_weight(one, other)
    pairs = zip(one.scores(weight).numpy(), other.scores(weight).numpy(), strict=True)
    return float(
        np.mean(
            [
                spearmanr(*pair).statistic if min(np.ptp(scores) for scores in pair) > 0 else 0.0
                for pair in pairs
            ]
        )
    )
