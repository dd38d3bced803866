"""The HeSS profile: what calibration measured on a model, scene by scene, and its file."""

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hess.errors import ConfigError, ProfileError
from hess.files import write_atomically
from hess.models.base import Model
from hess.sensitivity.fisher import PROJECTIONS, qkv_layers
from hess.sensitivity.scores import (
    SceneConcentration,
    aggregate_scenes,
    head_scores,
    scene_concentration,
)

FORMAT_VERSION = 1
BUNDLED = ("nano", "pi3-nano")
"""Models whose profile is bundled, under their name; behind it ``LABEL_FREE`` names the other."""
LABEL_FREE = "-label-free"
ERRORS = ("camera", "point")
ROWS = ("all", "patch")
_TENSORS = ("traces", "patch_traces", "weight_norms")
_METADATA_KEY = "hess_profile"  # one key only: safetensors writes several in random order


@dataclass(frozen=True, kw_only=True)
class SceneRecord:
    """What calibration saw in one scene; lengths in the normalised unit of the scene.

    A calibration without ground truth knows the first two only; the others are None.

    Args:
        name: of the scene.
        num_views: photos in it.
        camera_error: Eq. 2.
        point_error: Eq. 4, or None when the scene has no depth.
        inlier_share: share of predicted points that are inliers, or None likewise.
        aligned_on: "points" or "cameras".
        alignment_scale: scale of the similarity prediction -> ground truth.
        icp_used, rmse_before, rmse_after: see ``AlignmentResult``; the lengths are None when
            aligned on cameras.
    """

    name: str
    num_views: int
    camera_error: float | None = None
    point_error: float | None = None
    inlier_share: float | None = None
    aligned_on: str | None = None
    alignment_scale: float | None = None
    icp_used: bool | None = None
    rmse_before: float | None = None
    rmse_after: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class HessProfile:
    """Raw Fisher traces of every scene; scores are views on them.

    Of a calibration without ground truth they are traces of random errors, see
    :mod:`hess.sensitivity.random_errors`.

    Args:
        traces: float64 [scene, error, projection, layer, head], errors (camera, point),
            projections (query, key, value); NaN for the point error of scenes without depth.
        patch_traces: float64 [scene, error, layer, head], W_Q from patch-query rows only.
        weight_norms: float64 [projection, layer, head], squared.
        scenes: one record per scene.
        failed: (scene name, reason) of the scenes that gave no traces.
        provenance: JSON object; holds at least ``model_name``, ``model_fingerprint``,
            ``camera_weight`` (the model's default) and ``num_scenes`` (planned). If no ground
            truth was used, ``kind`` is "label-free" and ``score_exponent`` says to which power
            scores are raised; without them the profile is the paper's.

    Raises:
        ProfileError: tensors have the wrong type, shape or range, or a key is missing.
    """

    traces: Tensor
    patch_traces: Tensor
    weight_norms: Tensor
    scenes: tuple[SceneRecord, ...]
    failed: tuple[tuple[str, str], ...] = ()
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        if self.traces.ndim != 5 or len(self.scenes) < 1:
            raise ProfileError(
                "a profile needs traces [scene >= 1, error, projection, layer, head], found "
                f"{tuple(self.traces.shape)} with {len(self.scenes)} scenes"
            )
        layers, heads = self.traces.shape[-2:]
        expected = {
            "traces": (len(self.scenes), len(ERRORS), len(PROJECTIONS), layers, heads),
            "patch_traces": (len(self.scenes), len(ERRORS), layers, heads),
            "weight_norms": (len(PROJECTIONS), layers, heads),
        }
        for name, shape in expected.items():
            tensor: Tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float64:
                raise ProfileError(
                    f"profile tensor {name!r} must be float64 {shape}, found {tensor.dtype} "
                    f"{tuple(tensor.shape)}"
                )
            if bool((tensor < 0).any() | tensor.isinf().any()):
                raise ProfileError(f"profile tensor {name!r} must be finite and >= 0")
        for name in ("traces", "patch_traces"):
            if bool(getattr(self, name)[:, 0].isnan().any()):
                raise ProfileError(f"profile tensor {name!r}: a camera trace must not be NaN")
        if bool(self.weight_norms.isnan().any()):
            raise ProfileError("profile tensor 'weight_norms' must not be NaN")
        for key in ("model_name", "model_fingerprint", "camera_weight", "num_scenes"):
            if key not in self.provenance:
                raise ProfileError(f"profile provenance lacks {key!r}")

    @property
    def num_layers(self) -> int:
        return self.traces.shape[-2]

    @property
    def num_heads(self) -> int:
        return self.traces.shape[-1]

    @property
    def kind(self) -> str:
        """ "label-free", or "ground truth" as in the paper."""
        return str(self.provenance.get("kind", "ground truth"))

    @property
    def is_complete(self) -> bool:
        """Whether every planned scene was measured or failed."""
        return len(self.scenes) + len(self.failed) == self.provenance["num_scenes"]

    def scores(
        self,
        camera_weight: float | None = None,
        projection: str = "query",
        normalization: str = "trace",
        aggregate: str = "mean",
        rows: str = "all",
        scale_free: bool = False,
    ) -> Tensor:
        """HeSS of every head: float64 [layers, heads], every row sums to 1 (Eq. 7-9).

        Args:
            camera_weight: lambda in [0, 1]; None takes the model's default.
            projection: "query" (paper), "key" or "value".
            normalization: see :func:`hess.sensitivity.scores.head_scores`.
            aggregate: "mean" (paper) or "median" over scenes.
            rows: "all" (paper), or "patch": gradients from patch-query rows only.
            scale_free: multiply traces by the squared norm of their weights.

        Raises:
            ConfigError: a parameter is out of range, or patch rows of keys or values are asked.
            ProfileError: no scene has the point error and its weight is > 0.
        """
        if camera_weight is None:
            camera_weight = float(self.provenance["camera_weight"])
        if not 0.0 <= camera_weight <= 1.0:
            raise ConfigError(f"camera_weight must be in [0, 1], found {camera_weight}")
        camera = self._aggregated("camera", projection, aggregate, rows, scale_free)
        point = self._aggregated("point", projection, aggregate, rows, scale_free)
        if point is None and camera_weight < 1.0:
            raise ProfileError(
                "no calibration scene had depth, so this profile has no point traces, but the "
                f"point error has weight {1.0 - camera_weight:g}; pass camera_weight=1 or "
                "calibrate on scenes with depth"
            )
        return head_scores(
            camera,
            point,
            camera_weight=camera_weight,
            normalization=normalization,
            exponent=float(self.provenance.get("score_exponent", 1.0)),
        )

    def layer_shares(self, camera_weight: float | None = None) -> Tensor:
        """Share of each layer in the query traces of all: float64 [layers], sums to 1.

        Each error counts by its own share, mixed by ``camera_weight`` as in :meth:`scores`.

        Raises:
            ConfigError, ProfileError: as :meth:`scores`.
        """
        self.scores(camera_weight)  # raises what is wrong with the weight
        weight = self.provenance["camera_weight"] if camera_weight is None else camera_weight
        shares = torch.zeros(self.num_layers, dtype=torch.float64)
        for error, share in (("camera", float(weight)), ("point", 1.0 - float(weight))):
            traces = self._aggregated(error, "query", "mean", "all", False)
            if share > 0 and traces is not None and traces.sum() > 0:
                shares += share * traces.sum(1) / traces.sum()
        total = shares.sum()
        return shares / total if total > 0 else torch.full_like(shares, 1 / len(shares))

    def concentration(self, error: str, projection: str = "query") -> SceneConcentration | None:
        """How many scenes effectively decide the trace of ``error``; None without that error."""
        return scene_concentration(self._select(error, projection, "all"))

    def check_model(self, model: Model) -> None:
        """Raise :class:`ProfileError` unless this profile was measured on ``model``."""
        found = (len(model.global_attention_sites()), model.num_heads)
        if found != (self.num_layers, self.num_heads):
            raise ProfileError(
                f"this profile is for {self.provenance['model_name']!r} with {self.num_layers} "
                f"global layers of {self.num_heads} heads, found a model with {found[0]} layers "
                f"of {found[1]} heads; calibrate this model"
            )
        expected, fingerprint = self.provenance["model_fingerprint"], model_fingerprint(model)
        if fingerprint != expected:
            raise ProfileError(
                f"this profile was measured on other weights: expected fingerprint "
                f"{expected[:12]} ({self.provenance['model_name']!r}), found {fingerprint[:12]}; "
                "calibrate this model"
            )

    def to_bytes(self) -> bytes:
        """The file's content: the same profile gives the same bytes."""
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        header = {
            "format_version": FORMAT_VERSION,
            "scenes": [asdict(scene) for scene in self.scenes],
            "failed": [list(pair) for pair in self.failed],
            "provenance": self.provenance,
        }
        header["checksum"] = _checksum(header, tensors)
        return save(tensors, {_METADATA_KEY: _canonical_json(header)})

    def save(self, path: str | Path) -> None:
        """Write a safetensors file at ``path``; readers see the old file or the whole new one."""
        write_atomically(path, self.to_bytes())

    @staticmethod
    def load(path: str | Path) -> "HessProfile":
        """Read a profile.

        Raises:
            ProfileError: the file is missing, damaged, or of another format version.
        """
        if not Path(path).is_file():
            raise ProfileError(f"no profile at {path}; make one with `hess calibrate`")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ProfileError(f"profile {path} is damaged or no profile: {error}") from error
        if _METADATA_KEY not in metadata:
            raise ProfileError(f"{path} is a safetensors file, but not a HeSS profile")
        try:
            header = json.loads(metadata[_METADATA_KEY])
            version = header["format_version"]
        except (ValueError, TypeError, KeyError) as error:
            raise ProfileError(f"profile {path} has a damaged header: {error!r}") from error
        if version != FORMAT_VERSION:
            raise ProfileError(
                f"profile {path} has format version {version}, expected {FORMAT_VERSION}; "
                "calibrate again with this version of hess"
            )
        if set(tensors) != set(_TENSORS):
            raise ProfileError(
                f"profile {path} must hold tensors {sorted(_TENSORS)}, found {sorted(tensors)}"
            )
        if header.pop("checksum", None) != _checksum(header, tensors):
            raise ProfileError(f"profile {path} is damaged: its checksum does not match")
        try:
            scenes = tuple(SceneRecord(**record) for record in header["scenes"])
            failed = tuple((name, reason) for name, reason in header["failed"])
            provenance = header["provenance"]
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileError(f"profile {path} has a damaged header: {error!r}") from error
        return HessProfile(**tensors, scenes=scenes, failed=failed, provenance=provenance)

    def _aggregated(
        self, error: str, projection: str, aggregate: str, rows: str, scale_free: bool
    ) -> Tensor | None:
        traces = aggregate_scenes(self._select(error, projection, rows), aggregate)
        if traces is None or not scale_free:
            return traces
        return traces * self.weight_norms[PROJECTIONS.index(projection)]

    def _select(self, error: str, projection: str, rows: str) -> Tensor:
        """Traces [scene, layer, head] of one error."""
        for name, value, allowed in (
            ("error", error, ERRORS),
            ("projection", projection, PROJECTIONS),
            ("rows", rows, ROWS),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} must be one of {allowed}, found {value!r}")
        if rows == "all":
            return self.traces[:, ERRORS.index(error), PROJECTIONS.index(projection)]
        if projection != "query":
            raise ConfigError(
                f"rows='patch' exists for the query projection only, found {projection!r}"
            )
        return self.patch_traces[:, ERRORS.index(error)]


