"""DTU's official point metrics: predictions against the laser scan, in millimetres.

Aanaes et al., "Large-Scale Data for Multiple-View Stereopsis" (IJCV 2016), with the bounds of
the Python port in common use (jzhangbs/DTUeval-python). What pi3 measures on DTU, against depth
maps and without limits, is in :mod:`hess.evaluation.dtu_pi3`.
"""

import math
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hess.datasets.dtu_official import DtuTruth
from hess.errors import AlignmentError, ConfigError
from hess.evaluation.point_metrics import CloudDistance
from hess.geometry.alignment import align_points
from hess.geometry.nearest import NearestNeighbors
from hess.geometry.ransac import agreeing_pairs
from hess.geometry.reduction import reduce_cloud
from hess.geometry.sim3 import Sim3, umeyama

# fmt: off
DTU_TEST_SCANS = (
    1, 4, 9, 10, 11, 12, 13, 15, 23, 24, 29, 32, 33, 34, 48, 49, 62, 75, 77, 110, 114, 118,
)
# fmt: on
"""The 22 scans that MVSNet and its successors are tested on."""


@dataclass(frozen=True, kw_only=True)
class DtuProtocol:
    """One way to judge predictions against the laser scan; lengths in mm, all photos of a scan.

    Predictions are aligned by Umeyama on the camera centres, as the scan has no pixels.

    Args:
        name: under which results are compared.
        reduction: no two predicted points are kept within this distance.
        box_margin: how far below and above the box of the observed volume a predicted point may
            lie to complete the scan.
        max_distance: larger distances do not count.
        ransac_distance: only the cameras that RANSAC finds to agree within this distance align;
            None takes all.
        icp_distance: largest distance that point-to-plane ICP pairs points at, after the cameras;
            None leaves ICP out.
        seed: of the shuffle before the reduction and of RANSAC.

    Raises:
        ConfigError: a length is not positive.
    """

    name: str
    reduction: float = 0.2
    box_margin: tuple[float, float] = (60.0, 120.0)
    max_distance: float = 20.0
    ransac_distance: float | None = None
    icp_distance: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        lengths = {
            field: getattr(self, field)
            for field in ("reduction", "max_distance", "ransac_distance", "icp_distance")
        }
        lengths |= {f"box_margin[{i}]": length for i, length in enumerate(self.box_margin)}
        for field, length in lengths.items():
            if length is not None and not 0 < length < math.inf:
                raise ConfigError(
                    f"protocol {self.name!r}: {field} must be above 0 mm, found {length}"
                )

    def as_dict(self) -> dict[str, object]:
        """JSON values of all fields, and the unit."""
        return asdict(self) | {"box_margin": list(self.box_margin), "unit": "mm"}

    def describe(self) -> str:
        """All of it in one line, to be printed with every result."""
        alignment = "Umeyama on camera centres"
        if self.ransac_distance is not None:
            alignment += f" that agree within {self.ransac_distance:g} mm (RANSAC)"
        if self.icp_distance is not None:
            alignment += f" and point-to-plane ICP up to {self.icp_distance:g} mm"
        below, above = self.box_margin
        return (
            f"{self.name}: all photos of a scan; {alignment}; predicted points at least "
            f"{self.reduction:g} mm apart (seed {self.seed}); accuracy in the observed volume; "
            f"completeness of the scan above the table, by points up to {below:g} mm below and "
            f"{above:g} mm above the volume's box; distances up to {self.max_distance:g} mm count"
        )


DTU_OFFICIAL = DtuProtocol(name="dtu-official")
"""The official measure, which is silent on alignment."""

DTU_PAPER = replace(DTU_OFFICIAL, name="dtu-paper", ransac_distance=10.0, icp_distance=20.0)
"""The official measure after RANSAC and point-to-plane ICP, as in the paper (App. B.1). There,
RANSAC pairs points by their FPFH features, and the distances are not given."""


