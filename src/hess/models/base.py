"""What the rest of the package may know about a model, whichever model it is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from hess.attention.layout import TokenLayout
from hess.errors import ConfigError, LayoutError
from hess.geometry.fit_rules import FitRule


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes that every backbone has.

    Args:
        image_size: side in pixels of the square images that positions were trained for.
        patch_size: side of a patch in pixels.
        dim, num_heads: width and heads of the transformer.
        layer_scale: initial LayerScale.
        block_size_q, block_size_kv: default tile of the block-sparse attention, in tokens.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    image_size: int = 518
    patch_size: int = 14
    dim: int = 1024
    num_heads: int = 16
    layer_scale: float = 0.01
    block_size_q: int = 128
    block_size_kv: int = 64

    may_be_zero: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            sizes = value if isinstance(value, (list, tuple)) else (value,)
            least = 0 if name in self.may_be_zero else 1
            if any(isinstance(x, int) and x < least for x in sizes):
                raise ConfigError(f"{name} is too small: {value}")
        if self.dim % (4 * self.num_heads):
            raise ConfigError(
                f"dim must be a multiple of 4 * num_heads (rotary positions pair channels), "
                f"found dim {self.dim} with {self.num_heads} heads"
            )
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )

    def as_dict(self) -> dict[str, object]:
        """The configuration as JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Output of one forward pass over B scenes of N views of H x W pixels.

    World coordinates are those of the model's reference frame, in its own scale. All tensors are
    differentiable with respect to the model's weights, but for intrinsics that a model does not
    predict and that are estimated from its points.

    Args:
        world_from_cam: [B, N, 4, 4], OpenCV axes.
        intrinsics: [B, N, 3, 3] in pixels, top-left pixel centre at (0.5, 0.5).
        depth: [B, N, H, W], z-depth.
        depth_confidence: [B, N, H, W]; what it means is the model's affair, see
            :meth:`Model.certainty`.
        world_points: [B, N, H, W, 3], from the model's point head.
        point_confidence: [B, N, H, W], alike.
    """

    world_from_cam: Tensor
    intrinsics: Tensor
    depth: Tensor
    depth_confidence: Tensor
    world_points: Tensor
    point_confidence: Tensor


@dataclass(frozen=True, kw_only=True)
class GlobalAttentionSite:
    """One global attention that can be made sparse: ``getattr(parent, attribute)``.

    ``layer_idx`` counts global layers from 0 in the order of execution.
    """

    layer_idx: int
    parent: nn.Module
    attribute: str

    @property
    def module(self) -> nn.Module:
        return getattr(self.parent, self.attribute)


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The parts of a model that decide its memory and its work (:mod:`hess.footprint`).

    Args:
        encoder_blocks: blocks within a view that make its patch tokens; may be empty.
        encoder_special: tokens per view that they see beside the patches.
        frame_blocks: blocks within a view that take turns with the global ones.
        kept: tensors [B, N, tokens, dim] held for the heads once the last block has run.
        heads: the dense heads, which run over chunks of views.
        pixel_values: numbers per pixel of the predictions.
    """

    encoder_blocks: Sequence[nn.Module]
    encoder_special: int
    frame_blocks: Sequence[nn.Module]
    kept: int
    heads: Sequence[nn.Module]
    pixel_values: int


class Model(nn.Module, ABC):
    """A feed-forward multi-view geometry model with global attention.

    Attributes:
        model_name: the name under which ``load_model`` found it.
        weights_license: one line on the licence of weights that others published, else None.
        image_rule: how photos are brought to the size the model was trained for.
        patch_size: side of a patch in pixels.
        num_special: special tokens per view.
        num_heads: heads of every global attention.
        block_size_q, block_size_kv: default tile of the block-sparse attention, in tokens.
        cloud_from: which points make the better cloud: the "point_head"'s, or the "depth" maps
            taken to the world by the predicted cameras.
        recompute: whether activations of the blocks and dense heads are made anew in the backward
            pass instead of being held; slower, and far smaller. Off unless calibration sets it.
        camera_weight: default share of the camera error in the score (lambda of Eq. 9).
    """

    model_name: str
    weights_license: str | None = None
    image_rule: FitRule
    patch_size: int
    num_special: int
    num_heads: int
    block_size_q: int
    block_size_kv: int
    cloud_from: Literal["point_head", "depth"]
    recompute: bool = False
    camera_weight: ClassVar[float]

    @abstractmethod
    def global_attention_sites(self) -> list[GlobalAttentionSite]:
        """The global attentions in execution order."""

    @abstractmethod
    def forward(self, images: Tensor) -> Predictions:
        """Predict cameras and points for ``images`` [B, N, 3, H, W] in [0, 1]."""

    @abstractmethod
    def certainty(self, confidence: Tensor) -> Tensor:
        """Confidences of the model's predictions as numbers between 0 and 1, in the same order."""

    @abstractmethod
    def backbone_parts(self) -> list[nn.Module]:
        """The parts whose matrix products may run in half precision; the others need float32."""

    def anatomy(self) -> Anatomy:
        """The parts that decide the model's memory and work, beside the global sites.

        Raises:
            ConfigError: the model does not say; all but :mod:`hess.footprint` works without.
        """
        raise ConfigError(
            f"{type(self).__name__} does not describe its anatomy(), so its memory and time "
            "cannot be estimated"
        )

    def token_layout(self, images: Tensor) -> TokenLayout:
        """Token layout of ``images`` [B, N, 3, H, W].

        Raises:
            LayoutError: another shape, or H and W are not multiples of the patch.
        """
        p = self.patch_size
        if images.ndim != 5 or images.shape[2] != 3 or images.shape[3] % p or images.shape[4] % p:
            raise LayoutError(
                f"expected images [batch, views, 3, H, W] with H and W multiples of {p}, found "
                f"{tuple(images.shape)}; bring photos to the model's size before the forward pass"
            )
        _, num_views, _, height, width = images.shape
        return TokenLayout(
            num_views=num_views,
            grid_h=height // p,
            grid_w=width // p,
            num_special=self.num_special,
        )
