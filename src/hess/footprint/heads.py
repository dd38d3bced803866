"""Memory and work of the dense heads on a chunk of views, term by term as they run."""

from dataclasses import dataclass

from torch import nn

from hess.attention.layout import TokenLayout
from hess.errors import ConfigError
from hess.footprint.blocks import (
    BlockSizes,
    attention_flops,
    backward_bytes,
    forward_bytes,
    linear_flops,
    saved_bytes,
)
from hess.models.dense_heads import DPTHead, LinearHead
from hess.models.pi3 import HeadDecoder

FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class HeadCost:
    """What one head needs for a chunk of views.

    Args:
        shared: bytes held as long as the head runs, and by its graph, however many views.
        forward: peak bytes without gradients.
        backward: peak bytes of the backward pass, all that autograd saved included.
        blocks, attention, convolutions: floating-point operations of a forward pass by kind.
        itemsize: bytes per number of its matrices.
    """

    shared: int
    forward: int
    backward: int
    blocks: int = 0
    attention: int = 0
    convolutions: int = 0
    itemsize: int = FLOAT32


def head_cost(head: nn.Module, layout: TokenLayout, patch_size: int, *, widened: bool) -> HeadCost:
    """Cost of ``head`` for the views of ``layout``.

    Args:
        widened: whether half-precision weights are widened first, as calibration does.

    Raises:
        ConfigError: a kind of head that this module does not know.
    """
    match head:
        case DPTHead():
            return _dpt(head, layout, patch_size)
        case LinearHead():
            return _linear(head, layout, patch_size)
        case HeadDecoder():
            return _decoder(head, layout, widened=widened)
    raise ConfigError(
        f"there is no memory model for a head of type {type(head).__name__}; add one to "
        "hess.footprint.heads"
    )


def _dpt(head: DPTHead, layout: TokenLayout, patch_size: int) -> HeadCost:
    views, grid = layout.num_views, layout.grid_h * layout.grid_w
    pixels = grid * patch_size**2
    coarse = -(-layout.grid_h // 2) * -(-layout.grid_w // 2)
    places = (16 * grid, 4 * grid, grid, coarse)  # of the four levels, from fine to coarse
    finer = (64 * grid, *places[:3])  # what each level is brought to
    width = head.features
    middle = head.get_parameter("scratch.output_conv2.0.weight").shape[0]
    tokens = head.norm.normalized_shape[0] * grid

    codes = sum(head.out_channels) * grid + width // 2 * pixels
    levels = sum(c * p for c, p in zip(head.out_channels, places, strict=True))
    skips = width * sum(places)
    # _FusionBlock at the finest level: its input, the upsampled map, and that through out_conv.
    fusion = levels + skips + width * (places[0] + 2 * finer[0])
    # Up to the pixels, and output_conv2 with both sides of its ReLU.
    upsampled = levels + width // 2 * (finer[0] + pixels)
    last = levels + (width // 2 + 2 * middle) * pixels

    # A convolution saves its input, so does the norm: tokens and normalised tokens, projected
    # levels before and after their resizing, in each residual unit two rectified maps, ...
    saved = 2 * len(places) * tokens
    saved += sum(head.out_channels) * grid + levels - head.out_channels[2] * grid
    saved += width * (4 * sum(places[:3]) + 2 * places[3])
    # ... what goes into out_conv, output_conv1 and both layers of output_conv2.
    at_pixels = (width // 2 + middle) * pixels
    saved += width * (sum(finer) + finer[0]) + at_pixels
    # Gradients of these; or later, with them gone, of what output_conv1 takes and gives.
    gradients = max(at_pixels, (width + width // 2) * finer[0] - at_pixels)

    def numbers(layer: str) -> int:
        return head.get_parameter(f"{layer}.weight").numel()

    products = sum(numbers(f"projects.{i}") for i in range(4)) * grid
    products += (numbers("resize_layers.0") + numbers("resize_layers.1")) * grid
    products += numbers("resize_layers.3") * coarse
    for i, (at, up) in enumerate(zip(places, finer, strict=True), start=1):
        units = 2 if i < len(places) else 1  # the coarsest level has nothing to fold in
        unit = 2 * numbers(f"scratch.refinenet{i}.resConfUnit2.conv1")
        products += (numbers(f"scratch.layer{i}_rn") + units * unit) * at
        products += numbers(f"scratch.refinenet{i}.out_conv") * up
    products += numbers("scratch.output_conv1") * finer[0]
    products += (numbers("scratch.output_conv2.0") + numbers("scratch.output_conv2.2")) * pixels
    return HeadCost(
        shared=FLOAT32 * codes,
        forward=FLOAT32 * views * max(fusion, upsampled, last),
        backward=FLOAT32 * views * (saved + gradients),
        convolutions=2 * views * products,
    )


def _linear(head: LinearHead, layout: TokenLayout, patch_size: int) -> HeadCost:
    patches = layout.num_patch_tokens
    width, hidden = head.mlp.fc1.in_features, head.mlp.fc1.out_features
    values = head.mlp.fc2.out_features
    # Tokens side by side and normalised; then normalised tokens and both sides of the GELU.
    inside = width + max(width, 2 * hidden)
    saved = 2 * width + hidden + 3 * values
    return HeadCost(
        shared=0,
        forward=FLOAT32 * patches * max(inside, 4 * values),
        backward=FLOAT32 * patches * (saved + 2 * hidden),
        blocks=2 * patches * hidden * (width + values),
    )


def _decoder(head: HeadDecoder, layout: TokenLayout, *, widened: bool) -> HeadCost:
    views, tokens, t = layout.num_views, layout.tokens_per_view, layout.num_tokens
    sizes = BlockSizes.of(head.blocks[0], rope=True, widened=widened)
    d, m, depth = sizes.width, sizes.matrix, len(head.blocks)
    # Tokens side by side, in the precision of the projection, and projected; then the blocks.
    projected = (2 * d * FLOAT32 + (2 * d * m if m < FLOAT32 else 0) + d * m) * t
    inside = sizes.stream_bytes * t + forward_bytes(sizes, views, tokens)
    ends = head.projects.weight.numel() + head.linear_out.weight.numel()
    return HeadCost(
        shared=0,
        forward=max(projected, inside),
        backward=depth * saved_bytes(sizes, t) + backward_bytes(sizes, t),
        blocks=depth * linear_flops(sizes, t) + 2 * ends * t,
        attention=depth * attention_flops(sizes, views, tokens),
        itemsize=m,
    )
