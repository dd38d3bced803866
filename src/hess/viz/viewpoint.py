"""Where a picture of a scene is taken from, and two places from which it shows well."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hess.errors import ConfigError

Floats = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class Viewpoint:
    """Where a picture is taken from: a pinhole camera with the target in the middle.

    Args:
        eye, target, up: [3] in world coordinates.
        field_of_view: vertical, in degrees, 1 to 150.

    Raises:
        ConfigError: the field of view is outside its range.
    """

    eye: Floats
    target: Floats
    up: Floats
    field_of_view: float = 35.0

    def __post_init__(self) -> None:
        if not 1 <= self.field_of_view <= 150:
            raise ConfigError(
                f"field_of_view must be 1 to 150 degrees, found {self.field_of_view}"
            )

    @property
    def cam_from_world(self) -> Floats:
        """[4, 4], OpenCV axes."""
        forward = _unit(self.target - self.eye)
        right = np.cross(forward, self.up)
        if np.linalg.norm(right) < 1e-9:
            right = np.cross(forward, np.eye(3)[np.abs(forward).argmin()])
        right = _unit(right)
        rotation = np.stack((right, np.cross(forward, right), forward))
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = rotation, -rotation @ self.eye
        return matrix


def two_viewpoints(
    points: Floats, world_from_cam: Floats, *, aspect: float = 4 / 3
) -> tuple[Viewpoint, Viewpoint]:
    """A view from behind and above the cameras, and one from the side, that show the scene.

    Up is the mean up of the cameras, or that of the first if they contradict each other. All
    cameras and all but the outermost points are in view.

    Args:
        points: [M >= 1, 3] in world coordinates, finite.
        world_from_cam: [N >= 1, 4, 4], finite.
        aspect: width over height of the picture.
    """
    right, down, forward, centers = world_from_cam[:, :3].transpose(2, 0, 1)
    up = _first_direction(-down.mean(0), -down[0])
    candidates = (-forward.mean(0), right[0], -forward[0])
    back = _first_direction(*(x - up * (x @ up) for x in candidates))
    side = np.cross(up, back)

    def view(around_deg: float, elevation_deg: float) -> Viewpoint:
        around, elevation = math.radians(around_deg), math.radians(elevation_deg)
        flat = math.cos(around) * back + math.sin(around) * side
        direction = math.cos(elevation) * flat + math.sin(elevation) * up
        return _fitted(points, centers, direction, up, aspect)

    return view(25.0, 40.0), view(-60.0, 24.0)


def _fitted(
    points: Floats, centers: Floats, direction: Floats, up: Floats, aspect: float
) -> Viewpoint:
    """The viewpoint in ``direction`` from the scene that fills the picture with it."""
    target = np.median(points, axis=0)
    radius = max(float(np.quantile(np.linalg.norm(points - target, axis=1), 0.95)), 1e-9)
    distance = 4.0 * radius
    half = math.tan(math.radians(35.0) / 2)
    for _ in range(8):
        found = Viewpoint(eye=target + distance * direction, target=target, up=up)
        matrix = found.cam_from_world
        in_cam = points @ matrix[:3, :3].T + matrix[:3, 3]
        in_cam = in_cam[in_cam[:, 2] > 0.05 * distance]
        of_cams = centers @ matrix[:3, :3].T + matrix[:3, 3]
        xy, cams = (x[:, :2] / np.maximum(x[:, 2:], 0.05 * distance) for x in (in_cam, of_cams))
        low = np.minimum(np.quantile(xy, 0.004, axis=0), cams.min(0))
        high = np.maximum(np.quantile(xy, 0.996, axis=0), cams.max(0))
        shift = distance * (low + high) / 2
        target = target + shift[0] * matrix[0, :3] + shift[1] * matrix[1, :3]
        used = max((high[0] - low[0]) / (2 * half * aspect), (high[1] - low[1]) / (2 * half))
        distance *= 1.08 * float(used)
    return Viewpoint(eye=target + distance * direction, target=target, up=up)


def _first_direction(*candidates: Floats) -> Floats:
    """The first that is not too short to have one, as a unit vector."""
    return _unit(next(x for x in candidates if np.linalg.norm(x) > 1e-3))


def _unit(vector: Floats) -> Floats:
    return vector / np.linalg.norm(vector)
