"""Which key blocks every query block of every head looks at."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hess.errors import LayoutError


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockMask:
    """Selected patch key blocks per batch element, head and query block, in CSR form.

    Row ``(b, h, i)`` owns ``indices[row_offsets[r] : row_offsets[r + 1]]`` with
    ``r = (b * num_heads + h) * num_q_blocks + i``. Special tokens are not part of the mask: they
    are visible always.

    Making one never waits for the device, so the contents of the tensors are trusted; for lists
    from elsewhere call :meth:`check`.

    Args:
        row_offsets: int64 [batch * num_heads * num_q_blocks + 1], ascending from 0.
        indices: int32 [nnz], the key blocks of each row, strictly ascending within a row.
        batch, num_heads, num_q_blocks, num_kv_blocks: size of the mask, each at least 1.
        known_head_blocks: :attr:`head_blocks`, if it is known without asking the device.

    Raises:
        LayoutError: sizes or types disagree.
    """

    row_offsets: Tensor
    indices: Tensor
    batch: int
    num_heads: int
    num_q_blocks: int
    num_kv_blocks: int
    known_head_blocks: Tensor | None = None

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise LayoutError(f"a block mask needs sizes >= 1, found {self.shape}")
        rows = self.batch * self.num_heads * self.num_q_blocks
        if self.row_offsets.shape != (rows + 1,) or self.row_offsets.dtype != torch.int64:
            raise LayoutError(
                f"row_offsets of a {self.shape} mask must be int64 [{rows + 1}], found "
                f"{self.row_offsets.dtype} {list(self.row_offsets.shape)}"
            )
        if self.indices.ndim != 1 or self.indices.dtype != torch.int32:
            raise LayoutError(
                f"indices must be int32 [nnz], found {self.indices.dtype} "
                f"{list(self.indices.shape)}"
            )

    def check(self) -> "BlockMask":
        """Look at every entry, which takes time and memory and waits for the device.

        Returns:
            Itself.

        Raises:
            LayoutError: offsets do not ascend from 0 to nnz, a list does not ascend, an index is
                no key block, or ``known_head_blocks`` is wrong.
        """
        steps = self.row_offsets.diff()
        ends_match = self.row_offsets[0] == 0 and self.row_offsets[-1] == len(self.indices)
        if not ends_match or (steps < 0).any():
            raise LayoutError(f"row_offsets must ascend from 0 to nnz = {len(self.indices)}")
        in_range = (self.indices >= 0) & (self.indices < self.num_kv_blocks)
        if not in_range.all() or (self._flat_index().diff() <= 0).any():
            raise LayoutError(
                f"indices must ascend within each row and lie in [0, {self.num_kv_blocks})"
            )
        if not torch.equal(self.head_blocks, self.counts.sum(-1).cpu()):
            raise LayoutError(
                f"the heads have {self.counts.sum(-1).tolist()} blocks, found "
                f"known_head_blocks {self.head_blocks.tolist()}"
            )
        return self

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, num_heads, num_q_blocks, num_kv_blocks)."""
        return self.batch, self.num_heads, self.num_q_blocks, self.num_kv_blocks

    @cached_property
    def counts(self) -> Tensor:
        """Selected key blocks per row: int64 [batch, num_heads, num_q_blocks]."""
        return self.row_offsets.diff().view(self.shape[:3])

    @cached_property
    def head_blocks(self) -> Tensor:
        """Selected key blocks per head: int64 [batch, num_heads], on the CPU.

        Waits for the device unless the numbers were given.
        """
        if self.known_head_blocks is not None:
            return self.known_head_blocks
        return self.counts.sum(-1).cpu()

    @cached_property
    def head_order(self) -> Tensor:
        """Heads ``b * num_heads + h`` from most to fewest blocks, in which order they are best
        started: int64 [batch * num_heads], on the CPU. Waits as :attr:`head_blocks` does."""
        return self.head_blocks.flatten().sort(descending=True, stable=True).indices

    @cached_property
    def selects_last(self) -> Tensor:
        """Rows with the last, perhaps partial, key block: bool [batch, heads, q_blocks]."""
        if not len(self.indices):
            return torch.zeros_like(self.counts, dtype=torch.bool)
        ends = self.row_offsets[1:].view(self.shape[:3])
        last = self.indices[(ends - 1).clamp_min(0)]
        return (self.counts > 0) & (last == self.num_kv_blocks - 1)

    def _flat_index(self) -> Tensor:
        """Position of every entry in the flattened dense mask: int64 [nnz]."""
        counts = self.row_offsets.diff()
        rows = torch.arange(len(counts), device=counts.device)
        rows = rows.repeat_interleave(counts, output_size=len(self.indices))
        return rows * self.num_kv_blocks + self.indices

    def to_dense(self) -> Tensor:
        """The mask as bool [batch, num_heads, num_q_blocks, num_kv_blocks]."""
        dense = torch.zeros(self.shape, dtype=torch.bool, device=self.indices.device)
        dense.view(-1)[self._flat_index()] = True
        return dense

    @classmethod
    def from_dense(cls, dense: Tensor) -> "BlockMask":
        """The mask that selects where ``dense``, bool [B, heads, q_blocks, kv_blocks], is True.

        Raises:
            LayoutError: ``dense`` is not a four-dimensional bool tensor.
        """
        if dense.ndim != 4 or dense.dtype != torch.bool:
            raise LayoutError(
                "a dense block mask must be bool [B, heads, q_blocks, kv_blocks], found "
                f"{dense.dtype} {list(dense.shape)}"
            )
        batch, num_heads, num_q_blocks, num_kv_blocks = dense.shape
        ends = dense.sum(-1).flatten().cumsum(0)
        return cls(
            row_offsets=torch.cat([ends.new_zeros(1), ends]),
            indices=dense.view(-1, num_kv_blocks).nonzero()[:, 1].to(torch.int32),
            batch=batch,
            num_heads=num_heads,
            num_q_blocks=num_q_blocks,
            num_kv_blocks=num_kv_blocks,
        )
