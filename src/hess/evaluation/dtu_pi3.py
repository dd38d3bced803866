"""Pi3's point metrics on DTU: against depth maps, aligned on pixels, all distances counted, in mm.

Source: pi3's branch "evaluation" at commit 97ce97b, mv_recon/eval.py.
"""

import math
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from hess.datasets.scene import Scene
from hess.errors import ConfigError, DatasetError
from hess.evaluation.dtu import dtu_scan
from hess.evaluation.pixel_points import PixelTruth, pixel_metric_names
from hess.evaluation.point_metrics import GroundTruthPoints, PointMetrics, cloud_distance
from hess.geometry.alignment import ICP_MAX_POINTS
from hess.geometry.nearest import NearestNeighbors
from hess.geometry.sim3 import Sim3, umeyama

_ICP_ITERATIONS = 30  # Open3D's defaults
_ICP_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class DtuPi3Points:
    """How points are measured on DTU pixel by pixel; lengths in mm.

    Args:
        icp_distance: largest distance that point-to-point ICP pairs points at, after Umeyama on
            all pixels with known depth.
        normals: whether normal consistency is measured too.

    Raises:
        ConfigError: the distance is not positive.
    """

    icp_distance: float
    normals: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.icp_distance < math.inf:
            raise ConfigError(f"DTU's icp_distance must be above 0 mm, found {self.icp_distance}")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, in the order of a results row."""
        return pixel_metric_names(self.normals)

    def as_dict(self) -> dict[str, object]:
        """JSON values of all fields."""
        return asdict(self)

    def describe(self) -> str:
        """All of it in words."""
        return (
            "points of every pixel with depth, after Umeyama on pixel correspondences and "
            f"point-to-point ICP up to {self.icp_distance:g} mm; all distances count"
            f"{', with normals' if self.normals else ''}"
        )

    def truth(self, scene: Scene) -> PixelTruth:
        """The true points of a scene.

        Raises:
            DatasetError: the scene is not named after a scan, has no depth, or none is known.
        """
        dtu_scan(scene)
        points, valid = scene.point_map() if scene.has_points else (None, None)
        if points is None or valid is None or not bool(valid.any()):
            raise DatasetError(
                f"scene {scene.name!r} has no pixel with known depth; use a layout of DTU with "
                "depth maps: MVSNet's for testing with depths/ and binary_masks/, or its training "
                "data"
            )
        return PixelTruth(
            GroundTruthPoints(points, valid, stride=1, normals=self.normals),
            partial(pixel_metrics, measure=self),
            self.normals,
        )


DTU_PI3 = DtuPi3Points(icp_distance=100.0)
"""Pi3 takes the normals of planes through neighbouring points, we those of neighbouring pixels."""


def pixel_metrics(
    pred_points: Tensor, truth: GroundTruthPoints, measure: DtuPi3Points = DTU_PI3
) -> PointMetrics:
    """Align a predicted point map [N, H, W, 3] to the truth and measure it.

    Args:
        truth: every pixel with known depth, with normals if they are measured.

    Raises:
        AlignmentError: the prediction is degenerate or not finite.
        LayoutError: the prediction has another shape than the truth.
    """
    pred = truth.pick(pred_points)
    start = umeyama(pred, truth.points)
    refinement = point_to_point_icp(start.apply(pred), truth.neighbors, measure.icp_distance)
    world_from_pred = refinement.compose(start)
    aligned = world_from_pred.apply(pred)
    distance = torch.linalg.vector_norm(aligned - truth.points, dim=-1)
    return PointMetrics(
        cloud=cloud_distance(aligned, truth.points, truth.neighbors),
        point_error=float(distance.mean()),
        world_from_pred=world_from_pred,
        normal_consistency=(
            truth.normal_consistency(pred_points, world_from_pred) if measure.normals else None
        ),
    )


def point_to_point_icp(source: Tensor, target: NearestNeighbors, max_distance: float) -> Sim3:
    """Rigid ICP that pairs nearest points (Besl and McKay 1992), stopped as Open3D does.

    It ends after 30 rounds, or when neither the share of paired points nor their root mean square
    distance changes by 1e-6. At most 20,000 evenly spaced source points are used.

    Args:
        source: [J >= 3, 3].
        target: index over the points to move to.
        max_distance: farther points are not paired.

    Returns:
        target from source, of scale 1; the identity when fewer than three points can be paired.

    Raises:
        AlignmentError: a point is not finite, or the paired points are on a line.
        LayoutError: ``source`` is not [J, 3].
    """
    source = source[:: max(1, math.ceil(len(source) / ICP_MAX_POINTS))].double()
    target_from_source, before = Sim3.identity(), (math.inf, math.inf)
    for _ in range(_ICP_ITERATIONS):
        moved = target_from_source.apply(source)
        distance, index = target.query(moved)
        paired = distance < max_distance
        if int(paired.sum()) < 3:
            break
        now = (paired.double().mean().item(), distance[paired].square().mean().sqrt().item())
        if max(abs(a - b) for a, b in zip(now, before, strict=True)) < _ICP_TOLERANCE:
            break
        before = now
        start, goal = moved[paired], target.points[index[paired]].to(moved)
        rotation = umeyama(start, goal).rotation  # the best one whatever the scale
        shift = goal.mean(0) - rotation @ start.mean(0)
        step = Sim3(scale=1.0, rotation=rotation, translation=shift)
        target_from_source = step.compose(target_from_source)
    return target_from_source
