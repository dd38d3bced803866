"""Writing reconstructions to files."""

from hess.export.save import save_reconstruction

__all__ = ["save_reconstruction"]
