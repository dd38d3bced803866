"""All metrics of one prediction of one scene, against ground truth that is prepared once."""

import torch
from torch import Tensor

from hess.datasets.scene import Scene
from hess.errors import AlignmentError, DatasetError
from hess.evaluation.pose_metrics import auc, pair_errors, trajectory_error
from hess.evaluation.protocol import PointTruth, Protocol

SceneMetrics = dict[str, float | str | None]
"""Metric name -> value; None when the scene lacks the ground truth for it. Where the protocol's
mean is not over scenes, also what it needs of the scene: its "num_pairs" and "category"."""


class SceneTruth:
    """Ground truth of one scene: cameras, and points where the protocol and the scene have them.

    Args:
        scene: must have poses.
        protocol: what will be measured.

    Raises:
        DatasetError: no poses, another number of views or another unit than the protocol's, no
            category where its mean is over categories, or no ground truth that its points need.
        AlignmentError: a true point is not finite.
    """

    def __init__(self, scene: Scene, protocol: Protocol) -> None:
        if scene.world_from_cam is None:
            raise DatasetError(
                f"scene {scene.name!r} has no camera poses, so nothing can be measured on it; "
                "use a data set with poses"
            )
        if protocol.views is not None and scene.num_views != protocol.views:
            raise DatasetError(
                f"protocol {protocol.name!r} needs scenes of {protocol.views} views, scene "
                f"{scene.name!r} has {scene.num_views}; choose the views or another protocol"
            )
        if protocol.mean == "categories" and scene.category is None:
            raise DatasetError(
                f"protocol {protocol.name!r} takes the mean over categories, scene {scene.name!r} "
                "has none; use CO3Dv2 or another protocol"
            )
        # First, since a measure can say better than the unit why a scene is not for it.
        self.points: PointTruth | None = None
        if protocol.points is not None:
            self.points = protocol.points.truth(scene)
        if protocol.unit is not None and scene.unit != protocol.unit:
            raise DatasetError(
                f"protocol {protocol.name!r} needs lengths in {protocol.unit!r}, scene "
                f"{scene.name!r} is in {scene.unit!r}"
            )
        self.name = scene.name
        self.category = scene.category
        self.unit = scene.unit
        self.world_from_cam = scene.world_from_cam.cpu().double()


def scene_metrics(
    world_from_cam: Tensor, world_points: Tensor, truth: SceneTruth, protocol: Protocol
) -> SceneMetrics:
    """Metrics of a prediction: ``protocol.metrics`` by name, and what their mean needs.

    Args:
        world_from_cam: predicted poses [N, 4, 4], any frame and scale.
        world_points: predicted point map [N, H, W, 3] in the same frame and scale.

    Raises:
        LayoutError: shapes differ from the truth's.
        AlignmentError: the prediction is not finite or degenerate, or the truth is degenerate.
    """
    world_from_cam = world_from_cam.detach().cpu().double()
    if not bool(torch.isfinite(world_from_cam).all()):
        raise AlignmentError("the predicted cameras hold NaN or infinity")
    rotation, translation = pair_errors(world_from_cam, truth.world_from_cam, protocol.pair_order)
    worst = torch.maximum(rotation, translation)
    metrics: SceneMetrics = {f"auc_{t}": float(auc(worst, t)) for t in protocol.auc_thresholds}
    trajectory = trajectory_error(world_from_cam, truth.world_from_cam)
    metrics |= {"ate_rmse": trajectory.rmse, "ate_relative": trajectory.relative}
    if protocol.mean != "scenes":
        metrics |= {"num_pairs": worst.shape[-1], "category": truth.category}
    if truth.points is None:
        return metrics | dict.fromkeys(protocol.point_metrics)
    return metrics | truth.points.measure(world_from_cam, world_points)
