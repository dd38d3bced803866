"""``hess train-nano``: train the embedded model from scratch."""

from dataclasses import asdict, dataclass, field
from typing import Annotated

import tyro

from hess.cli.console import Json, Output, command_line, console, print_json, progress_bar
from hess.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainNano:
    """Train the small VGGT that ships with this package, from scratch, on procedural scenes.

    The folder holds checkpoint.pt (a stopped run continues: type the same command again),
    log.jsonl, curve.png and at the end nano.safetensors.

    Example: hess train-nano -o runs/nano-0 --seed 0 --steps 8000
    """

    output: Output = field()
    """Folder of the run."""
    steps: int = 8000
    """Optimiser steps of 48 images each; about half a second each on one CPU core."""
    seed: int = 0
    matching: float = 1.0
    """Weight of the matching loss, which treats all layers alike; 0 trains without it."""
    device: Annotated[str, tyro.conf.arg(metavar="cpu|cuda")] = "cpu"
    threads: int = 1
    """CPU threads; so small a model gains nothing from more."""
    json: Json = False

    def run(self) -> None:
        import torch

        from hess.files import write_atomically
        from hess.models.loading import save_model
        from hess.training.nano import Trainer, TrainingConfig
        from hess.viz.figure import figure_png
        from hess.viz.training import training_figure

        if self.threads < 1:
            raise ConfigError(f"--threads must be at least 1, found {self.threads}")
        torch.set_num_threads(self.threads)
        torch.set_flush_denormal(True)
        config = TrainingConfig(steps=self.steps, seed=self.seed, matching=self.matching)
        trainer = Trainer(config, self.output, self.device)
        last: dict[str, float] = {}
        with progress_bar("train") as progress:

            def report(step: int, steps: int, row: dict[str, float]) -> None:
                last.update(row)
                text = f"camera {row['camera']:.4f}  points {row['points']:.3f}"
                if "val_auc_30" in last:
                    text += f"  AUC@30 {last['val_auc_30']:.3f}"
                progress(step, steps, text)

            trainer.run(progress=report)
        weights = self.output / "nano.safetensors"
        record = {"command": command_line(), "config": asdict(config), "final": last}
        save_model(trainer.model, weights, record)
        figure = training_figure({f"seed {self.seed}": self.output / "log.jsonl"})
        write_atomically(self.output / "curve.png", figure_png(figure))
        if self.json:
            print_json({"weights": str(weights), **record})
        else:
            console.print(f"AUC@30 {last.get('val_auc_30', float('nan')):.3f}; wrote {weights}")
