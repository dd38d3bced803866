"""Pi3's point metrics on DTU: against depth maps, aligned on pixels, all distances counted, in mm.

Source: pi3's branch "evaluation" at commit 97ce97b, mv_recon/eval.py.
"""

import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from hess.datasets.frames import FrameSequence
from hess.datasets.scene import Scene
from hess.errors import ConfigError, DatasetError
from hess.evaluation.point_metrics import GroundTruthPoints, PointMetrics, cloud_distance
from hess.geometry.alignment import ICP_MAX_POINTS
from hess.geometry.nearest import NearestNeighbors
from hess.geometry.sim3 import Sim3, umeyama

_ICP_ITERATIONS = 30  # Open3D's defaults
_ICP_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class DtuPixelProtocol:
    """One way to judge predictions on DTU pixel by pixel; lengths in mm.

    Args:
        name: under which results are compared.
        frames: which photos of a scan, counted from 0 in their order.
        icp_distance: largest distance that point-to-point ICP pairs points at, after Umeyama on
            all pixels with known depth.
        normals: whether normal consistency is measured too.

    Raises:
        ConfigError: no frames, repeated or negative ones, or a distance that is not positive.
    """

    name: str
    frames: tuple[int, ...]
    icp_distance: float
    normals: bool = True

    def __post_init__(self) -> None:
        frames = self.frames
        if not frames or min(frames) < 0 or len(set(frames)) < len(frames):
            raise ConfigError(
                f"protocol {self.name!r}: frames must be different and at least 0, found {frames}"
            )
        if not 0 < self.icp_distance < math.inf:
            raise ConfigError(
                f"protocol {self.name!r}: icp_distance must be above 0 mm, found "
                f"{self.icp_distance}"
            )

    def as_dict(self) -> dict[str, object]:
        """JSON values of all fields, and the unit."""
        return asdict(self) | {"frames": list(self.frames), "unit": "mm"}

    def describe(self) -> str:
        """All of it in one line, to be printed with every result."""
        return (
            f"{self.name}: photos {', '.join(map(str, self.frames))} of a scan; every pixel with "
            f"depth, after Umeyama on pixels and point-to-point ICP up to {self.icp_distance:g} "
            f"mm; all distances count, in mm{'; with normals' if self.normals else ''}"
        )

    def take_frames(self, sequence: FrameSequence) -> FrameSequence:
        """The frames of a scan that this protocol judges.

        Raises:
            DatasetError: the scan has too few, or is not in mm.
        """
        if sequence.unit != "mm":
            raise DatasetError(
                f"protocol {self.name!r} needs lengths in 'mm', {sequence.name!r} is in "
                f"{sequence.unit!r}; name folders of DTU after their scan, such as scan24"
            )
        if max(self.frames) >= len(sequence.frames):
            raise DatasetError(
                f"protocol {self.name!r} needs photos up to number {max(self.frames)} (from 0), "
                f"{sequence.name!r} has {len(sequence.frames)}"
            )
        return replace(sequence, frames=tuple(sequence.frames[i] for i in self.frames))

    def truth(self, scene: Scene) -> GroundTruthPoints:
        """The true points of a scene, to be made once for all predictions.

        Raises:
            DatasetError: the scene has no depth, or none of it is known.
        """
        points, valid = scene.point_map()
        if not bool(valid.any()):
            raise DatasetError(f"scene {scene.name!r} has no pixel with known depth")
        return GroundTruthPoints(points, valid, stride=1, normals=self.normals)


DTU_PI3 = DtuPixelProtocol(
    name="dtu-pi3", frames=(0, 5, 10, 15, 20, 25, 30, 35, 40, 45), icp_distance=100.0
)
"""Ten photos of each scan. Pi3 takes the normals of planes through neighbouring points, we those
of neighbouring pixels."""


def pixel_metrics(
    pred_points: Tensor, truth: GroundTruthPoints, protocol: DtuPixelProtocol = DTU_PI3
) -> PointMetrics:
    """Align a predicted point map [N, H, W, 3] to the truth and measure it.

    Args:
        truth: from :meth:`DtuPixelProtocol.truth`.

    Raises:
        AlignmentError: the prediction is degenerate or not finite.
        LayoutError: the prediction has another shape than the truth.
    """
    pred = truth.pick(pred_points)
    start = umeyama(pred, truth.points)
    refinement = point_to_point_icp(start.apply(pred), truth.neighbors, protocol.icp_distance)
    world_from_pred = refinement.compose(start)
    aligned = world_from_pred.apply(pred)
    distance = torch.linalg.vector_norm(aligned - truth.points, dim=-1)
    return PointMetrics(
        cloud=cloud_distance(aligned, truth.points, truth.neighbors),
        point_error=float(distance.mean()),
        world_from_pred=world_from_pred,
        normal_consistency=(
            truth.normal_consistency(pred_points, world_from_pred) if protocol.normals else None
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
