"""Every error this package raises on purpose.

A message says what was expected, what was found and what to do. The command line prints it
without a traceback and exits with 1 (or 2 for :class:`ConfigError`).
"""


class HessError(Exception):
    """Root of all errors raised on purpose by this package."""


class ConfigError(HessError, ValueError):
    """A parameter is outside its range, or two parameters contradict each other."""


class LayoutError(HessError, ValueError):
    """A tensor does not have the shape that its token layout or its caller promises."""


class AlignmentError(HessError, ValueError):
    """A similarity cannot be estimated: too few points, or all on a line."""


class BackendUnavailableError(HessError, RuntimeError):
    """A backend that was asked for by name cannot run here."""


class CheckpointError(HessError, ValueError):
    """A weight file is missing, truncated, or belongs to another architecture."""


class ProfileError(HessError, ValueError):
    """A HeSS profile is missing, damaged, of another version, or made for another model."""


class DatasetError(HessError, ValueError):
    """Input data is missing, unreadable, or not laid out as its format demands."""


class AlreadySparsifiedError(HessError, RuntimeError):
    """``sparsify`` was asked to act on a model that is sparsified already."""
