"""What the rest of the package may know about a model, whichever model it is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from hess.attention.layout import TokenLayout
from hess.geometry.image_fit import FitRule


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Output of one forward pass over B scenes of N views of H x W pixels.

    World coordinates are those of the model's reference frame, in its own scale. All tensors are
    differentiable with respect to the model's weights.

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


class Model(nn.Module, ABC):
    """A feed-forward multi-view geometry model with global attention.

    Attributes:
        model_name: the name under which ``load_model`` found it.
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

    def token_layout(self, images: Tensor) -> TokenLayout:
        """Token layout of ``images`` [..., N, 3, H, W]; H and W are multiples of the patch."""
        num_views, _, height, width = images.shape[-4:]
        return TokenLayout(
            num_views=num_views,
            grid_h=height // self.patch_size,
            grid_w=width // self.patch_size,
            num_special=self.num_special,
        )
