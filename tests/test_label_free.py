"""Calibration without ground truth: random errors against full Jacobians, and end to end."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hess.calibration import calibrate
from hess.datasets.photo_scenes import photo_scenes
from hess.datasets.scene import Scene
from hess.errors import AlignmentError, ConfigError, DatasetError, ProfileError
from hess.geometry.fit_rules import square_crop
from hess.sensitivity.fisher import fisher_probe
from hess.sensitivity.profile import HessProfile
from hess.sensitivity.random_errors import (
    CONTROL_POINTS,
    SCORE_EXPONENT,
    ProbeConfig,
    random_errors,
    smooth_noise,
    without_similarity,
)
from test_calibrate import Scenes, make_scene
from test_sensitivity import TinyModel
from test_video import write_video


def photos_only(scene: Scene) -> Scene:
    return replace(scene, world_from_cam=None, intrinsics=None, depth=None)


class Photos(Scenes):
    """The scenes of other tests without their ground truth."""

    def __getitem__(self, index: int) -> Scene:
        return photos_only(super().__getitem__(index))

    def __iter__(self) -> Iterator[Scene]:
        return (self[index] for index in range(self.count))


def smoothing(shape: tuple[int, int, int], num_points: int) -> Tensor:
    """The linear map from control values to the noise of points, column by column of one axis."""
    views = shape[0]
    unit = torch.eye(views * num_points**2).double().view(-1, views, num_points, num_points)
    smooth = F.interpolate(unit, shape[1:], mode="bilinear", align_corners=True)
    return smooth.flatten(1).T


def exact_traces(model: TinyModel, scene: Scene) -> Tensor:
    """tr(Jᵀ P S Sᵀ P J) of the query projections by one gradient per coordinate: [error, layer,
    head].

    P takes out what a similarity of the scene makes of the prediction, S smooths the noise of
    points; cameras have S = 1.
    """
    weights = [site.module.qkv.weight for site in model.global_attention_sites()]
    predictions = model(scene.images[None])
    poses, point_map = predictions.world_from_cam[0], predictions.world_points[0]
    points = point_map.flatten(0, 2)
    scale = (points - poses[0, :3, 3]).norm(dim=-1).mean().item()
    axes = [poses[:, :3, 3] + scale * poses[:, :3, axis] for axis in range(3)]
    cameras = torch.stack((poses[:, :3, 3], *axes), dim=1).flatten(0, 1)
    smooth = smoothing(tuple(point_map.shape[:3]), CONTROL_POINTS)
    found = []
    for moved, mixed in ((cameras, torch.eye(len(cameras)).double()), (points, smooth)):
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(x, weights, retain_graph=True)])
            for x in moved.flatten()
        ]
        jacobian = torch.stack(rows).double()
        columns = jacobian.T.reshape(-1, len(moved), 3)
        projected = torch.stack([without_similarity(c, moved.detach().double()) for c in columns])
        seen = mixed.T @ (projected / scale)
        squares = seen.square().sum((1, 2)) / len(moved)
        per_layer = squares.view(len(weights), 3, model.num_heads, -1).sum(-1)
        found.append(per_layer[:, 0])
    return torch.stack(found)


def test_the_mean_over_probes_is_the_trace_of_the_jacobian():
    model, scene = TinyModel(), photos_only(make_scene(0))
    expected = exact_traces(model, scene)
    layout = model.token_layout(scene.images[None])
    config = ProbeConfig(num_probes=400)
    with fisher_probe(model, recompute=False) as probe:
        draws = [
            torch.stack(
                [probe.traces(error, layout, last=False).traces[0] for error in (camera, point)]
            )
            for camera, point in random_errors(model, scene, config, 0)
        ]
    draws = torch.stack(draws)
    standard_error = draws.std(0) / len(draws) ** 0.5
    assert (standard_error < 0.25 * expected).all()
    assert ((draws.mean(0) - expected).abs() < 4 * standard_error).all()


def test_noise_of_points_is_smooth_over_a_view_and_of_its_own_in_each():
    noise = smooth_noise(np.random.default_rng(0), (2, 9, 13)).view(2, 9, 13, 3)
    at_control = noise[:, ::4, ::6]
    assert at_control.std() > 0.7
    middle = (at_control[:, :-1] + at_control[:, 1:]) / 2
    assert torch.allclose(noise[:, 2::4, ::6], middle)
    assert not torch.allclose(noise[0], noise[1], atol=0.5)


def test_of_one_photo_only_points_give_a_trace():
    """However a single camera moves, a similarity of the scene moves it back."""
    model, scene = TinyModel(), photos_only(make_scene(0))
    one = replace(scene, images=scene.images[:1], view_names=())
    camera, point = next(random_errors(model, one, ProbeConfig(), 0))
    assert camera == 0
    assert point != 0


def test_noise_holds_nothing_that_a_similarity_makes():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(9, 3, generator=generator).double() * 7 + 100
    noise = without_similarity(torch.randn(9, 3, generator=generator).double(), points)
    moves = [torch.tensor([[3.0, -1, 2]]).double().expand(9, 3), points - points.mean(0)]
    moves += [torch.linalg.cross(axis.expand(9, 3), points) for axis in torch.eye(3).double()]
    for move in moves:
        assert abs((noise * move).sum()) < 1e-9 * move.norm()
        assert without_similarity(move, points).norm() < 1e-9 * move.norm()
    assert without_similarity(noise, points).allclose(noise, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2])
def test_few_cameras_leave_less_to_move(count: int):
    """One camera can always be moved back, of two only the distance along no axis is left."""
    noise = torch.randn(count, 3, generator=torch.Generator().manual_seed(0)).double()
    points = torch.tensor([[0.0, 0, 0], [1, 2, 3]]).double()[:count]
    assert without_similarity(noise, points).norm() < 1e-12


def test_photos_alone_are_enough_and_the_kind_is_recorded(tmp_path: Path):
    model = TinyModel()
    profile = calibrate(model, Photos(3), ProbeConfig(num_probes=3))
    assert profile.kind == "label-free"
    assert (profile.traces > 0).all()
    assert profile.provenance["config"] == {"num_probes": 3, "seed": 0}
    query = profile.traces[:, :, 0].mean(0)
    mixed = (query / query.sum(-1, keepdim=True)).mean(0) ** SCORE_EXPONENT
    assert torch.allclose(profile.scores(), mixed / mixed.sum(-1, keepdim=True))
    assert [scene.camera_error for scene in profile.scenes] == [None] * 3
    profile.save(tmp_path / "a.hess")
    again = HessProfile.load(tmp_path / "a.hess")
    assert again.kind == "label-free"
    assert again.to_bytes() == profile.to_bytes()
    assert calibrate(model, Scenes(3)).kind == "ground truth"


def test_ground_truth_is_not_looked_at():
    model, config = TinyModel(), ProbeConfig()
    with_truth, without = calibrate(model, Scenes(2), config), calibrate(model, Photos(2), config)
    assert torch.equal(with_truth.traces, without.traces)


def test_a_stopped_run_ends_with_the_same_bytes(tmp_path: Path):
    def stop(index: int) -> None:
        if index == 2:
            raise KeyboardInterrupt

    model, config = TinyModel(), ProbeConfig()
    expected = calibrate(model, Photos(4), config).to_bytes()
    checkpoint = tmp_path / "partial.hess"
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, Photos(4, fetch=stop), config, checkpoint=checkpoint)
    assert calibrate(model, Photos(4), config, checkpoint=checkpoint).to_bytes() == expected
    with pytest.raises(ProfileError, match="another calibration"):
        calibrate(model, Photos(4), ProbeConfig(seed=1), checkpoint=checkpoint)


def test_the_seed_decides_the_noise():
    model = TinyModel()
    one, other = (calibrate(model, Photos(1), ProbeConfig(seed=seed)) for seed in (0, 1))
    assert not torch.equal(one.traces, other.traces)


def test_a_prediction_that_is_not_finite_is_named():
    model, scene = TinyModel(), photos_only(make_scene(0))
    with torch.no_grad():
        model.point_head.bias[0] = torch.nan
    with pytest.raises(AlignmentError, match="NaN"):
        list(random_errors(model, scene, ProbeConfig(), 0))


@pytest.mark.parametrize("options", [{"num_probes": 0}, {"seed": -1}])
def test_bad_settings_are_refused(options: dict[str, int]):
    with pytest.raises(ConfigError, match="must be at least"):
        ProbeConfig(**options)


# --- photos and videos -----------------------------------------------------------------------


def test_photos_are_cut_into_scenes_whatever_else_is_there(tmp_path: Path, office: Path):
    scenes = photo_scenes(
        office, image_fit=square_crop(48), frames_folder=tmp_path, views_per_scene=5, num_scenes=9
    )
    assert [scene.num_views for scene in scenes] == [5, 5]
    assert not any(scene.has_poses for scene in scenes)
    assert not {*scenes[0].view_names} & {*scenes[1].view_names}


def test_a_video_gives_as_many_frames_as_are_needed(tmp_path: Path):
    video = write_video(tmp_path / "a.mp4", 9)
    folder = tmp_path / "frames"
    scenes = photo_scenes(
        video, image_fit=square_crop(48), frames_folder=folder, views_per_scene=2, num_scenes=3
    )
    assert len(scenes) == 3
    assert len(list(folder.glob("*.jpg"))) == 6


@pytest.fixture
def office() -> Path:
    """The bundled photos, without their poses."""
    from hess.datasets.bundled import bundled_capture

    return bundled_capture() / "images"


def test_an_empty_folder_is_no_photos(tmp_path: Path):
    with pytest.raises(DatasetError):
        photo_scenes(
            tmp_path,
            image_fit=square_crop(48),
            frames_folder=tmp_path,
            views_per_scene=2,
            num_scenes=1,
        )
