"""Pictures and the HTML report: what is drawn is what was given."""

import io
import os
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hess.errors import ConfigError, DatasetError, LayoutError
from hess.files import write_atomically
from hess.geometry.image_fit import ImageFit
from hess.geometry.projection import unproject_depth
from hess.reconstruction import Reconstruction
from hess.viz.contact_sheet import contact_sheet
from hess.viz.figure import figure_png, image_png
from hess.viz.heatmap import head_heatmap
from hess.viz.picture import Picture
from hess.viz.pointcloud import CameraSet, render_points
from hess.viz.report import report_html, write_report
from hess.viz.scene import preview, render_views
from hess.viz.style import DARK, LIGHT, policy_style
from hess.viz.tradeoff import metric_figure, paired_figure, tradeoff_figure
from hess.viz.viewpoint import Viewpoint, two_viewpoints

AUC = {"uniform": (0.52, 0.31), "hess": (0.53, 0.43), "reverse": (0.41, 0.13)}
FRONT = Viewpoint(eye=np.array([0.0, 0, -5]), target=np.zeros(3), up=np.array([0.0, -1, 0]))


def make_row(policy: str, setting: tuple, sparsity: float, auc: float, **values: object) -> dict:
    row = {
        "policy": policy, "settings": {}, "sparse_ratio": setting[0], "cdf_threshold": setting[1],
        "block_sparsity": sparsity, "flop_saving": 0.8 * sparsity, "auc_30": auc,
        "auc_30_se": 0.011, "ate_rmse": 0.0612, "ate_rmse_se": 0.0013, "n_scenes": 224,
        "failed_scenes": [], "seed": 7, "model": "nano", "commit": "0123abcd", "dirty": False,
        "protocol": {"name": "procedural-8", "views": 8}, "command": "hess demo <out>",
        "machine": {"cpu_count": 2}, "unit": "arbitrary", "chamfer_mean": None,
    }  # fmt: skip
    return row | values


def make_rows(**values: object) -> list[dict]:
    rows = [make_row("dense", (None, None), 0.0, 0.565, **values)]
    for i, (setting, sparsity) in enumerate((((0.6, 0.4), 0.604), ((0.9, 0.2), 0.911))):
        for policy, aucs in AUC.items():
            row = make_row(policy, setting, sparsity, aucs[i], **values)
            if policy != "uniform":
                row["paired_auc_30_vs_uniform"] = aucs[i] - AUC["uniform"][i]
                row["paired_auc_30_vs_uniform_se"] = 0.009
            rows.append(row)
    return rows


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), int)


