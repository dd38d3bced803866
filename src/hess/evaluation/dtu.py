"""DTU's official point metrics: predictions against the laser scan, in millimetres.

Aanaes et al., "Large-Scale Data for Multiple-View Stereopsis" (IJCV 2016), with the bounds of
the Python port in common use (jzhangbs/DTUeval-python). What pi3 measures on DTU, against depth
maps and without limits, is in :mod:`hess.evaluation.dtu_pi3`.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hess.datasets.dtu_cameras import scan_number
from hess.datasets.dtu_official import DtuTruth, read_dtu_truth
from hess.datasets.scene import Scene
from hess.errors import AlignmentError, ConfigError, DatasetError
from hess.evaluation.point_metrics import CLOUD_METRICS, CloudDistance
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

_SHARES = ("accuracy_share", "completeness_share")


@dataclass(frozen=True, kw_only=True)
class DtuScanPoints:
    """How points are measured against the laser scan; lengths in mm.

    Predictions are aligned by Umeyama on the camera centres, as the scan has no pixels. Every
    pixel of every view is a predicted point.

    Args:
        reduction: no two predicted points are kept within this distance.
        box_margin: how far below and above the box of the observed volume a predicted point may
            lie to complete the scan.
        max_distance: larger distances do not count.
        ransac_distance: only the cameras that RANSAC finds to agree within this distance align;
            None takes all.
        icp_distance: largest distance that point-to-plane ICP pairs points at, after the cameras;
            None leaves ICP out.
        seed: of the shuffle before the reduction and of RANSAC.
        folder: holds ``Points/stl/`` and ``ObsMask/``; must be given before :meth:`truth`.

    Raises:
        ConfigError: a length is not positive.
    """

    reduction: float = 0.2
    box_margin: tuple[float, float] = (60.0, 120.0)
    max_distance: float = 20.0
    ransac_distance: float | None = None
    icp_distance: float | None = None
    seed: int = 0
    folder: Path | None = None

    def __post_init__(self) -> None:
        lengths = {
            field: getattr(self, field)
            for field in ("reduction", "max_distance", "ransac_distance", "icp_distance")
        }
        lengths |= {f"box_margin[{i}]": length for i, length in enumerate(self.box_margin)}
        for field, length in lengths.items():
            if length is not None and not 0 < length < math.inf:
                raise ConfigError(f"DTU's {field} must be above 0 mm, found {length}")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, in the order of a results row."""
        return (*CLOUD_METRICS, *_SHARES)

    def with_truth(self, folder: Path | None) -> "DtuScanPoints":
        """The same with ``folder`` as the place of the laser scans.

        Raises:
            ConfigError: no folder.
            DatasetError: it does not hold them.
        """
        return replace(self, folder=_scan_folder(folder))

    def as_dict(self) -> dict[str, object]:
        """JSON values of all fields."""
        folder = None if self.folder is None else str(self.folder)
        return asdict(self) | {"box_margin": list(self.box_margin), "folder": folder}

    def describe(self) -> str:
        """All of it in words."""
        alignment = "Umeyama on camera centres"
        if self.ransac_distance is not None:
            alignment += f" that agree within {self.ransac_distance:g} mm (RANSAC)"
        if self.icp_distance is not None:
            alignment += f" and point-to-plane ICP up to {self.icp_distance:g} mm"
        below, above = self.box_margin
        return (
            f"points after {alignment}, at least {self.reduction:g} mm apart (seed {self.seed}), "
            "against the laser scan: accuracy in the observed volume; completeness of the scan "
            f"above the table, by points up to {below:g} mm below and {above:g} mm above the "
            f"volume's box; distances up to {self.max_distance:g} mm count"
        )

    def truth(self, scene: Scene) -> "ScanTruth":
        """The laser scan of a scene that is named after its number.

        Raises:
            ConfigError: no folder.
            DatasetError: the scene has no number or no poses, or a file of its scan is missing or
                damaged.
        """
        if scene.world_from_cam is None:
            raise DatasetError(f"scene {scene.name!r} has no camera poses to align predictions by")
        scan = read_dtu_truth(_scan_folder(self.folder), dtu_scan(scene))
        return ScanTruth(scan, scene.world_from_cam[:, :3, 3], self)


def _scan_folder(folder: Path | None) -> Path:
    if folder is None:
        raise ConfigError(
            "DTU's laser scans are not among its photos: give the folder that holds Points/stl/ "
            "and ObsMask/ of DTU as --truth"
        )
    for part, archive in (("Points/stl", "Points"), ("ObsMask", "SampleSet")):
        if not (folder / part).is_dir():
            raise DatasetError(
                f"{folder}: expected Points/stl/ and ObsMask/ of DTU, found no {part}/; take it "
                f"from the {archive} archive of DTU"
            )
    return folder


