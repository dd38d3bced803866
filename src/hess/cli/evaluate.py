"""``hess evaluate``: policies on a data set, side by side."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from hess.cli.console import (
    Json,
    ModelName,
    Output,
    ProfileName,
    command_line,
    console,
    print_json,
    print_table,
    progress_bar,
)
from hess.cli.policies import SETTINGS, build_policies


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Run several sparsification policies on the same scenes; compare them pair by pair.

    A stopped run continues: type the same command again. On the CPU the same command gives the
    same numbers.

    Example: hess evaluate -o results.jsonl --data procedural:test --num-scenes 224
    """

    output: Output = field()
    """Results, one JSON line per policy and setting."""
    model: ModelName = "nano"
    profile: ProfileName = "nano"
    data: Annotated[str, tyro.conf.arg(metavar="NAME|PATH")] = "procedural:test"
    """procedural:test, bundled, or a folder whose layout is recognised."""
    num_scenes: int = 224
    views: int = 8
    seed: int = 0
    """Of the procedural scenes."""
    policies: tuple[str, ...] = ("dense", "uniform", "hess", "reverse", "random")
    """Any of dense, uniform, hess, reverse, random, no_reallocation."""
    settings: tuple[tuple[float, float], ...] = SETTINGS
    """Pairs of sparse ratio and CDF threshold."""
    random_seeds: tuple[int, ...] = (0,)
    """One random permutation of the scores per seed."""
    batch_size: int = 16
    threads: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """CPU threads; by default all cores."""
    json: Json = False

    def run(self) -> None:
        import torch

        from hess.datasets.open import open_dataset
        from hess.evaluation.evaluate import evaluate
        from hess.geometry.image_fit import square_crop
        from hess.models.loading import load_model
        from hess.sensitivity.profile import load_profile

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        model = load_model(self.model)
        profile = load_profile(self.profile)
        dataset = open_dataset(
            self.data,
            image_fit=square_crop(model.image_size),
            views_per_scene=self.views,
            num_scenes=self.num_scenes,
            seed=self.seed,
        )
        policies = build_policies(self.policies, profile, self.settings, self.random_seeds)
        with progress_bar("evaluate") as progress:
            report = evaluate(
                model,
                dataset,
                policies,
                seed=self.seed,
                batch_size=self.batch_size,
                progress=progress,
                rows_path=self.output,
                command=command_line(),
            )
        if self.json:
            print_json(report.rows)
        else:
            print_table(report.table(), f"{model.model_name} on {len(dataset)} scenes")
            console.print(f"wrote {self.output}")
