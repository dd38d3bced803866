"""Effect of every open reading of the paper and of every control, on the embedded model.

    python experiments/ablate.py -o results/nano/ablations.jsonl

Writes a row per variant and setting, with paired differences to plain HeSS and to uniform on the
same scenes. A stopped run continues.
"""

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hess import policies
from hess.calibration import CalibrationConfig, calibrate
from hess.datasets.procedural import Procedural
from hess.evaluation.evaluate import evaluate
from hess.evaluation.report import mean_and_error
from hess.files import write_atomically
from hess.models.loading import load_model
from hess.sensitivity.profile import HessProfile, load_profile

SETTINGS = ((0.5, 0.9), (0.8, 0.4), (0.9, 0.2))
METRICS = ("auc_30", "ate_rmse", "point_error", "chamfer_mean")
Variants = dict[str, dict[str, Any]]

SCORES: Variants = {
    "lambda 0 (point error only)": {"camera_weight": 0.0},
    "lambda 1 (camera error only)": {"camera_weight": 1.0},
    "trace of W_K": {"projection": "key"},
    "trace of W_V": {"projection": "value"},
    "median over scenes": {"aggregate": "median"},
    "patch-query rows only": {"rows": "patch"},
    "trace times squared norm of W_Q": {"scale_free": True},
}
BUDGETS: Variants = {
    "rows in proportion to the baseline": {"row_rule": "proportional"},
    "best blocks of the whole map": {"row_rule": "map"},
    "at least one block per row": {"min_row_blocks": 1},
    "half HeSS, half uniform": {"blend": 0.5},
    "equal budgets (uniform, equal rows)": {"blend": 1.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--profile", default="nano")
    parser.add_argument("--num-scenes", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, profile = load_model(args.model), load_profile(args.profile)
    by_distance = calibrate(
        model,
        Procedural(40, 20, "calibration"),
        CalibrationConfig(inlier_on="distance"),
        checkpoint=args.output.with_suffix(".distance.partial"),
    )
    profiles = {
        "inliers by distance instead of its square": by_distance,
        "calibrated on 1 scene": first_scenes(profile, 1),
        "calibrated on 10 scenes": first_scenes(profile, 10),
    }
    variants: list[tuple[str, dict[str, Any], HessProfile]] = [("HeSS", {}, profile)]
    variants += [(name, options, profile) for name, options in (SCORES | BUDGETS).items()]
    variants += [(name, {}, other) for name, other in profiles.items()]
    built = {}
    for ratio, threshold in SETTINGS:
        both: dict[str, Any] = {"sparse_ratio": ratio, "cdf_threshold": threshold}
        built["uniform", ratio] = policies.Uniform(**both)
        built["no reallocation", ratio] = policies.NoReallocation(profile, **both)
        for name, options, source in variants:
            built[name, ratio] = policies.HeSS(source, **both, **options)
    rows, values = run(model, args, built, "")
    # "cover" changes the baseline itself, so it is compared with a uniform policy of its own.
    cover = {}
    for ratio, threshold in SETTINGS:
        both = {"sparse_ratio": ratio, "cdf_threshold": threshold, "cdf_rule": "cover"}
        cover["uniform, tau covered", ratio] = policies.Uniform(**both)
        cover["HeSS, tau covered", ratio] = policies.HeSS(profile, **both)
    more_rows, more_values = run(model, args, cover, ".cover")
    rows, values = rows | more_rows, values | more_values
    lines = []
    for (name, ratio), row in rows.items():
        row = {"variant": name} | row
        for metric in METRICS:
            reference = values["HeSS", ratio]
            paired = [
                ours[metric] - reference[scene][metric]
                for scene, ours in values[name, ratio].items()
                if scene in reference
            ]
            mean, error = mean_and_error(paired)
            row |= {f"paired_{metric}_vs_hess": mean, f"paired_{metric}_vs_hess_se": error}
        lines.append(json.dumps(row) + "\n")
    write_atomically(args.output, "".join(lines).encode())
    for suffix in ("", ".cover"):
        with_suffix(args.output, suffix).with_suffix(".scenes.jsonl").unlink()


def run(model: Any, args: argparse.Namespace, built: dict, suffix: str) -> tuple[dict, dict]:
    """Rows and per-scene metrics by (variant, sparse ratio)."""
    distinct = {json.dumps([p.name, p.settings()], sort_keys=True): p for p in built.values()}
    report = evaluate(
        model,
        Procedural(args.num_scenes, 8, "test"),
        list(distinct.values()),
        seed=0,
        rows_path=with_suffix(args.output, suffix),
        command=shlex.join(["python", *sys.argv]),
        progress=lambda done, total, name: print(f"\r{done}/{total} {name:<20}", end=""),
    )
    by_identity = {
        json.dumps([row["policy"], row["settings"]], sort_keys=True): row for row in report.rows
    }
    scenes: dict[str, dict] = {}
    for scene in report.scenes:
        identity = json.dumps([scene["policy"], scene["settings"]], sort_keys=True)
        if scene["metrics"] is not None:
            scenes.setdefault(identity, {})[scene["index"]] = scene["metrics"]
    rows, values = {}, {}
    for key, policy in built.items():
        identity = json.dumps([policy.name, policy.settings()], sort_keys=True)
        rows[key], values[key] = by_identity[identity], scenes[identity]
    return rows, values


def first_scenes(profile: HessProfile, count: int) -> HessProfile:
    """The profile as if calibration had stopped after ``count`` scenes."""
    return replace(
        profile,
        traces=profile.traces[:count],
        patch_traces=profile.patch_traces[:count],
        scenes=profile.scenes[:count],
        failed=(),
    )


def with_suffix(path: Path, suffix: str) -> Path:
    return path.with_name(path.stem + suffix + path.suffix)


if __name__ == "__main__":
    main()
