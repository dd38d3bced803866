"""Writing reconstructions to files."""

from hess.export.point_cloud import PointCloud
from hess.export.save import save_reconstruction

__all__ = ["PointCloud", "save_reconstruction"]
