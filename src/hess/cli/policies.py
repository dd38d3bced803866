"""Policies from names and settings on the command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hess.errors import ConfigError

if TYPE_CHECKING:
    from hess.policies.base import Policy
    from hess.policies.scored import ScoreSource

SETTINGS = ((0.5, 0.7), (0.6, 0.4), (0.8, 0.4), (0.9, 0.2))
"""Default (sparse ratio, CDF threshold) pairs; block sparsity 0.46, 0.56, 0.74, 0.84 on nano."""
PolicyName = Literal[
    "dense", "uniform", "hess", "hess+", "reverse", "random", "no_reallocation", "joint_ranking"
]


def build_policies(
    names: Sequence[PolicyName],
    profile: "Profiles | ScoreSource | None",
    settings: Sequence[tuple[float, float | None]] = SETTINGS,
    random_seeds: Sequence[int] = (0,),
) -> list["Policy"]:
    """Every named policy at every setting; dense once, random once per seed.

    Args:
        names, random_seeds: which policies.
        profile: of all policies, or those of :func:`find_profiles`.
        settings: pairs of sparse ratio and CDF threshold.

    Raises:
        ConfigError: a setting out of range, or a policy that goes by head scores without a
            profile to take them from.
    """
    from hess import policies

    scored: dict[str, Any] = {
        "hess": policies.HeSS,
        "reverse": policies.Reverse,
        "hess+": policies.HessPlus,
        "no_reallocation": policies.NoReallocation,
        "joint_ranking": policies.JointRanking,
    }
    profiles = profile if isinstance(profile, Profiles) else Profiles(profile, profile)
    built: list[Policy] = [policies.Dense()] if "dense" in names else []
    for sparse_ratio, cdf_threshold in settings:
        both: dict[str, Any] = {"sparse_ratio": sparse_ratio, "cdf_threshold": cdf_threshold}
        if "uniform" in names:
            built.append(policies.Uniform(**both))
        built += [
            scored[name](_needed(profiles, name), **both) for name in names if name in scored
        ]
        if "random" in names:
            source = _needed(profiles, "random")
            built += [policies.RandomScores(source, **both, seed=seed) for seed in random_seeds]
    return built


@dataclass(frozen=True)
class Profiles:
    """The profile of HeSS and its controls, and that of HeSS+; None: there is none."""

    hess: "ScoreSource | None"
    plus: "ScoreSource | None"


def find_profiles(profile: str | None, model: str) -> Profiles:
    """The profile of that name or file; None stands for those bundled with ``model``, if any.

    Of these HeSS+ has the one that was made without ground truth, with which it was checked.

    Raises:
        ProfileError: see ``load_profile``.
    """
    from hess.sensitivity.profile import BUNDLED, LABEL_FREE, load_profile

    if profile is not None:
        given = load_profile(profile)
        return Profiles(given, given)
    if model in BUNDLED:
        return Profiles(load_profile(model), load_profile(f"{model}{LABEL_FREE}"))
    return Profiles(None, None)


def _needed(profiles: Profiles, policy: str) -> "ScoreSource":
    profile = profiles.plus if policy == "hess+" else profiles.hess
    if profile is None:
        raise ConfigError(
            f"policy {policy} needs a profile, and none is bundled with this model; make one "
            "with `hess calibrate --images PHOTOS` and name it with --profile"
        )
    return profile
