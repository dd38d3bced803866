"""What results must share to be compared: model, data, protocol. And where they are kept."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from hess.datasets.open import open_dataset
from hess.datasets.procedural import Procedural
from hess.datasets.scene import Dataset
from hess.evaluation.evaluate import configuration
from hess.evaluation.frame_choice import ChosenScenes
from hess.evaluation.protocol import PROCEDURAL_8, Protocol
from hess.evaluation.protocols import PROTOCOLS, protocol_named
from hess.evaluation.resume import Sidecar
from hess.models.base import Model
from hess.models.loading import load_model


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on scenes under a protocol.

    Args:
        model: name or path.
        device, dtype: where and in which precision it runs.
        data: name or path, see ``open_dataset``.
        views: per scene, unless the protocol says.
        scenes: at most; None: all.
        protocol: name; None takes the scenes as they come, each counted alike.
        truth: folder of the protocol's ground truth, where that is not in the data.
        batch_size: scenes per forward pass.
        block_size: tokens per block; None: the model's own.
    """

    model: str
    device: str = "cpu"
    dtype: str = "float32"
    data: str
    views: int
    scenes: int | None
    protocol: str | None = None
    truth: str | None = None
    batch_size: int = 16
    block_size: int | None = None

    @property
    def sparsify_options(self) -> dict[str, int]:
        """What ``sparsify`` is told beside the policy."""
        if self.block_size is None:
            return {}
        return {"block_size_q": self.block_size, "block_size_kv": self.block_size}

    def load(self) -> Model:
        """The model; errors as those of ``load_model``."""
        return load_model(self.model, device=self.device, dtype=self.dtype)

    def open(self, model: Model) -> tuple[Dataset, Protocol]:
        """Scenes at the model's size, and what is measured on them.

        Raises:
            ConfigError, DatasetError: as ``protocol_named`` and ``open_dataset``.
        """
        named = None
        if self.protocol is not None:
            folder = None if self.truth is None else Path(self.truth).expanduser()
            named = protocol_named(self.protocol).with_truth(folder)
        if named is not None and named.frames is not None:
            chosen = ChosenScenes(
                self.data, named.frames, image_fit=model.image_rule, num_scenes=self.scenes
            )
            return chosen, named
        dataset = open_dataset(
            self.data,
            image_fit=model.image_rule,
            views_per_scene=(named and named.views) or self.views,
            num_scenes=self.scenes,
        )
        if named is not None:
            return dataset, named
        if isinstance(dataset, Procedural):
            views = dataset.num_views
            return dataset, replace(PROCEDURAL_8, name=f"procedural-{views}", views=views)
        return dataset, PROTOCOLS["any-views"]

    def store(self, folder: Path, model: Model) -> Sidecar:
        """The results per scene in ``folder``, of every method that was ever measured.

        Raises:
            ConfigError: the file there is of other weights, data or code.
        """
        dataset, protocol = self.open(model)
        config = configuration(
            model,
            dataset,
            protocol,
            seed=0,
            batch_size=self.batch_size,
            sparsify_options=self.sparsify_options,
        )
        size = f"{self.scenes or 'all'}x{self.views}"
        blocks = None if self.block_size is None else f"blocks{self.block_size}"
        parts = (self.model, self.data, size, blocks, self.protocol, self.dtype, self.device)
        usual = (None, "float32", "cpu")
        name = "-".join(file_name(part) for part in parts if part not in usual)
        return Sidecar(folder / f"{name}.scenes.jsonl", config)


def file_name(text: str | None) -> str:
    """Text as part of a file's name."""
    return re.sub(r"[^\w.]+", "_", text or "").strip("_.")
