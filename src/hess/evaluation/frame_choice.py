"""Which frames of recorded sequences a protocol measures: one scene per sequence."""

import random
import typing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hess.datasets.co3d import ANNOTATIONS
from hess.datasets.frames import FrameSequence
from hess.datasets.open import open_dataset
from hess.datasets.recordings import FrameDataset, load_scene
from hess.datasets.scene import Scene
from hess.errors import ConfigError, DatasetError
from hess.geometry.fit_rules import FitRule


class Frames(typing.Protocol):
    """How a protocol makes one scene of each recorded sequence, as data."""

    @property
    def views(self) -> int | None:
        """Frames per scene; None: as many as the sequence has."""
        ...

    @property
    def part(self) -> str | None:
        """Part of a CO3Dv2 tree, as in :func:`hess.datasets.open.open_dataset`."""
        ...

    def pick(self, sequences: Sequence[FrameSequence]) -> list[tuple[FrameSequence, list[int]]]:
        """Sequences with the frames of their scene."""
        ...

    def as_dict(self) -> dict[str, object]: ...

    def describe(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class SameFrames:
    """The same frames of every sequence, by number.

    Args:
        numbers: different, from 0 in the order of the photos; None takes all frames.

    Raises:
        ConfigError: repeated or negative numbers, or none.
    """

    numbers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        numbers = self.numbers
        if numbers is not None and (
            not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers)
        ):
            raise ConfigError(f"frames must be different and at least 0, found {numbers}")

    @property
    def views(self) -> int | None:
        """Frames per scene; None: as many as the sequence has."""
        return None if self.numbers is None else len(self.numbers)

    @property
    def part(self) -> None:
        """Such protocols are about data sets without parts."""
        return None

    def as_dict(self) -> dict[str, object]:
        """JSON values of all fields."""
        return {"numbers": self.numbers and list(self.numbers)}

    def describe(self) -> str:
        """In words, such as "all photos of a sequence"."""
        if self.numbers is None:
            return "all photos of a sequence"
        return f"photos {', '.join(map(str, self.numbers))} (from 0) of a sequence"

    def pick(self, sequences: Sequence[FrameSequence]) -> list[tuple[FrameSequence, list[int]]]:
        """Sequences with the frames of their scene.

        Raises:
            DatasetError: a sequence is too short.
        """
        if self.numbers is None:
            return [(sequence, [*range(len(sequence.frames))]) for sequence in sequences]
        for sequence in sequences:
            if max(self.numbers) >= len(sequence.frames):
                raise DatasetError(
                    f"the protocol takes photos up to number {max(self.numbers)} (from 0), "
                    f"{sequence.name!r} has {len(sequence.frames)}; give it all its photos, or "
                    "choose another protocol"
                )
        return [(sequence, [*self.numbers]) for sequence in sequences]


@dataclass(frozen=True, kw_only=True)
class FrameChoice:
    """How a protocol makes one scene of each recorded sequence: by drawing frames at random.

    Frames are drawn without replacement and keep the drawn order, so that the first one drawn is
    a model's reference view. One generator each (Python's for sequences, numpy's legacy one for
    frames) runs through all categories and sequences by name, as in VGGT's script: the same
    sequences give the same frames as there.

    Args:
        views: frames per scene, at least 3.
        seed: of both generators.
        min_frames: sequences with fewer frames, or fewer than ``views``, are left out.
        per_category: draw this many sequences of each category that has more; None takes all.
        part: of a CO3Dv2 tree, as in :func:`hess.datasets.open.open_dataset`.
        categories: of CO3Dv2; those that are not on the disk are left out. None takes all.

    Raises:
        ConfigError: a number is out of range.
    """

    views: int
    seed: int = 0
    min_frames: int = 0
    per_category: int | None = None
    part: str = "fewview_dev/test"
    categories: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for field, lowest in {"views": 3, "seed": 0, "min_frames": 0, "per_category": 1}.items():
            value = getattr(self, field)
            if value is not None and value < lowest:
                raise ConfigError(f"{field} of frames must be at least {lowest}, found {value}")

    def as_dict(self) -> dict[str, object]:
        """JSON values of all fields."""
        return asdict(self) | {"categories": self.categories and list(self.categories)}

    def describe(self) -> str:
        """In words, such as "10 random frames of a sequence (seed 0)"."""
        text = f"{self.views} random frames of a sequence (seed {self.seed})"
        if self.min_frames:
            text += f" of at least {self.min_frames}"
        if self.per_category is not None:
            text += f", {self.per_category} sequences of a category"
        if self.categories is not None:
            text += f", {len(self.categories)} categories"
        return f"{text}, {self.part}"

    def pick(self, sequences: Sequence[FrameSequence]) -> list[tuple[FrameSequence, list[int]]]:
        """Sequences with the frames of their scene, by category and name."""
        sequence_draws, frame_draws = random.Random(self.seed), np.random.RandomState(self.seed)
        picked = []
        for category in sorted({sequence.category or "" for sequence in sequences}):
            if self.categories is not None and category not in self.categories:
                continue
            members = [s for s in sequences if (s.category or "") == category]
            members.sort(key=lambda sequence: sequence.name)
            if self.per_category is not None and len(members) >= self.per_category:
                members = sequence_draws.sample(members, self.per_category)
                members.sort(key=lambda sequence: sequence.name)
            for sequence in members:
                count = len(sequence.frames)
                if count >= max(self.min_frames, self.views):
                    drawn = frame_draws.choice(count, self.views, replace=False)
                    picked.append((sequence, drawn.tolist()))
        return picked


