"""Policies from names and settings on the command line."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from hess.errors import ConfigError

if TYPE_CHECKING:
    from hess.policies.base import Policy
    from hess.policies.scored import ScoreSource
    from hess.sensitivity.profile import HessProfile

SETTINGS = ((0.5, 0.7), (0.6, 0.4), (0.8, 0.4), (0.9, 0.2))
"""Default (sparse ratio, CDF threshold) pairs; block sparsity 0.46, 0.56, 0.74, 0.84 on nano."""
PolicyName = Literal["dense", "uniform", "hess", "reverse", "random", "no_reallocation"]


def build_policies(
    names: Sequence[PolicyName],
    profile: "ScoreSource | None",
    settings: Sequence[tuple[float, float]] = SETTINGS,
    random_seeds: Sequence[int] = (0,),
) -> list["Policy"]:
    """Every named policy at every setting; dense once, random once per seed.

    Raises:
        ConfigError: a setting out of range, or a policy that goes by head scores without a
            profile to take them from.
    """
    from hess import policies

    scored: dict[str, Any] = {
        "hess": policies.HeSS,
        "reverse": policies.Reverse,
        "no_reallocation": policies.NoReallocation,
    }
    built: list[Policy] = [policies.Dense()] if "dense" in names else []
    for sparse_ratio, cdf_threshold in settings:
        both: dict[str, Any] = {"sparse_ratio": sparse_ratio, "cdf_threshold": cdf_threshold}
        if "uniform" in names:
            built.append(policies.Uniform(**both))
        built += [scored[name](_needed(profile, name), **both) for name in names if name in scored]
        if "random" in names:
            source = _needed(profile, "random")
            built += [policies.RandomScores(source, **both, seed=seed) for seed in random_seeds]
    return built


def find_profile(profile: str | None, model: str) -> "HessProfile | None":
    """The profile of that name or file; None stands for the one bundled with ``model``, if any.

    Raises:
        ProfileError: see ``load_profile``.
    """
    from hess.sensitivity.profile import BUNDLED, load_profile

    if profile is None and model in BUNDLED:
        profile = model
    return None if profile is None else load_profile(profile)


def _needed(profile: "ScoreSource | None", policy: str) -> "ScoreSource":
    if profile is None:
        raise ConfigError(
            f"policy {policy} needs a profile, and none is bundled with this model; make one "
            "with `hess calibrate` and name it with --profile"
        )
    return profile
