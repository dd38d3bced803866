"""The command line end to end: what it writes, what it prints where, and how it fails."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import av
import numpy as np
import pycolmap
import pytest
import torch
import trimesh
from PIL import Image
from plyfile import PlyData

from hess.cli.console import print_table
from hess.cli.main import VERBS, main
from hess.models.loading import load_model, read_training_record
from hess.sensitivity.profile import HessProfile
from test_video import write_video

SMALL = ["--num-scenes", "2", "--views", "3"]
SETTING = ["--settings", "0.8", "0.4", "--random-seeds", "0"]
ISSUE_FIELDS = [
    "policy",
    "sparse_ratio",
    "cdf_threshold",
    "block_sparsity",
    "flop_saving",
    "auc_30",
    "auc_30_se",
    "ate_rmse",
    "accuracy",
    "completeness",
    "chamfer_mean",
    "paired_auc_30_vs_uniform",
    "paired_auc_30_vs_uniform_se",
    "n_scenes",
    "seed",
    "model",
    "commit",
]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def hess(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Done]:
    """Runs the command line in this process, for a reader of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> Done:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # how the parser ends
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return run


@pytest.mark.parametrize("width", [40, 80, 95, 200])
def test_tables_lose_no_number_however_narrow_the_terminal(width, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    cells = ["gather (not the default)", "equal, pooled", "0.500", "84.19", "1.54", "8.0%", "16"]
    header = ["backend", "budgets", "s", "ms", "ratio to ideal", "selection", "peak MiB"]
    print_table([header, cells], "attention")
    lines = capsys.readouterr().err.splitlines()
    assert any(all(cell in line for cell in cells) for line in lines)
    if width > 90:
        assert all(word in "\n".join(lines) for word in ["ratio", "ideal", "selection", "MiB"])


def start(*arguments: object) -> subprocess.Popen[str]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "hess.cli.main", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env=environment,
        # A shell's background jobs ignore Ctrl-C, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(3):
        pixels = random.integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"view{i}.jpg")
    return folder