class Page(HTMLParser):
    """Collects what the tests ask for."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.images: list[dict] = []
        self.links: list[str] = []
        self.table: list[list[str]] = []
        self.headers: list[dict] = []
        self.ids: list[str] = []
        self.stack: list[str] = []
        self.feed(html)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        found = dict(attrs)
        self.links += [found[key] for key in ("src", "srcset", "href") if key in found]
        if "id" in found:
            self.ids.append(found["id"])
        if tag == "img":
            self.images.append(found)
        if tag == "tr":
            self.table.append([])
        if tag == "th":
            self.headers.append(found)
        if tag in ("td", "th"):
            self.table[-1].append("")
        if tag not in ("meta", "img", "source", "br"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & {*self.stack}:
            self.table[-1][-1] += data


def test_report_is_self_contained_and_accessible(tmp_path: Path) -> None:
    scores = np.full((3, 4), 0.25)
    picture = Picture(
        title="Room", caption="c", alt="A room", png=image_png(np.zeros((4, 6, 3), np.uint8))
    )
    path = write_report(
        tmp_path / "new" / "index.html",
        title="Heads & <tails>",
        rows=make_rows(),
        camera_score=scores,
        point_score=scores,
        pictures=[picture],
    )
    html = path.read_text()
    page = Page(html)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "http" not in html.replace("http-equiv", "")
    assert len(page.images) == 4  # heat map, AUC, its paired difference, the room
    assert all(image["alt"] for image in page.images)
    assert page.images[-1]["alt"] == "A room"
    assert (page.images[-1]["width"], page.images[-1]["height"]) == ("6", "4")
    assert {header["scope"] for header in page.headers} == {"col", "row", "rowgroup"}
    assert len(set(page.ids)) == len(page.ids)
    assert "Heads &amp; &lt;tails&gt;" in html
    assert "<tails>" not in html
    assert [p.name for p in path.parent.iterdir()] == ["index.html"]


@pytest.fixture(scope="module")
def html() -> str:
    return report_html(title="t", rows=make_rows(dirty=True, failed_scenes=["scene <3>"]))


def test_report_table_holds_the_numbers_given(html: str) -> None:
    page = Page(html)
    header, *lines = page.table
    assert "Chamfer ↓" not in header  # no row has one
    body = [dict(zip(header, line, strict=True)) for line in lines if len(line) == len(header)]
    assert [line["Policy"] for line in body] == [
        "Dense", "Uniform", "HeSS", "Reverse", "Uniform", "HeSS", "Reverse",
    ]  # fmt: skip
    sparse = body[5]
    assert sparse["Blocksparsity"] == "0.911"
    assert sparse["FLOPsaving"] == "0.729"
    assert sparse["AUC@30 ↑"] == "0.430 ± 0.011"
    assert sparse["Δ AUC@30to uniform"] == "+0.120 ± 0.009"
    assert body[6]["Δ AUC@30to uniform"] == "−0.180 ± 0.009"
    assert body[4]["Δ AUC@30to uniform"] == "–"
    assert sparse["ATE ↓"] == "0.0612 ± 0.0013"
    groups = [line[0] for line in lines if len(line) == 1]
    assert groups == [
        "nothing skipped",
        "ratio ρ = 0.6, CDF τ = 0.4",
        "ratio ρ = 0.9, CDF τ = 0.2",
    ]


def test_report_says_where_numbers_come_from_and_what_they_show(html: str) -> None:
    for text in (
        "nano", "0123abcd (with uncommitted changes)", "hess demo &lt;out&gt;", "cpu count: 2",
        "procedural-8", "scene &lt;3&gt;", "224 scenes",
    ):  # fmt: skip
        assert text in html
    assert html.count("no clear difference") == 1  # +0.010 ± 0.009 at 0.604
    assert html.count("clearly better") == 1  # +0.120 ± 0.009 at 0.911


def test_report_with_random_seeds_and_lower_is_better() -> None:
    rows = make_rows(chamfer_mean=0.06, chamfer_mean_se=0.001)
    for seed in (0, 1):
        rows.append(
            make_row(
                "random", (0.9, 0.2), 0.911, 0.2, settings={"seed": seed}, chamfer_mean=0.09,
                chamfer_mean_se=0.002, paired_chamfer_mean_vs_uniform=0.03,
                paired_chamfer_mean_vs_uniform_se=0.001,
            )
        )  # fmt: skip
    html = report_html(title="t", rows=rows)
    assert "Random (seed 0)" in html
    assert '<td class="worse">+0.0300' in html  # a larger distance is worse


def test_report_refuses_bad_input() -> None:
    with pytest.raises(ConfigError, match="at least one results row"):
        report_html(title="t", rows=[])
    with pytest.raises(ConfigError, match="commit"):
        report_html(title="t", rows=[{k: v for k, v in make_rows()[0].items() if k != "commit"}])
    with pytest.raises(ConfigError, match="nothing to plot"):
        report_html(title="t", rows=make_rows(), metrics=("point_error",))
    with pytest.raises(ConfigError, match="not a PNG"):
        Picture(title="t", caption="c", alt="a", png=b"GIF89a")


def test_heatmap_shows_each_score_at_its_layer_and_head() -> None:
    camera, point = np.full((3, 4), 0.1), np.full((3, 4), 0.2)
    camera[2, 1] = 0.9
    axes = head_heatmap(camera, point).axes[0]
    drawn = [mesh.get_array().reshape(4, 2) for mesh in axes.collections]
    np.testing.assert_array_equal(np.stack(drawn)[:, :, 0], camera)
    np.testing.assert_array_equal(np.stack(drawn)[:, :, 1], point)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["H1", "H2", "H3", "H4"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["Cam", "PC"] * 3
    assert axes.yaxis_inverted()  # H1 on top
    mesh = axes.collections[0]
    shades = mesh.cmap(np.linspace(0, 1, 50))[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(shades) < 0).all()  # darker is more sensitive


def test_heatmap_mixes_and_does_without_points() -> None:
    camera, point = np.full((2, 4), 0.1), np.full((2, 4), 0.5)
    mixed = head_heatmap(camera, point, camera_weight=0.25).axes[0].collections[0].get_array()
    np.testing.assert_allclose(mixed.reshape(4, 3)[:, 2], 0.4)
    only = head_heatmap(camera, None).axes[0].collections[0].get_array()
    assert only.size == 4


@pytest.mark.parametrize(
    ("camera", "point", "weight", "error"),
    [
        (np.ones((2, 4)), np.ones((2, 3)), None, LayoutError),
        (np.ones(4), np.ones(4), None, LayoutError),
        (np.full((2, 4), np.nan), np.ones((2, 4)), None, LayoutError),
        (-np.ones((2, 4)), np.ones((2, 4)), None, LayoutError),
        (np.ones((2, 4)), np.ones((2, 4)), 1.5, ConfigError),
        (np.ones((2, 4)), None, 0.5, ConfigError),
        (None, None, None, ConfigError),
    ],
)
def test_heatmap_refuses_bad_scores(
    camera: np.ndarray, point: np.ndarray, weight: float | None, error: type
) -> None:
    with pytest.raises(error):
        head_heatmap(camera, point, camera_weight=weight)


def test_tradeoff_draws_the_values_in_order_of_sparsity() -> None:
    figure = metric_figure(make_rows()[::-1], "auc_30")
    lines = {bars.get_label(): bars.lines[0] for bars in figure.axes[0].containers}
    assert [*lines] == ["Uniform", "HeSS", "Reverse"]
    np.testing.assert_allclose(lines["HeSS"].get_xdata(), [0.604, 0.911])
    np.testing.assert_allclose(lines["HeSS"].get_ydata(), AUC["hess"])
    assert lines["HeSS"].get_color() == policy_style("hess").color
    dense = next(line for line in figure.axes[0].lines if line.get_label() == "Dense")
    assert dense.get_linestyle() == ":"
    np.testing.assert_allclose(dense.get_ydata(), 0.565)


def test_paired_panel_draws_differences_and_not_the_baseline() -> None:
    axes = paired_figure(make_rows(), "auc_30").axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    np.testing.assert_allclose(lines["HeSS"], [0.01, 0.12])
    np.testing.assert_allclose(lines["Reverse"], [-0.11, -0.18])
    np.testing.assert_allclose(lines["Uniform"], 0)
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.01 - 0.009)
    assert band[:, 1].max() == pytest.approx(0.12 + 0.009)


def test_tradeoff_averages_random_seeds_and_refuses_unknown_metrics() -> None:
    rows = make_rows() + [
        make_row("random", (0.9, 0.2), 0.9, auc, settings={"seed": i})
        for i, auc in enumerate((0.2, 0.3))
    ]
    containers = metric_figure(rows, "auc_30").axes[0].containers
    random = next(bars for bars in containers if bars.get_label() == "Random").lines[0]
    np.testing.assert_allclose(random.get_ydata(), [0.25])
    with pytest.raises(ConfigError, match="chamfer_mean"):
        tradeoff_figure(rows)
    with pytest.raises(ConfigError):
        tradeoff_figure(rows, metrics=())
    assert figure_png(tradeoff_figure(rows, metrics=("auc_30",))).startswith(b"\x89PNG")


def test_variants_of_one_policy_are_not_averaged_into_one_line() -> None:
    rows = make_rows()
    hess = next(row for row in rows if row["policy"] == "hess")
    half = hess | {"settings": {"blend": 0.5}}
    with pytest.raises(ConfigError, match=r"one variant per policy.*hess"):
        tradeoff_figure([*rows, half])


def test_themes_colour_the_page_around_the_data() -> None:
    for theme in (LIGHT, DARK):
        corner = pixels(figure_png(metric_figure(make_rows(), "auc_30", theme=theme)))[0, 0]
        assert "#{:02x}{:02x}{:02x}".format(*corner) == theme.background


def test_the_nearest_point_wins_whatever_the_order() -> None:
    points = np.array([[0.0, 0, 1], [0, 0, -1], [0, 0, 0]])
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    for order in ([0, 1, 2], [1, 2, 0], [2, 0, 1]):
        image = render_points(
            points[order], colors[order], FRONT, point_size=0.5, width=60, height=40
        )
        assert image.shape == (40, 60, 3)
        assert tuple(image[20, 30]) == (0, 255, 0)
        assert tuple(image[1, 1]) == (255, 255, 255)


def test_points_land_where_a_pinhole_camera_sees_them() -> None:
    points = np.array([[1.0, 0, 0], [0, 1, 0]])  # right and, as y points down, below
    colors = np.array([[255, 0, 0], [0, 0, 255]], np.uint8)
    image = render_points(points, colors, FRONT, point_size=0.1, width=100, height=100)
    offset = 50 / np.tan(np.radians(35 / 2)) / 5
    row, column = np.argwhere((image == [255, 0, 0]).all(-1)).mean(0)
    np.testing.assert_allclose([column, row], [49.5 + offset, 49.5], atol=1)
    row, column = np.argwhere((image == [0, 0, 255]).all(-1)).mean(0)
    np.testing.assert_allclose([column, row], [49.5, 49.5 + offset], atol=1)


def test_points_seen_from_behind_are_left_out() -> None:
    points, colors = np.zeros((1, 3)), np.zeros((1, 3), np.uint8)
    options = {"point_size": 1.0, "width": 40, "height": 40}
    front = render_points(points, colors, FRONT, seen_from=np.array([[0.0, 0, -1]]), **options)
    back = render_points(points, colors, FRONT, seen_from=np.array([[0.0, 0, 1]]), **options)
    assert (front == 0).any()
    assert (back == 255).all()


def test_frusta_are_drawn_in_their_colour() -> None:
    cameras = [CameraSet(world_from_cam=np.eye(4)[None], color="#d55e00")]
    image = render_points(
        np.array([[9.0, 9, 9]]), np.zeros((1, 3), np.uint8), FRONT, cameras=cameras
    )
    assert (image == [0xD5, 0x5E, 0x00]).all(-1).any()


def test_two_viewpoints_see_cameras_and_scene() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(loc=(0, 0, 6), size=(500, 3))
    world_from_cam = np.tile(np.eye(4), (5, 1, 1))
    world_from_cam[:, :3, 3] = rng.normal(size=(5, 3)) * 0.3
    views = two_viewpoints(points, world_from_cam)
    assert not np.allclose(views[0].eye, views[1].eye)
    everything = np.concatenate([points, world_from_cam[:, :3, 3]])
    for view in views:
        matrix = view.cam_from_world
        assert np.linalg.det(matrix[:3, :3]) == pytest.approx(1)
        seen = everything @ matrix[:3, :3].T + matrix[:3, 3]
        xy = np.abs(seen[:, :2] / seen[:, 2:]) / np.tan(np.radians(view.field_of_view / 2))
        inside = (xy <= [4 / 3, 1]).all(1) & (seen[:, 2] > 0)
        assert inside[:500].mean() > 0.95
        assert inside[500:].all()
        assert matrix[1, 1] > 0  # the cameras' up is up in the picture


def test_two_viewpoints_of_cameras_that_contradict_each_other() -> None:
    points = np.random.default_rng(0).normal(size=(50, 3))
    upside_down = np.diag([-1.0, -1, 1, 1])
    backwards = np.diag([-1.0, 1, -1, 1])
    for other in (upside_down, backwards):
        first, second = two_viewpoints(points, np.stack((np.eye(4), other)))
        assert np.isfinite(first.cam_from_world).all()
        assert np.linalg.norm(first.eye - second.eye) > 1
        assert first.up == pytest.approx([0, -1, 0])


def bowl(views: int = 3) -> Reconstruction:
    """Red and certain on the left of every view, blue and less certain on the right."""
    row, column = torch.meshgrid(torch.arange(24), torch.arange(32), indexing="ij")
    depth = (2 + 0.003 * ((row - 12) ** 2 + (column - 16) ** 2)).float().repeat(views, 1, 1)
    intrinsics = torch.tensor([[30.0, 0, 16], [0, 30, 12], [0, 0, 1]]).repeat(views, 1, 1)
    poses = torch.eye(4).repeat(views, 1, 1)
    poses[:, 0, 3] = 0.2 * torch.arange(views)
    left = (column < 16).float().expand(views, 24, 32)
    return Reconstruction(
        model_name="bowl",
        view_names=tuple(f"{view}.png" for view in range(views)),
        image_paths=(None,) * views,
        image_fits=(ImageFit.identity(32, 24),) * views,
        images=torch.stack((left, 0 * left, 1 - left), dim=1),
        world_from_cam=poses,
        intrinsics=intrinsics,
        original_intrinsics=intrinsics,
        depth=depth,
        depth_confidence=left,
        world_points=unproject_depth(depth, intrinsics, poses),
        confidence=0.1 + 0.8 * left,
    )


def blue_share(picture: np.ndarray) -> float:
    red, _, blue = picture.astype(int).transpose(2, 0, 1)
    return (blue - red > 150).sum() / max(1, (abs(blue - red) > 150).sum())


def test_preview_shows_the_scene_from_two_sides() -> None:
    first, second = views = render_views(bowl(), drop_lowest=0)
    assert first.shape == second.shape == (540, 720, 3)
    assert np.mean(first != second) > 0.2
    for view in views:
        assert 0.1 < blue_share(view) < 0.9  # both halves are seen from either side
    whole = preview(bowl(), bowl().depth, drop_lowest=0)
    np.testing.assert_array_equal(whole[-540:], np.concatenate(views, axis=1))


def test_preview_leaves_out_the_share_it_is_told() -> None:
    assert blue_share(preview(bowl(), drop_lowest=0.5)[-540:]) < 0.02
    assert blue_share(preview(bowl(), drop_lowest=0)[-540:]) > 0.3
    with pytest.raises(ConfigError, match="drop_lowest"):
        preview(bowl(), drop_lowest=1.0)


def test_preview_leaves_out_what_is_not_finite() -> None:
    good = bowl()
    poses, points, depth = (
        x.clone() for x in (good.world_from_cam, good.world_points, good.depth)
    )
    poses[1, 0, 3] = torch.nan
    points[0, :, 0] = torch.inf
    depth[0, :, 0], depth[2, 0] = torch.inf, torch.nan
    spoilt = replace(good, world_from_cam=poses, world_points=points, depth=depth)
    without = replace(
        spoilt, world_from_cam=good.world_from_cam, confidence=good.confidence.clone()
    )
    without.confidence[1] = torch.nan
    for found, expected in zip(
        render_views(spoilt, drop_lowest=0), render_views(without, drop_lowest=0), strict=True
    ):
        assert np.mean(found != expected) < 0.05  # the frustum of the camera
    assert preview(spoilt).shape == preview(good).shape
    lost = torch.full_like(poses, torch.nan)
    with pytest.raises(DatasetError, match="0 finite cameras of 3"):
        preview(replace(good, world_from_cam=lost))


def test_rendering_refuses_bad_clouds() -> None:
    good, colors = np.zeros((2, 3)), np.zeros((2, 3), np.uint8)
    for points, paint in ((good[:0], colors[:0]), (good * np.nan, colors), (good, good)):
        with pytest.raises(LayoutError):
            render_points(points, paint, FRONT)
    with pytest.raises(ConfigError):
        Viewpoint(eye=np.ones(3), target=np.zeros(3), up=np.ones(3), field_of_view=0.0)
    with pytest.raises(LayoutError):
        image_png(np.zeros((4, 4)))


def test_contact_sheet_shows_every_photo_and_depth_map() -> None:
    images = np.random.default_rng(0).random((10, 3, 6, 8))
    depth = np.ones((10, 6, 8))
    depth[:, 0] = 0
    figure = contact_sheet(images, {"depth": depth})
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(shown) == 20
    photos = [array for array in shown if array.ndim == 3]
    np.testing.assert_allclose(photos[7], images[7].transpose(1, 2, 0), atol=1 / 255)
    depths = [array for array in shown if array.ndim == 2]
    assert all(array.mask[0].all() and not array.mask[1:].any() for array in depths)
    with pytest.raises(LayoutError, match="depth"):
        contact_sheet(images, {"depth": depth[:3]})
    with pytest.raises(LayoutError, match="images"):
        contact_sheet(images[0])


def test_writing_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "no bytes")
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


def test_pictures_are_reproducible_and_use_no_global_state() -> None:
    first, second = (figure_png(head_heatmap(np.eye(4), np.eye(4))) for _ in range(2))
    assert first == second
    code = (
        "import sys, hess.evaluation.evaluate\n"
        "assert 'matplotlib' not in sys.modules\n"
        "import hess.viz.report, hess.viz.contact_sheet, hess.viz.pointcloud\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