def load_profile(name_or_path: str | Path) -> HessProfile:
    """The profile of a bundled model ("nano", "pi3-nano"; with "-label-free" behind it, the one
    made without ground truth), or the one in a file.

    Raises:
        ProfileError: the file is missing, damaged, of another format version, or holds a
            calibration that was not finished.
    """
    if str(name_or_path).removesuffix(LABEL_FREE) in BUNDLED:
        with as_file(files("hess") / "assets" / f"{name_or_path}.hess") as path:
            return HessProfile.load(path)
    profile = HessProfile.load(name_or_path)
    if not profile.is_complete:
        raise ProfileError(
            f"{name_or_path} holds {len(profile.scenes)} of {profile.provenance['num_scenes']} "
            "scenes of an unfinished calibration; run the same `hess calibrate` again to finish it"
        )
    return profile


@torch.no_grad()
def model_fingerprint(model: Model) -> str:
    """SHA-256 over the ``qkv`` weights of all global layers, rounded to bfloat16.

    The rounding gives float32 weights and their bfloat16 copy one fingerprint. A float16 copy
    of float32 weights rounds twice and may differ.
    """
    digest = hashlib.sha256()
    for layer in qkv_layers(model):
        digest.update(repr(tuple(layer.weight.shape)).encode())
        digest.update(_raw_bytes(layer.weight.bfloat16()))
    return digest.hexdigest()


def _checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(_canonical_json(header).encode())
    for name in _TENSORS:
        digest.update(_raw_bytes(tensors[name]))
    return digest.hexdigest()


def _canonical_json(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _raw_bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