class ScanTruth:
    """The laser scan of one scene, and its true camera centres [N, 3] in mm."""

    def __init__(self, scan: DtuTruth, centers: Tensor, points: DtuScanPoints) -> None:
        self._scan, self._centers, self._points = scan, centers.cpu().double(), points

    def measure(self, world_from_cam: Tensor, world_points: Tensor) -> dict[str, float | None]:
        """Metrics of predicted poses [N, 4, 4] and points [N, H, W, 3], in one frame and scale.

        Raises:
            AlignmentError: the prediction is degenerate, not finite or far from the scan.
            LayoutError: another number of views than the truth's.
        """
        cloud = world_points.detach().cpu().double().reshape(-1, 3)
        centers = world_from_cam[:, :3, 3].detach().cpu().double()
        world_from_pred = align_to_scan(cloud, centers, self._centers, self._scan, self._points)
        found = distance_to_scan(world_from_pred.apply(cloud), self._scan, self._points)
        return {**found.cloud.as_dict(), **{name: getattr(found, name) for name in _SHARES}}


def dtu_scan(scene: Scene) -> int:
    """Number of the DTU scan that a scene shows.

    Raises:
        DatasetError: its name has none.
    """
    scan = scan_number(scene.name)
    if scan is None:
        raise DatasetError(
            f"scene {scene.name!r}: expected the number of a DTU scan in the name of its folder, "
            "found none; call the folder after its scan, such as scan24"
        )
    return scan


DTU_OFFICIAL = DtuScanPoints()
"""The official measure, which is silent on alignment."""

DTU_PAPER = replace(DTU_OFFICIAL, ransac_distance=10.0, icp_distance=20.0)
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
    measure: DtuScanPoints = DTU_OFFICIAL,
) -> Sim3:
    """Similarity that takes a prediction to DTU's frame, as the measure says.

    Args:
        pred_points: [M, 3], finite, in the frame and scale of ``pred_centers``; for ICP.
        pred_centers, gt_centers: camera centres [N >= 3, 3], the true ones in mm.

    Raises:
        AlignmentError: the cameras do not determine a similarity, or a point is not finite.
        LayoutError: a tensor does not have its shape.
    """
    if measure.ransac_distance is not None:
        generator = torch.Generator().manual_seed(measure.seed)
        agree = agreeing_pairs(pred_centers, gt_centers, measure.ransac_distance, generator)
        pred_centers, gt_centers = pred_centers.cpu()[agree], gt_centers.cpu()[agree]
    if measure.icp_distance is None:
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
        max_correspondence=measure.icp_distance / radius,
    ).world_from_pred


def distance_to_scan(
    points: Tensor, truth: DtuTruth, measure: DtuScanPoints = DTU_OFFICIAL
) -> DtuMetrics:
    """Measure a predicted cloud [M, 3] that lies in DTU's frame.

    Accuracy is from the reduced cloud, where the scanner could see, to the whole scan;
    completeness from the scan above the table to the reduced cloud in the widened box.

    Raises:
        AlignmentError: a point is not finite, or none of the cloud is near the scan.
        LayoutError: ``points`` is not [M, 3].
    """
    points = points.detach().cpu().double()
    generator = torch.Generator().manual_seed(measure.seed)
    reduced = points[reduce_cloud(points, measure.reduction, generator)]
    near = reduced[truth.in_box(reduced, measure.box_margin)]
    observed = near[truth.is_observed(near)]
    above_table = truth.points[truth.above_table(truth.points)]
    if len(observed) == 0 or len(above_table) == 0:
        raise AlignmentError(
            f"{len(observed)} of {len(points)} predicted points lie in the observed volume of DTU "
            f"scan {truth.scan}, and {len(above_table)} of {len(truth.points)} scanned points "
            "above its table, both must be some; the alignment has failed, or points are not in mm"
        )
    to_scan, _ = truth.neighbors.query(observed)
    # The approximate index for large clouds would overestimate some distances.
    to_cloud, _ = NearestNeighbors(near, "exact").query(above_table)
    to_scan_near = to_scan[to_scan < measure.max_distance]
    to_cloud_near = to_cloud[to_cloud < measure.max_distance]
    if len(to_scan_near) == 0 or len(to_cloud_near) == 0:
        raise AlignmentError(
            f"no predicted point is within {measure.max_distance} mm of the points of DTU scan "
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
