"""Where each token of a global attention lives: which view, special or patch, which block.

A VGGT-like model lays its tokens out view by view, the special tokens (camera, registers) of a
view first, then its patches in row-major order. Sparsification looks at patches only; this module
is the single place that knows which tokens those are.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hess.errors import LayoutError


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """Token order of one scene in a global attention: ``[special, patches] * num_views``.

    Args:
        num_views: images in the scene, at least 1.
        grid_h, grid_w: patch rows and columns per image, at least 1.
        num_special: special tokens per view (VGGT: 1 camera + 4 registers), 0 or more.

    Raises:
        LayoutError: a count is out of range.
    """

    num_views: int
    grid_h: int
    grid_w: int
    num_special: int

    def __post_init__(self) -> None:
        if min(self.num_views, self.grid_h, self.grid_w) < 1 or self.num_special < 0:
            raise LayoutError(
                "a token layout needs num_views, grid_h, grid_w >= 1 and num_special >= 0, found "
                f"{self.num_views} views, {self.grid_h}x{self.grid_w} patches, "
                f"{self.num_special} special tokens"
            )

    @property
    def tokens_per_view(self) -> int:
        return self.num_special + self.grid_h * self.grid_w

    @property
    def num_tokens(self) -> int:
        return self.num_views * self.tokens_per_view

    @property
    def num_patch_tokens(self) -> int:
        return self.num_views * self.grid_h * self.grid_w

    @property
    def num_special_tokens(self) -> int:
        return self.num_views * self.num_special

    @cached_property
    def is_special(self) -> Tensor:
        """Which tokens are special: bool [num_tokens], on the CPU."""
        in_view = torch.arange(self.num_tokens) % self.tokens_per_view
        return in_view < self.num_special

    @cached_property
    def patch_index(self) -> Tensor:
        """Positions of the patch tokens, ascending: int64 [num_patch_tokens], on the CPU."""
        return (~self.is_special).nonzero().squeeze(1)

    @cached_property
    def special_index(self) -> Tensor:
        """Positions of the special tokens, ascending: int64 [num_special_tokens], on the CPU."""
        return self.is_special.nonzero().squeeze(1)

    def check(self, tokens: Tensor, dim: int = -2) -> None:
        """Raise :class:`LayoutError` unless ``tokens.shape[dim]`` equals ``num_tokens``."""
        if tokens.shape[dim] != self.num_tokens:
            raise LayoutError(
                f"expected {self.num_tokens} tokens ({self.num_views} views x "
                f"({self.num_special} special + {self.grid_h}x{self.grid_w} patches)), "
                f"found {tokens.shape[dim]} in a tensor of shape {tuple(tokens.shape)}"
            )
