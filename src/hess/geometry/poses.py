"""Rigid camera poses: composition helpers, quaternions (scalar last), rotations and angles.

A pose ``a_from_b`` is a matrix [..., 4, 4] that maps coordinates of frame b to frame a.
"""

import torch
from torch import Tensor

from hess.errors import LayoutError


def pose_from(rotation: Tensor, translation: Tensor) -> Tensor:
    """Rigid pose [..., 4, 4] of a rotation [..., 3, 3] and a translation [..., 3].

    Raises:
        LayoutError: the last dimensions are not as above.
    """
    _check_shape("rotation", rotation, (3, 3))
    _check_shape("translation", translation, (3,))
    batch = torch.broadcast_shapes(rotation.shape[:-2], translation.shape[:-1])
    upper = torch.cat(
        (rotation.expand(*batch, 3, 3), translation.expand(*batch, 3).unsqueeze(-1)), dim=-1
    )
    last = upper.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*batch, 1, 4)
    return torch.cat((upper, last), dim=-2)


def invert_pose(pose: Tensor) -> Tensor:
    """Inverse of rigid poses [..., 4, 4], exact in the rotation (a transpose).

    Raises:
        LayoutError: the last dimensions are not [4, 4].
    """
    _check_shape("pose", pose, (4, 4))
    rotation = pose[..., :3, :3].mT
    return pose_from(rotation, -(rotation @ pose[..., :3, 3:]).squeeze(-1))


def camera_centers(world_from_cam: Tensor) -> Tensor:
    """Camera centres [..., 3] in world coordinates of poses [..., 4, 4].

    Raises:
        LayoutError: the last dimensions are not [4, 4].
    """
    _check_shape("world_from_cam", world_from_cam, (4, 4))
    return world_from_cam[..., :3, 3]


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Rotation [..., 3, 3] of quaternions [..., 4] in the order x, y, z, w (as VGGT).

    The quaternion need not have unit length, but must not be zero.

    Raises:
        LayoutError: the last dimension is not 4.
    """
    _check_shape("quaternion", quaternion, (4,))
    x, y, z, w = quaternion.unbind(-1)
    two = 2.0 / quaternion.square().sum(-1)
    rows = (
        (1 - two * (y * y + z * z), two * (x * y - z * w), two * (x * z + y * w)),
        (two * (x * y + z * w), 1 - two * (x * x + z * z), two * (y * z - x * w)),
        (two * (x * z - y * w), two * (y * z + x * w), 1 - two * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def matrix_to_quaternion(rotation: Tensor) -> Tensor:
    """Unit quaternions [..., 4] in the order x, y, z, w with w >= 0, of rotations [..., 3, 3].

    The entries of R give all products ``4 q_i q_j``; the row of the largest ``q_i`` is the
    quaternion up to its length (at least 2), so nothing is divided by a small number and the
    gradient is finite at every rotation (Shepperd 1978).

    Raises:
        LayoutError: the last dimensions are not [3, 3].
    """
    _check_shape("rotation", rotation, (3, 3))
    r = [[rotation[..., i, j] for j in range(3)] for i in range(3)]
    xy, xz, yz = r[1][0] + r[0][1], r[0][2] + r[2][0], r[2][1] + r[1][2]
    xw, yw, zw = r[2][1] - r[1][2], r[0][2] - r[2][0], r[1][0] - r[0][1]
    xx = 1 + r[0][0] - r[1][1] - r[2][2]
    yy = 1 - r[0][0] + r[1][1] - r[2][2]
    zz = 1 - r[0][0] - r[1][1] + r[2][2]
    ww = 1 + r[0][0] + r[1][1] + r[2][2]
    rows = ((xx, xy, xz, xw), (xy, yy, yz, yw), (xz, yz, zz, zw), (xw, yw, zw, ww))
    products = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    largest = products.diagonal(dim1=-2, dim2=-1).argmax(-1)
    row = products.gather(-2, largest[..., None, None].expand(*largest.shape, 1, 4)).squeeze(-2)
    quaternion = row / torch.linalg.vector_norm(row, dim=-1, keepdim=True)
    return torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def nearest_rotation(matrix: Tensor) -> Tensor:
    """The rotation nearest to each ``matrix`` [..., 3, 3] (orthogonal Procrustes problem).

    The gradient is exact also where singular values coincide, as they do at every rotation and
    where the derivative of the SVD itself is undefined: with M = U S Vᵀ, it turns R = U Vᵀ by
    the skew part of Uᵀ dM V, divided by the sums (not differences) of singular values.

    Raises:
        LayoutError: the last dimensions are not [3, 3].
    """
    _check_shape("matrix", matrix, (3, 3))
    with torch.no_grad():
        u, s, vh = torch.linalg.svd(matrix)
        # A reflection is mended along the axis where that costs least, the last.
        sign = torch.linalg.det(u @ vh).sign()
        mend = torch.stack([torch.ones_like(sign), torch.ones_like(sign), sign], dim=-1)
        u, s = u * mend[..., None, :], s * mend
        sums = s[..., :, None] + s[..., None, :]
        sums.diagonal(dim1=-2, dim2=-1).fill_(1.0)  # divides zeros only
    inner = u.mT @ matrix @ vh.mT
    return u @ vh + u @ ((inner - inner.mT) / sums) @ vh


def rotation_angle_deg(rotation: Tensor) -> Tensor:
    """Angle [...] in degrees, 0 to 180, of rotations [..., 3, 3].

    ``atan2`` of sine and cosine keeps full precision at tiny angles and near 180 degrees, where
    the arc cosine of the trace loses half of the digits.

    Raises:
        LayoutError: the last dimensions are not [3, 3].
    """
    _check_shape("rotation", rotation, (3, 3))
    twice_sine_axis = torch.stack(
        (
            rotation[..., 2, 1] - rotation[..., 1, 2],
            rotation[..., 0, 2] - rotation[..., 2, 0],
            rotation[..., 1, 0] - rotation[..., 0, 1],
        ),
        dim=-1,
    )
    twice_sine = torch.linalg.vector_norm(twice_sine_axis, dim=-1)
    twice_cosine = rotation.diagonal(dim1=-2, dim2=-1).sum(-1) - 1
    return torch.rad2deg(torch.atan2(twice_sine, twice_cosine))


def _check_shape(name: str, tensor: Tensor, last: tuple[int, ...]) -> None:
    if tuple(tensor.shape[-len(last) :]) != last:
        expected = ", ".join(map(str, last))
        raise LayoutError(f"{name} must have shape [..., {expected}], found {tuple(tensor.shape)}")
