"""Similarity transforms of 3D space, and the one that best maps one point set to another."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hess.errors import AlignmentError, LayoutError
from hess.geometry.poses import camera_centers, pose_from

_COLLINEAR = 1e-6  # spread across a line, relative to the spread along it
_COINCIDENT = 1e-9  # spread of all points, relative to their coordinates


@dataclass(frozen=True, kw_only=True, eq=False)
class Sim3:
    """The map ``x -> scale * rotation @ x + translation``, held in float64 on the CPU.

    Args:
        scale: positive.
        rotation: [3, 3], orthonormal with determinant +1.
        translation: [3].

    Raises:
        AlignmentError: the parameters are not those of a similarity.
    """

    scale: float
    rotation: Tensor
    translation: Tensor

    def __post_init__(self) -> None:
        if tuple(self.rotation.shape) != (3, 3) or tuple(self.translation.shape) != (3,):
            raise AlignmentError(
                "a Sim3 needs rotation [3, 3] and translation [3], found "
                f"{tuple(self.rotation.shape)} and {tuple(self.translation.shape)}"
            )
        object.__setattr__(self, "scale", float(self.scale))
        object.__setattr__(self, "rotation", self.rotation.detach().cpu().double())
        object.__setattr__(self, "translation", self.translation.detach().cpu().double())
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise AlignmentError(f"a Sim3 needs a scale that is > 0, found {self.scale}")
        if not bool(torch.isfinite(self.translation).all()):
            raise AlignmentError("a Sim3 needs a finite translation")
        error = (self.rotation @ self.rotation.mT - torch.eye(3, dtype=torch.float64)).abs().max()
        if not (error < 1e-5 and torch.linalg.det(self.rotation) > 0):
            raise AlignmentError(
                "a Sim3 needs an orthonormal rotation with determinant +1, found "
                f"{self.rotation.tolist()}"
            )

    @staticmethod
    def identity() -> "Sim3":
        """The transform that changes nothing."""
        eye = torch.eye(3, dtype=torch.float64)
        return Sim3(scale=1.0, rotation=eye, translation=torch.zeros(3, dtype=torch.float64))

    def apply(self, points: Tensor) -> Tensor:
        """Transform points [..., 3]; keeps dtype and device, differentiable in the points."""
        _check_points("points", points)
        rotation = self.rotation.to(points) * self.scale
        return points @ rotation.mT + self.translation.to(points)

    def apply_to_poses(self, world_from_cam: Tensor) -> Tensor:
        """Transform camera-to-world poses [..., 4, 4]: centres move, rotations are composed.

        The result stays rigid: cameras have no scale.
        """
        rotation = self.rotation.to(world_from_cam) @ world_from_cam[..., :3, :3]
        return pose_from(rotation, self.apply(camera_centers(world_from_cam)))

    def inverse(self) -> "Sim3":
        """The transform that undoes this one."""
        rotation = self.rotation.mT
        return Sim3(
            scale=1.0 / self.scale,
            rotation=rotation,
            translation=-(rotation @ self.translation) / self.scale,
        )

    def compose(self, first: "Sim3") -> "Sim3":
        """The transform that applies ``first`` and then this one."""
        return Sim3(
            scale=self.scale * first.scale,
            rotation=self.rotation @ first.rotation,
            translation=self.apply(first.translation),
        )


@torch.no_grad()
def umeyama(source: Tensor, target: Tensor, weights: Tensor | None = None) -> Sim3:
    """Similarity that minimises ``sum_i w_i |sim3(source_i) - target_i|^2`` (Umeyama 1991).

    Computed in float64 on the CPU; never a reflection.

    Args:
        source, target: corresponding points [M, 3], M >= 3.
        weights: [M], not negative, at least three of them positive; None weighs all alike.

    Raises:
        AlignmentError: fewer than three points, points on one line, or non-finite values.
        LayoutError: shapes are not as above.
    """
    _check_points("source", source)
    _check_points("target", target)
    if source.ndim != 2 or source.shape != target.shape:
        raise LayoutError(
            "umeyama needs source and target of one shape [M, 3], found "
            f"{tuple(source.shape)} and {tuple(target.shape)}"
        )
    if weights is not None and weights.shape != source.shape[:1]:
        raise LayoutError(f"weights must have shape [{len(source)}], found {tuple(weights.shape)}")
    source, target = source.detach().cpu().double(), target.detach().cpu().double()
    weights = torch.ones(len(source)) if weights is None else weights.detach().cpu()
    weights = weights.double()
    if not all(bool(torch.isfinite(x).all()) for x in (source, target, weights)):
        raise AlignmentError(
            "a similarity needs finite points and weights, found NaN or infinity; "
            "mask such points out first"
        )
    if bool((weights < 0).any()):
        raise AlignmentError(f"weights must not be negative, found {weights.min().item()}")
    used = int((weights > 0).sum())
    if used < 3:
        raise AlignmentError(f"a similarity needs at least 3 point pairs, found {used}")

    weights = (weights / weights.sum()).unsqueeze(1)
    source_mean, target_mean = (weights * source).sum(0), (weights * target).sum(0)
    source_centered, target_centered = source - source_mean, target - target_mean
    _check_spread("source", source_centered, weights, source)
    _check_spread("target", target_centered, weights, target)

    covariance = (weights * target_centered).mT @ source_centered
    u, singular, vt = torch.linalg.svd(covariance)
    signs = torch.ones(3, dtype=torch.float64)
    signs[2] = torch.sign(torch.linalg.det(u) * torch.linalg.det(vt))
    rotation = u @ torch.diag(signs) @ vt
    scale = (singular * signs).sum() / (weights * source_centered.square()).sum()
    translation = target_mean - scale * rotation @ source_mean
    return Sim3(scale=scale.item(), rotation=rotation, translation=translation)


def _check_points(name: str, points: Tensor) -> None:
    if points.ndim < 1 or points.shape[-1] != 3:
        raise LayoutError(f"{name} must have shape [..., 3], found {tuple(points.shape)}")


def _check_spread(name: str, centered: Tensor, weights: Tensor, points: Tensor) -> None:
    spread = torch.linalg.svdvals(weights.sqrt() * centered)
    if spread[0] <= _COINCIDENT * points.abs().max():
        raise AlignmentError(f"the {name} points are all in one place: a similarity needs three")
    if spread[1] <= _COLLINEAR * spread[0]:
        raise AlignmentError(
            f"the {name} points lie on one line, so the rotation about it is unknown; "
            "add points or views off that line"
        )
