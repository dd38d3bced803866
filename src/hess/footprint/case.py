"""One scene for one model: the quantities that memory and work are made of."""

from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from hess.attention.layout import TokenLayout
from hess.attention.pooling import num_blocks
from hess.footprint.blocks import BlockSizes
from hess.footprint.heads import FLOAT32, HeadCost, head_cost
from hess.models.base import Anatomy, Model
from hess.models.layers import VIEWS_PER_CHUNK


@dataclass(frozen=True, kw_only=True)
class Case:
    """Model, scene and purpose. Sizes are in bytes.

    Args:
        model: on any device.
        layout: token order of the scene.
        calibrating: for calibration, in float32, instead of a forward pass.
        block_sparsity: dropped share of the attention map; None: dense.
    """

    model: Model
    layout: TokenLayout
    calibrating: bool
    block_sparsity: float | None

    @cached_property
    def anatomy(self) -> Anatomy:
        return self.model.anatomy()

    @cached_property
    def chunk(self) -> TokenLayout:
        """The views that encoder and heads work on at a time."""
        return replace(self.layout, num_views=min(VIEWS_PER_CHUNK, self.layout.num_views))

    @cached_property
    def encoder(self) -> BlockSizes | None:
        blocks = self.anatomy.encoder_blocks
        return self._sizes(blocks[0], rope=False) if blocks else None

    @cached_property
    def frame(self) -> BlockSizes:
        return self._sizes(self.anatomy.frame_blocks[0], rope=True)

    @cached_property
    def globals(self) -> BlockSizes:
        return self._sizes(self.model.global_attention_sites()[0].parent, rope=True)

    def _sizes(self, block: nn.Module, *, rope: bool) -> BlockSizes:
        return BlockSizes.of(block, rope=rope, widened=self.calibrating)

    @cached_property
    def heads(self) -> list[HeadCost]:
        """Each for one chunk of views."""
        patch_size = self.model.patch_size
        return [
            head_cost(head, self.chunk, patch_size, widened=self.calibrating)
            for head in self.anatomy.heads
        ]

    @cached_property
    def weights(self) -> int:
        least = FLOAT32 if self.calibrating else 1
        tensors = (*self.model.parameters(), *self.model.buffers())
        return sum(tensor.numel() * max(least, tensor.itemsize) for tensor in tensors)

    @property
    def pixels(self) -> int:
        """Number of pixels of all views."""
        return self.layout.num_patch_tokens * self.model.patch_size**2

    @property
    def images(self) -> int:
        return 3 * FLOAT32 * self.pixels

    @property
    def tokens(self) -> int:
        """The residual stream: all tokens of all views once."""
        return self.frame.stream_bytes * self.layout.num_tokens

    @property
    def rope(self) -> int:
        """Cosines and sines for all tokens."""
        return 2 * FLOAT32 * self.layout.num_tokens * self.frame.width // self.frame.heads

    @property
    def kept(self) -> int:
        """What the blocks leave to the heads."""
        return self.anatomy.kept * self.tokens

    @property
    def predictions(self) -> int:
        return self.anatomy.pixel_values * FLOAT32 * self.pixels

    @property
    def num_frame_blocks(self) -> int:
        return len(self.anatomy.frame_blocks)

    @cached_property
    def num_global_blocks(self) -> int:
        return len(self.model.global_attention_sites())

    @property
    def block_map(self) -> int:
        """Number of entries of the attention map of all heads of a layer."""
        patches = self.layout.num_patch_tokens
        q_blocks = num_blocks(patches, self.model.block_size_q)
        return self.model.num_heads * q_blocks * num_blocks(patches, self.model.block_size_kv)