class ChosenScenes:
    """The data set of a protocol's :class:`Frames`, read from disk when asked for.

    The first sequence of every category comes first, then every second one, and so on, so that
    the first scenes differ as much as possible.

    Args:
        source: whatever :func:`hess.datasets.open.open_dataset` reads as recorded sequences; of
            a CO3Dv2 tree the part that the choice names, unless the source names one itself.
        choice: which frames.
        image_fit: brings photos, cameras and depth to the model's input size.
        num_scenes: at most this many scenes, to be quick; None takes all, as the protocol says.

    Raises:
        ConfigError: ``num_scenes`` below 1, or a source without recorded frames.
        DatasetError: nothing readable, or no sequence that the choice accepts.
    """

    def __init__(
        self,
        source: str | Path,
        choice: Frames,
        *,
        image_fit: FitRule,
        num_scenes: int | None = None,
    ) -> None:
        if num_scenes is not None and num_scenes < 1:
            raise ConfigError(f"num_scenes must be at least 1, found {num_scenes}")
        sequences = _sequences(source, choice, image_fit)
        picked = choice.pick(sequences)
        if not picked:
            longest = max((len(sequence.frames) for sequence in sequences), default=0)
            found = f"{len(sequences)} of at most {longest} frames"
            raise DatasetError(
                f"{source}: the protocol takes {choice.describe()}; found {found} and no such "
                "sequence; take the whole data set, or another protocol, such as any-views"
            )
        rank: dict[str | None, int] = {}
        ranked = []
        for sequence, index in picked:
            rank[sequence.category] = rank.get(sequence.category, -1) + 1
            ranked.append((rank[sequence.category], sequence, index))
        ranked.sort(key=lambda item: item[0])
        self._scenes = [(sequence, index) for _, sequence, index in ranked][:num_scenes]
        self._image_fit = image_fit
        self.name = str(source)
        self._provenance: dict[str, object] = {
            "source": str(source),
            "frames": choice.as_dict(),
            "image_fit": image_fit.name,
            "num_scenes": num_scenes,
        }

    @property
    def provenance(self) -> dict[str, object]:
        """All that is needed to get the same scenes again; JSON values only."""
        return dict(self._provenance)

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Scene:
        sequence, frames = self._scenes[index]
        return load_scene(
            sequence.name,
            [sequence.frames[frame] for frame in frames],
            unit=sequence.unit,
            category=sequence.category,
            image_fit=self._image_fit,
        )

    def __iter__(self) -> Iterator[Scene]:
        return (self[index] for index in range(len(self)))


def _sequences(source: str | Path, choice: Frames, image_fit: FitRule) -> Sequence[FrameSequence]:
    root = Path(source).expanduser()
    is_co3d = (root / ANNOTATIONS).is_file() or any(root.glob(f"*/{ANNOTATIONS}"))
    named = f"{source}:{choice.part}" if is_co3d and choice.part else source
    dataset = open_dataset(named, image_fit=image_fit)
    if not isinstance(dataset, FrameDataset):
        raise ConfigError(
            f"the protocol takes {choice.describe()}; {source} has no recorded sequences: give "
            "the folder of a data set, or choose another protocol"
        )
    return dataset.sequences
