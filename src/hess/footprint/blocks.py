"""Memory and work of transformer blocks, term by term as :class:`hess.models.layers.Block` runs.

D is the width of a block, t the number of its tokens; every tensor of [t, D] numbers counts D * t
times the bytes of its type. Bytes are those alive at once *beside the input* of the block, its
result included. What is small against D numbers per token (one number per head) is left out.
"""

from dataclasses import dataclass

from torch import nn

from hess.attention.torch_selection import ENTRIES_AT_ONCE
from hess.errors import ConfigError
from hess.models.layers import TOKENS_PER_CHUNK, Block, LayerScale


@dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """What memory and work of a block depend on.

    Args:
        width, hidden: D, and the width inside the MLP.
        heads: attention heads.
        matrix: bytes per number of the linear layers and of queries, keys and values.
        norm: bytes per number of the norms, at least 4 in practice.
        stream: bytes per number of the residual stream.
        qk_norm, rope: whether queries and keys are normalised, and rotated.
    """

    width: int
    hidden: int
    heads: int
    matrix: int
    norm: int
    stream: int
    qk_norm: bool
    rope: bool

    @staticmethod
    def of(block: nn.Module, *, rope: bool, widened: bool = False) -> "BlockSizes":
        """Sizes of ``block``; ``widened`` is calibration's at least 4 bytes per number.

        Raises:
            ConfigError: not a ``Block``.
        """
        if not isinstance(block, Block):
            raise ConfigError(
                f"the memory model knows blocks of type Block, found {type(block).__name__}"
            )
        least = 4 if widened else 1
        matrix = max(least, block.mlp.fc1.weight.itemsize)
        norm = max(least, block.norm1.weight.itemsize)
        return BlockSizes(
            width=block.mlp.fc1.in_features,
            hidden=block.mlp.fc1.out_features,
            heads=block.attn.num_heads,
            matrix=matrix,
            norm=norm,
            # LayerScale widens what is added to the stream; without it nothing does.
            stream=max(matrix, norm) if isinstance(block.ls1, LayerScale) else matrix,
            qk_norm=hasattr(block.attn.q_norm, "weight"),
            rope=rope,
        )

    @property
    def stream_bytes(self) -> int:
        """Bytes of a token in the residual stream."""
        return self.stream * self.width


def forward_bytes(sizes: BlockSizes, sequences: int, tokens: int) -> int:
    """Peak of ``block(x)`` without gradients for x [sequences, tokens, D]."""
    t = sequences * tokens
    chunk = sequences * min(tokens, TOKENS_PER_CHUNK)
    chunked = chunk < t
    m, n, f = sizes.matrix, sizes.norm, sizes.stream
    normalised = m * t

    # Attention.project: the joint projection, and in q and k both normalised results, q rotated,
    # and of the rotation of k two products and their sum. The results of the chunk before are
    # still there.
    if sizes.rope:
        wide = max(m, 4)  # the rotary tables are float32
        between = 2 * (n if sizes.qk_norm else 0) + 4 * wide
    else:
        between = (2 * n + (n if m < n else 0)) if sizes.qk_norm else 0
    copies = 2 * m if sizes.qk_norm or sizes.rope else 0
    projected = normalised + (3 * m + between) * chunk
    if chunked:
        next_chunk = min(chunk, t - chunk)
        after = (3 * m + between) * next_chunk + (3 * m + copies) * chunk
        projected = max(projected, normalised + after) + 3 * m * t

    # The kernel: v is a view of the joint projection, q and k are copies if they were changed.
    # Chunks have put all three together instead.
    attended = normalised + 3 * m * t + (0 if chunked else copies * t) + m * t

    # Block._residual: the sum, its norm, and both sides of the GELU.
    inside = f + n + 2 * m * sizes.hidden / sizes.width
    mlp = m * t + f * (t - chunk) + inside * chunk
    joined = m * t + 2 * f * t if chunked else 0

    return round(max(projected, attended, mlp, joined) * sizes.width)


def sparse_bytes(sizes: BlockSizes, tokens: int, block_map: int, block_sparsity: float) -> int:
    """Peak of a block whose attention is block-sparse, for one sequence.

    Args:
        block_map: entries of the map of all heads, query blocks and key blocks.
        block_sparsity: dropped share of it.
    """
    m, kept = sizes.matrix, 1 - block_sparsity
    copies = 2 * m if tokens <= TOKENS_PER_CHUNK and (sizes.qk_norm or sizes.rope) else 0
    held = (m + 3 * m + copies) * tokens * sizes.width
    # Whole heads at a time, if one is small enough: logits, those before or probabilities, and
    # the lists of all heads. Plain torch, which sorts, takes up to 12 bytes more for each logit.
    head_map = block_map // sizes.heads
    chunk = min(block_map, max(1, ENTRIES_AT_ONCE // head_map) * min(head_map, ENTRIES_AT_ONCE))
    lists = 4 * kept * block_map
    choosing = lists + 8 * chunk
    # The result head by head, its heads side by side, and that projected.
    merging = lists + 3 * m * tokens * sizes.width
    return max(forward_bytes(sizes, 1, tokens), round(held + max(choosing, merging)))


def run_block_bytes(sizes: BlockSizes, sequences: int, tokens: int) -> int:
    """Peak of :func:`hess.models.layers.run_block`, where groups of sequences take turns."""
    group = max(1, TOKENS_PER_CHUNK // tokens)
    if sequences <= group:
        return forward_bytes(sizes, sequences, tokens)
    result = sizes.stream_bytes * sequences * tokens
    last = result - sizes.stream_bytes * group * tokens + forward_bytes(sizes, group, tokens)
    return max(last, 2 * result)


def saved_bytes(sizes: BlockSizes, tokens: int) -> int:
    """What autograd holds of one block whose weights need no gradient, its input included.

    Input; q, k, v (v in the joint projection); result of the attention; input of the second norm;
    input of the GELU.
    """
    copies = 2 if sizes.qk_norm or sizes.rope else 0
    numbers = sizes.stream + sizes.matrix * (3 + copies + 1) + sizes.stream
    return tokens * (numbers * sizes.width + sizes.matrix * sizes.hidden)


def backward_bytes(sizes: BlockSizes, tokens: int) -> int:
    """Peak of the backward pass of one block beside :func:`saved_bytes`.

    Gradients of the result and of both sides of the GELU.
    """
    return tokens * (sizes.stream * sizes.width + 2 * sizes.matrix * sizes.hidden)


def linear_flops(sizes: BlockSizes, tokens: int) -> int:
    """Of the four linear layers, for ``tokens`` in all."""
    return 2 * tokens * sizes.width * (4 * sizes.width + 2 * sizes.hidden)


def attention_flops(sizes: BlockSizes, sequences: int, tokens: int) -> int:
    """Of the products of queries, keys and values."""
    return 4 * sequences * tokens**2 * sizes.width
