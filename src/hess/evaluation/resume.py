"""The sidecar of an evaluation: per-scene results on disk, so that a stopped run continues."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hess.errors import ConfigError, DatasetError
from hess.evaluation.scene_metrics import SceneMetrics


@dataclass(frozen=True, kw_only=True)
class SceneResult:
    """One scene under one policy: metrics, or the reason why there are none."""

    index: int
    scene: str
    metrics: SceneMetrics | None
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """One batch of scenes ``first, first + 1, ...`` of the data set under one policy.

    Args:
        policy: identity of the policy (name and settings).
        first: index of the first scene.
        unit: length unit of the metrics.
        block_sparsity, flop_saving: realised in this batch, in [0, 1].
        backends: that computed the attention.
        scenes: one result per scene.
    """

    policy: str
    first: int
    unit: str
    block_sparsity: float
    flop_saving: float
    backends: tuple[str, ...]
    scenes: tuple[SceneResult, ...]


_OF_THE_COMMIT = ("commit", "dirty")
"""What a header says of the code beside its digest, which alone decides."""


class Store:
    """Batch results in memory, by policy and first scene; all in one length unit.

    Args:
        header: configuration they belong to, as JSON values.
    """

    def __init__(self, header: Mapping[str, object]) -> None:
        self.header: dict[str, Any] = json.loads(json.dumps(header))
        self._results: dict[tuple[int, str], BatchResult] = {}

    def get(self, policy: str, first: int) -> BatchResult | None:
        """The result of one policy on the batch that starts at scene ``first``, if there is."""
        return self._results.get((first, policy))

    def of_policy(self, policy: str) -> list[BatchResult]:
        """All results of one policy in the order of the data set."""
        keys = sorted(key for key in self._results if key[1] == policy)
        return [self._results[key] for key in keys]

    def add(self, result: BatchResult) -> None:
        """Keep one more result.

        Raises:
            DatasetError: it is in another unit than those before.
        """
        before = next(iter(self._results.values()), result)
        if result.unit != before.unit:
            raise DatasetError(mixed_units((before.unit, result.unit)))
        self._results[result.first, result.policy] = result


def mixed_units(units: Sequence[str]) -> str:
    """Why scenes of different length units cannot be evaluated together."""
    return (
        f"the scenes are in different length units ({', '.join(sorted(units))}), so their errors "
        "have no mean; evaluate them apart"
    )


class Sidecar(Store):
    """A store on disk: a JSON line with the configuration, then one per batch result.

    Policies are added at any time; all else that decides a result is in the configuration. A line
    counts once its newline is on the disk; what a killed run left behind is cut off.

    Args:
        path: file; made with the first result when missing.
        header: configuration as JSON values; a file with another one is refused. It may be of
            another commit with the same code; that commit is kept, for it measured.

    Attributes:
        header: that of the file.

    Raises:
        ConfigError: the file belongs to another configuration or is no sidecar.
    """

    def __init__(self, path: Path, header: Mapping[str, object]) -> None:
        super().__init__(header)
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        wanted = self.header
        if not lines:
            path.unlink(missing_ok=True)
            return
        found = self._decode(lines[0]).get("header")
        if not isinstance(found, dict):
            raise ConfigError(f"{path} holds no per-scene results; choose another output file")
        keys = {*found, *wanted} - {*_OF_THE_COMMIT}
        differing = sorted(key for key in keys if found.get(key) != wanted.get(key))
        if differing:
            raise ConfigError(
                f"{path} holds the results of another configuration (different: "
                f"{', '.join(differing)}); choose another output file or delete this one"
            )
        self.header = found
        for line in lines[1:]:
            super().add(_batch_from_json(self._decode(line)))
        complete = sum(len(line) + 1 for line in lines)
        if complete < path.stat().st_size:
            os.truncate(path, complete)

    def add(self, result: BatchResult) -> None:
        """Keep one more result and write it to the disk; errors as those of a store."""
        super().add(result)
        if not self._path.exists():
            self._append({"header": self.header})
        self._append(asdict(result))

    def _append(self, value: object) -> None:
        with self._path.open("ab") as file:
            file.write(json.dumps(value, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _decode(self, line: bytes) -> dict:
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f"{self._path} is damaged: {error}; delete it to start again"
            ) from error
        if not isinstance(value, dict):
            raise ConfigError(f"{self._path} is no sidecar of an evaluation; delete or move it")
        return value


def _batch_from_json(value: dict) -> BatchResult:
    scenes = tuple(SceneResult(**scene) for scene in value["scenes"])
    backends = tuple(value["backends"])
    return BatchResult(**{**value, "backends": backends, "scenes": scenes})
