"""What exactly is measured, as data: a protocol travels with every number it produced."""

import typing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from hess.datasets.scene import Scene
from hess.errors import ConfigError
from hess.evaluation.frame_choice import Frames
from hess.evaluation.means import Mean
from hess.evaluation.pixel_points import PixelPoints
from hess.evaluation.pose_metrics import PairOrder

Unit = Literal["m", "mm", "arbitrary"]

_PAIRS = {"vggt": "T_i T_j^-1", "pi3": "T_j T_i^-1"}
_MEANS = {
    "scenes": "mean over scenes",
    "pairs": "all pairs of all scenes pooled",
    "categories": "pairs pooled in each category, then the mean over categories",
}


class PointTruth(typing.Protocol):
    """True points of one scene, prepared once for all predictions of it."""

    def measure(self, world_from_cam: Tensor, world_points: Tensor) -> dict[str, float | None]:
        """Metrics by name of predicted poses [N, 4, 4] and a point map [N, H, W, 3]."""
        ...


class PointMeasure(typing.Protocol):
    """How a protocol measures points, as data."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, in the order of a results row."""
        ...

    def truth(self, scene: Scene) -> PointTruth | None:
        """What predictions of a scene are measured against; None when the scene has none."""
        ...

    def as_dict(self) -> dict[str, object]: ...

    def describe(self) -> str: ...


@typing.runtime_checkable
class MeasureWithFolder(PointMeasure, typing.Protocol):
    """A measure whose ground truth lies in a folder of its own, not in the data set."""

    def with_truth(self, folder: Path | None) -> PointMeasure:
        """The same with that folder; raises where it is not given or not the right one."""
        ...


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way to evaluate.

    Args:
        name: under which results are compared.
        summary: whose protocol it is, or what it is for, in a few words.
        frames: which frames make the scenes; None takes the scenes as the data set cuts them.
        views: views each scene must have; None accepts any number.
        pair_order: relative pose of a pair of views, "vggt" or "pi3".
        auc_thresholds: ascending whole degrees, at least 1.
        mean: how the values of the scenes are brought together.
        points: how points are measured; None measures none.
        unit: length unit the scenes must have, and so of all distances: "m", "mm" or "arbitrary";
            None takes the unit of the data, which must be the same in all scenes.

    Raises:
        ConfigError: a field is out of its range, or two contradict each other.
    """

    name: str
    summary: str = ""
    frames: Frames | None = None
    views: int | None = None
    pair_order: PairOrder = "vggt"
    auc_thresholds: tuple[int, ...] = (3, 5, 15, 30)
    mean: Mean = "scenes"
    points: PointMeasure | None = field(default_factory=PixelPoints)
    unit: Unit | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("pair_order", get_args(PairOrder)),
            ("mean", get_args(Mean)),
            ("unit", (*get_args(Unit), None)),
        ):
            if getattr(self, name) not in allowed:
                raise self._wrong(f"{name} must be one of {allowed}", getattr(self, name))
        thresholds = self.auc_thresholds
        if not thresholds or thresholds[0] < 1 or sorted(set(thresholds)) != list(thresholds):
            raise self._wrong("auc_thresholds must ascend from at least 1 degree", thresholds)
        if self.views is not None and self.views < 3:
            raise self._wrong(
                "views must be at least 3 (a trajectory cannot be aligned with fewer)", self.views
            )
        if self.frames is not None and self.frames.views != self.views:
            raise self._wrong(
                f"views must be those of its frames, {self.frames.views}", self.views
            )

    def _wrong(self, expected: str, found: object) -> ConfigError:
        return ConfigError(f"protocol {self.name!r}: {expected}, found {found!r}")

    def with_truth(self, folder: Path | None) -> "Protocol":
        """The same with the folder of its ground truth, where that is not in the data.

        Raises:
            ConfigError: it needs a folder and gets none, or the other way round.
            DatasetError: the folder is not the right one.
        """
        if isinstance(self.points, MeasureWithFolder):
            return replace(self, points=self.points.with_truth(folder))
        if folder is not None:
            raise ConfigError(
                f"protocol {self.name!r} has its ground truth in the data itself, found the "
                f"folder {folder}; leave --truth out"
            )
        return self

    def as_dict(self) -> dict[str, object]:
        """JSON values of all fields."""
        return asdict(self) | {
            "auc_thresholds": list(self.auc_thresholds),
            "frames": None if self.frames is None else self.frames.as_dict(),
            "points": None if self.points is None else self.points.as_dict(),
        }

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics, in the order of a results row."""
        aucs = tuple(f"auc_{threshold}" for threshold in self.auc_thresholds)
        return (*aucs, *TRAJECTORY_METRICS, *self.point_metrics)

    @property
    def point_metrics(self) -> tuple[str, ...]:
        """Names of the metrics of points."""
        return () if self.points is None else self.points.metrics

    def describe(self) -> str:
        """All of it in one line, printed with every result."""
        views = "any number of views" if self.views is None else f"{self.views} views"
        parts = [
            self.frames.describe() if self.frames is not None else views,
            f"AUC@{'/'.join(map(str, self.auc_thresholds))} of {_PAIRS[self.pair_order]}, "
            + _MEANS[self.mean],
            "ATE after Sim(3)",
            "no points" if self.points is None else self.points.describe(),
            "lengths in " + ("the data's unit" if self.unit is None else f"unit {self.unit!r}"),
        ]
        return f"{self.name}: {'; '.join([self.summary, *parts] if self.summary else parts)}"


TRAJECTORY_METRICS = ("ate_rmse", "ate_relative")

PROCEDURAL_8 = Protocol(name="procedural-8", summary="procedural scenes", views=8)
"""The default: scenes of 8 views from the procedural generator."""
