"""``hess train-nano``: train an embedded model from scratch."""

from dataclasses import asdict, dataclass, field
from typing import Literal

from hess.cli.console import (
    Device,
    Json,
    Output,
    command_line,
    console,
    prepare_folder,
    print_json,
    progress_bar,
    use_threads,
)
from hess.errors import BackendUnavailableError


@dataclass(frozen=True, kw_only=True)
class TrainNano:
    """Train a small model that ships with this package, from scratch, on procedural scenes.

    The folder holds checkpoint.pt (a stopped run continues: type the same command again),
    log.jsonl, curve.png and at the end the weights, as nano.safetensors or pi3-nano.safetensors.

    Example: hess train-nano -o runs/nano-0 --seed 0 --steps 6500
    """

    output: Output = field()
    """Folder of the run."""
    model: Literal["nano", "pi3-nano"] = "nano"
    """The small VGGT, or the small π³, in which no view leads."""
    steps: int = 6500
    """Optimiser steps of 48 images each; about 0.4 seconds each on one CPU core."""
    seed: int = 0
    matching: float = 1.0
    """Weight of the matching loss, which treats all layers alike; 0 trains without it."""
    device: Device = "cpu"
    threads: int = 1
    """CPU threads; so small a model gains nothing from more."""
    json: Json = False

    def run(self) -> None:
        import torch

        from hess.files import write_atomically
        from hess.models.loading import save_model
        from hess.training.trainer import Trainer, TrainingConfig, read_log
        from hess.viz.figure import figure_png
        from hess.viz.training import training_figure

        use_threads(self.threads)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise BackendUnavailableError("this torch finds no CUDA device; use --device cpu")
        config = TrainingConfig(
            model=self.model, steps=self.steps, seed=self.seed, matching=self.matching
        )
        trainer = Trainer(config, prepare_folder(self.output), self.device)
        auc = ""
        with progress_bar("train") as progress:

            def report(step: int, steps: int, row: dict[str, float]) -> None:
                nonlocal auc
                if "val_auc_30" in row:
                    auc = f"  AUC@30 {row['val_auc_30']:.3f}"
                progress(step, steps, f"points {row['points']:.3f}{auc}")

            torch.set_flush_denormal(True)
            try:
                trainer.run(progress=report)
            finally:
                # Others in this process need them: k-d trees are built with the next number to 0.
                torch.set_flush_denormal(False)
        weights = self.output / f"{self.model}.safetensors"
        # From the log, which also knows it when there was nothing left to train.
        final = read_log(trainer.log)[-1]
        record = {"command": command_line(), "config": asdict(config), "final": final}
        save_model(trainer.model, weights, record)
        figure = training_figure({f"seed {self.seed}": trainer.log})
        write_atomically(self.output / "curve.png", figure_png(figure))
        if self.json:
            print_json({"weights": str(weights), **record})
        else:
            console.print(f"AUC@30 {final['val_auc_30']:.3f}; wrote {weights}", soft_wrap=True)
