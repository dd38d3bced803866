"""From photos through a model to files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from hess.datasets import Scene
from hess.errors import ConfigError, DatasetError
from hess.files import atomic_write
from hess.geometry.image_fit import square_crop
from hess.geometry.projection import unproject_depth
from hess.models.base import GlobalAttentionSite, Model, Predictions
from hess.reconstruction import Reconstruction, reconstruct


class FlatModel(Model):
    """Sees a wall at depth 2 with every camera at the origin; confidence grows with redness."""

    camera_weight = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.model_name = "flat"
        self.image_rule = square_crop(16)
        self.cloud_from = "point_head"
        self.patch_size = 4
        self.num_special = 1
        self.num_heads = 1
        self.block_size_q = self.block_size_kv = 4
        self.wall = nn.Parameter(torch.tensor(2.0))
        self.was_training: bool | None = None
        self.fails = False

    def global_attention_sites(self) -> list[GlobalAttentionSite]:
        return []

    def certainty(self, confidence: Tensor) -> Tensor:
        return 1 - 1 / confidence

    def backbone_parts(self) -> list[nn.Module]:
        return []

    def forward(self, images: Tensor) -> Predictions:
        self.was_training = self.training
        if self.fails:
            raise RuntimeError("out of memory")
        b, n, _, h, w = images.shape
        k = torch.tensor([[w, 0.0, w / 2], [0.0, w, h / 2], [0.0, 0.0, 1.0]])
        intrinsics, poses = k.expand(b, n, 3, 3), torch.eye(4).expand(b, n, 4, 4)
        depth = self.wall.expand(b, n, h, w)
        return Predictions(
            world_from_cam=poses,
            intrinsics=intrinsics,
            depth=depth,
            depth_confidence=torch.ones_like(depth),
            world_points=unproject_depth(depth, intrinsics, poses),
            point_confidence=1 + images[:, :, 0],
        )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two photos of different size, dark on the left and red on the right."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, (width, height) in {"a10.png": (64, 32), "a9.png": (40, 80)}.items():
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[:, width // 2 :, 0] = 255
        Image.fromarray(pixels).save(folder / name)
    return folder


def test_photos_become_a_reconstruction(photos: Path) -> None:
    model = FlatModel().train()
    recon = reconstruct(model, photos)
    assert model.was_training is False
    assert model.training
    assert recon.view_names == ("a9.png", "a10.png")
    assert recon.model_name == "flat"
    assert recon.images.shape == (2, 3, 16, 16)
    assert not recon.world_points.is_inference()
    assert not any(t.requires_grad for t in vars(recon).values() if isinstance(t, Tensor))
    # Focal length 16 at 16 pixels is the shorter side of each photo; the crop is in the middle.
    expected = [[[40, 0, 20], [0, 40, 40], [0, 0, 1]], [[32, 0, 32], [0, 32, 16], [0, 0, 1]]]
    assert torch.allclose(recon.original_intrinsics, torch.tensor(expected).float())


def test_mode_is_restored_when_the_model_fails(photos: Path) -> None:
    model = FlatModel().train()
    model.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        reconstruct(model, photos)
    assert model.training


def test_scene_is_used_as_it_is() -> None:
    scene = Scene(name="s", images=torch.rand(3, 3, 8, 12))
    recon = reconstruct(FlatModel(), scene)
    assert torch.equal(recon.images, scene.images)
    assert torch.equal(recon.original_intrinsics, recon.intrinsics)
    assert recon.view_names == ("0", "1", "2")
    with pytest.raises(ConfigError, match="final size"):
        reconstruct(FlatModel(), scene, fit=lambda w, h: None)  # type: ignore[arg-type]


def test_unreadable_photo_is_skipped_or_refused(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photos / "a1.jpg").write_bytes(b"not a photo")
    recon = reconstruct(FlatModel(), photos)
    assert recon.view_names == ("a9.png", "a10.png")
    assert "a1.jpg" in caplog.text
    with pytest.raises(DatasetError, match=r"a1\.jpg"):
        reconstruct(FlatModel(), photos, strict=True)


def test_least_confident_points_are_dropped(photos: Path) -> None:
    recon = reconstruct(FlatModel(), photos)
    points, colors = recon.point_cloud(drop_lowest=0.5)
    assert points.shape == colors.shape == (256, 3)
    assert (colors[:, 0] > 0.5).all()  # the red half is the confident one
    assert (points[:, 0] > 0).all()  # and lies to the right
    assert len(recon.point_cloud(drop_lowest=0)[0]) == 512
    with pytest.raises(ConfigError, match="drop_lowest"):
        recon.point_cloud(drop_lowest=1.0)


def test_points_that_are_not_finite_are_left_out(photos: Path) -> None:
    recon = reconstruct(FlatModel(), photos)
    world_points = recon.world_points.clone()
    world_points[0, 0, 0, 1] = torch.nan
    points, _ = replace(recon, world_points=world_points).point_cloud(drop_lowest=0)
    assert len(points) == 511
    assert points.isfinite().all()


def test_shapes_are_checked(photos: Path) -> None:
    recon = reconstruct(FlatModel(), photos)
    with pytest.raises(DatasetError, match="depth must have shape"):
        replace(recon, depth=recon.depth[:1])
    with pytest.raises(DatasetError, match="view names"):
        replace(recon, view_names=("one",))


def saved_recon(photos: Path) -> Reconstruction:
    recon = reconstruct(FlatModel(), photos)
    return replace(recon, sparsification={"block_sparsity": 0.8})


def test_ply_holds_points_and_colours(photos: Path, tmp_path: Path) -> None:
    recon = saved_recon(photos)
    path = tmp_path / "new" / "scene.ply"
    recon.save(path, drop_lowest=0)
    assert path.read_bytes().startswith(b"ply\nformat binary_little_endian")
    points, colors = recon.point_cloud(drop_lowest=0)
    header, body = path.read_bytes().split(b"end_header\n")
    assert b"element vertex 512\n" in header
    fields = [(name, "<f4") for name in "xyz"] + [(name, "u1") for name in ("r", "g", "b")]
    cloud = np.frombuffer(body, dtype=fields)
    np.testing.assert_array_equal(np.stack([cloud[a] for a in "xyz"], axis=1), points.numpy())
    found = np.stack([cloud[c] for c in "rgb"], axis=1)
    np.testing.assert_array_equal(found, (colors * 255).round().numpy())
    assert list(path.parent.iterdir()) == [path]


def test_npz_holds_everything(photos: Path, tmp_path: Path) -> None:
    recon = saved_recon(photos)
    recon.save(tmp_path / "scene.NPZ")
    with np.load(tmp_path / "scene.NPZ", allow_pickle=False) as arrays:
        for name in ("images", "world_from_cam", "original_intrinsics", "depth", "confidence"):
            np.testing.assert_array_equal(arrays[name], getattr(recon, name).numpy())
        metadata = json.loads(str(arrays["metadata"]))
    assert metadata["view_names"] == ["a9.png", "a10.png"]
    assert metadata["sparsification"] == {"block_sparsity": 0.8}
    assert metadata["image_fits"][0]["original_height"] == 80


def test_unknown_suffix_lists_the_known(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.npz or \.ply"):
        saved_recon(photos).save(tmp_path / "scene.obj")
    with pytest.raises(ConfigError, match="no suffix"):
        saved_recon(photos).save(tmp_path / "scene")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "cloud.ply"
    path.write_bytes(b"old")

    def fail_half_way() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail_half_way()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
