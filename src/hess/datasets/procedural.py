"""Procedural scenes with exact ground truth: textured rooms with boxes and ellipsoids.

A batched ray caster in plain torch, on CPU or GPU. Everything about a scene follows from its
split, seed and index alone; the splits never share a scene. Textures are solid (a function of the
world point), so views agree with each other: low frequencies say roughly where a point is, high
ones let it be found exactly.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hess.datasets.scene import Scene
from hess.errors import ConfigError
from hess.geometry.poses import pose_from

Split = Literal["train", "calibration", "test"]
_SPLITS: tuple[Split, ...] = ("train", "calibration", "test")


@dataclass(frozen=True, kw_only=True)
class ProceduralConfig:
    """How hard the scenes are. Lengths are in room units (about a metre), angles in degrees.

    Args:
        image_size: side of the square images in pixels.
        num_objects: objects at most; each is there with probability 0.85.
        num_waves: sine waves per texture.
        wave_frequency: lowest and highest texture frequency in cycles per unit.
        azimuth_span: the cameras of a scene spread over an arc of a width drawn from this range.
        elevation, distance: of the cameras, seen from the middle of the room.
        field_of_view: full angle, one per scene.
        gain_noise, pixel_noise: standard deviations of a view's colour gain and of each pixel.

    Raises:
        ConfigError: a value is out of range.
    """

    image_size: int = 48
    num_objects: int = 5
    num_waves: int = 20
    wave_frequency: tuple[float, float] = (0.12, 2.5)
    azimuth_span: tuple[float, float] = (20.0, 150.0)
    elevation: tuple[float, float] = (8.0, 50.0)
    distance: tuple[float, float] = (1.6, 2.4)
    field_of_view: tuple[float, float] = (55.0, 75.0)
    gain_noise: float = 0.06
    pixel_noise: float = 0.02

    def __post_init__(self) -> None:
        if min(self.image_size, self.num_objects, self.num_waves) < 1:
            raise ConfigError("image_size, num_objects and num_waves must be at least 1")
        for name in ("wave_frequency", "azimuth_span", "elevation", "distance", "field_of_view"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ConfigError(f"{name} must be 0 < low <= high, found ({low}, {high})")
        if self.elevation[1] >= 80 or self.field_of_view[1] >= 170:
            raise ConfigError("elevation must stay below 80 and field_of_view below 170 degrees")


@dataclass(frozen=True, kw_only=True)
class SceneBatch:
    """B rendered scenes of N views.

    Args:
        images: [B, N, 3, S, S] in [0, 1].
        depth: z-depth [B, N, S, S]; every pixel hits something.
        world_from_cam: [B, N, 4, 4], OpenCV axes.
        intrinsics: [B, N, 3, 3] in pixels, top-left pixel centre at (0.5, 0.5).
    """

    images: Tensor
    depth: Tensor
    world_from_cam: Tensor
    intrinsics: Tensor


@dataclass(frozen=True)
class Procedural:
    """Data set of procedural scenes; scene i is the same whatever else is asked for.

    Args:
        num_scenes, num_views: size of the data set and of each scene.
        split: "train", "calibration" or "test"; splits are disjoint by construction.
        seed: another seed gives other scenes of the same split.
        config: difficulty.
    """

    num_scenes: int
    num_views: int = 8
    split: Split = "test"
    seed: int = 0
    config: ProceduralConfig = field(default_factory=ProceduralConfig)

    def __post_init__(self) -> None:
        if self.num_scenes < 1 or self.num_views < 1 or not 0 <= self.seed < 2**20:
            raise ConfigError(
                "procedural scenes need num_scenes >= 1, num_views >= 1 and 0 <= seed < 2^20, "
                f"found {self.num_scenes}, {self.num_views} and {self.seed}"
            )
        if self.split not in _SPLITS:
            raise ConfigError(f"split must be one of {_SPLITS}, found {self.split!r}")

    @property
    def name(self) -> str:
        return f"procedural-{self.split}"

    @property
    def provenance(self) -> dict[str, object]:
        return {
            "name": self.name,
            "num_scenes": self.num_scenes,
            "num_views": self.num_views,
            "seed": self.seed,
            **asdict(self.config),
        }

    def __len__(self) -> int:
        return self.num_scenes

    def __iter__(self) -> Iterator[Scene]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.num_scenes:
            raise IndexError(f"scene {index} of {self.num_scenes}")
        batch = self.render([index])
        return Scene(
            name=f"{self.name}-{self.seed}-{index:05d}",
            images=batch.images[0],
            world_from_cam=batch.world_from_cam[0],
            intrinsics=batch.intrinsics[0],
            depth=batch.depth[0],
            view_names=tuple(f"view{i}" for i in range(self.num_views)),
        )

    def render(self, indices: Sequence[int], device: torch.device | str = "cpu") -> SceneBatch:
        """Render several scenes at once. The random numbers are the same on any device."""
        drawn = [_draw_scene(self._random(i), self.num_views, self.config) for i in indices]
        stacked = {key: torch.stack([d[key] for d in drawn]).to(device) for key in drawn[0]}
        return _render(stacked, self.config.image_size)

    def _random(self, index: int) -> np.random.Generator:
        # NumPy hashes all of the key; torch's CPU generator would keep only 32 bits of a seed.
        return np.random.default_rng([_SPLITS.index(self.split), self.seed, index])


def _draw_scene(
    random: np.random.Generator, num_views: int, config: ProceduralConfig
) -> dict[str, Tensor]:
    """All random numbers of one scene."""

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.from_numpy(random.random(shape, dtype=np.float32)) * (high - low) + low

    def between(bounds: tuple[float, float], *shape: int) -> Tensor:
        return uniform(*shape, low=math.radians(bounds[0]), high=math.radians(bounds[1]))

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(random.standard_normal(shape, dtype=np.float32))

    m, k, n, s = config.num_objects, config.num_waves, num_views, config.image_size
    room = torch.cat([uniform(2, low=2.6, high=4.0), uniform(1, low=2.6, high=3.6)])
    radius, angle = uniform(m, high=0.85), uniform(m, high=2 * math.pi)
    object_size = uniform(m, 3, low=0.18, high=0.5)
    height = object_size[:, 2] + uniform(m, low=-0.05, high=0.35)
    object_center = torch.stack([radius * angle.cos(), radius * angle.sin(), height], dim=-1)

    low, high = config.wave_frequency
    frequency = low * (high / low) ** uniform(k)
    wave_vector = 2 * math.pi * frequency[:, None] * F.normalize(normal(k, 3), dim=-1)

    azimuth = uniform(1, high=2 * math.pi) + (uniform(n) - 0.5) * between(config.azimuth_span, 1)
    elevation = between(config.elevation, n)
    distance = uniform(n, low=config.distance[0], high=config.distance[1])
    center = torch.stack(
        [
            distance * elevation.cos() * azimuth.cos(),
            distance * elevation.cos() * azimuth.sin(),
            (0.3 + distance * elevation.sin()).clamp(max=float(room[2]) - 0.15),
        ],
        dim=-1,
    )
    target = torch.tensor([0.0, 0.0, 0.4]) + normal(n, 3) * 0.2
    return {
        "room": room,
        "object_size": object_size,
        "object_center": object_center,
        "object_yaw": uniform(m, high=2 * math.pi),
        "object_is_ellipsoid": uniform(m) < 0.5,
        "object_exists": uniform(m) < 0.85,
        "wave_vector": wave_vector,
        "wave_amplitude": normal(k, 3) * 0.38 * frequency[:, None] ** -0.35,
        "wave_phase": uniform(m + 1, k, high=2 * math.pi),
        "base_colour": normal(m + 1, 3) * 0.7,
        "light": F.normalize(normal(3) + torch.tensor([0.0, 0.0, 1.0]), dim=-1),
        "world_from_cam": pose_from(_look_at(center, target, normal(n) * math.radians(5)), center),
        "field_of_view": between(config.field_of_view, 1)[0],
        "gain": 1 + config.gain_noise * normal(n, 3),
        "noise": config.pixel_noise * normal(n, 3, s, s),
    }


def _look_at(center: Tensor, target: Tensor, roll: Tensor) -> Tensor:
    """Rotation world_from_cam of cameras at ``center`` that look at ``target``, world z up."""
    z = F.normalize(target - center, dim=-1)
    up = torch.tensor([0.0, 0.0, 1.0]).expand_as(z)
    x = F.normalize(torch.linalg.cross(z, up), dim=-1)
    y = torch.linalg.cross(z, x)
    cos, sin = roll.cos()[:, None], roll.sin()[:, None]
    return torch.stack([cos * x + sin * y, cos * y - sin * x, z], dim=-1)


def _render(scene: dict[str, Tensor], size: int) -> SceneBatch:
    """Cast one ray per pixel. Tensors below have shape [B, N, pixels(, 3)]."""
    poses = scene["world_from_cam"]
    batch, num_views = poses.shape[:2]
    focal = size / 2 / torch.tan(scene["field_of_view"] / 2)
    offset = torch.arange(size, device=poses.device) + 0.5 - size / 2
    v, u = torch.meshgrid(offset, offset, indexing="ij")
    u, v = u.flatten() / focal[:, None], v.flatten() / focal[:, None]
    in_camera = torch.stack([u, v, torch.ones_like(u)], dim=-1)
    # Rays have unit z in the camera's frame, so the ray parameter is the z-depth.
    ray = torch.einsum("bnij,bpj->bnpi", poses[..., :3, :3], in_camera)
    origin = poses[..., :3, 3]

    depth, normal, surface = _hit_room(scene["room"], origin, ray)
    for m in range(scene["object_size"].shape[1]):
        depth, normal, surface = _hit_object(scene, m, origin, ray, depth, normal, surface)
    points = origin[:, :, None] + depth[..., None] * ray
    colour = _shade(scene, points.flatten(1, 2), normal.flatten(1, 2), surface.flatten(1))

    images = colour.view(batch, num_views, size, size, 3).permute(0, 1, 4, 2, 3)
    images = images * scene["gain"][..., None, None] + scene["noise"]
    intrinsics = torch.zeros(batch, 3, 3, device=poses.device)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal
    intrinsics[:, :2, 2] = size / 2
    intrinsics[:, 2, 2] = 1
    return SceneBatch(
        images=images.clamp(0, 1).contiguous(),
        depth=depth.view(batch, num_views, size, size),
        world_from_cam=poses,
        intrinsics=intrinsics[:, None].expand(-1, num_views, -1, -1).contiguous(),
    )


def _hit_room(room: Tensor, origin: Tensor, ray: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where rays leave the room, which is centred on the z axis and stands on z = 0."""
    high = room[:, None, None]
    low = torch.cat([-high[..., :2], torch.zeros_like(high[..., 2:])], dim=-1)
    inverse = 1 / _away_from_zero(ray)
    start = origin[:, :, None]
    leave = torch.maximum((low - start) * inverse, (high - start) * inverse)
    depth, axis = leave.min(dim=-1)
    normal = -F.one_hot(axis, 3) * ray.sign()
    return depth, normal, torch.zeros_like(axis)