# Help


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example_that_parses(
    hess: Callable[..., Done], verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = hess(verb, "--help")
    assert shown.code == 0
    assert shown.err == ""
    example = re.search(rf"Example: hess ({verb} .*)", shown.out)
    assert example is not None
    monkeypatch.setattr(VERBS[verb], "run", lambda self: None)
    assert hess(*shlex.split(example[1])).code == 0
    options = shown.out.partition(example[0])[2].splitlines()
    assert len(options) > 5
    assert max(map(len, options)) <= 80


def test_the_overview_names_every_verb(hess: Callable[..., Done]) -> None:
    shown = hess("--help")
    assert shown.code == 0
    for verb in VERBS:
        assert f"• {verb}" in shown.out


# What the verbs do


def test_calibrate_and_inspect(hess: Callable[..., Done], tmp_path: Path) -> None:
    path, again, picture = (tmp_path / name for name in ("new/a.hess", "b.hess", "heads.png"))
    done = hess("calibrate", "-o", path, *SMALL, "--json")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    profile = HessProfile.load(path)
    profile.check_model(load_model("nano"))
    assert summary["profile"] == str(path)
    assert summary["num_scenes"] == len(profile.scenes) == 2
    assert [scene.num_views for scene in profile.scenes] == [3, 3]
    assert summary["dataset"]["name"] == "procedural-calibration"
    assert list(tree(path.parent)) == ["a.hess"]  # no partial file is left

    # People get a table, on standard error; the profile is the same to the byte.
    shown = hess("calibrate", "-o", again, *SMALL)
    assert shown.code == 0
    assert shown.out == ""
    assert "GA 6" in shown.err
    assert again.read_bytes() == path.read_bytes()

    seen = hess("inspect", path, "-o", picture, "--json")
    assert seen.code == 0
    inspected = json.loads(seen.out)
    assert inspected == {key: value for key, value in summary.items() if key != "profile"}
    for error in ("camera", "point"):
        assert np.sum(inspected[f"{error}_score"], axis=1) == pytest.approx([1] * 6)
        assert 1 <= inspected[f"{error}_effective_scenes"] <= 2
    with Image.open(picture) as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 200
    shown = hess("inspect", path)
    assert shown.out == ""
    assert "GA 6" in shown.err


@pytest.mark.slow
def test_calibrate_on_the_bundled_capture(hess: Callable[..., Done], tmp_path: Path) -> None:
    done = hess(
        "calibrate", "--data", "bundled", "-o", tmp_path / "a.hess", "--views", "6", "--json"
    )
    assert done.code == 0, done.err
    profile = HessProfile.load(tmp_path / "a.hess")
    assert len(profile.scenes) == 2
    assert json.loads(done.out)["point_score"] is not None
    assert all(scene.point_error is not None for scene in profile.scenes)


@pytest.mark.slow
def test_calibrate_on_photos_alone(
    hess: Callable[..., Done], tmp_path: Path, photos: Path
) -> None:
    output = tmp_path / "photos.hess"
    done = hess("calibrate", "--images", photos, "--views", 3, "-o", output, "--json")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert (summary["kind"], summary["num_scenes"]) == ("label-free", 1)
    video = write_video(tmp_path / "clip.mp4", 4)
    done = hess("calibrate", "--images", video, "--views", 2, "--num-scenes", 2, "-o", output)
    assert done.code == 0, done.err
    assert "without ground truth" in done.err
    assert [path.name for path in tmp_path.glob("*.hess*")] == ["photos.hess"]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_calibrate_on_nothing_or_on_two_things(hess: Callable[..., Done], tmp_path: Path) -> None:
    output = tmp_path / "a.hess"
    both = hess("calibrate", "--images", "a", "--data", "b", "-o", output)
    assert both.code == 2
    assert "give one of them" in both.err
    nothing = hess("calibrate", "--images", tmp_path / "missing", "-o", output)
    assert nothing.code == 1
    assert "missing" in nothing.err
    assert not output.exists()


def test_evaluate_writes_rows_and_continues(hess: Callable[..., Done], tmp_path: Path) -> None:
    rows_path, sidecar = tmp_path / "rows.jsonl", tmp_path / "rows.scenes.jsonl"
    command = ["evaluate", "-o", rows_path, "--num-scenes", "4", "--views", "3", *SETTING]
    command += ["--batch-size", "2"]
    done = hess(*command, "--json")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in rows_path.read_text().splitlines()]
    assert json.loads(done.out) == rows
    assert [row["policy"] for row in rows] == ["dense", "uniform", "hess", "reverse", "random"]
    for row in rows:
        assert set(ISSUE_FIELDS) <= row.keys()
        assert row["n_scenes"] == 4
        assert row["protocol"]["views"] == 3
    hess_row = rows[2]
    assert (hess_row["sparse_ratio"], hess_row["cdf_threshold"]) == (0.8, 0.4)
    assert hess_row["paired_auc_30_vs_uniform_se"] is not None
    assert 0.5 < hess_row["block_sparsity"] < 1

    # Run again after a stop in the middle of a write: nothing but the same bytes.
    before = tree(tmp_path)
    lines = sidecar.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 5
    sidecar.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    rows_path.unlink()
    shown = hess(*command)
    assert shown.code == 0
    assert shown.out == ""
    assert "AUC@30" in shown.err
    assert tree(tmp_path) == before
    assert hess(*command).code == 0
    assert tree(tmp_path) == before


def test_a_refused_evaluation_leaves_nothing_in_the_way(
    hess: Callable[..., Done], tmp_path: Path, photos: Path
) -> None:
    command = ["evaluate", "-o", tmp_path / "rows.jsonl", *SMALL, *SETTING]
    before = tree(tmp_path)
    refused = hess(*command, "--data", photos)
    assert refused.code == 1
    assert "has no camera poses" in refused.err
    assert tree(tmp_path) == before
    assert hess(*command, "--policies", "dense").code == 0