@dataclass(frozen=True, kw_only=True)
class DtuMetrics:
    """Distances of one scan in mm; ``cloud.chamfer_mean`` is what DTU calls overall.

    Args:
        cloud: means and medians of the distances that count.
        accuracy_share, completeness_share: the share of distances that count, in (0, 1]. Without
            them, what is wrong beyond the largest distance would go unseen.
    """

    cloud: CloudDistance
    accuracy_share: float
    completeness_share: float


def align_to_scan(
    pred_points: Tensor,
    pred_centers: Tensor,
    gt_centers: Tensor,
    truth: DtuTruth,
    protocol: DtuProtocol = DTU_OFFICIAL,
) -> Sim3:
    """Similarity that takes a prediction to DTU's frame, as the protocol says.

    Args:
        pred_points: [M, 3], finite, in the frame and scale of ``pred_centers``; for ICP.
        pred_centers, gt_centers: camera centres [N >= 3, 3], the true ones in mm.

    Raises:
        AlignmentError: the cameras do not determine a similarity, or a point is not finite.
        LayoutError: a tensor does not have its shape.
    """
    if protocol.ransac_distance is not None:
        generator = torch.Generator().manual_seed(protocol.seed)
        agree = agreeing_pairs(pred_centers, gt_centers, protocol.ransac_distance, generator)
        pred_centers, gt_centers = pred_centers.cpu()[agree], gt_centers.cpu()[agree]
    if protocol.icp_distance is None:
        return umeyama(pred_centers, gt_centers)
    center = truth.points.mean(0)
    radius = (truth.points - center).square().sum(-1).mean().sqrt().item()
    if radius == 0:
        raise AlignmentError(f"ICP needs a surface; DTU scan {truth.scan} is a single point")
    return align_points(
        pred_points,
        truth.points,
        pred_centers,
        gt_centers,
        max_correspondence=protocol.icp_distance / radius,
    ).world_from_pred


def distance_to_scan(
    points: Tensor, truth: DtuTruth, protocol: DtuProtocol = DTU_OFFICIAL
) -> DtuMetrics:
    """Measure a predicted cloud [M, 3] that lies in DTU's frame.

    Accuracy is from the reduced cloud, where the scanner could see, to the whole scan;
    completeness from the scan above the table to the reduced cloud in the widened box.

    Raises:
        AlignmentError: a point is not finite, or none of the cloud is near the scan.
        LayoutError: ``points`` is not [M, 3].
    """
    points = points.detach().cpu().double()
    generator = torch.Generator().manual_seed(protocol.seed)
    reduced = points[reduce_cloud(points, protocol.reduction, generator)]
    near = reduced[truth.in_box(reduced, protocol.box_margin)]
    observed = near[truth.is_observed(near)]
    above_table = truth.points[truth.above_table(truth.points)]
    if len(observed) == 0 or len(above_table) == 0:
        raise AlignmentError(
            f"{len(observed)} of {len(points)} predicted points lie in the observed volume of DTU "
            f"scan {truth.scan}, and {len(above_table)} of {len(truth.points)} scanned points "
            "above its table, both must be some; the alignment has failed, or points are not in mm"
        )
    # The approximate index for large clouds would overestimate some distances.
    to_scan, _ = NearestNeighbors(truth.points, "exact").query(observed)
    to_cloud, _ = NearestNeighbors(near, "exact").query(above_table)
    to_scan_near = to_scan[to_scan < protocol.max_distance]
    to_cloud_near = to_cloud[to_cloud < protocol.max_distance]
    if len(to_scan_near) == 0 or len(to_cloud_near) == 0:
        raise AlignmentError(
            f"no predicted point is within {protocol.max_distance} mm of the points of DTU scan "
            f"{truth.scan}; the alignment has failed, or the points are not in mm"
        )
    return DtuMetrics(
        cloud=CloudDistance(
            accuracy=float(to_scan_near.mean()),
            accuracy_median=float(np.median(to_scan_near.numpy())),
            completeness=float(to_cloud_near.mean()),
            completeness_median=float(np.median(to_cloud_near.numpy())),
        ),
        accuracy_share=len(to_scan_near) / len(to_scan),
        completeness_share=len(to_cloud_near) / len(to_cloud),
    )