def _hit_object(
    scene: dict[str, Tensor],
    m: int,
    origin: Tensor,
    ray: Tensor,
    depth: Tensor,
    normal: Tensor,
    surface: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest of the hits so far and object ``m``: an ellipsoid or a box, turned about z."""
    size = scene["object_size"][:, m, None, None]
    yaw = scene["object_yaw"][:, m]
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    turn = torch.stack(
        [yaw.cos(), -yaw.sin(), zero, yaw.sin(), yaw.cos(), zero, zero, zero, one], dim=-1
    ).view(-1, 3, 3)
    # In the object's own frame it is a unit sphere or the cube [-1, 1]^3.
    start = torch.einsum("bji,bnj->bni", turn, origin - scene["object_center"][:, None, m])
    start = start[:, :, None] / size
    step = torch.einsum("bji,bnpj->bnpi", turn, ray) / size

    a, b = step.square().sum(-1), (step * start).sum(-1)
    discriminant = b.square() - a * (start.square().sum(-1) - 1)
    t_sphere = (-b - discriminant.clamp_min(0).sqrt()) / a
    hits_sphere = (discriminant > 0) & (t_sphere > 0.05)

    inverse = 1 / _away_from_zero(step)
    t1, t2 = (-1 - start) * inverse, (1 - start) * inverse
    t_box, axis = torch.minimum(t1, t2).max(dim=-1)
    hits_box = (t_box < torch.maximum(t1, t2).amin(-1)) & (t_box > 0.05)

    is_sphere = scene["object_is_ellipsoid"][:, m, None, None]
    t = torch.where(is_sphere, t_sphere, t_box)
    hit = torch.where(is_sphere, hits_sphere, hits_box) & (t < depth)
    hit &= scene["object_exists"][:, m, None, None]
    box_normal = -F.one_hot(axis, 3) * step.sign()
    local = torch.where(is_sphere[..., None], start + t_sphere[..., None] * step, box_normal)
    world = F.normalize(torch.einsum("bij,bnpj->bnpi", turn, local / size), dim=-1)
    return (
        torch.where(hit, t, depth),
        torch.where(hit[..., None], world, normal),
        torch.where(hit, m + 1, surface),
    )


def _shade(scene: dict[str, Tensor], points: Tensor, normal: Tensor, surface: Tensor) -> Tensor:
    """Colour in [0, 1] of surface points [B, P, 3]: solid sine texture under one lamp."""
    index = surface[..., None]
    phase = scene["wave_phase"].gather(1, index.expand(-1, -1, scene["wave_phase"].shape[-1]))
    base = scene["base_colour"].gather(1, index.expand(-1, -1, 3))
    waves = torch.baddbmm(phase, points, scene["wave_vector"].mT).sin()
    albedo = 0.5 + 0.5 * torch.tanh(torch.baddbmm(base, waves, scene["wave_amplitude"]))
    facing = (normal * scene["light"][:, None]).sum(-1, keepdim=True).clamp_min(0)
    return albedo * (0.65 + 0.35 * facing)


def _away_from_zero(x: Tensor) -> Tensor:
    """``x`` with tiny entries replaced, so that its reciprocal is finite."""
    return torch.where(x.abs() < 1e-6, torch.full_like(x, 1e-6), x)
