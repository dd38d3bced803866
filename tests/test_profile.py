"""The profile: its scores, its file, and what it refuses."""

import json
import struct
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hess.errors import ConfigError, ProfileError
from hess.sensitivity.fisher import weight_norms
from hess.sensitivity.profile import (
    HessProfile,
    SceneRecord,
    load_profile,
    model_fingerprint,
)
from hess.sensitivity.scores import head_scores
from test_sensitivity import TinyModel


def record(name: str, has_points: bool = True) -> SceneRecord:
    return SceneRecord(
        name=name,
        num_views=3,
        camera_error=0.1,
        point_error=0.2 if has_points else None,
        inlier_share=0.9 if has_points else None,
        aligned_on="points" if has_points else "cameras",
        alignment_scale=1.5,
        icp_used=has_points,
        rmse_before=0.3 if has_points else None,
        rmse_after=0.1 if has_points else None,
    )


def make_profile(
    model: TinyModel | None = None, without_points: tuple[int, ...] = ()
) -> HessProfile:
    model = model or TinyModel()
    generator = torch.Generator().manual_seed(0)
    traces = torch.rand(4, 2, 3, 2, 2, generator=generator, dtype=torch.float64)
    patch_traces = torch.rand(4, 2, 2, 2, generator=generator, dtype=torch.float64)
    for scene in without_points:
        traces[scene, 1] = torch.nan
        patch_traces[scene, 1] = torch.nan
    return HessProfile(
        traces=traces,
        patch_traces=patch_traces,
        weight_norms=weight_norms(model),
        scenes=tuple(record(f"scene {i}", i not in without_points) for i in range(4)),
        failed=(("scene 4", "no inliers"),),
        provenance={
            "model_name": "tiny",
            "model_fingerprint": model_fingerprint(model),
            "camera_weight": 0.25,
            "num_scenes": 5,
            "config": {"inlier_threshold": 0.05, "icp": True},
        },
    )


def assert_same(a: HessProfile, b: HessProfile) -> None:
    for name in ("traces", "patch_traces", "weight_norms"):
        assert torch.equal(getattr(a, name).nan_to_num(-1), getattr(b, name).nan_to_num(-1))
    assert (a.scenes, a.failed, a.provenance) == (b.scenes, b.failed, b.provenance)


# --- scores ----------------------------------------------------------------------------------


def test_default_scores_are_equation_9_written_out():
    profile = make_profile()
    camera, point = profile.traces[:, :, 0].mean(0)
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for layer in range(2):
        for head in range(2):
            expected[layer, head] = (
                0.25 * camera[layer, head] / camera[layer].sum()
                + 0.75 * point[layer, head] / point[layer].sum()
            )
    torch.testing.assert_close(profile.scores(), expected)
    torch.testing.assert_close(profile.scores(camera_weight=0.25), expected)


def variant(camera: Tensor, point: Tensor) -> Tensor:
    return head_scores(camera, point, camera_weight=0.5)


def test_every_variant_selects_what_it_says():
    profile = make_profile()
    camera, point = profile.traces[:, 0], profile.traces[:, 1]
    for index, name in enumerate(("query", "key", "value")):
        torch.testing.assert_close(
            profile.scores(0.5, projection=name),
            variant(camera[:, index].mean(0), point[:, index].mean(0)),
        )
        norms = profile.weight_norms[index]
        torch.testing.assert_close(
            profile.scores(0.5, projection=name, scale_free=True),
            variant(norms * camera[:, index].mean(0), norms * point[:, index].mean(0)),
        )
    middle = [torch.sort(t[:, 0], dim=0).values[1:3].mean(0) for t in (camera, point)]
    torch.testing.assert_close(profile.scores(0.5, aggregate="median"), variant(*middle))
    torch.testing.assert_close(
        profile.scores(0.5, rows="patch"), variant(*profile.patch_traces.mean(0))
    )
    log = profile.scores(0.5, normalization="log")
    torch.testing.assert_close(log.sum(1), torch.ones(2, dtype=torch.float64))
    assert not torch.equal(log, profile.scores(0.5))


def test_scenes_without_depth_count_for_the_camera_only():
    profile = make_profile(without_points=(1, 2))
    expected = variant(profile.traces[:, 0, 0].mean(0), profile.traces[[0, 3], 1, 0].mean(0))
    torch.testing.assert_close(profile.scores(0.5), expected)
    assert profile.concentration("point").num_scenes == 2
    assert profile.concentration("camera").num_scenes == 4


def test_no_depth_at_all_is_an_error_unless_cameras_alone_are_asked_for():
    profile = make_profile(without_points=(0, 1, 2, 3))
    with pytest.raises(ProfileError, match=r"no point traces.*weight 0\.75.*camera_weight=1"):
        profile.scores()
    assert profile.scores(camera_weight=1.0).shape == (2, 2)
    assert profile.concentration("point") is None


@pytest.mark.parametrize(
    "bad",
    [
        {"camera_weight": -0.1},
        {"projection": "output"},
        {"normalization": "max"},
        {"aggregate": "sum"},
        {"rows": "special"},
        {"rows": "patch", "projection": "key"},
    ],
)
def test_unknown_variants_are_refused(bad):
    with pytest.raises(ConfigError):
        make_profile().scores(**bad)