@pytest.mark.slow
def test_reconstruct_within_a_limit_of_drift(
    hess: Callable[..., Done], tmp_path: Path, photos: Path
) -> None:
    always_sparse = ["--dense-below", 0, "--formats", "npz", "-o", tmp_path / "out"]
    done = hess("reconstruct", photos, *always_sparse, "--max-drift", "99%", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["policy"] == "hess+"
    assert result["guard"]["sparse_ratio"] == 0.95
    assert result["block_sparsity"] > 0.7
    assert max(p["drift"]["largest"] for p in result["guard"]["probes"]) <= 0.99
    assert "moves the result of 3 of 3 photos" in done.err
    done = hess("reconstruct", photos, *always_sparse, "--max-drift", "0.000001", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert (result["policy"], result["block_sparsity"]) == ("dense", 0.0)
    assert "attention stays dense" in done.err
    done = hess("reconstruct", photos, *always_sparse, "--speedup", "1.0001x", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["guard"]["predicted_speedups"][str(result["guard"]["sparse_ratio"])] >= 1.0001
    done = hess("reconstruct", photos, *always_sparse, "--speedup", "100x")
    assert done.code == 2
    assert "times as fast at most" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-drift", "five"], "such as 1%"),
        (["--max-drift", "0%"], "above 0"),
        (["--max-drift", "100%"], "below 1"),
        (["--speedup", "1x"], "above 1"),
        (["--speedup", "nanx"], "above 1"),
        (["--max-drift", "1%", "--speedup", "2x"], "give one"),
        (["--max-drift", "1%", "--sparse-ratio", "0.5"], "leave --sparse-ratio"),
        (["--max-drift", "1%", "--policy", "dense"], "it is dense"),
    ],
)
def test_goals_that_make_no_sense(
    hess: Callable[..., Done], tmp_path: Path, photos: Path, options: list[str], message: str
) -> None:
    done = hess("reconstruct", photos, "-o", tmp_path / "out", *options)
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert not (tmp_path / "out").exists()


def test_reconstruct_says_why_it_is_dense(
    hess: Callable[..., Done], tmp_path: Path, photos: Path
) -> None:
    """Weights without a bundled profile."""
    weights = tmp_path / "mine.safetensors"
    weights.write_bytes((files("hess") / "assets" / "nano.safetensors").read_bytes())
    done = hess("reconstruct", photos, "-o", tmp_path / "out", "--model", weights)
    assert done.code == 0, done.err
    assert "there is no profile of this model" in done.err


def check_reconstruction(folder: Path, names: list[str]) -> None:
    """Every file, loaded with libraries that did not write them."""
    assert sorted(path.name for path in folder.iterdir() if path.name != "frames") == [
        "colmap",
        "preview.png",
        "scene.glb",
        "scene.npz",
        "scene.ply",
        "transforms.json",
    ]
    vertices = PlyData.read(folder / "scene.ply")["vertex"]
    assert len(vertices) == len(names) * 48 * 48 - int(0.2 * len(names) * 48 * 48)
    assert {"x", "y", "z", "red", "green", "blue"} <= {p.name for p in vertices.properties}
    with np.load(folder / "scene.npz") as arrays:
        assert arrays["world_points"].shape == (len(names), 48, 48, 3)
        poses = arrays["world_from_cam"]
    frames = json.loads((folder / "transforms.json").read_text())["frames"]
    assert [Path(frame["file_path"]).name for frame in frames] == names
    assert all((folder / frame["file_path"]).is_file() for frame in frames)
    opencv = np.array([frame["transform_matrix"] for frame in frames]) * [1, -1, -1, 1]
    np.testing.assert_allclose(opencv, poses, atol=1e-6)
    model = pycolmap.Reconstruction(folder / "colmap")
    assert sorted(image.name for image in model.images.values()) == sorted(names)
    assert len(trimesh.load(folder / "scene.glb").geometry) > 1
    with Image.open(folder / "preview.png") as image:
        image.load()
        assert image.format == "PNG"


def test_reconstruct_photos(hess: Callable[..., Done], tmp_path: Path, photos: Path) -> None:
    done = hess("reconstruct", photos, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.out == ""
    assert "views: 3 at 48x48 pixels, block sparsity 0.00" in done.err
    assert re.search(r"load model [0-9.]+ s, .*peak memory [0-9.]+ GiB", done.err)
    check_reconstruction(tmp_path / "out", ["view0.jpg", "view1.jpg", "view2.jpg"])
    # A pattern, into the same folder again.
    done = hess("reconstruct", photos / "view[01].jpg", "-o", tmp_path / "out", "--json")
    assert json.loads(done.out)["num_views"] == 2
    check_reconstruction(tmp_path / "out", ["view0.jpg", "view1.jpg"])


def test_reconstruct_a_video(hess: Callable[..., Done], tmp_path: Path) -> None:
    video = tmp_path / "clip.mp4"
    with av.open(video, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for shade in range(0, 240, 20):
            picture = np.full((48, 64, 3), shade, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    out = tmp_path / "out"
    assert hess("reconstruct", video, "-o", out, "--every", "4").code == 0
    names = sorted(path.name for path in (out / "frames").glob("*.jpg"))
    assert len(names) == 3
    check_reconstruction(out, names)
    few = hess("reconstruct", video, "-o", tmp_path / "few", "--max-views", "2", "--json")
    assert json.loads(few.out)["num_views"] == 2


def test_reconstruct_writes_what_was_asked_for(
    hess: Callable[..., Done], tmp_path: Path, photos: Path
) -> None:
    out = tmp_path / "out"
    done = hess(
        "reconstruct", photos, "-o", out, "--formats", "npz", "--fit", "pad", "--max-views", "2",
        "--points", "depth", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["files"] == ["scene.npz"]
    assert [path.name for path in out.iterdir()] == ["scene.npz"]
    with np.load(out / "scene.npz") as arrays:
        metadata = json.loads(str(arrays["metadata"]))
        assert (arrays["images"][:, :, 0] == 1).all()  # the white above a landscape photo
    assert metadata["view_names"] == ["view0.jpg", "view2.jpg"]


def test_one_format_that_fails_does_not_stop_the_others(
    hess: Callable[..., Done], tmp_path: Path, photos: Path
) -> None:
    out = tmp_path / "out"
    (out / "colmap").mkdir(parents=True)
    (out / "colmap" / "notes.txt").write_text("mine")
    done = hess("reconstruct", photos, "-o", out, "--json")
    assert done.code == 1
    assert "notes.txt" in done.err
    assert "colmap" not in json.loads(done.out)["files"]
    assert (out / "colmap" / "notes.txt").read_text() == "mine"
    assert {"scene.npz", "transforms.json", "preview.png"} <= {p.name for p in out.iterdir()}


def test_out_of_memory_is_said_in_words(
    hess: Callable[..., Done], tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 GiB.")

    monkeypatch.setattr("hess.reconstruction.reconstruct", too_much)
    done = hess("reconstruct", photos, "-o", tmp_path / "out")
    assert done.code == 1
    assert "--max-views" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_reconstruct_the_bundled_capture_sparsely(
    hess: Callable[..., Done], tmp_path: Path
) -> None:
    done = hess(
        "reconstruct", "bundled", "-o", tmp_path / "out", "--policy", "hess",
        "--max-views", "4", "--dense-below", "0", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["num_views"] == 4
    assert 0.3 < result["block_sparsity"] < 1
    assert {"auc_30", "ate_rmse", "chamfer_mean", "point_error"} <= result["errors"].keys()
    capture = files("hess") / "assets" / "hololens_office" / "images"
    frames = json.loads((tmp_path / "out" / "transforms.json").read_text())["frames"]
    names = [Path(frame["file_path"]).name for frame in frames]
    assert {*names} <= {path.name for path in capture.iterdir()}
    check_reconstruction(tmp_path / "out", names)


def test_too_few_tokens_for_sparsity_are_left_dense(
    hess: Callable[..., Done], tmp_path: Path, photos: Path
) -> None:
    command = ["reconstruct", photos, "--policy", "uniform", "--formats", "npz", "--json"]
    done = hess(*command, "-o", tmp_path / "dense")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert (result["backends"], result["block_sparsity"]) == (["dense"], 0)
    assert result["dense_below"] > 0
    assert "--dense-below 0" in done.err
    forced = hess(*command, "-o", tmp_path / "sparse", "--dense-below", "0")
    assert json.loads(forced.out)["block_sparsity"] > 0.3
    assert "dense" not in json.loads(forced.out)["backends"]


def test_a_broken_photo_is_skipped_and_named(
    hess: Callable[..., Done], tmp_path: Path, photos: Path
) -> None:
    broken = photos / "view1.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    process = start("reconstruct", photos, "-o", tmp_path / "out", "--json")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out)["num_views"] == 2  # nothing but JSON on standard output
    assert err.count(str(broken)) == 1
    assert "skipped" in err
    check_reconstruction(tmp_path / "out", ["view0.jpg", "view2.jpg"])

    strict = hess("reconstruct", photos, "-o", tmp_path / "strict", "--strict")
    assert strict.code == 1
    assert str(broken) in strict.err
    assert not (tmp_path / "strict").exists()


@pytest.mark.slow
def test_demo(hess: Callable[..., Done], tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = hess(
        "demo", "-o", out, "--calibration-scenes", "2", "--calibration-views", "4",
        "--scenes", "4",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.out == ""
    assert f"{out}/index.html" in done.err.replace("\n", "")
    assert "reverse" in done.err

    page = (out / "index.html").read_text()
    resources = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'\s>]{1,40})", page)
    resources += re.findall(r"url\(\s*[\"']?([^\"')]{1,40})", page)
    assert resources
    assert {link.partition(":")[0] for link in resources} == {"data"}  # self-contained
    assert "@import" not in page
    for word in ("Block sparsity", "AUC@30", "Reverse", "Real photos"):
        assert word in page

    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 1 + 4 * 4
    for row in rows:
        assert set(ISSUE_FIELDS) <= row.keys()
        assert (row["n_scenes"], row["model"], row["seed"]) == (4, "nano", 0)
    settings = {(row["sparse_ratio"], row["cdf_threshold"]) for row in rows}
    assert len(settings) == 1 + 4
    assert len(HessProfile.load(out / "profile.hess").scenes) == 2
    clouds = [
        f"{scene}-{policy}.ply"
        for scene in ("office", "procedural")
        for policy in ("dense", "hess")
    ]
    assert sorted(path.name for path in out.glob("*.ply")) == sorted(clouds)
    for name in clouds:
        assert len(PlyData.read(out / name)["vertex"]) > 10_000


@pytest.mark.slow
def test_train_nano_twice(hess: Callable[..., Done], tmp_path: Path) -> None:
    command = ["train-nano", "-o", tmp_path / "run", "--steps", "1", "--json"]
    done = [hess(*command) for _ in range(2)]
    assert [one.code for one in done] == [0, 0], done[0].err
    assert done[0].out == done[1].out  # the second time, nothing was left to do
    result = json.loads(done[0].out)
    assert 0 <= result["final"]["val_auc_30"] <= 1
    weights = tmp_path / "run" / "nano.safetensors"
    assert result["weights"] == str(weights)
    assert read_training_record(weights)["config"]["steps"] == 1
    assert load_model(weights)(torch.zeros(1, 2, 3, 48, 48)).world_points.isfinite().all()
    with Image.open(tmp_path / "run" / "curve.png") as image:
        assert image.format == "PNG"
    # Training rounds tiny numbers to zero; k-d trees crash if that stays so.
    assert torch.full((1,), 1e-310, dtype=torch.float64).mul(1).item() > 0


def test_doctor_tells_what_there_is(
    hess: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    done = hess("doctor", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["fit"] is None
    machine = report["machine"]
    assert (machine["torch"], machine["threads"]) == (torch.__version__, 1)
    assert 2**30 < machine["free_memory"] <= machine["memory"]
    assert (machine["gpu"] is None) == (not torch.cuda.is_available())
    assert (machine["gpu"] is None) == bool(machine["why_no_gpu"])
    for name in ("reference", "masked", "gather", "native"):
        assert report["backends"][name]["max_error"] < 1e-5
    for backend in report["backends"].values():
        assert (backend["max_error"] is None) == bool(backend["why_not"])
    assert report["libraries"]["trimesh"] is not None
    assert report["models"]["facebook/VGGT-1B"] is None
    assert not cache.exists()  # nothing was downloaded

    blob = cache / "models--yyfz233--Pi3" / "blobs" / "0"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(bytes(5000))
    snapshot = cache / "models--yyfz233--Pi3" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(blob)
    assert json.loads(hess("doctor", "--json").out)["models"]["yyfz233/Pi3"] == 5000
    shown = hess("doctor")
    assert (shown.code, shown.out) == (0, "")
    assert "not downloaded yet" in shown.err
    assert max(map(len, shown.err.splitlines())) <= 80


def test_doctor_tells_what_fits(hess: Callable[..., Done]) -> None:
    command = ["doctor", "--views", "30", "--device", "cpu", "--dtype", "float32"]
    done = hess(*command, "--json")
    assert done.code == 0, done.err
    fit = json.loads(done.out)["fit"]
    assert (fit["model"], fit["width"], fit["height"]) == ("facebook/VGGT-1B", 518, 392)
    dense, sparse, calibration = fit["cases"].values()
    assert fit["weights"] < dense["peak_memory"] < calibration["peak_memory"]
    assert 0 < sparse["seconds"] < dense["seconds"] < calibration["seconds"]
    for case in fit["cases"].values():
        assert case["fits"] == (case["most_views"] >= 30)
        assert case["fits"] == (case["peak_memory"] <= round(0.9 * fit["free_memory"]))
    shown = hess(*command, "--size", "280x140", "--model", "yyfz233/Pi3")
    assert (shown.code, shown.out) == (0, "")
    assert "yyfz233/Pi3 on cpu, 30 views of 280x140" in shown.err
    assert max(map(len, shown.err.splitlines())) <= 80


# Failures

BAD_USE = [
    (["calibrate", "-o", "{tmp}/a.hess", "--num-scenes", "0"], "num_scenes"),
    (["calibrate", "-o", "{tmp}/a.hess", "--num-scenes", "many"], "--num-scenes"),
    (["calibrate", "-o", "{tmp}/a.hess", "--inlier-threshold", "-1"], "inlier"),
    (["calibrate", "-o", "{tmp}/a.hess", "--device", "abacus"], "abacus"),
    (["calibrate"], "--output"),
    (["calibrate", "-o", "{tmp}", *SMALL], "is a folder"),
    (["evaluate", "-o", "{tmp}/a.jsonl", "--policies", "uniform", "lucky"], "lucky"),
    (["evaluate", "-o", "{tmp}/a.jsonl", "--settings", "0.8"], "--settings"),
    (["evaluate", "-o", "{tmp}/a.jsonl", "--settings", "0.8", "1.5"], "1.5"),
    (["evaluate", "-o", "{tmp}/a.jsonl", "--views", "2"], "at least 3"),
    (["evaluate", "-o", "{tmp}/a.jsonl", "--threads", "0"], "--threads"),
    (["evaluate", "-o", "{tmp}/a.jsonl", "--batch-size", "0"], "batch size"),
    (["evaluate", "-o", "{tmp}/a.jsonl", "--seed", "-1"], "seed"),
    (["evaluate", "-o", "{tmp}/a.jsonl", "--policies"], "at least one policy"),
    (["reconstruct", "{photos}", "-o", "{tmp}/out", "--policy", "lucky"], "lucky"),
    (["reconstruct", "{photos}", "-o", "{tmp}/out", "--policy", "hess", "--sparse-ratio", "1.5"],
     "sparse_ratio"),
    (["reconstruct", "{photos}", "-o", "{tmp}/out", "--max-views", "0"], "at least 1"),
    (["reconstruct", "{photos}", "-o", "{tmp}/out", "--dense-below", "-1"], "dense_below"),
    (["reconstruct", "{photos}", "-o", "{tmp}/file"], "is a file"),
    (["reconstruct", "{photos}", "-o", "{photos}"], "input as well"),
    (["reconstruct", "{photos}", "-o", "{tmp}/out", "--formats"], "--formats"),
    (["reconstruct", "-o", "{tmp}/out"], "found nothing"),
    (["reconstruct", "{photos}", "-o", "{tmp}/out", "--fps", "2"], "of a video"),
    (["reconstruct", "{photos}", "-o", "{tmp}/out", "--formats", "fbx"], "fbx"),
    (["reconstruct", "{photos}", "-o", "{tmp}/out", "--drop-lowest", "1"], "--drop-lowest"),
    (["reconstruct", "{photos}", "-o", "{tmp}/out", "--voxel-size", "0"], "--voxel-size"),
    (["demo", "-o", "{tmp}/file"], "is a file"),
    (["train-nano", "-o", "{tmp}/run", "--threads", "0"], "--threads"),
    (["train-nano", "-o", "{tmp}/run", "--steps", "0"], "steps"),
    (["inspect"], "profile"),
    (["doctor", "--views", "0"], "at least 1"),
    (["doctor", "--size", "518x392"], "--views"),
    (["doctor", "--views", "2", "--size", "518"], "WIDTHxHEIGHT"),
    (["doctor", "--views", "2", "--size", "518x390"], "518x392"),
    (["doctor", "--views", "2", "--block-sparsity", "2"], "block_sparsity"),
    (["paint"], "paint"),
    ([], "demo"),
]  # fmt: skip
BAD_INPUT = [
    (["reconstruct", "{tmp}/file.mp4", "-o", "{tmp}/out"], "file.mp4"),
    (["reconstruct", "{photos}/view0.jpg", "{tmp}/file.mp4", "-o", "{tmp}/out"], "file.mp4"),
    (["reconstruct", "{tmp}/empty", "-o", "{tmp}/out"], "found no files"),
    (["reconstruct", "{tmp}/none", "-o", "{tmp}/out"], "no such folder"),
    (["reconstruct", "{photos}", "-o", "{tmp}/out", "--model", "{tmp}/none"], "no model named"),
    (["reconstruct", "{photos}", "-o", "{tmp}/out", "--model", "{tmp}/file"], "not a weight file"),
    (["reconstruct", "{photos}", "-o", "{tmp}/out", "--model", "{tmp}/cut.safetensors"],
     "not a readable"),
    (["reconstruct", "{photos}", "-o", "{tmp}/out", "--model", "{tmp}/nano.hess"],
     "not a weight file"),
    (["reconstruct", "{photos}", "-o", "{tmp}/file/out"], "file"),
    (["inspect", "{tmp}/none.hess"], "hess calibrate"),
    (["doctor", "--views", "2", "--model", "{tmp}/none"], "facebook/VGGT-1B"),
    (["inspect", "{tmp}/file"], "no profile"),
    (["inspect", "{tmp}/cut.safetensors"], "no profile"),
    (["inspect", "nano", "-o", "{tmp}/file/a/heads.png"], "file"),
    (["calibrate", "-o", "{tmp}/a.hess", "--data", "{photos}"], "no poses"),
    (["calibrate", "-o", "{tmp}/a.hess", "--data", "{tmp}/empty"], "recognised"),
    (["calibrate", "-o", "{tmp}/file/a/a.hess", *SMALL], "file"),
    (["evaluate", "-o", "{tmp}/file/a/a.jsonl", *SMALL], "file"),
    (["evaluate", "-o", "{tmp}/a.jsonl", "--profile", "{tmp}/none.hess"], "hess calibrate"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [(2, *case) for case in BAD_USE] + [(1, *case) for case in BAD_INPUT],
)
def test_failures_say_why_and_leave_nothing_behind(
    hess: Callable[..., Done],
    tmp_path: Path,
    photos: Path,
    code: int,
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("just text, for once")
    (tmp_path / "file.mp4").write_text("just text, for once")
    assets = files("hess") / "assets"
    (tmp_path / "nano.hess").write_bytes((assets / "nano.hess").read_bytes())
    weights = (assets / "nano.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(weights[: len(weights) // 2])
    before = tree(tmp_path)
    done = hess(*(argument.format(tmp=tmp_path, photos=photos) for argument in arguments))
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert "Traceback" not in done.err
    assert tree(tmp_path) == before


def test_the_parser_keeps_to_eighty_columns(hess: Callable[..., Done]) -> None:
    for arguments in ([], ["calibrate"], ["evaluate", "-o", "x", "--settings", "1"], ["paint"]):
        shown = hess(*arguments)
        assert shown.code == 2
        assert max(map(len, shown.err.splitlines())) <= 80


def test_a_full_disk_is_an_error_not_half_a_file(
    hess: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "heads.png"
    target.write_bytes(b"the old one")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(os, "replace", full)
    done = hess("inspect", "nano", "-o", target)
    assert done.code == 1
    assert f"{target}: No space left on device" in done.err
    assert tree(tmp_path) == {"heads.png": b"the old one"}


def test_exit_code_of_the_process(tmp_path: Path) -> None:
    process = start("inspect", tmp_path / "none.hess", "--json")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("hess: no profile at")
    assert err.count("\n") == 1  # in one line, for programs


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done(hess: Callable[..., Done], tmp_path: Path) -> None:
    path, partial = tmp_path / "a.hess", tmp_path / ".a.hess.partial"
    scenes = ["--num-scenes", "32", "--views", "3"]
    process = start("calibrate", "-o", path, *scenes)
    deadline = time.monotonic() + 300
    while not partial.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (130, "")
    assert "stopped" in err
    assert "Traceback" not in err
    assert [*tree(tmp_path)] == [partial.name]
    assert 1 <= len(HessProfile.load(partial).scenes) < 32

    # Another calibration is not mixed in.
    other = hess("calibrate", "-o", path, "--num-scenes", "32", "--views", "4")
    assert other.code == 1
    assert str(partial) in other.err

    continued = hess("calibrate", "-o", path, *scenes)
    assert continued.code == 0
    assert f"continuing {partial}" in continued.err
    whole = tmp_path / "whole.hess"
    assert hess("calibrate", "-o", whole, *scenes).code == 0
    assert path.read_bytes() == whole.read_bytes()
    assert [*tree(tmp_path)] == ["a.hess", "whole.hess"]


def test_bench_model_at_one_number_of_views(hess) -> None:
    """Too few to tell how time grows."""
    done = hess("bench", "model", "--views", "2", "--size", "24", "--rounds", "1")
    assert done.code == 0, done.err
    assert "stages" in done.err
    assert "scaling" not in done.err


def test_bench_selection_over_any_number_of_tokens(hess) -> None:
    """Also where a budget leaves rows without a block."""
    size = ["--tokens", "300", "600", "--heads", "4", "--head-dim", "16", "--seconds", "0.01"]
    done = hess("bench", "selection", *size)
    assert done.code == 0, done.err
    assert "hess+" in done.err
    assert hess("bench", "selection", "--tokens", "1").code == 2
