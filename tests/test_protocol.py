"""Protocols as data: what they say, which frames they draw, how they bring scenes together."""

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from hess.cli.main import main
from hess.datasets.frames import Frame, FrameSequence
from hess.datasets.procedural import Procedural, ProceduralConfig
from hess.datasets.scene import Scene
from hess.errors import ConfigError, DatasetError
from hess.evaluation.dtu import DTU_OFFICIAL, DTU_PAPER
from hess.evaluation.dtu_pi3 import DTU_PI3
from hess.evaluation.frame_choice import ChosenScenes, FrameChoice, SameFrames
from hess.evaluation.pixel_points import PixelPoints
from hess.evaluation.pose_metrics import auc, pair_errors
from hess.evaluation.protocol import PROCEDURAL_8, Protocol
from hess.evaluation.protocols import PROTOCOLS, SEEN_CATEGORIES, protocol_named
from hess.evaluation.report import PolicyResults, Report, build_report
from hess.evaluation.resume import BatchResult, SceneResult
from hess.evaluation.scene_metrics import SceneMetrics, SceneTruth, scene_metrics
from hess.geometry.fit_rules import square_crop

FRAMES = FrameChoice(views=4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"pair_order": "other"},
        {"auc_thresholds": ()},
        {"auc_thresholds": (30, 3)},
        {"auc_thresholds": (0, 3)},
        {"mean": "median"},
        {"unit": "feet"},
        {"views": 2},
        {"frames": FRAMES},
        {"frames": FRAMES, "views": 5},
    ],
)
def test_protocol_refuses_nonsense(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="'wrong'"):
        Protocol(name="wrong", **wrong)


@pytest.mark.parametrize("wrong", [{"alignment": "none"}, {"stride": 0}])
def test_points_refuse_nonsense(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} of points"):
        PixelPoints(**wrong)


@pytest.mark.parametrize("numbers", [(), (0, 0), (-1, 2)])
def test_same_frames_refuse_nonsense(numbers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="different and at least 0"):
        SameFrames(numbers=numbers)


