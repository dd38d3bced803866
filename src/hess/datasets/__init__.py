"""Data sets: every one gives :class:`Scene` objects."""

from hess.datasets.bundled import bundled_capture
from hess.datasets.open import open_dataset
from hess.datasets.photos import load_photos
from hess.datasets.procedural import Procedural
from hess.datasets.scene import Dataset, Scene

__all__ = ["Dataset", "Procedural", "Scene", "bundled_capture", "load_photos", "open_dataset"]
