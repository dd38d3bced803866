"""``--max-drift`` and ``--speedup``: how sparse, found out instead of given."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hess.cli.console import busy, console
from hess.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from hess.models.base import Model
    from hess.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What the sparsity shall be chosen for; at most one of the two.

    Args:
        max_drift: as typed, such as "1%" or "0.01".
        speedup: as typed, such as "2x" or "2".

    Raises:
        ConfigError: both are given, or one is no such number.
    """

    max_drift: str | None
    speedup: str | None

    def __post_init__(self) -> None:
        from hess.guard import check_max_drift

        if self.max_drift is not None and self.speedup is not None:
            raise ConfigError("--max-drift and --speedup each choose the sparsity; give one")
        if self.max_drift is not None:
            check_max_drift(self.drift_limit)
        if self.speedup is not None and not self.factor > 1:
            raise ConfigError(f"--speedup must be above 1, found {self.speedup}")

    def __bool__(self) -> bool:
        return self.max_drift is not None or self.speedup is not None

    @property
    def drift_limit(self) -> float:
        """The limit as a share."""
        text = self.max_drift or ""
        percent = text.endswith("%")
        return _number(text.removesuffix("%"), "--max-drift", "1%") / (100 if percent else 1)

    @property
    def factor(self) -> float:
        """The speed-up as a number."""
        return _number((self.speedup or "").removesuffix("x"), "--speedup", "2x")

    def choose(
        self, model: "Model", images: "Tensor", policy_at: "Callable[[float], Policy]"
    ) -> tuple[float | None, dict[str, Any]]:
        """The share of blocks to drop (None: stay dense) and what was found, as JSON values.

        Raises:
            ConfigError: no ratio is as fast as asked for.
        """
        if self.max_drift is not None:
            return self._within_drift(model, images, policy_at)
        return self._as_fast(model, images)

    def _within_drift(
        self, model: "Model", images: "Tensor", policy_at: "Callable[[float], Policy]"
    ) -> tuple[float | None, dict[str, Any]]:
        from hess.guard import choose_sparsity

        with busy("running some photos dense and sparse"):
            choice = choose_sparsity(model, images, policy_at, self.drift_limit)
        chosen = choice.chosen
        if chosen is None or chosen.drift is None:
            smallest = min(choice.probes, key=lambda probe: probe.sparse_ratio)
            _say(
                f"guard: already dropping {smallest.sparse_ratio:.0%} of the blocks moves the "
                f"result by {smallest.size:.2%}, and the limit is {self.drift_limit:.2%}: "
                "attention stays dense"
            )
        else:
            saved = 1 - chosen.seconds / choice.dense_seconds
            gain = f"{saved:.0%} saved" if saved > 0 else "nothing saved"
            _say(
                f"guard: dropping {chosen.sparse_ratio:.0%} of the blocks moves the result of "
                f"{choice.num_views} of {len(images)} photos by {chosen.size:.2%} of the scene "
                f"(points {chosen.drift.points:.2%}, positions {chosen.drift.positions:.2%}, "
                f"rotations {chosen.drift.rotations:.2%}); the limit is {self.drift_limit:.2%}. "
                f"Time there: {choice.dense_seconds:.2f} s dense, {chosen.seconds:.2f} s sparse "
                f"({gain})"
            )
        found = {
            "max_drift": self.drift_limit,
            "sparse_ratio": choice.sparse_ratio,
            "probe_views": choice.num_views,
            "dense_seconds": choice.dense_seconds,
            "probes": [
                {
                    "sparse_ratio": probe.sparse_ratio,
                    "block_sparsity": probe.block_sparsity,
                    "drift": None if probe.drift is None else probe.drift.as_dict(),
                    "seconds": probe.seconds,
                }
                for probe in choice.probes
            ],
        }
        return choice.sparse_ratio, found

    def _as_fast(self, model: "Model", images: "Tensor") -> tuple[float, dict[str, Any]]:
        from hess.footprint import predict_speedups
        from hess.guard import RATIOS

        height, width = images.shape[2:]
        with busy("measuring this machine"):
            factors = predict_speedups(
                model, num_views=len(images), height=height, width=width, sparsities=RATIOS
            )
        fast = [i for i, factor in enumerate(factors) if factor >= self.factor]
        if not fast:
            raise ConfigError(
                f"--speedup {self.speedup}: {len(images)} photos of {width}x{height} pixels get "
                f"{max(factors):.2f} times as fast at most (at {RATIOS[-1]:.0%} of the blocks "
                "dropped), since attention over all photos is only a part of the work; more "
                "photos gain more"
            )
        ratio = RATIOS[fast[0]]
        _say(
            f"dropping {ratio:.0%} of the blocks: predicted to be {factors[fast[0]]:.2f} times as "
            "fast; how far the result moves was not measured (--max-drift does that)"
        )
        predicted = dict(zip(map(str, RATIOS), factors, strict=True))
        return ratio, {
            "speedup": self.factor,
            "sparse_ratio": ratio,
            "predicted_speedups": predicted,
        }


def _number(text: str, option: str, example: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(
            f"{option} must be a number such as {example}, found {text!r}"
        ) from error


def _say(line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)
