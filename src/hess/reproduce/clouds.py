"""Clouds of some scenes under each method, aligned to the truth (paper, Fig. 1 and 5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hess.datasets.scene import Dataset, Scene
from hess.errors import ConfigError, DatasetError
from hess.evaluation.point_metrics import GroundTruthPoints, point_metrics
from hess.models.base import Model
from hess.reproduce.experiment import CloudsSpec, Experiment
from hess.reproduce.methods import Line
from hess.transforms.base import Method, applied
from hess.viz.error_clouds import CloudPanel, from_the_cameras, wrong_in_green
from hess.viz.viewpoint import Viewpoint

DENSE_QUANTILE = 0.9
"""Where data is not in millimetres, this share of the dense model's points is within reach."""


@dataclass(frozen=True, kw_only=True)
class WrongShare:
    """How many points of a cloud are farther from the truth than the threshold."""

    scene: str
    label: str
    setting: str
    threshold: float
    share: float


def check_clouds(spec: CloudsSpec, dataset: Dataset) -> None:
    """Raise :class:`DatasetError` if the first scene that is shown has no true cloud."""
    _true_poses(dataset[min(spec.scenes[0], len(dataset) - 1)])


def cloud_panels(
    experiment: Experiment,
    model: Model,
    dataset: Dataset,
    lines: Sequence[Line],
) -> tuple[list[list[CloudPanel]], list[WrongShare]]:
    """Two rows per scene, dense above the truth, then uniform above HeSS at each setting.

    Returns:
        Rows of panels, and the shares of green points if errors are shown.

    Raises:
        DatasetError: a scene has no points.
        AlignmentError: a prediction cannot be aligned.
    """
    spec = experiment.clouds
    if spec is None:
        raise ConfigError(f"experiment {experiment.name!r} does not say which clouds to show")
    rows, shares = [], []
    for index in spec.scenes:
        if index < len(dataset):
            shown, wrong = _of_scene(spec, model, dataset[index], lines)
            rows += shown
            shares += wrong
    if not rows:
        raise ConfigError(f"scenes {list(spec.scenes)} are shown, found {len(dataset)} in all")
    return rows, shares if spec.color == "error" else []


def _of_scene(
    spec: CloudsSpec, model: Model, scene: Scene, lines: Sequence[Line]
) -> tuple[list[list[CloudPanel]], list[WrongShare]]:
    points, valid = scene.point_map()
    truth = GroundTruthPoints(points, valid, 1)
    colors = (255 * scene.images.movedim(1, -1)[valid]).byte().numpy()
    poses = _true_poses(scene)
    seen_from = poses[valid.nonzero()[:, 0], :3, 3].numpy()
    viewpoint = from_the_cameras(truth.points.numpy(), poses.numpy())
    cloud = _Cloud(colors=colors, seen_from=seen_from, viewpoint=viewpoint)

    aligned, distance = {}, {}
    for i, line in enumerate(lines):
        aligned[i] = _aligned(model, line.method, scene, truth)
        distance[i] = truth.neighbors.query(aligned[i])[0].cpu().numpy()
    (dense,) = [i for i, line in enumerate(lines) if line.spec.method == "dense"]
    threshold = spec.threshold_mm
    if scene.unit != "mm":
        threshold = max(float(np.quantile(distance[dense], DENSE_QUANTILE)), 1e-9)

    panels, shares = {}, []
    for i, line in enumerate(lines):
        share = float((distance[i] > threshold).mean())
        setting = "" if line.setting is None else "{:g}, {:g}".format(*line.setting)
        title = f"{line.spec.label} {f'({setting})' if setting else ''}".strip()
        shown = colors
        if spec.color == "error":
            shown = wrong_in_green(colors, distance[i], threshold)
            unit = " mm" if scene.unit == "mm" else ""
            title += f": {share:.0%} beyond {threshold:.3g}{unit}"
        panels[i] = cloud.panel(title, aligned[i].numpy(), shown)
        shares.append(
            WrongShare(
                scene=scene.name,
                label=line.spec.label,
                setting=setting or "–",
                threshold=threshold,
                share=share,
            )
        )
    first = [panels[dense], cloud.panel(f"Truth, {scene.name}", truth.points.numpy(), colors)]
    rows = [
        [start, *(panels[i] for i, line in enumerate(lines) if line.spec.method == method)]
        for start, method in zip(first, ("uniform", "hess"), strict=True)
    ]
    return rows, shares


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cloud:
    """What all panels of a scene share."""

    colors: np.ndarray
    seen_from: np.ndarray
    viewpoint: Viewpoint

    def panel(self, title: str, points: np.ndarray, colors: np.ndarray) -> CloudPanel:
        return CloudPanel(
            title=title,
            points=points,
            colors=colors,
            seen_from=self.seen_from,
            viewpoint=self.viewpoint,
        )


def _true_poses(scene: Scene) -> torch.Tensor:
    """World from camera, float64 [N, 4, 4], of a scene that has a true cloud."""
    if scene.world_from_cam is None or not scene.has_points:
        raise DatasetError(
            f"scene {scene.name!r} has no depth with cameras, so there is no true cloud to "
            "compare with; use data with depth, or leave fig1 and fig5 out"
        )
    return scene.world_from_cam.double()


def _aligned(model: Model, method: Method, scene: Scene, truth: GroundTruthPoints) -> torch.Tensor:
    """Predicted points [K, 3] of the pixels of the truth, by Umeyama's similarity in its frame."""
    images = scene.images[None].to(next(model.parameters()).device)
    with applied(model, method), torch.inference_mode():
        points = model(images).world_points[0].cpu()
    return point_metrics(points, truth).world_from_pred.apply(truth.pick(points))
