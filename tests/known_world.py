"""A world whose photos can be checked pixel by pixel: the textured plane z = 2 + 0.3 x + 0.1 y."""

from pathlib import Path

import numpy as np
from PIL import Image

from hess.datasets import Scene
from hess.geometry.fit_rules import FitRule
from hess.geometry.image_fit import ImageFit

ORIGINAL_SIZE = FitRule(
    name="original", choose=lambda sizes: [ImageFit.identity(*size) for size in sizes]
)


def texture(points: np.ndarray) -> np.ndarray:
    x, y = points[..., 0], points[..., 1]
    return np.stack(
        [0.5 + 0.4 * np.sin(5 * x), 0.5 + 0.4 * np.sin(5 * y), 0.5 + 0.4 * np.sin(3 * x + 3 * y)],
        axis=-1,
    )


def camera(view: int) -> np.ndarray:
    """Camera-to-world pose of view 0, 1, 2, ...: a step to the side and a turn each."""
    a, b = 0.05 * view, -0.04 * view
    turn_y = [[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]]
    turn_x = [[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]]
    pose = np.eye(4)
    pose[:3, :3] = np.array(turn_y) @ np.array(turn_x)
    pose[:3, 3] = [-0.1 * view, 0.03 * view, 0.05 * view]
    return pose


def pinhole(focal: float, width: int, height: int) -> np.ndarray:
    """Intrinsics with the principal point a little off the middle, pixel centres at +0.5."""
    return np.array([[focal, 0, width / 2 + 1.5], [0, focal, height / 2 - 0.75], [0, 0, 1]])


def render(
    k: np.ndarray, pose: np.ndarray, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Colour uint8 [height, width, 3] and z-depth [height, width] of the plane."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    rays = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ np.linalg.inv(k).T
    directions = rays @ pose[:3, :3].T
    normal = np.array([-0.3, -0.1, 1.0])
    depth = (2.0 - normal @ pose[:3, 3]) / (directions @ normal)
    points = pose[:3, 3] + depth[..., None] * directions
    return (texture(points) * 255).round().astype(np.uint8), depth


def assert_on_plane(scene: Scene, *, distance: float = 0.002, colour: float = 0.012) -> None:
    points, valid = (t.numpy() for t in scene.point_map())
    assert valid.any(axis=(1, 2)).all()
    residual = points[..., 2] - (2.0 + 0.3 * points[..., 0] + 0.1 * points[..., 1])
    assert np.abs(residual[valid]).max() < distance
    difference = scene.images.permute(0, 2, 3, 1).numpy() - texture(points)
    assert np.abs(difference[valid]).max() < colour


def save_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def assert_shows_plane(scene: Scene, *, colour: float = 0.004) -> None:
    """The photos are what the scene's own cameras see of the plane."""
    assert scene.intrinsics is not None
    assert scene.world_from_cam is not None
    height, width = scene.images.shape[-2:]
    views = zip(scene.images, scene.intrinsics, scene.world_from_cam, strict=True)
    for image, k, pose in views:
        expected, _ = render(k.double().numpy(), pose.double().numpy(), width, height)
        difference = image.permute(1, 2, 0).numpy() - expected / 255
        assert np.abs(difference).mean() < colour
