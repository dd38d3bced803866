"""From photos through a model to files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from hess.datasets import Scene
from hess.datasets.photos import find_images, load_images
from hess.errors import ConfigError, DatasetError
from hess.files import atomic_write
from hess.geometry.fit_rules import square_crop, vggt_pad
from hess.geometry.projection import unproject_depth
from hess.models.base import GlobalAttentionSite, Model, Predictions
from hess.reconstruction import Reconstruction, reconstruct


class FlatModel(Model):
    """Sees a wall at depth 2 with every camera at the origin; confidence grows with redness.

    Its point head says depth 6.
    """

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
            depth_confidence=torch.full_like(depth, 4.0),
            world_points=unproject_depth(3 * depth, intrinsics, poses),
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
    assert recon.image_paths == (photos / "a9.png", photos / "a10.png")
    assert not any(t.is_inference() for t in vars(recon).values() if isinstance(t, Tensor))
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
    assert recon.image_paths == (None, None, None)
    with pytest.raises(ConfigError, match="final size"):
        reconstruct(FlatModel(), scene, fit=square_crop(8))
    with pytest.raises(ConfigError, match="max_views"):
        reconstruct(FlatModel(), scene, max_views=2)


def test_photos_loaded_before_give_the_same(photos: Path) -> None:
    model = FlatModel()
    loaded = load_images(find_images(photos), image_fit=model.image_rule)
    now, before = reconstruct(model, loaded), reconstruct(model, photos)
    assert now.images is loaded.images  # not copied
    assert torch.equal(now.world_points, before.world_points)
    assert now.view_names == before.view_names
    assert now.image_paths == before.image_paths
    assert now.image_fits == before.image_fits


def test_names_tell_photos_of_two_folders_apart(photos: Path) -> None:
    again = photos.parent / "again"
    again.mkdir()
    shutil.copy(photos / "a9.png", again)
    recon = reconstruct(FlatModel(), [photos / "a9.png", again / "a9.png"])
    assert recon.view_names == ("photos/a9.png", "again/a9.png")
    with pytest.raises(DatasetError, match=r"'same' 2 times"):
        replace(recon, view_names=("same", "same"))


def test_max_views_chooses(photos: Path) -> None:
    recon = reconstruct(FlatModel(), photos, max_views=1)
    assert recon.num_views == 1
    assert recon.images.shape == (1, 3, 16, 16)


def test_points_come_from_the_head_or_from_depth(photos: Path) -> None:
    model = FlatModel()
    head = reconstruct(model, photos)
    assert (head.world_points[..., 2] == 6).all()
    assert torch.allclose(head.confidence, 1 - 1 / (1 + head.images[:, 0]))
    assert torch.allclose(head.depth_confidence, torch.tensor(0.75))
    depth = reconstruct(model, photos, points="depth")
    assert (depth.world_points[..., 2] == 2).all()
    assert torch.allclose(depth.world_points, head.world_points / 3)
    assert torch.equal(depth.confidence, depth.depth_confidence)
    model.cloud_from = "depth"
    assert torch.equal(reconstruct(model, photos).world_points, depth.world_points)
    with pytest.raises(ConfigError, match="points must be"):
        reconstruct(model, photos, points="both")  # type: ignore[arg-type]


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
    cloud = recon.point_cloud(drop_lowest=0.5)
    assert cloud.points.shape == cloud.colors.shape == (256, 3)
    assert (cloud.colors[:, 0] > 0.5).all()  # the red half is the confident one
    assert (cloud.points[:, 0] > 0).all()  # and lies to the right
    assert cloud.confidence.min() > 1 - 1 / 1.5
    assert len(recon.point_cloud(drop_lowest=0)) == 512
    with pytest.raises(ConfigError, match="drop_lowest"):
        recon.point_cloud(drop_lowest=1.0)


@given(
    levels=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    share=st.sampled_from([0.0, 0.2, 0.5, 0.9]),
)
def test_of_equally_confident_points_the_first_go(levels: list[int], share: float) -> None:
    recon = reconstruct(FlatModel(), Scene(name="s", images=torch.rand(2, 3, 2, 2)))
    recon = replace(recon, confidence=torch.tensor(levels).reshape(2, 2, 2) / 3)
    order = sorted(range(8), key=lambda i: (levels[i], i))
    expected = torch.zeros(8, dtype=torch.bool)
    expected[order[int(share * 8) :]] = True
    found = recon.confident_pixels(drop_lowest=share)
    assert torch.equal(found, expected.reshape(2, 2, 2))


def test_points_that_are_not_finite_are_left_out(photos: Path) -> None:
    recon = reconstruct(FlatModel(), photos)
    world_points = recon.world_points.clone()
    world_points[0, 0, 0, 1] = torch.nan
    cloud = replace(recon, world_points=world_points).point_cloud(drop_lowest=0)
    assert len(cloud) == 511
    assert cloud.points.isfinite().all()
    nothing = torch.full_like(recon.confidence, torch.nan)
    with pytest.raises(DatasetError, match="no finite point"):
        replace(recon, confidence=nothing).point_cloud()


def test_padding_is_no_part_of_the_cloud(photos: Path) -> None:
    recon = reconstruct(FlatModel(), photos, fit=vggt_pad(16, 4))
    # 40x80 becomes 8x16 and 64x32 becomes 16x8 pixels of 16x16.
    cloud = recon.point_cloud(drop_lowest=0)
    assert len(cloud) == 2 * 8 * 16
    assert (cloud.colors[:, 1:] < 0.1).all()  # neither white nor anything but black and red


def test_shapes_are_checked(photos: Path) -> None:
    recon = reconstruct(FlatModel(), photos)
    with pytest.raises(DatasetError, match="depth must have shape"):
        replace(recon, depth=recon.depth[:1])
    with pytest.raises(DatasetError, match="1 view_names"):
        replace(recon, view_names=("one",))


def saved_recon(photos: Path) -> Reconstruction:
    recon = reconstruct(FlatModel(), photos)
    return replace(recon, sparsification={"block_sparsity": 0.8})


def test_npz_holds_everything(photos: Path, tmp_path: Path) -> None:
    recon = saved_recon(photos)
    recon.save(tmp_path / "scene.NPZ")
    with np.load(tmp_path / "scene.NPZ", allow_pickle=False) as arrays:
        for name in ("images", "world_from_cam", "original_intrinsics", "depth", "confidence"):
            np.testing.assert_array_equal(arrays[name], getattr(recon, name).numpy())
        metadata = json.loads(str(arrays["metadata"]))
    assert metadata["view_names"] == ["a9.png", "a10.png"]
    assert metadata["image_paths"] == [str(photos / "a9.png"), str(photos / "a10.png")]
    assert metadata["sparsification"] == {"block_sparsity": 0.8}
    assert metadata["image_fits"][0]["original_height"] == 80


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
