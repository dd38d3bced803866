"""How a model's errors react to gates on its heads: what head pruning methods calibrate on.

A gate is a factor of 1 on the output of a head, before the output projection of its layer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import hess
from hess.datasets.scene import Dataset, Scene
from hess.errors import AlignmentError, ConfigError, DatasetError, LayoutError, ProfileError
from hess.models.base import Model
from hess.models.swap import check_dense
from hess.sensitivity.fisher import fisher_probe
from hess.sensitivity.profile import ERRORS, model_fingerprint
from hess.sensitivity.scene_errors import CalibrationConfig, scene_errors

Progress = Callable[[int, int, str], None]
"""Called after each scene with (scenes done, scenes in all, name of the scene)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadImportance:
    """Gradients of both errors with respect to the gates, scene by scene.

    Args:
        gradients: float64 [scene, error, layer, head], errors (camera, point); NaN for the point
            error of scenes without depth.
        scenes: their names.
        failed: (scene name, reason) of the scenes that gave no gradients.
        provenance: JSON object; holds at least ``model_name``, ``model_fingerprint`` and
            ``camera_weight`` (the model's default).

    Raises:
        ProfileError: gradients have the wrong type, shape or range, or a key is missing.
    """

    gradients: Tensor
    scenes: tuple[str, ...]
    failed: tuple[tuple[str, str], ...] = ()
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        shape = tuple(self.gradients.shape)
        if (
            self.gradients.dtype != torch.float64
            or len(shape) != 4
            or shape[:2] != (len(self.scenes), len(ERRORS))
            or 0 in shape
        ):
            raise ProfileError(
                "gate gradients must be float64 [scene >= 1, error, layer, head] with "
                f"{len(self.scenes)} scenes and {len(ERRORS)} errors, found "
                f"{self.gradients.dtype} {shape}"
            )
        if bool(self.gradients.isinf().any() | self.gradients[:, 0].isnan().any()):
            raise ProfileError("gate gradients must be finite, and a camera gradient not NaN")
        for key in ("model_name", "model_fingerprint", "camera_weight"):
            if key not in self.provenance:
                raise ProfileError(f"the provenance of gate gradients lacks {key!r}")

    @property
    def num_layers(self) -> int:
        return self.gradients.shape[-2]

    @property
    def num_heads(self) -> int:
        return self.gradients.shape[-1]

    def mixed(
        self, statistic: Callable[[Tensor], Tensor], camera_weight: float | None = None
    ) -> Tensor:
        """``lambda * statistic(camera) + (1 - lambda) * statistic(point)``, as HeSS mixes (Eq. 9).

        Args:
            statistic: of the gradients [scenes that have the error, layers, heads] of one error;
                it shall make both errors comparable.
            camera_weight: lambda in [0, 1]; None takes the model's default.

        Raises:
            ConfigError: ``camera_weight`` is out of range.
            ProfileError: no scene has the point error and its weight is > 0.
        """
        if camera_weight is None:
            camera_weight = float(self.provenance["camera_weight"])
        if not 0.0 <= camera_weight <= 1.0:
            raise ConfigError(f"camera_weight must be in [0, 1], found {camera_weight}")
        parts = []
        for index, weight in enumerate((camera_weight, 1.0 - camera_weight)):
            if weight > 0:
                gradients = self.gradients[:, index]
                known = gradients[~gradients.flatten(1).isnan().any(1)]
                if len(known) == 0:
                    raise ProfileError(
                        f"no calibration scene has the {ERRORS[index]} error, but its weight is "
                        f"{weight:g}; pass camera_weight=1 or calibrate on scenes with depth"
                    )
                parts.append(weight * statistic(known))
        return torch.stack(parts).sum(0)

    def check_model(self, model: Model) -> None:
        """Raise :class:`ProfileError` unless the gradients were measured on ``model``."""
        expected, found = self.provenance["model_fingerprint"], model_fingerprint(model)
        if found != expected or model.num_heads != self.num_heads:
            raise ProfileError(
                f"this head importance was measured on {self.provenance['model_name']!r} with "
                f"fingerprint {expected[:12]} and {self.num_heads} heads, found "
                f"{model.model_name!r} with {found[:12]} and {model.num_heads}; measure it on "
                "this model"
            )