@pytest.mark.parametrize(
    "wrong", [{"views": 2}, {"seed": -1}, {"min_frames": -1}, {"per_category": 0}]
)
def test_frame_choice_refuses_nonsense(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        FrameChoice(**{"views": 10, **wrong})


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_is_data_and_one_line(name: str) -> None:
    protocol = protocol_named(name)
    data = protocol.as_dict()
    assert protocol.name == data["name"] == name
    assert json.loads(json.dumps(data)) == data
    assert data.keys() == asdict(protocol).keys()
    line = protocol.describe()
    assert line.startswith(f"{name}: ")
    assert "\n" not in line
    assert "/".join(map(str, protocol.auc_thresholds)) in line


def test_descriptions_tell_protocols_apart() -> None:
    """Whatever changes what is measured shows in the line."""
    base = Protocol(name="a", frames=FRAMES, views=4)
    frames = [{"seed": 1}, {"min_frames": 9}, {"per_category": 2}, {"categories": ("cup",)}]
    changed = [
        *(replace(base, frames=replace(FRAMES, **change)) for change in frames),
        replace(base, frames=replace(FRAMES, part="fewview_dev/train")),
        replace(base, frames=None, views=None),
        replace(base, frames=None),
        replace(base, pair_order="pi3"),
        replace(base, auc_thresholds=(5, 30)),
        replace(base, mean="pairs"),
        replace(base, mean="categories"),
        replace(base, frames=SameFrames(numbers=(0, 2, 4, 6))),
        replace(base, frames=SameFrames(), views=None),
        replace(base, points=None),
        replace(base, points=PixelPoints(alignment="umeyama+icp")),
        replace(base, points=PixelPoints(stride=1)),
        replace(base, points=PixelPoints(stride=3)),
        replace(base, points=PixelPoints(normals=True)),
        replace(base, points=DTU_OFFICIAL),
        replace(base, points=DTU_PAPER),
        replace(base, points=DTU_PI3),
        replace(base, unit="mm"),
    ]
    lines = {protocol.describe() for protocol in (base, *changed)}
    assert len(lines) == len(changed) + 1


def test_published_protocols() -> None:
    assert len(set(SEEN_CATEGORIES)) == len(SEEN_CATEGORIES) == 41
    assert list(SEEN_CATEGORIES) == sorted(SEEN_CATEGORIES)
    unseen = ["ball", "book", "couch", "frisbee", "hotdog", "kite", "remote", "sandwich"]
    assert not {*SEEN_CATEGORIES} & {*unseen, "skateboard", "suitcase"}
    vggt, fast, pi3 = (PROTOCOLS[f"co3d-{name}"] for name in ("vggt", "vggt-fast", "pi3"))
    assert (vggt.views, vggt.pair_order, vggt.mean) == (10, "vggt", "categories")
    assert vggt.frames == FrameChoice(views=10, seed=0, min_frames=50, categories=SEEN_CATEGORIES)
    assert fast.frames == replace(vggt.frames, per_category=10)
    assert (pi3.views, pi3.pair_order, pi3.mean) == (10, "pi3", "pairs")
    assert PROTOCOLS["paper-points"].points == PixelPoints(alignment="umeyama+icp", normals=True)
    with pytest.raises(ConfigError, match="co3d-vggt-fast  VGGT"):
        protocol_named("co3d")


def test_default_protocol_measures_what_it_always_did() -> None:
    data = PROCEDURAL_8.as_dict()
    assert (data["name"], data["views"], data["mean"]) == ("procedural-8", 8, "scenes")
    assert PROCEDURAL_8.metrics == (
        *("auc_3", "auc_5", "auc_15", "auc_30", "ate_rmse", "ate_relative"),
        *("accuracy", "accuracy_median", "completeness", "completeness_median"),
        *("chamfer_mean", "point_error"),
    )


# Frames


def sequences(lengths: dict[str, int]) -> list[FrameSequence]:
    return [
        FrameSequence(
            name=name,
            frames=tuple(Frame(image_path=Path(f"{i}.png")) for i in range(length)),
            category=name.split("/")[0],
        )
        for name, length in lengths.items()
    ]


def draws_of_a_script(
    lengths: dict[str, int], views: int, seed: int, fewest: int, fast: int | None
) -> dict[str, list[int]]:
    """VGGT's procedure told with the global generators: both seeded once, one stream each."""
    state = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    drawn = {}
    for category in ("apple", "cup", "vase"):
        names = sorted(name for name in lengths if name.startswith(category))
        if fast is not None and len(names) >= fast:
            names = sorted(random.sample(names, fast))
        for name in names:
            if lengths[name] >= fewest:
                ids = np.random.choice(lengths[name], views, replace=False)  # noqa: NPY002
                drawn[name] = ids.tolist()
    random.setstate(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    return drawn


@pytest.mark.parametrize("fast", [None, 3])
@pytest.mark.parametrize("seed", [0, 42])
def test_frames_are_those_of_the_published_script(seed: int, fast: int | None) -> None:
    lengths = {f"{c}/s{i}": 48 + 7 * i for c in ("vase", "apple", "cup") for i in (2, 0, 1, 10, 9)}
    lengths["cup/short"] = 20
    choice = FrameChoice(views=10, seed=seed, min_frames=50, per_category=fast)
    picked = {sequence.name: index for sequence, index in choice.pick(sequences(lengths))}
    expected = draws_of_a_script(lengths, 10, seed, 50, fast)
    assert picked == expected
    assert list(picked) == list(expected)
    # In the order drawn: the first is a model's reference view.
    assert any(index != sorted(index) for index in picked.values())


def write_co3d(root: Path, counts: dict[str, list[int]]) -> Path:
    """A CO3Dv2 tree without depth: categories, frames per sequence; all in the test part."""
    for category, lengths in counts.items():
        annotations, wanted = [], []
        for number, length in enumerate(lengths):
            name = f"seq{number}"
            (root / category / name / "images").mkdir(parents=True)
            for frame in range(length):
                path = f"{category}/{name}/images/frame{frame:06d}.png"
                Image.new("RGB", (20, 16), (frame, 0, 0)).save(root / path)
                turn = Rotation.from_euler("y", 0.1 * frame).as_matrix()
                viewpoint = {
                    "R": turn.tolist(),
                    "T": [0.1 * frame, 0.0, 2.0 + number],
                    "focal_length": [2.0, 2.0],
                    "principal_point": [0.0, 0.0],
                    "intrinsics_format": "ndc_isotropic",
                }
                image = {"path": path, "size": [16, 20]}
                annotations.append(
                    {
                        "sequence_name": name,
                        "frame_number": frame,
                        "image": image,
                        "viewpoint": viewpoint,
                        "depth": None,
                    }
                )
                wanted.append([name, frame, path])
        write_json(root / category / "frame_annotations.jgz", annotations)
        scores = [
            {"sequence_name": f"seq{i}", "category": category, "viewpoint_quality_score": 1.0}
            for i in range(len(lengths))
        ]
        write_json(root / category / "sequence_annotations.jgz", scores)
        (root / category / "set_lists").mkdir()
        lists = {"train": [], "val": [], "test": wanted}
        (root / category / "set_lists" / "set_lists_fewview_dev.json").write_text(
            json.dumps(lists)
        )
    return root


def write_json(path: Path, value: object) -> None:
    path.write_bytes(gzip.compress(json.dumps(value).encode()))


def test_chosen_scenes_of_a_co3d_tree(tmp_path: Path) -> None:
    root = write_co3d(tmp_path, {"ball": [9], "cup": [8, 6, 3], "apple": [7]})
    choice = FrameChoice(views=4, min_frames=5, categories=("apple", "cup", "vase"))
    dataset = ChosenScenes(root, choice, image_fit=square_crop(14))
    # One scene per sequence, first of every category first; the unseen and the short left out.
    assert [scene.name for scene in dataset] == ["apple/seq0", "cup/seq0", "cup/seq1"]
    assert [scene.category for scene in dataset] == ["apple", "cup", "cup"]
    generator = np.random.RandomState(0)
    for scene, length in zip(dataset, (7, 8, 6), strict=True):
        drawn = generator.choice(length, 4, replace=False)
        assert [int(Path(name).stem[-6:]) for name in scene.view_names] == drawn.tolist()
        assert scene.num_views == 4
        assert scene.has_poses
        red = (255 * scene.images[:, 0, 7, 7]).round().long()
        assert red.tolist() == drawn.tolist()
    provenance = dataset.provenance
    assert json.loads(json.dumps(provenance)) == provenance
    assert provenance["frames"]["seed"] == 0
    short = ChosenScenes(root, choice, image_fit=square_crop(14), num_scenes=2)
    assert [scene.name for scene in short] == ["apple/seq0", "cup/seq0"]
    # One category on its own, and a part that is named.
    one = ChosenScenes(root / "cup", choice, image_fit=square_crop(14))
    assert [scene.name for scene in one] == ["cup/seq0", "cup/seq1"]
    with pytest.raises(DatasetError, match="train"):
        ChosenScenes(f"{root}:train", choice, image_fit=square_crop(14))


def test_same_frames_of_every_sequence() -> None:
    long, short = sequences({"b/1": 6, "a/2": 4})
    assert SameFrames().pick([long, short]) == [(long, [0, 1, 2, 3, 4, 5]), (short, [0, 1, 2, 3])]
    some = SameFrames(numbers=(5, 0, 3))
    assert (some.views, SameFrames().views) == (3, None)
    assert some.pick([long]) == [(long, [5, 0, 3])]
    with pytest.raises(DatasetError, match=r"up to number 5 .*'a/2' has 4"):
        some.pick([long, short])


def test_chosen_scenes_refuse_what_has_none(tmp_path: Path) -> None:
    root = write_co3d(tmp_path, {"cup": [4]})
    fit = square_crop(14)
    with pytest.raises(DatasetError, match="found 1 of at most 4 frames"):
        ChosenScenes(root, FrameChoice(views=5), image_fit=fit)
    with pytest.raises(DatasetError, match="and no such sequence"):
        ChosenScenes(root, FrameChoice(views=3, categories=("apple",)), image_fit=fit)
    with pytest.raises(ConfigError, match="no recorded sequences"):
        ChosenScenes("procedural:test", FrameChoice(views=3), image_fit=fit)
    with pytest.raises(ConfigError, match="num_scenes"):
        ChosenScenes(root, FrameChoice(views=3), image_fit=fit, num_scenes=0)


# Means


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """Five scenes of two categories, with 3 to 7 views."""
    config = ProceduralConfig(image_size=16)
    made = list(Procedural(num_scenes=5, num_views=7, seed=3, config=config))
    return [
        replace(scene.take_views([*range(3 + i)]), category="ab"[i % 2])
        for i, scene in enumerate(made)
    ]


def noisy(scene: Scene, seed: int) -> torch.Tensor:
    """True poses turned by some degrees and shifted."""
    assert scene.world_from_cam is not None
    rng = np.random.default_rng(seed)
    poses = scene.world_from_cam.double().clone()
    turns = Rotation.from_rotvec(0.1 * rng.normal(size=(len(poses), 3))).as_matrix()
    poses[:, :3, :3] = poses[:, :3, :3] @ torch.from_numpy(turns)
    poses[:, :3, 3] += 0.05 * torch.from_numpy(rng.normal(size=(len(poses), 3)))
    return poses


def measured(scene: Scene, seed: int, protocol: Protocol) -> SceneMetrics:
    points, _ = scene.point_map()
    return scene_metrics(noisy(scene, seed), points, SceneTruth(scene, protocol), protocol)


def report_of(scenes: list[Scene], protocol: Protocol) -> Report:
    """Dense and uniform policies with noise of their own."""

    def results(policy: str, seed: int) -> PolicyResults:
        found = tuple(
            SceneResult(index=i, scene=scene.name, metrics=measured(scene, seed + i, protocol))
            for i, scene in enumerate(scenes)
        )
        batch = BatchResult(
            policy=policy, first=0, unit="arbitrary", block_sparsity=0.5, flop_saving=0.4,
            backends=("reference",), scenes=found,
        )  # fmt: skip
        # As it comes back from the file of a stopped run.
        value = json.loads(json.dumps(asdict(batch)))
        value["scenes"] = tuple(SceneResult(**scene) for scene in value["scenes"])
        settings = {"sparse_ratio": 0.5} if policy == "uniform" else {}
        return PolicyResults(name=policy, settings=settings, batches=[BatchResult(**value)])

    return build_report([results("dense", 0), results("uniform", 50)], protocol, {"seed": 0})


def pooled_auc(scenes: list[Scene], seed: int, protocol: Protocol, threshold: int) -> float:
    """AUC over all pairs of the scenes at once."""
    errors = []
    for i, scene in enumerate(scenes):
        if scene is not None:
            pair = pair_errors(noisy(scene, seed + i), scene.world_from_cam, protocol.pair_order)
            errors.append(torch.maximum(*pair))
    return float(auc(torch.cat(errors), threshold))


def of_category(scenes: list[Scene], category: str) -> list:
    return [scene if scene.category == category else None for scene in scenes]


EXPECTED: dict[str, Callable[..., float]] = {
    "scenes": lambda s, *rest: float(
        np.mean([pooled_auc([x if x is y else None for x in s], *rest) for y in s])
    ),
    "pairs": pooled_auc,
    "categories": lambda s, *rest: float(
        np.mean([pooled_auc(of_category(s, c), *rest) for c in "ab"])
    ),
}


@pytest.mark.parametrize("order", ["vggt", "pi3"])
@pytest.mark.parametrize("mean", EXPECTED)
def test_rows_bring_scenes_together_as_the_protocol_says(
    scenes: list[Scene], mean: str, order: str
) -> None:
    protocol = Protocol(name="test", mean=mean, pair_order=order, points=None)
    dense, uniform = report_of(scenes, protocol).rows
    for threshold in protocol.auc_thresholds:
        ours, theirs = (EXPECTED[mean](scenes, seed, protocol, threshold) for seed in (0, 50))
        assert dense[f"auc_{threshold}"] == pytest.approx(ours, abs=1e-12)
        delta = uniform[f"paired_auc_{threshold}_vs_dense"]
        assert delta == pytest.approx(theirs - ours, abs=1e-12)
    ates = [measured(scene, i, protocol)["ate_rmse"] for i, scene in enumerate(scenes)]
    expected = np.mean(ates)
    if mean == "categories":
        expected = (np.mean(ates[::2]) + np.mean(ates[1::2])) / 2
    assert dense["ate_rmse"] == pytest.approx(expected)
    assert dense["auc_30_se"] > 0
    assert dense["n_scenes"] == 5
    assert dense.get("n_categories") == (2 if mean == "categories" else None)
    assert dense["n_scenes_with_points"] == 0
    assert "chamfer_mean" not in dense


def test_means_differ_here(scenes: list[Scene]) -> None:
    protocol = Protocol(name="test", points=None)
    values = [expected(scenes, 0, protocol, 30) for expected in EXPECTED.values()]
    assert np.diff(sorted(values)).min() > 1e-4


def test_default_scene_metrics_hold_nothing_but_metrics(scenes: list[Scene]) -> None:
    protocol = Protocol(name="test", points=PixelPoints(stride=1))
    assert tuple(measured(scenes[0], 0, protocol)) == protocol.metrics
    normals = replace(protocol, points=PixelPoints(stride=1, normals=True))
    found = measured(scenes[0], 0, normals)
    assert tuple(found) == normals.metrics
    assert found["normal_consistency"] == pytest.approx(1)
    nothing_known = replace(scenes[0], depth=torch.zeros_like(scenes[0].depth))
    found = scene_metrics(
        noisy(scenes[0], 0), torch.zeros(3, 16, 16, 3), SceneTruth(nothing_known, normals), normals
    )
    assert found["normal_consistency"] is found["chamfer_mean"] is None
    poses_only = replace(protocol, points=None)
    assert SceneTruth(scenes[0], poses_only).points is None
    assert tuple(measured(scenes[0], 0, poses_only)) == poses_only.metrics


def test_a_mean_over_categories_needs_them(scenes: list[Scene]) -> None:
    protocol = Protocol(name="by-kind", mean="categories")
    with pytest.raises(DatasetError, match=r"by-kind.*categories"):
        SceneTruth(replace(scenes[0], category=None), protocol)


def test_results_say_their_protocol_scenes_and_failures(scenes: list[Scene]) -> None:
    protocol = Protocol(name="test", auc_thresholds=(5, 15), points=None)
    report = report_of(scenes, protocol)
    header, dense, uniform = report.table()
    assert header[2:] == ["AUC@15 ↑", "Δ AUC@15 to dense", "ATE ↓", "FLOPs saved"]
    row = report.rows[1]
    delta, error = (row[f"paired_auc_15_vs_dense{suffix}"] for suffix in ("", "_se"))
    assert dense[3] == "-"
    assert uniform[3] == f"{delta:+.3f}±{error:.3f}"
    lines = report.notes()
    assert lines[0] == f"protocol {protocol.describe()}"
    assert "5" in lines[1]
    assert len(lines) == 2
    report.rows[1]["failed_scenes"] = ["kitchen"]
    assert "uniform" in report.notes()[2]
    assert "kitchen" in report.notes()[2]
    points = PixelPoints(stride=1, normals=True)
    with_points = report_of(scenes, Protocol(name="test", points=points)).table()
    assert with_points[0][4:8] == ["ATE ↓", "chamfer ↓", "point error ↓", "normals ↑"]


# The command line


def test_evaluate_by_a_named_protocol(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    root = write_co3d(tmp_path / "co3d", {"cup": [12, 14]})
    rows = tmp_path / "rows.jsonl"
    command = ["evaluate", "-o", str(rows), "--data", str(root), "--policies", "dense"]
    assert main([*command, "--protocol", "co3d-pi3"]) == 0
    shown = capsys.readouterr().err
    assert f"protocol {PROTOCOLS['co3d-pi3'].describe()}" in shown
    (row,) = map(json.loads, rows.read_text().splitlines())
    assert row["protocol"] == PROTOCOLS["co3d-pi3"].as_dict()
    assert row["n_scenes"] == 2
    assert row["dataset_provenance"]["frames"]["seed"] == 42
    assert "auc_3" not in row
    assert 0 <= row["auc_30"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "co3d"], "co3d-vggt       VGGT's evaluation"),
        (["--protocol", "co3d-pi3"], "no recorded sequences"),
        (["--protocol", "co3d-pi3", "--views", "8"], "leave --views out"),
        (["--protocol", "co3d-pi3", "--truth", "."], "leave --truth out"),
        (["--truth", "."], "add --protocol"),
    ],
)
def test_misused_protocols_say_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["evaluate", "-o", str(tmp_path / "rows.jsonl"), *arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not list(tmp_path.iterdir())
