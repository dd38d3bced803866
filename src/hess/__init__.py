"""HeSS: Head Sensitivity Score for sparsity redistribution in VGGT-like models.

    model = hess.load_model("nano")
    profile = hess.load_profile("nano")
    policy = hess.policies.HeSS(profile, sparse_ratio=0.8, cdf_threshold=0.4)
    with hess.sparsify(model, policy) as run:
        scene = hess.reconstruct(model, "photos/")
    print(run.stats)
    scene.save("scene.ply")

Names are imported when first used, so ``import hess`` itself is quick.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hess import datasets, policies
    from hess.calibration import CalibrationConfig, ProbeConfig, calibrate
    from hess.evaluation.evaluate import evaluate
    from hess.models.loading import from_upstream, load_model
    from hess.reconstruction import Reconstruction, reconstruct
    from hess.sensitivity.profile import HessProfile, load_profile
    from hess.sparsification import sparsify

try:
    __version__ = version("hess-vggt")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

_HOME = {
    "CalibrationConfig": "hess.calibration",
    "ProbeConfig": "hess.calibration",
    "HessProfile": "hess.sensitivity.profile",
    "Reconstruction": "hess.reconstruction",
    "calibrate": "hess.calibration",
    "evaluate": "hess.evaluation.evaluate",
    "from_upstream": "hess.models.loading",
    "load_model": "hess.models.loading",
    "load_profile": "hess.sensitivity.profile",
    "reconstruct": "hess.reconstruction",
    "sparsify": "hess.sparsification",
}
_PACKAGES = ("datasets", "errors", "policies")

__all__ = [
    "CalibrationConfig",
    "HessProfile",
    "ProbeConfig",
    "Reconstruction",
    "calibrate",
    "datasets",
    "evaluate",
    "from_upstream",
    "load_model",
    "load_profile",
    "policies",
    "reconstruct",
    "sparsify",
]


def __getattr__(name: str) -> object:
    if name in _PACKAGES:
        return import_module(f"hess.{name}")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'hess' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
