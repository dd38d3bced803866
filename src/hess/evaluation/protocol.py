"""What exactly is measured, as data: a protocol travels with every number it produced."""

from dataclasses import asdict, dataclass
from typing import Literal, get_args

from hess.errors import ConfigError
from hess.evaluation.point_metrics import PointAlignment
from hess.evaluation.pose_metrics import PairOrder

Unit = Literal["m", "mm", "arbitrary"]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way to evaluate.

    Args:
        name: under which results are compared.
        pair_order: relative pose of a pair of views, "vggt" or "pi3".
        auc_thresholds: ascending whole degrees, at least 1.
        point_alignment: "umeyama" (on pixel correspondences) or "umeyama+icp".
        point_stride: every how many pixels and rows a point is compared.
        unit: length unit the scenes must have, and so of all distances: "m", "mm" or "arbitrary";
            None takes the unit of the data, which must be the same in all scenes.
        views: views each scene must have; None accepts any number.

    Raises:
        ConfigError: a field is out of its range.
    """

    name: str
    pair_order: PairOrder = "vggt"
    auc_thresholds: tuple[int, ...] = (3, 5, 15, 30)
    point_alignment: PointAlignment = "umeyama"
    point_stride: int = 2
    unit: Unit | None = None
    views: int | None = None

    def __post_init__(self) -> None:
        for field, allowed in (
            ("pair_order", get_args(PairOrder)),
            ("point_alignment", get_args(PointAlignment)),
            ("unit", (*get_args(Unit), None)),
        ):
            if getattr(self, field) not in allowed:
                raise ConfigError(
                    f"protocol {self.name!r}: {field} must be one of {allowed}, "
                    f"found {getattr(self, field)!r}"
                )
        thresholds = self.auc_thresholds
        if not thresholds or thresholds[0] < 1 or sorted(set(thresholds)) != list(thresholds):
            raise ConfigError(
                f"protocol {self.name!r}: auc_thresholds must be ascending and at least 1 degree, "
                f"found {thresholds}"
            )
        if self.point_stride < 1:
            raise ConfigError(
                f"protocol {self.name!r}: point_stride must be at least 1, "
                f"found {self.point_stride}"
            )
        if self.views is not None and self.views < 3:
            raise ConfigError(
                f"protocol {self.name!r}: views must be at least 3 (a trajectory cannot be "
                f"aligned with fewer), found {self.views}"
            )

    def as_dict(self) -> dict[str, object]:
        """JSON values of all fields."""
        return asdict(self) | {"auc_thresholds": list(self.auc_thresholds)}

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics, in the order of a results row."""
        aucs = tuple(f"auc_{threshold}" for threshold in self.auc_thresholds)
        return (*aucs, *TRAJECTORY_METRICS, *POINT_METRICS)


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
