"""Procedural scenes: exact geometry, determinism, disjoint splits."""

import pytest
import torch

from hess.datasets.procedural import Procedural, ProceduralConfig
from hess.errors import ConfigError
from hess.geometry.poses import invert_pose
from hess.geometry.projection import project


def test_a_scene_depends_on_split_seed_and_index_only():
    scene = Procedural(10, 4, "test", seed=3)[7]
    again = Procedural(99, 4, "test", seed=3).render([2, 7])
    assert torch.equal(scene.images, again.images[1])
    assert torch.equal(scene.depth, again.depth[1])


def test_splits_seeds_and_indices_give_different_scenes():
    keys = [
        (split, seed, index)
        for split in ("train", "calibration", "test")
        for seed in (0, 1, 2**20 - 1)
        for index in (0, 1, 2**33)
    ]
    poses = [
        tuple(Procedural(2**40, 1, split, seed=seed)[i].world_from_cam.flatten().tolist())
        for split, seed, i in keys
    ]
    assert len(set(poses)) == len(keys)


def test_views_agree_on_colour_where_they_see_the_same_point():
    """Unproject view 0, project into view 1: where depths agree, so do the colours."""
    quiet = ProceduralConfig(image_size=64, gain_noise=0.0, pixel_noise=0.0)
    compared, same = 0, 0
    for scene in Procedural(4, 3, "test", config=quiet):
        points, valid = scene.point_map()
        assert valid.all()
        pixels, depth = project(
            points[0].flatten(0, 1), scene.intrinsics[1], invert_pose(scene.world_from_cam[1])
        )
        inside = ((pixels >= 0) & (pixels < 64)).all(-1) & (depth > 0)
        column, row = pixels[inside].long().unbind(-1)
        agrees = (scene.depth[1, row, column] - depth[inside]).abs() < 0.03
        first = scene.images[0].flatten(1)[:, inside][:, agrees]
        second = scene.images[1][:, row, column][:, agrees]
        compared += first.shape[1]
        same += int(((first - second).abs().amax(0) < 0.15).sum())
    assert compared > 1000
    assert same / compared > 0.95


def test_cameras_are_rigid_and_inside_the_room():
    scene = Procedural(3, 8)[2]
    rotation = scene.world_from_cam[:, :3, :3].double()
    identity = torch.eye(3, dtype=torch.float64).expand_as(rotation)
    assert torch.allclose(rotation @ rotation.mT, identity, atol=1e-6)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(8).double(), atol=1e-6)
    assert (scene.world_from_cam[:, :2, 3].abs() < 2.6).all()
    assert ((scene.world_from_cam[:, 2, 3] > 0) & (scene.world_from_cam[:, 2, 3] < 3.6)).all()


@pytest.mark.parametrize(
    "wrong", [{"num_scenes": 0}, {"num_views": 0}, {"seed": 2**20}, {"split": "validation"}]
)
def test_impossible_data_sets_are_refused(wrong):
    with pytest.raises(ConfigError):
        Procedural(**{"num_scenes": 1, **wrong})


@pytest.mark.parametrize(
    "wrong", [{"image_size": 0}, {"elevation": (10.0, 85.0)}, {"distance": (2.0, 1.0)}]
)
def test_impossible_difficulties_are_refused(wrong):
    with pytest.raises(ConfigError):
        ProceduralConfig(**wrong)
