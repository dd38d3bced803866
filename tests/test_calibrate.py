"""Calibration end to end: determinism, resuming, failing scenes, and what it leaves behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hess.calibration import CalibrationConfig, calibrate
from hess.datasets.procedural import Procedural
from hess.datasets.scene import Scene
from hess.errors import AlreadySparsifiedError, ConfigError, DatasetError, ProfileError
from hess.geometry.poses import camera_centers, pose_from, quaternion_to_matrix
from hess.geometry.projection import unproject_depth
from hess.geometry.sim3 import umeyama
from hess.models.loading import load_model
from hess.policies import Uniform
from hess.sensitivity.fisher import fisher_probe
from hess.sensitivity.profile import HessProfile
from hess.sparsification import sparsify
from test_sensitivity import TinyModel

VIEWS, HEIGHT, WIDTH = 4, 8, 12


def make_scene(seed: int) -> Scene:
    """A scene whose colours hold its points, which is what TinyModel reads."""
    generator = torch.Generator().manual_seed(seed)
    quaternion = torch.tensor([0.0, 0.0, 0.0, 1.0]) + 0.1 * torch.randn(
        VIEWS, 4, generator=generator
    )
    pose = pose_from(
        quaternion_to_matrix(quaternion), 0.4 * torch.randn(VIEWS, 3, generator=generator)
    )
    intrinsics = torch.tensor([[10.0, 0, 6], [0, 10.0, 4], [0, 0, 1]]).expand(VIEWS, 3, 3)
    depth = 1.5 + torch.rand(VIEWS, HEIGHT, WIDTH, generator=generator)
    points = unproject_depth(depth, intrinsics, pose)
    depth[0, 0, 0] = 0.0  # one unknown pixel
    return Scene(
        name=f"scene {seed}",
        images=((points.permute(0, 3, 1, 2) + 4) / 8).clamp(0, 1),
        world_from_cam=pose,
        intrinsics=intrinsics.clone(),
        depth=depth,
        unit="m",
    )


class Scenes:
    """Scenes made on demand; ``change`` may spoil them, ``fetch`` may stop the run."""

    name = "tiny scenes"

    def __init__(
        self,
        count: int = 4,
        change: Callable[[int, Scene], Scene] = lambda _, scene: scene,
        fetch: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.count, self.change, self.fetch = count, change, fetch

    @property
    def provenance(self) -> dict[str, object]:
        return {"count": self.count, "size": (HEIGHT, WIDTH)}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Scene:
        self.fetch(index)
        return self.change(index, make_scene(index))

    def __iter__(self) -> Iterator[Scene]:
        return (self[i] for i in range(self.count))


def only(index: int, **changes: object) -> Callable[[int, Scene], Scene]:
    return lambda i, scene: replace(scene, **changes) if i == index else scene


# --- what is measured ------------------------------------------------------------------------


def test_profile_holds_every_scene_and_its_story():
    model = TinyModel()
    seen = []
    profile = calibrate(model, Scenes(3), progress=lambda *args: seen.append(args))
    assert seen == [(1, 3, "scene 0"), (2, 3, "scene 1"), (3, 3, "scene 2")]
    assert profile.traces.shape == (3, 2, 3, 2, 2)
    assert (profile.traces > 0).all()
    assert profile.failed == ()
    assert profile.is_complete
    profile.check_model(model)
    for index, record in enumerate(profile.scenes):
        assert (record.name, record.num_views) == (f"scene {index}", VIEWS)
        assert record.aligned_on == "points"
        assert 0.5 < record.inlier_share <= 1.0
        assert record.rmse_after <= record.rmse_before
    assert profile.provenance["dataset"]["name"] == "tiny scenes"
    assert profile.provenance["versions"]["torch"] == torch.__version__
    scores = profile.scores()
    torch.testing.assert_close(scores.sum(1), torch.ones(2, dtype=torch.float64))


def test_a_camera_only_scene_is_equation_2_with_umeyama_on_the_centres():
    model, scene = TinyModel(), make_scene(0)
    change = only(0, depth=None, intrinsics=None)
    config = CalibrationConfig(normalize_scale=False)
    profile = calibrate(model, Scenes(1, change), config)
    with fisher_probe(model) as probe:
        images = scene.images[None]
        pred = camera_centers(model(images).world_from_cam[0])
        gt = camera_centers(scene.world_from_cam)
        sim3 = umeyama(pred, gt)
        error = 0.0
        for i in range(VIEWS):
            error = error + (sim3.apply(pred[i]) - gt[i]).square().sum() / (2 * VIEWS)
        expected = probe.traces(error, model.token_layout(images), last=True)
    torch.testing.assert_close(profile.traces[0, 0], expected.traces, rtol=1e-4, atol=0)
    assert profile.traces[0, 1].isnan().all()
    assert profile.patch_traces[0, 1].isnan().all()
    record = profile.scenes[0]
    assert record.camera_error == pytest.approx(error.item(), rel=1e-5)
    assert (record.aligned_on, record.point_error, record.rmse_after) == ("cameras", None, None)
    with pytest.raises(ProfileError, match="no point traces"):
        profile.scores()


def rescaled(_: int, scene: Scene) -> Scene:
    pose = scene.world_from_cam.clone()
    pose[:, :3, 3] *= 1000.0
    return replace(scene, world_from_cam=pose, depth=scene.depth * 1000.0, unit="mm")


def test_normalised_scale_makes_the_unit_irrelevant():
    model = TinyModel()
    metres, millimetres = (calibrate(model, Scenes(1, c)) for c in (only(9), rescaled))
    torch.testing.assert_close(metres.traces, millimetres.traces, rtol=1e-3, atol=0)
    assert metres.scenes[0].point_error == pytest.approx(
        millimetres.scenes[0].point_error, rel=1e-4
    )
    with pytest.raises(ProfileError, match=r"no predicted point.*unit of length: mm"):
        calibrate(model, Scenes(1, rescaled), CalibrationConfig(normalize_scale=False))


def without_depth(change: Callable[[int, Scene], Scene]) -> Callable[[int, Scene], Scene]:
    return lambda i, scene: replace(change(i, scene), depth=None)


def test_normalised_scale_makes_the_unit_of_camera_only_scenes_irrelevant():
    model = TinyModel().double()  # float32 gradients of the aligned centres cancel to 3 digits
    metres, millimetres = (
        calibrate(model, Scenes(1, without_depth(change))) for change in (only(9), rescaled)
    )
    torch.testing.assert_close(metres.traces[:, 0], millimetres.traces[:, 0], rtol=1e-3, atol=0)


def test_settings_reach_the_errors():
    model = TinyModel()

    def record(**settings: object) -> object:
        return calibrate(model, Scenes(1), CalibrationConfig(**settings)).scenes[0]

    default = record()
    assert record(inlier_threshold=1e-3).inlier_share < default.inlier_share
    assert record(inlier_on="distance").inlier_share < default.inlier_share
    assert not record(icp=False).icp_used
    assert record(confidence_keep=0.3).alignment_scale != default.alignment_scale
    assert record(point_stride=2).point_error != default.point_error
    for bad in (
        {"inlier_threshold": -1.0},
        {"inlier_on": "angle"},
        {"point_stride": 0},
        {"confidence_keep": 0.0},
    ):
        with pytest.raises(ConfigError):
            CalibrationConfig(**bad)


def test_half_precision_models_are_measured_in_float32_and_given_back():
    half = TinyModel().bfloat16()
    wide = TinyModel()
    wide.load_state_dict(half.state_dict())
    assert torch.equal(calibrate(half, Scenes(1)).traces, calibrate(wide, Scenes(1)).traces)
    assert {t.dtype for t in half.state_dict().values()} == {torch.bfloat16}


# --- determinism and resuming ----------------------------------------------------------------


def test_two_runs_give_the_same_bytes(tmp_path):
    first = calibrate(TinyModel(), Scenes()).to_bytes()
    assert calibrate(TinyModel(), Scenes()).to_bytes() == first
    checkpointed = calibrate(TinyModel(), Scenes(), checkpoint=tmp_path / "part.hess")
    assert checkpointed.to_bytes() == first == (tmp_path / "part.hess").read_bytes()


def test_holding_the_activations_changes_nothing_but_time(tmp_path):
    scenes = Procedural(2, 4, "calibration")
    model, path = load_model("nano"), tmp_path / "part.hess"
    whole = calibrate(model, scenes).to_bytes()

    def cable_pulled(done: int, *_: object) -> None:
        raise ConnectionError("disk gone")

    with pytest.raises(ConnectionError):
        calibrate(model, scenes, checkpoint=path, progress=cable_pulled)
    assert len(HessProfile.load(path).scenes) == 1
    assert calibrate(model, scenes, checkpoint=path, recompute=False).to_bytes() == whole


def test_an_interrupted_run_continues_where_it_stopped(tmp_path):
    change = only(1, world_from_cam=None)  # a failed scene must survive the interruption too
    whole = calibrate(TinyModel(), Scenes(change=change)).to_bytes()
    path = tmp_path / "part.hess"

    def cable_pulled(index: int) -> None:
        if index == 3:
            raise ConnectionError("disk gone")

    model = TinyModel().train()
    with pytest.raises(ConnectionError):
        calibrate(model, Scenes(change=change, fetch=cable_pulled), checkpoint=path)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    partial = HessProfile.load(path)
    assert [s.name for s in partial.scenes] == ["scene 0", "scene 2"]
    assert not partial.is_complete
    fetched = []
    resumed = calibrate(model, Scenes(change=change, fetch=fetched.append), checkpoint=path)
    assert fetched == [3]
    assert resumed.to_bytes() == whole == path.read_bytes()
    again = calibrate(model, Scenes(change=change, fetch=fetched.append), checkpoint=path)
    assert fetched == [3]
    assert again.to_bytes() == whole


def run_and_kill_itself(moment: str, path: str) -> None:
    """Body of the child process: dies by SIGKILL in the third scene or in its saving."""
    replacements = []

    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_in_third_save(source: object, target: object) -> None:
        replacements.append(target)
        if len(replacements) == 3:
            kill()
        real_replace(source, target)

    real_replace = os.replace
    if moment == "save":
        os.replace = kill_in_third_save
    fetch = (lambda i: kill() if i == 2 else None) if moment == "scene" else (lambda _: None)
    calibrate(TinyModel(), Scenes(fetch=fetch), checkpoint=path)


@pytest.mark.parametrize("moment", ["scene", "save"])
def test_kill_9_at_any_moment_costs_at_most_a_scene(tmp_path, moment):
    path = tmp_path / "part.hess"
    program = f"import test_calibrate as t; t.run_and_kill_itself({moment!r}, {str(path)!r})"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    child = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=False
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert len(HessProfile.load(path).scenes) == 2
    fetched = []
    resumed = calibrate(TinyModel(), Scenes(fetch=fetched.append), checkpoint=path)
    assert fetched == [2, 3]
    assert resumed.to_bytes() == calibrate(TinyModel(), Scenes()).to_bytes() == path.read_bytes()
    assert os.listdir(tmp_path) == ["part.hess"]


@pytest.mark.parametrize(
    ("model", "scenes", "config", "named"),
    [
        (TinyModel(seed=1), Scenes(2), CalibrationConfig(), "model_fingerprint"),
        (TinyModel(), Scenes(3), CalibrationConfig(), "num_scenes: expected 3, found 2"),
        (TinyModel(), Scenes(2), CalibrationConfig(icp=False), "config"),
    ],
)
def test_a_checkpoint_of_another_calibration_is_refused(tmp_path, model, scenes, config, named):
    path = tmp_path / "part.hess"
    calibrate(TinyModel(), Scenes(2), checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ProfileError, match=f"another calibration.*{named}"):
        calibrate(model, scenes, config, checkpoint=path)
    assert path.read_bytes() == before


# --- scenes that fail ------------------------------------------------------------------------


def test_failed_scenes_are_named_and_left_out():
    good = calibrate(TinyModel(), Scenes(1))
    profile = calibrate(TinyModel(), Scenes(2, only(1, depth=torch.zeros(VIEWS, HEIGHT, WIDTH))))
    assert [s.name for s in profile.scenes] == ["scene 0"]
    ((name, reason),) = profile.failed
    assert name == "scene 1"
    assert "found 0 points" in reason
    assert torch.equal(profile.traces, good.traces)
    assert profile.is_complete


def test_if_all_scenes_fail_there_is_no_profile(tmp_path):
    path = tmp_path / "part.hess"
    change = lambda _, scene: replace(scene, world_from_cam=None)  # noqa: E731
    with pytest.raises(ProfileError, match=r"all 2 calibration scenes failed.*no poses"):
        calibrate(TinyModel(), Scenes(2, change), checkpoint=path)
    assert not path.exists()


def test_unusable_data_sets_are_refused():
    with pytest.raises(DatasetError, match="empty"):
        calibrate(TinyModel(), Scenes(0))

    class Opaque(Scenes):
        provenance = {"path": object()}  # noqa: RUF012

    with pytest.raises(DatasetError, match="JSON"):
        calibrate(TinyModel(), Opaque(1))


def test_an_unreadable_scene_is_named_and_left_out():
    def broken(index: int) -> None:
        if index == 1:
            raise DatasetError("frame 7 is damaged")

    profile = calibrate(TinyModel(), Scenes(3, fetch=broken))
    assert [s.name for s in profile.scenes] == ["scene 0", "scene 2"]
    assert profile.failed == (("tiny scenes[1]", "frame 7 is damaged"),)


def test_a_sparsified_model_is_refused():
    model = load_model("nano")
    with (
        sparsify(model, Uniform(sparse_ratio=0.5)),
        pytest.raises(AlreadySparsifiedError, match="dense model"),
    ):
        calibrate(model, Scenes(1))
