"""Errors without ground truth: how far the prediction moves along random directions.

With J the derivative of the predicted cameras (or points) by a head's W_Q and Gaussian
noise n, ``E |Jᵀ n|² = tr(Jᵀ J)`` (Hutchinson): the Gauss-Newton part of the curvature that the
Fisher trace of HeSS measures, with noise in the place of the residual to the ground truth. So the
trace of the scalar ``<n, prediction>`` needs no ground truth, and its mean over draws is a score.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hess.datasets.scene import Scene
from hess.errors import AlignmentError, ConfigError
from hess.geometry.poses import camera_centers
from hess.models.base import Model
from hess.sensitivity.errors import scene_scale

CAMERA_WEIGHT = 0.5
"""Share of the camera error in the score; the paper's weights are for its errors."""

SCORE_EXPONENT = 0.9
"""The score goes by this power of the trace; 1 is slightly too sure of the largest heads."""

CONTROL_POINTS = 3
"""Places per side of a view at which the noise of points is drawn."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """How a calibration without ground truth draws its noise.

    Args:
        num_probes: draws per scene, each with a backward pass for cameras and one for points.
        seed: of the noise.

    Raises:
        ConfigError: a value is out of range.
    """

    num_probes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_probes < 1:
            raise ConfigError(f"num_probes must be at least 1, found {self.num_probes}")
        if self.seed < 0:
            raise ConfigError(f"the seed of probes must be at least 0, found {self.seed}")


def random_errors(
    model: Model, scene: Scene, config: ProbeConfig, index: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run ``model`` once; then pairs of a camera and a point error, one per probe.

    Each is ``<n, x> / (scale * sqrt(count))`` for predicted positions x and noise n: the expected
    square of a change of it is a mean squared displacement, in units of the scene's size as the
    model sees it (mean distance of points to the first camera). A camera's positions are its
    centre and the ends of its three axes, one size long, so that turning it counts as much as
    moving it. The noise of points is smooth over each view, as errors of depth are: without that
    the score goes by how well a head can move single pixels. No noise has a share that a
    similarity of the whole scene would take up, since that is no error.

    Args:
        index: of the scene in its data set; with the seed it decides the noise.

    Raises:
        AlignmentError: a prediction is not finite, or all points lie in the first camera.
    """
    device = next(model.parameters()).device
    with torch.autocast(device.type, enabled=False):
        predictions = model(scene.images.unsqueeze(0).to(device))
    poses, point_map = predictions.world_from_cam[0], predictions.world_points[0]
    points = point_map.flatten(0, 2)
    if not bool(torch.isfinite(poses).all() and torch.isfinite(points).all()):
        raise AlignmentError(f"scene {scene.name!r}: the prediction holds NaN or infinity")
    scale = scene_scale(points.detach(), poses[0, :3, 3].detach())
    cameras = camera_positions(poses, scale)
    random = np.random.default_rng([config.seed, index])
    for _ in range(config.num_probes):
        white = torch.from_numpy(random.standard_normal(tuple(cameras.shape)))
        if len(poses) == 1:  # however a single camera moves, a similarity moves it back
            white = torch.zeros_like(white)
        smooth = smooth_noise(random, tuple(point_map.shape[:3]))
        yield _along(white, cameras, scale), _along(smooth, points, scale)


def camera_positions(poses: Tensor, axis_length: float) -> Tensor:
    """Centres of ``poses`` [N, 4, 4] and the ends of their axes: [4 N, 3]."""
    centers = camera_centers(poses)
    ends = centers[:, None] + axis_length * poses[:, :3, :3].mT
    return torch.cat((centers[:, None], ends), dim=1).flatten(0, 1)


def smooth_noise(random: np.random.Generator, shape: tuple[int, int, int]) -> Tensor:
    """Noise for the points of views [N, H, W]: float64 [N * H * W, 3].

    Gaussian at :data:`CONTROL_POINTS` squared places of each view, bilinear between them.
    """
    views, *size = shape
    drawn = random.standard_normal((views, 3, CONTROL_POINTS, CONTROL_POINTS))
    noise = F.interpolate(torch.from_numpy(drawn), size, mode="bilinear", align_corners=True)
    return noise.permute(0, 2, 3, 1).flatten(0, 2)


def _along(noise: Tensor, predicted: Tensor, scale: float) -> Tensor:
    noise = without_similarity(noise, predicted.detach().cpu().double())
    return (noise.to(predicted) * predicted).sum() / (scale * math.sqrt(len(predicted)))


def without_similarity(noise: Tensor, points: Tensor) -> Tensor:
    """The part of displacements [n, 3] of points [n, 3] that no small similarity makes.

    Three translations, three rotations and a scaling span what is taken out; if the points lie on
    a line or a spot these are fewer.
    """
    centred = points - points.mean(0)
    size = centred.square().sum(-1).mean().sqrt()
    centred = centred / size if size > 0 else centred
    axes = torch.eye(3, dtype=points.dtype)
    moves = [axis.expand_as(points) for axis in axes]
    moves += [torch.linalg.cross(axis.expand_as(points), centred) for axis in axes]
    moves.append(centred)
    directions = torch.stack(moves, dim=-1).flatten(0, 1)
    basis, singular, _ = torch.linalg.svd(directions, full_matrices=False)
    basis = basis[:, singular > 1e-9 * singular[0]]
    flat = noise.flatten()
    return (flat - basis @ (basis.mT @ flat)).view_as(noise)
