"""The evaluation loop: rows, paired differences, resuming, failures, missing ground truth."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hess.datasets.procedural import Procedural, ProceduralConfig
from hess.datasets.scene import Scene
from hess.errors import AlignmentError, ConfigError, DatasetError
from hess.evaluation import evaluate as evaluation
from hess.evaluation.evaluate import evaluate
from hess.evaluation.pixel_points import PixelPoints
from hess.evaluation.protocol import Protocol
from hess.evaluation.report import mean_and_error
from hess.models.base import Predictions
from hess.models.vggt import VGGT, VGGTConfig
from hess.policies import Dense, HeSS, Reverse, Uniform
from stand_ins import FixedScores

PROTOCOL = Protocol(name="tiny", views=4, points=PixelPoints(stride=1))
VARYING = ("commit", "dirty", "machine")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tensors this small only lose by being shared out


class TinyVGGT(VGGT):
    """A VGGT with random weights that counts its forward passes."""

    def __init__(self) -> None:
        config = VGGTConfig(
            image_size=16, patch_size=8, dim=32, depth=2, num_heads=4, num_registers=1,
            patch_embed="conv", camera_trunk_depth=1, camera_heads=4, camera_iterations=1,
            dense_head="linear", dense_layers=(0, 1), block_size_q=2, block_size_kv=2,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(config, model_name="tiny")
            for parameter in self.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        self.calls = 0

    def forward(self, images: Tensor) -> Predictions:
        self.calls += 1
        return super().forward(images)


def fixed_scores(last: float = 1.0) -> FixedScores:
    """Head scores that differ from layer to layer."""
    return FixedScores(torch.tensor([[8.0, 4.0, 2.0, 1.0], [1.0, 1.0, 9.0, last]]))


class Listed:
    """A data set from a list of scenes."""

    name = "listed"

    def __init__(self, scenes: list[Scene]) -> None:
        self._scenes = scenes

    @property
    def provenance(self) -> dict[str, object]:
        return {"scenes": [scene.name for scene in self._scenes]}

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Scene:
        return self._scenes[index]

    def __iter__(self) -> Iterator[Scene]:
        return iter(self._scenes)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    config = ProceduralConfig(image_size=16)
    return list(Procedural(num_scenes=5, num_views=4, seed=1, config=config))


@pytest.fixture
def model() -> TinyVGGT:
    return TinyVGGT()


def policies() -> list:
    setting = {"sparse_ratio": 0.7, "cdf_threshold": 0.3}
    scored = [kind(fixed_scores(), **setting) for kind in (HeSS, Reverse)]
    return [Dense(), Uniform(**setting), *scored, Uniform(sparse_ratio=0.2)]


def run(model: TinyVGGT, scenes: list[Scene], **options: object) -> list[dict]:
    defaults = {"protocol": PROTOCOL, "seed": 1, "batch_size": 2}
    return evaluate(model, Listed(scenes), policies(), **{**defaults, **options}).rows


def stable(rows: list[dict]) -> str:
    return json.dumps([{k: v for k, v in row.items() if k not in VARYING} for row in rows])


def test_rows_hold_what_was_measured(model: TinyVGGT, scenes: list[Scene]) -> None:
    report = evaluate(
        model, Listed(scenes), policies(), protocol=PROTOCOL, seed=1, batch_size=2, command="typed"
    )
    rows = report.rows
    assert [row["policy"] for row in rows] == ["dense", "uniform", "hess", "reverse", "uniform"]
    assert model.calls == 5 * 3  # five policies on three batches
    for row in rows:
        assert row["n_scenes"] == row["n_scenes_with_points"] == 5
        assert row["failed_scenes"] == []
        assert row["protocol"] == PROTOCOL.as_dict()
        assert (row["seed"], row["model"], row["command"]) == (1, "tiny", "typed")
        assert {"platform", "cpu_count", "torch", "package"} <= row["machine"].keys()
        assert 0 <= row["auc_30"] <= 1
        assert row["chamfer_mean"] == pytest.approx((row["accuracy"] + row["completeness"]) / 2)
    assert (rows[0]["sparse_ratio"], rows[0]["block_sparsity"]) == (None, 0.0)
    assert (rows[1]["sparse_ratio"], rows[1]["cdf_threshold"]) == (0.7, 0.3)
    assert rows[1]["block_sparsity"] > rows[4]["block_sparsity"] > 0
    assert rows[1]["flop_saving"] > 0
    assert json.loads(json.dumps(rows)) == rows
    # Back to dense: no site was left sparse.
    assert {type(site.module).__name__ for site in model.global_attention_sites()} == {"Attention"}


def test_results_of_another_precision_or_code_are_not_taken_over(
    model: TinyVGGT, scenes: list[Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = run(model, scenes, rows_path=path)
    assert {(row["device"], row["dtype"]) for row in rows} == {("cpu", "float32")}
    with pytest.raises(ConfigError, match=r"different: .*dtype"):
        run(model.double(), scenes, rows_path=path)
    model.float()
    origin = evaluation.provenance(torch.device("cpu"))
    later = replace(origin, commit="later", dirty=True)
    monkeypatch.setattr(evaluation, "provenance", lambda device: later)
    again = run(model, scenes, rows_path=path)  # another commit, but the same code
    assert [(row["commit"], row["dirty"]) for row in again] == [
        (row["commit"], row["dirty"]) for row in rows
    ]
    monkeypatch.setattr(evaluation, "code_digest", lambda: "changed")
    with pytest.raises(ConfigError, match="different: code_sha256"):
        run(model, scenes, rows_path=path)


def test_means_and_paired_differences_against_numpy(model: TinyVGGT, scenes: list[Scene]) -> None:
    report = evaluate(model, Listed(scenes), policies(), protocol=PROTOCOL, seed=1, batch_size=3)
    per_policy = np.array([s["metrics"]["ate_rmse"] for s in report.scenes]).reshape(5, 5)
    dense, uniform, hess, _, other = per_policy
    row = report.rows[2]
    assert row["ate_rmse"] == pytest.approx(hess.mean())
    assert row["ate_rmse_se"] == pytest.approx(hess.std(ddof=1) / np.sqrt(5))
    for name, baseline in (("uniform", uniform), ("dense", dense)):
        difference = hess - baseline
        assert row[f"paired_ate_rmse_vs_{name}"] == pytest.approx(difference.mean())
        expected = difference.std(ddof=1) / np.sqrt(5)
        assert row[f"paired_ate_rmse_vs_{name}_se"] == pytest.approx(expected)
        assert row[f"n_paired_vs_{name}"] == 5
    # Uniform has no paired difference to itself, not even to its other setting.
    assert report.rows[4]["paired_ate_rmse_vs_uniform"] is None
    assert report.rows[4]["n_paired_vs_uniform"] == 0
    assert report.rows[4]["paired_ate_rmse_vs_dense"] == pytest.approx((other - dense).mean())
    assert report.rows[0]["paired_ate_rmse_vs_dense"] is None


def test_a_perfect_prediction_scores_perfectly(scenes: list[Scene]) -> None:
    class Perfect(TinyVGGT):
        def forward(self, images: Tensor) -> Predictions:
            found = super().forward(images)
            known = [next(s for s in scenes if torch.equal(s.images, i)) for i in images]
            cameras = torch.stack([scene.world_from_cam for scene in known])
            cameras[..., :3, 3] *= 0.5  # a prediction may have another scale
            points = torch.stack([scene.point_map()[0] for scene in known]) * 0.5
            return replace(found, world_from_cam=cameras, world_points=points)

    for row in run(Perfect(), scenes):
        assert row["auc_3"] == row["auc_30"] == 1.0
        assert max(row["ate_rmse"], row["chamfer_mean"], row["point_error"]) < 1e-5


def test_repeating_gives_the_same_bytes(tmp_path: Path, scenes: list[Scene]) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    rows = [run(TinyVGGT(), scenes, rows_path=path) for path in files]
    assert stable(rows[0]) == stable(rows[1]) == stable(run(TinyVGGT(), scenes))
    saved = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert stable(saved) == stable(rows[0])


def test_a_stopped_run_continues(tmp_path: Path, scenes: list[Scene]) -> None:
    path = tmp_path / "rows.jsonl"
    sidecar = tmp_path / "rows.scenes.jsonl"

    def stop(done: int, total: int, _: str) -> None:
        assert total == 25
        if done == 12:
            raise KeyboardInterrupt

    first = TinyVGGT()
    with pytest.raises(KeyboardInterrupt):
        run(first, scenes, rows_path=path, progress=stop)
    assert first.calls == 6
    assert not path.exists()
    with sidecar.open("ab") as file:  # what a kill in the middle of a write leaves behind
        file.write(b'{"policy": "half a li')

    second = TinyVGGT()
    steps: list[int] = []
    rows = run(second, scenes, rows_path=path, progress=lambda done, *_: steps.append(done))
    assert second.calls == 15 - first.calls
    assert steps[-1] == 25
    assert stable(rows) == stable(run(TinyVGGT(), scenes))
    assert len([json.loads(line) for line in sidecar.read_text().splitlines()]) == 1 + 15

    third = TinyVGGT()
    assert stable(run(third, scenes, rows_path=path)) == stable(rows)
    assert third.calls == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, "seed"),
        ({"batch_size": 3}, "batch_size"),
        ({"protocol": replace(PROTOCOL, points=PixelPoints(stride=2))}, "protocol"),
        ({"sparsify_options": {"block_size_q": 4}}, "sparsify_options"),
    ],
)
def test_results_of_another_configuration_are_refused(
    tmp_path: Path, scenes: list[Scene], change: dict, named: str
) -> None:
    path = tmp_path / "rows.jsonl"
    run(TinyVGGT(), scenes, rows_path=path)
    before = (tmp_path / "rows.scenes.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=named):
        run(TinyVGGT(), scenes, rows_path=path, **change)
    assert (tmp_path / "rows.scenes.jsonl").read_bytes() == before


def test_results_of_other_weights_or_damaged_ones_are_refused(
    tmp_path: Path, scenes: list[Scene]
) -> None:
    path = tmp_path / "rows.jsonl"
    run(TinyVGGT(), scenes, rows_path=path)
    other = TinyVGGT()
    with torch.no_grad():
        other.global_attention_sites()[0].module.qkv.weight.add_(1.0)
    with pytest.raises(ConfigError, match="model_fingerprint"):
        run(other, scenes, rows_path=path)
    (tmp_path / "rows.scenes.jsonl").write_text("no json\n")
    with pytest.raises(ConfigError, match="damaged"):
        run(TinyVGGT(), scenes, rows_path=path)


def test_without_depth_point_metrics_are_absent_not_zero(scenes: list[Scene]) -> None:
    rows = run(TinyVGGT(), [replace(scene, depth=None) for scene in scenes])
    for row in rows:
        for metric in ("accuracy", "completeness", "chamfer_mean", "point_error"):
            assert row[metric] is None
            assert row[f"{metric}_se"] is None
            assert row[f"paired_{metric}_vs_uniform"] is None
        assert row["n_scenes_with_points"] == 0
        assert row["ate_rmse"] > 0


class Broken(TinyVGGT):
    """Predicts NaN for the scenes at these places of a batch, in sparse attention only or ever."""

    def __init__(self, places: list[int], *, sparse_only: bool) -> None:
        super().__init__()
        self.places, self.sparse_only = places, sparse_only

    def forward(self, images: Tensor) -> Predictions:
        found = super().forward(images)
        name = self.global_attention_sites()[0].module._policy.name
        if self.sparse_only and name != "hess":
            return found
        points = found.world_points.clone()
        points[self.places] = float("nan")
        return replace(found, world_points=points)


def test_failed_scenes_are_named_and_left_out_of_pairs(scenes: list[Scene]) -> None:
    rows = run(Broken([1], sparse_only=True), scenes[:4])
    assert rows[1]["n_scenes"] == 4
    assert rows[1]["failed_scenes"] == []
    assert rows[2]["policy"] == "hess"
    assert rows[2]["n_scenes"] == rows[2]["n_paired_vs_uniform"] == 2
    assert rows[2]["failed_scenes"] == [scenes[1].name, scenes[3].name]
    kept = run(TinyVGGT(), [scenes[0], scenes[2]], batch_size=1)
    assert rows[2]["paired_auc_30_vs_uniform"] == pytest.approx(
        kept[2]["paired_auc_30_vs_uniform"]
    )


def test_a_policy_that_fails_everywhere_has_no_mean(scenes: list[Scene]) -> None:
    with pytest.raises(AlignmentError, match="failed on all 4"):
        run(Broken([0, 1], sparse_only=False), scenes[:4])
    with pytest.raises(AlignmentError, match="no value"):
        mean_and_error([])
    assert mean_and_error([2.0]) == (2.0, None)


def test_policies_of_different_profiles_are_told_apart(scenes: list[Scene]) -> None:
    first, second = (HeSS(fixed_scores(last), sparse_ratio=0.7) for last in (1.0, 5.0))
    rows = evaluate(
        TinyVGGT(), Listed(scenes[:2]), [first, second], protocol=PROTOCOL, seed=1
    ).rows
    assert rows[0]["settings"]["scores_sha256"] != rows[1]["settings"]["scores_sha256"]
    assert rows[0]["point_error"] != rows[1]["point_error"]


def test_policies_are_added_to_what_was_measured(tmp_path: Path, scenes: list[Scene]) -> None:
    """Whichever policies came first: only new ones run, and the rows are those of a fresh run."""
    path = tmp_path / "rows.jsonl"
    options = {"protocol": PROTOCOL, "seed": 1, "batch_size": 2}
    dense, uniform, hess, *_ = policies()
    first, second = TinyVGGT(), TinyVGGT()
    alone = evaluate(first, Listed(scenes), [uniform], **options, rows_path=path).rows
    rows = evaluate(second, Listed(scenes), [dense, uniform, hess], **options, rows_path=path).rows
    assert (first.calls, second.calls) == (3, 2 * 3)
    fresh = evaluate(TinyVGGT(), Listed(scenes), [dense, uniform, hess], **options).rows
    assert stable(rows) == stable(fresh)
    # What else the file holds does not show.
    third = TinyVGGT()
    again = evaluate(third, Listed(scenes), [uniform], **options, rows_path=path).rows
    assert third.calls == 0
    assert stable(again) == stable(alone)


def test_scenes_of_other_shapes_go_into_other_batches(scenes: list[Scene]) -> None:
    model = TinyVGGT()
    mixed = [scenes[0], scenes[1], scenes[2].take_views([0, 1, 2]), scenes[3]]
    protocol = replace(PROTOCOL, views=None)
    report = evaluate(model, Listed(mixed), [Dense()], protocol=protocol, seed=1, batch_size=8)
    assert model.calls == 3
    assert [scene["scene"] for scene in report.scenes] == [scene.name for scene in mixed]


def test_unfit_data_and_policies_are_refused(model: TinyVGGT, scenes: list[Scene]) -> None:
    with pytest.raises(DatasetError, match="no scenes"):
        run(model, [])
    with pytest.raises(DatasetError, match="4 views"):
        run(model, [scenes[0].take_views([0, 1, 2])])
    with pytest.raises(DatasetError, match="no camera poses"):
        run(model, [replace(scenes[0], world_from_cam=None)])
    with pytest.raises(DatasetError, match="'mm'"):
        run(model, scenes, protocol=replace(PROTOCOL, unit="mm"))
    with pytest.raises(DatasetError, match="different length units"):
        run(model, [scenes[0], replace(scenes[1], unit="m")])
    with pytest.raises(ConfigError, match="batch size"):
        run(model, scenes, batch_size=0)
    for wrong in ([], [Dense(), Dense()]):
        with pytest.raises(ConfigError, match="policy"):
            evaluate(model, Listed(scenes), wrong, protocol=PROTOCOL, seed=1)
    ambiguous = [Uniform(sparse_ratio=0.5), Uniform(sparse_ratio=0.5, cdf_rule="cover")]
    with pytest.raises(ConfigError, match="one 'uniform'"):
        evaluate(model, Listed(scenes[:1]), ambiguous, protocol=PROTOCOL, seed=1)


def test_table_shows_the_numbers(model: TinyVGGT, scenes: list[Scene]) -> None:
    report = evaluate(model, Listed(scenes), policies(), protocol=PROTOCOL, seed=1)
    header, *body = report.table()
    assert {len(line) for line in body} == {len(header)}
    hess = dict(zip(header, body[2], strict=True))
    row = report.rows[2]
    assert hess["policy"] == "hess"
    assert hess["AUC@30 ↑"] == f"{row['auc_30']:.3f}±{row['auc_30_se']:.3f}"
    assert hess["ATE ↓"] == f"{row['ate_rmse']:.3f}"
    assert hess["Δ AUC@30 to uniform"].startswith(f"{row['paired_auc_30_vs_uniform']:+.3f}")
    assert body[0][3] == "-"  # dense has no uniform at its setting to compare with
