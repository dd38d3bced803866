"""What exactly is measured, as data: a protocol travels with every number it produced."""

from dataclasses import asdict, dataclass
from typing import Literal, get_args

from hess.errors import ConfigError
from hess.evaluation.frame_choice import FrameChoice
from hess.evaluation.means import Mean
from hess.evaluation.point_metrics import PointAlignment
from hess.evaluation.pose_metrics import PairOrder

Unit = Literal["m", "mm", "arbitrary"]

_PAIRS = {"vggt": "T_i T_j^-1", "pi3": "T_j T_i^-1"}
_MEANS = {
    "scenes": "mean over scenes",
    "pairs": "all pairs of all scenes pooled",
    "categories": "pairs pooled in each category, then the mean over categories",
}
_ALIGNMENTS = {
    "umeyama": "Umeyama on pixel correspondences",
    "umeyama+icp": "Umeyama on pixel correspondences and point-to-plane ICP",
}


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
        point_alignment: see :data:`hess.evaluation.point_metrics.PointAlignment`; None measures
            no points.
        point_stride: every how many pixels and rows a point is compared.
        normals: whether normal consistency is measured too.
        unit: length unit the scenes must have, and so of all distances: "m", "mm" or "arbitrary";
            None takes the unit of the data, which must be the same in all scenes.

    Raises:
        ConfigError: a field is out of its range, or two contradict each other.
    """

    name: str
    summary: str = ""
    frames: FrameChoice | None = None
    views: int | None = None
    pair_order: PairOrder = "vggt"
    auc_thresholds: tuple[int, ...] = (3, 5, 15, 30)
    mean: Mean = "scenes"
    point_alignment: PointAlignment | None = "umeyama"
    point_stride: int = 2
    normals: bool = False
    unit: Unit | None = None

    def __post_init__(self) -> None:
        for field, allowed in (
            ("pair_order", get_args(PairOrder)),
            ("mean", get_args(Mean)),
            ("point_alignment", (*get_args(PointAlignment), None)),
            ("unit", (*get_args(Unit), None)),
        ):
            if getattr(self, field) not in allowed:
                raise self._wrong(f"{field} must be one of {allowed}", getattr(self, field))
        thresholds = self.auc_thresholds
        if not thresholds or thresholds[0] < 1 or sorted(set(thresholds)) != list(thresholds):
            raise self._wrong("auc_thresholds must ascend from at least 1 degree", thresholds)
        if self.point_stride < 1:
            raise self._wrong("point_stride must be at least 1", self.point_stride)
        if self.views is not None and self.views < 3:
            raise self._wrong(
                "views must be at least 3 (a trajectory cannot be aligned with fewer)", self.views
            )
        if self.frames is not None and self.frames.views != self.views:
            raise self._wrong(
                f"views must be those of its frames, {self.frames.views}", self.views
            )
        if self.normals and self.point_alignment is None:
            raise self._wrong("normals need a point_alignment", None)

    def _wrong(self, expected: str, found: object) -> ConfigError:
        return ConfigError(f"protocol {self.name!r}: {expected}, found {found!r}")

    def as_dict(self) -> dict[str, object]:
        """JSON values of all fields."""
        frames = None if self.frames is None else self.frames.as_dict()
        return asdict(self) | {"auc_thresholds": list(self.auc_thresholds), "frames": frames}

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics, in the order of a results row."""
        aucs = tuple(f"auc_{threshold}" for threshold in self.auc_thresholds)
        return (*aucs, *TRAJECTORY_METRICS, *self.point_metrics)

    @property
    def point_metrics(self) -> tuple[str, ...]:
        """Names of the metrics of points."""
        if self.point_alignment is None:
            return ()
        return (*POINT_METRICS, *(("normal_consistency",) if self.normals else ()))

    def describe(self) -> str:
        """All of it in one line, printed with every result."""
        views = "any number of views" if self.views is None else f"{self.views} views"
        parts = [
            self.frames.describe() if self.frames is not None else views,
            f"AUC@{'/'.join(map(str, self.auc_thresholds))} of {_PAIRS[self.pair_order]}, "
            + _MEANS[self.mean],
            "ATE after Sim(3)",
            self._describe_points(),
            "lengths in " + ("the data's unit" if self.unit is None else f"unit {self.unit!r}"),
        ]
        return f"{self.name}: {'; '.join([self.summary, *parts] if self.summary else parts)}"

    def _describe_points(self) -> str:
        if self.point_alignment is None:
            return "no points"
        apart = "all pixels" if self.point_stride == 1 else f"pixels {self.point_stride} apart"
        text = f"points of {apart} after {_ALIGNMENTS[self.point_alignment]}"
        return text + (", with normals" if self.normals else "")


TRAJECTORY_METRICS = ("ate_rmse", "ate_relative")
POINT_METRICS = (
    "accuracy",
    "accuracy_median",
    "completeness",
    "completeness_median",
    "chamfer_mean",
    "point_error",
)

PROCEDURAL_8 = Protocol(name="procedural-8", views=8)
"""The default: scenes of 8 views from the procedural generator."""
