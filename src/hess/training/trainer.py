"""Train the small models that ship with the package, on procedural scenes."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import nn

from hess.datasets.procedural import Procedural, ProceduralConfig, SceneBatch
from hess.errors import CheckpointError, ConfigError
from hess.evaluation.pose_metrics import auc, pair_errors
from hess.files import atomic_write, write_atomically
from hess.training.matching import MatchingLoss
from hess.training.muon import Muon
from hess.training.nano import NanoRecipe
from hess.training.pi3_nano import Pi3NanoRecipe
from hess.training.pool import ScenePool
from hess.training.recipe import Recipe

RECIPES: dict[str, Callable[[], Recipe]] = {"nano": NanoRecipe, "pi3-nano": Pi3NanoRecipe}
"""By the name of the model."""

VALIDATION_SEED = 2**20 - 1
"""Of the training-split scenes that no run trains on."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What decides the trained weights, together with the machine's arithmetic.

    Args:
        model: which of :data:`RECIPES`.
        steps: optimiser steps in all.
        seed: of the initial weights, the scenes and their order; below 2^20 - 1, which is the
            seed of the validation scenes.
        frames_per_step: images per step, a multiple of 24.
        matching: weight of the matching loss over all layers; 0 leaves it out.
        muon_lr: of the block matrices.
        adam_lr: of everything else.
        decay_from: share of the steps after which the learning rates fall linearly.
        reuse: times each rendered scene is used.

    Raises:
        ConfigError: a value is out of range.
    """

    model: str = "nano"
    steps: int = 6_500
    seed: int = 0
    frames_per_step: int = 48
    matching: float = 1.0
    muon_lr: float = 0.02
    adam_lr: float = 1.5e-3
    decay_from: float = 0.5
    reuse: int = 3

    def __post_init__(self) -> None:
        if self.model not in RECIPES:
            raise ConfigError(f"model must be one of {list(RECIPES)}, found {self.model!r}")
        if self.steps < 1 or self.reuse < 1 or not 0 < self.decay_from <= 1:
            raise ConfigError(
                "training needs steps >= 1, reuse >= 1 and 0 < decay_from <= 1, found "
                f"{self.steps}, {self.reuse} and {self.decay_from}"
            )
        if not 0 <= self.seed < VALIDATION_SEED or not self.matching >= 0:
            raise ConfigError(
                f"training needs 0 <= seed < {VALIDATION_SEED} and matching >= 0, found "
                f"{self.seed} and {self.matching}"
            )
        if self.frames_per_step % 24 or self.frames_per_step < 24:
            raise ConfigError(
                f"frames_per_step must be a multiple of 24, found {self.frames_per_step}"
            )

    def learning_rate(self, step: int) -> float:
        """Factor on both learning rates: warm-up over 100 steps, constant, linear decay."""
        done = step / self.steps
        decay = 1.0 if done < self.decay_from else (1 - done) / (1 - self.decay_from)
        return min(1.0, (step + 1) / 100) * max(0.02, decay)

    def views(self, step: int) -> int:
        """Views per scene: few at first, up to eight later, in a fixed rotation."""
        choices = (3, 4) if step < 0.3 * self.steps else (4, 6, 8)
        return choices[step % len(choices)]


class Trainer:
    """Weights, optimisers and scene pool; ``run`` trains, saves and resumes.

    Args:
        config: see :class:`TrainingConfig`.
        folder: where ``log.jsonl`` and ``checkpoint.pt`` go; a checkpoint there is resumed.
        device: "cpu" or "cuda".

    Raises:
        CheckpointError: the folder's checkpoint belongs to another configuration, is damaged, or
            has had more steps than are asked for.
    """

    def __init__(
        self, config: TrainingConfig, folder: Path, device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self.folder = folder
        self.device = torch.device(device)
        self.step = 0
        self.seconds = 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.recipe = RECIPES[config.model]()
            self.model = self.recipe.model.to(self.device)
            layers = len(self.model.global_attention_sites())
            self.matching = MatchingLoss(self.recipe.dim, layers).to(self.device)
        self.modules = nn.ModuleDict({"model": self.model, "matching": self.matching})
        matrices, others = self._split_parameters()
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=config.muon_lr),
            torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.97), weight_decay=0.0),
        ]
        scenes = Procedural(2**40, 8, "train", seed=config.seed, config=ProceduralConfig())
        self.pool = ScenePool(scenes, seed=config.seed, reuse=config.reuse)
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self._resume()
        # Rows after the checkpoint, and what a killed run left of one, will be written again.
        known = [row for row in read_log(self.log) if row["step"] <= self.step]
        write_atomically(self.log, "".join(json.dumps(row) + "\n" for row in known).encode())

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    def run(
        self,
        *,
        log_every: int = 50,
        evaluate_every: int = 500,
        validation_scenes: int = 64,
        progress: Callable[[int, int, dict[str, float]], None] | None = None,
    ) -> None:
        """Train to the last step; every ``evaluate_every`` steps evaluate, log and save."""
        for losses in self._steps():
            last = self.step == self.config.steps
            evaluates = self.step % evaluate_every == 0 or last
            if self.step % log_every == 0 or evaluates:
                row = {"step": self.step, "seconds": round(self.seconds, 1), **losses}
                if evaluates:
                    row |= validate(self.recipe, num_scenes=validation_scenes)
                with self.log.open("a") as log:
                    log.write(json.dumps(row) + "\n")
                if evaluates:
                    self._save()
                if progress is not None:
                    progress(self.step, self.config.steps, row)

    def _steps(self) -> Iterator[dict[str, float]]:
        average: dict[str, float] = {}
        while self.step < self.config.steps:
            start = time.perf_counter()
            for key, value in self._train_step().items():
                average[key] = 0.95 * average.get(key, value) + 0.05 * value
            self.step += 1
            self.seconds += time.perf_counter() - start
            yield {key: round(value, 5) for key, value in average.items()}

    def _train_step(self) -> dict[str, float]:
        config = self.config
        views = config.views(self.step)
        batch = self.pool.draw(config.frames_per_step // views, views)
        batch = SceneBatch(**{k: v.to(self.device) for k, v in vars(batch).items()})
        losses, layers = self.recipe.losses(batch, with_layers=config.matching > 0)
        weights = self.recipe.weights
        if config.matching:
            losses["matching"] = self.matching(layers, self.recipe.patch_points(batch))
            weights = weights | {"matching": config.matching}
        torch.stack([weights[name] * loss for name, loss in losses.items()]).sum().backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        factor = config.learning_rate(self.step)
        for optimizer, lr in zip(self.optimizers, (config.muon_lr, config.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad()
        return {key: float(value.detach()) for key, value in losses.items()}

    def _split_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Matrices of the transformer blocks and dense heads for Muon; all else for AdamW."""
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.modules.named_parameters():
            inside = any(part in name for part in self.recipe.matrices)
            is_matrix = inside and name.endswith("weight") and parameter.ndim == 2
            (matrices if is_matrix else others).append(parameter)
        return matrices, others

    def _save(self) -> None:
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "seconds": self.seconds,
            "modules": self.modules.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "pool": self.pool.state(),
        }
        with atomic_write(self.checkpoint) as file:
            torch.save(state, file)

    def _resume(self) -> None:
        try:
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        except (RuntimeError, UnpicklingError, EOFError) as error:
            raise CheckpointError(
                f"{self.checkpoint} is damaged ({error}); delete it to start again"
            ) from error
        # A run may be given more or fewer steps; the learning rate then follows the new plan.
        found = {**state["config"], "steps": self.config.steps}
        if found != asdict(self.config):
            raise CheckpointError(
                f"{self.checkpoint} was made with {state['config']}, asked for "
                f"{asdict(self.config)}; use another folder or the same settings"
            )
        if state["step"] > self.config.steps:
            raise CheckpointError(
                f"{self.checkpoint} has had {state['step']} steps, asked for "
                f"{self.config.steps}; use another folder or more steps"
            )
        self.step, self.seconds = state["step"], state["seconds"]
        self.modules.load_state_dict(state["modules"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.pool.restore(state["pool"])


def read_log(path: Path) -> list[dict[str, float]]:
    """Rows of a training log, oldest first; a last line without its end does not count."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


@torch.no_grad()
def validate(recipe: Recipe, *, num_scenes: int = 64, num_views: int = 8) -> dict[str, float]:
    """AUC@30 and point error on training-split scenes that no run trains on (VALIDATION_SEED)."""
    scenes = Procedural(num_scenes, num_views, "train", seed=VALIDATION_SEED)
    device = next(recipe.model.parameters()).device
    aucs, errors = [], []
    for start in range(0, num_scenes, 16):
        batch = scenes.render(range(start, min(start + 16, num_scenes)), device)
        out = recipe.model(batch.images)
        rotation, translation = pair_errors(out.world_from_cam, batch.world_from_cam)
        aucs.append(auc(torch.maximum(rotation, translation), 30))
        errors.append(recipe.point_errors(out, batch).mean())
    return {
        "val_auc_30": float(torch.cat(aucs).mean()),
        "val_point_error": float(torch.stack(errors).mean()),
    }
