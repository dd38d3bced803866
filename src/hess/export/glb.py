"""A scene to look at: points and cameras as binary glTF."""

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hess.export.exportable import Exportable
from hess.export.point_cloud import PointCloud
from hess.export.transforms import OPENCV_FROM_OPENGL
from hess.files import write_atomically

MAX_POINTS = 2_000_000
"""More than this no viewer turns smoothly."""
FRUSTUM_SHARE = 0.05
"""Length of a camera's frustum as a share of the scene's diagonal."""
FIRST_CAMERA_COLOR = (0.84, 0.37, 0.0)
CAMERA_COLOR = (0.0, 0.45, 0.70)

_AXES = OPENCV_FROM_OPENGL.numpy()
_FLOAT = 5126  # glTF's number for float32

Floats = NDArray[np.floating]


def write_glb(path: Path, recon: Exportable, cloud: PointCloud) -> None:
    """Write points and one frustum per view as glTF 2.0 in one file, atomically.

    World and cameras are turned from OpenCV's axes (y down, z forward) to glTF's (y up, z
    backwards), so the first camera of a model that takes it as origin stands upright. The node
    of a camera bears its view's name and holds its pose; its frustum shows what the original
    photo shows. The first camera has another colour. Colours are linear, as glTF demands, not
    sRGB as in the photos. Of more than two million points that many are kept, evenly spread.
    """
    import trimesh

    cloud = cloud.at_most(MAX_POINTS)
    points = cloud.points.double().numpy()
    scene = trimesh.Scene()
    # Bytes that no other buffer has, which trimesh would store only once.
    placeholder = np.full((len(points), 4), 255, np.uint8)
    scene.add_geometry(
        trimesh.PointCloud(points @ _AXES[:3, :3], colors=placeholder),
        node_name="points",
        geom_name="points",
    )
    low, high = np.quantile(points, (0.05, 0.95), axis=0)
    length = FRUSTUM_SHARE * float(np.linalg.norm(high - low)) or FRUSTUM_SHARE
    poses = _AXES @ recon.world_from_cam.double().numpy() @ _AXES
    for view, name in enumerate(recon.view_names):
        fit = recon.image_fits[view]
        corners = _far_corners(
            recon.original_intrinsics[view].double().numpy(),
            fit.original_width,
            fit.original_height,
        )
        mesh = _wire_pyramid(length * corners @ _AXES[:3, :3], thickness=0.02 * length)
        mesh.visual = trimesh.visual.TextureVisuals(
            material=trimesh.visual.material.PBRMaterial(
                name="first camera" if view == 0 else "camera",
                baseColorFactor=(*(CAMERA_COLOR if view else FIRST_CAMERA_COLOR), 1.0),
                metallicFactor=0.0,
                roughnessFactor=1.0,
                doubleSided=True,
            )
        )
        node = f"camera {name}"
        scene.add_geometry(mesh, node_name=node, geom_name=node, transform=poses[view])
    colors = _linear(cloud.colors)
    data = scene.export(
        file_type="glb",
        buffer_postprocessor=lambda buffers, tree: _set_point_colors(buffers, tree, colors),
    )
    write_atomically(path, data)


def _linear(colors: Tensor) -> Floats:
    """sRGB colours in [0, 1] as linear ones (IEC 61966-2-1)."""
    srgb = colors.double().numpy()
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _set_point_colors(
    buffers: MutableMapping[Any, bytes], tree: Mapping[str, Any], colors: Floats
) -> None:
    """Put colours [M, 3] in place of trimesh's 8-bit ones, which show steps in dark tones."""
    (attributes,) = (
        primitive["attributes"]
        for mesh in tree["meshes"]
        for primitive in mesh["primitives"]
        if "COLOR_0" in primitive["attributes"]
    )
    accessor = [*tree["accessors"].values()][attributes["COLOR_0"]]
    buffers[[*buffers][accessor["bufferView"]]] = colors.astype("<f4").tobytes()
    accessor.update(componentType=_FLOAT, type="VEC3")
    del accessor["normalized"]


def _far_corners(intrinsics: Floats, width: int, height: int) -> Floats:
    """Corners of the photo at z = 1 in the camera's frame, OpenCV axes: [4, 3], in a ring."""
    pixels = [[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]]
    return np.asarray(pixels, float) @ np.linalg.inv(intrinsics).T


def _wire_pyramid(corners: Floats, thickness: float) -> Any:
    """The eight edges from the origin to ``corners`` and around them, as thin rods."""
    import trimesh

    rim = np.roll(corners, -1, axis=0)
    edges = [*zip(np.zeros_like(corners), corners, strict=True), *zip(corners, rim, strict=True)]
    rods = [
        trimesh.creation.cylinder(radius=thickness / 2, segment=edge, sections=6) for edge in edges
    ]
    return trimesh.util.concatenate(rods)