def measure_head_importance(
    model: Model,
    dataset: Dataset,
    config: CalibrationConfig | None = None,
    *,
    progress: Progress | None = None,
    recompute: bool = True,
) -> HeadImportance:
    """Differentiate both errors by the gates of all heads, over a data set with ground truth.

    Errors, alignment, precision and determinism are those of ``hess.calibrate``: float32,
    evaluation mode, the model left as it was, on the CPU the same bytes again.

    Args:
        model: dense; its device is where the work is done.
        dataset: scenes with poses, images at the model's input size. Scenes without depth give
            the camera error only.
        config: settings; None takes the defaults.
        progress: called after every scene.
        recompute: as for ``hess.calibrate``.

    Raises:
        ProfileError: every scene failed.
        AlreadySparsifiedError: the model is sparsified or transformed.
        DatasetError: the data set is empty.
    """
    config = config or CalibrationConfig()
    check_dense(model)
    if len(dataset) == 0:
        raise DatasetError("calibration needs at least one scene, found an empty data set")
    provenance = {
        "model_name": model.model_name,
        "model_fingerprint": model_fingerprint(model),
        "camera_weight": model.camera_weight,
        "dataset": {"name": dataset.name, "provenance": dataset.provenance},
        "num_scenes": len(dataset),
        "config": asdict(config),
        "device": next(model.parameters()).device.type,
        "versions": {"hess": hess.__version__, "torch": torch.__version__},
    }
    gradients: list[Tensor] = []
    names: list[str] = []
    failed: list[tuple[str, str]] = []
    # The probe prepares the model (precision, modes, what requires gradients) and undoes it; its
    # own traces are not asked for.
    with fisher_probe(model, recompute=recompute) as probe, head_gates(model) as gates:
        for index in range(len(dataset)):
            name = f"{dataset.name}[{index}]"
            try:
                scene = dataset[index]
                name = scene.name
                gradients.append(_gate_gradients(model, gates, scene, config))
                names.append(name)
            except (AlignmentError, DatasetError, ProfileError) as error:
                failed.append((name, str(error)))
            probe.clear()
            if progress is not None:
                progress(index + 1, len(dataset), name)
    if not gradients:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed[:3])
        raise ProfileError(
            f"all {len(failed)} calibration scenes failed, so no head has an importance. {reasons}"
        )
    return HeadImportance(
        gradients=torch.stack(gradients),
        scenes=tuple(names),
        failed=tuple(failed),
        provenance=provenance,
    )


@contextmanager
def head_gates(model: Model) -> Iterator[list[Tensor]]:
    """Put a gate on the output of every head of every global layer.

    Yields:
        Per layer the gates [heads], all 1, which require a gradient. They may be changed in
        place, outside of autograd.

    Raises:
        LayoutError: a site has no linear layer ``proj`` that joins the heads.
    """
    gates, handles = [], []
    try:
        for site in model.global_attention_sites():
            proj = getattr(site.module, "proj", None)
            if not isinstance(proj, nn.Linear) or proj.in_features % model.num_heads:
                raise LayoutError(
                    f"global layer {site.layer_idx} ({type(site.module).__name__}) needs a linear "
                    f"layer 'proj' that joins its {model.num_heads} heads, found {proj}"
                )
            gate = proj.weight.new_ones(model.num_heads).requires_grad_()
            handles.append(proj.register_forward_pre_hook(partial(_through_gate, gate)))
            gates.append(gate)
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def _through_gate(gate: Tensor, _proj: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    heads = args[0].unflatten(-1, (len(gate), -1))
    return ((heads * gate[:, None]).flatten(-2),)


def _gate_gradients(
    model: Model, gates: list[Tensor], scene: Scene, config: CalibrationConfig
) -> Tensor:
    """Gradients of both errors in one scene: float64 [error, layer, head]."""
    errors = scene_errors(model, scene, config)
    camera = _gradients(errors.camera, gates, last=errors.point is None)
    if errors.point is None:
        point = torch.full_like(camera, torch.nan)
    else:
        point = _gradients(errors.point.error, gates, last=True)
    found = camera if errors.point is None else torch.stack((camera, point))
    if not bool(torch.isfinite(found).all()):
        raise ProfileError(f"scene {scene.name!r}: the gradients are not finite")
    return torch.stack((camera, point))


def _gradients(error: Tensor, gates: list[Tensor], *, last: bool) -> Tensor:
    """[layer, head]; zero for gates that the error does not depend on."""
    found = torch.autograd.grad(error, gates, retain_graph=not last, materialize_grads=True)
    return torch.stack(found).double().cpu()
