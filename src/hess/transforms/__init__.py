"""Ways to save attention that are no choice of blocks: pruned heads, merged tokens."""

from hess.transforms.base import Method, Transform, applied
from hess.transforms.fisher_mask import FisherMask
from hess.transforms.head_pruning import HeadPruning
from hess.transforms.token_merging import TokenMerging

__all__ = ["FisherMask", "HeadPruning", "Method", "TokenMerging", "Transform", "applied"]