# --- file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("without_points", [(), (1,)])
def test_round_trip(tmp_path, without_points):
    profile = make_profile(without_points=without_points)
    path = tmp_path / "new folder" / "tiny.hess"
    profile.save(path)
    loaded = HessProfile.load(path)
    assert_same(profile, loaded)
    assert loaded.to_bytes() == profile.to_bytes() == path.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["tiny.hess"]
    assert loaded.is_complete
    assert not replace(loaded, failed=()).is_complete


def test_load_profile_takes_a_path_and_names_a_missing_one(tmp_path):
    make_profile().save(tmp_path / "tiny.hess")
    assert_same(load_profile(str(tmp_path / "tiny.hess")), make_profile())
    with pytest.raises(ProfileError, match=r"no profile at.*nano2"):
        load_profile(tmp_path / "nano2.hess")


def test_load_profile_refuses_an_unfinished_calibration(tmp_path):
    whole = make_profile()
    part = replace(whole, provenance=whole.provenance | {"num_scenes": 99})
    part.save(tmp_path / "part.hess")
    with pytest.raises(ProfileError, match="of 99 scenes of an unfinished calibration"):
        load_profile(tmp_path / "part.hess")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tiny.hess"
    profile = make_profile()
    profile.save(path)
    before = path.read_bytes()

    def full_disk(_descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        replace(profile, failed=()).save(path)
    assert path.read_bytes() == before


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(ProfileError, match="no profile at"):
        HessProfile.load(tmp_path / "absent.hess")
    text = tmp_path / "text.hess"
    text.write_text("not a profile, but a text that is long enough to look like one")
    with pytest.raises(ProfileError, match="damaged or no profile"):
        HessProfile.load(text)
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "weights.hess")
    with pytest.raises(ProfileError, match="not a HeSS profile"):
        HessProfile.load(tmp_path / "weights.hess")


def test_every_truncation_is_noticed(tmp_path):
    whole = make_profile().to_bytes()
    path = tmp_path / "cut.hess"
    for length in [0, 1, 7, 8, 9, *range(50, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ProfileError):
            HessProfile.load(path)


def test_flipped_bits_are_noticed(tmp_path):
    whole = make_profile().to_bytes()
    path = tmp_path / "flipped.hess"
    for position in range(8, len(whole), 41):
        spoiled = bytearray(whole)
        spoiled[position] ^= 0x04
        path.write_bytes(spoiled)
        try:
            loaded = HessProfile.load(path)
        except ProfileError:
            continue
        assert_same(loaded, make_profile())  # it hit a byte without meaning


def rewrite_header(data: bytes, **changes: object) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    inner = json.loads(header["__metadata__"]["hess_profile"])
    inner.update(changes)
    header["__metadata__"]["hess_profile"] = json.dumps(inner, sort_keys=True)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def test_other_versions_and_edited_headers_are_refused(tmp_path):
    path = tmp_path / "edited.hess"
    whole = make_profile().to_bytes()
    path.write_bytes(rewrite_header(whole))
    assert_same(HessProfile.load(path), make_profile())
    path.write_bytes(rewrite_header(whole, format_version=99))
    with pytest.raises(ProfileError, match="format version 99, expected 1"):
        HessProfile.load(path)
    path.write_bytes(rewrite_header(whole, provenance={"model_name": "another"}))
    with pytest.raises(ProfileError, match="checksum"):
        HessProfile.load(path)


def test_profile_tensors_are_validated():
    profile = make_profile()
    with pytest.raises(ProfileError, match="weight_norms"):
        replace(profile, weight_norms=profile.weight_norms[:2])
    with pytest.raises(ProfileError, match="float64"):
        replace(profile, patch_traces=profile.patch_traces.float())
    with pytest.raises(ProfileError, match="finite and >= 0"):
        replace(profile, traces=-profile.traces)
    with pytest.raises(ProfileError, match="camera trace must not be NaN"):
        replace(profile, traces=profile.traces * torch.nan)
    with pytest.raises(ProfileError, match="5 scenes"):
        replace(profile, traces=profile.traces[0], scenes=profile.scenes + profile.scenes[:1])
    provenance = {k: v for k, v in profile.provenance.items() if k != "camera_weight"}
    with pytest.raises(ProfileError, match="camera_weight"):
        replace(profile, provenance=provenance)


# --- model -----------------------------------------------------------------------------------


def test_profile_accepts_its_model_in_any_float_format_that_holds_it():
    model = TinyModel()
    profile = make_profile(model)
    profile.check_model(model)
    profile.check_model(TinyModel().double())
    profile.check_model(TinyModel().bfloat16())


def test_profile_refuses_other_models():
    profile = make_profile()
    with pytest.raises(ProfileError, match=r"2 global layers of 2 heads.*3 layers of 2 heads"):
        profile.check_model(TinyModel(layers=3))
    with pytest.raises(ProfileError, match="2 layers of 4 heads"):
        profile.check_model(TinyModel(heads=4))
    expected = profile.provenance["model_fingerprint"][:12]
    with pytest.raises(ProfileError, match=f"other weights: expected fingerprint {expected}"):
        profile.check_model(TinyModel(seed=1))
