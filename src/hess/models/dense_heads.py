"""Heads that turn tokens into a value and a confidence per pixel: DPT (VGGT's) and linear."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hess.models.aggregator import PairTokens
from hess.models.layers import Mlp, over_views

Activation = Literal["inv_log", "exp"]


def activate(raw: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Split the last channel off as confidence and map both to their ranges.

    Args:
        raw: [..., channels + 1].
        activation: "inv_log" gives sign(x) (e^|x| - 1), for points; "exp" gives e^x, for depth.

    Returns:
        value [..., channels] and confidence 1 + e^x [...], which is greater than 1.
    """
    value, confidence = raw[..., :-1], 1 + raw[..., -1].exp()
    if activation == "exp":
        return value.exp(), confidence
    return value.sign() * value.abs().expm1(), confidence


def predict_views(
    raw: Callable[[list[Tensor]], Tensor],
    activation: Activation,
    pairs: Sequence[PairTokens],
    num_special: int,
    *,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    """Run a head over chunks of views: what it holds in between does not grow with their number.

    Args:
        raw: from the patch tokens of the pairs, frame and global in turns, each [views, patches,
            dim], to [views, H, W, channels + 1].

    Returns:
        value [B, N, H, W, channels] and confidence [B, N, H, W].
    """

    def run(*tokens: Tensor) -> tuple[Tensor, Tensor]:
        return activate(raw([x[:, num_special:] for x in tokens]), activation)

    tokens = [x.flatten(0, 1) for pair in pairs for x in pair]
    value, confidence = over_views(run, *tokens, recompute=recompute)
    views = pairs[0][0].shape[:2]
    return value.unflatten(0, views), confidence.unflatten(0, views)


class LinearHead(nn.Module):
    """A two-layer MLP per token whose outputs are the pixels of its patch.

    Far lighter than DPT and, on small images, as good.

    Args:
        dim: width of the incoming tokens.
        layers: block pairs to read.
        channels: values per pixel, without the confidence.
        patch_size: side of a patch in pixels.
        activation: see :func:`activate`.
    """

    def __init__(
        self,
        dim: int,
        *,
        layers: Sequence[int],
        channels: int,
        patch_size: int,
        activation: Activation,
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.patch_size = patch_size
        self.activation: Activation = activation
        self.norm = nn.LayerNorm(dim * len(self.layers))
        self.mlp = Mlp(dim * len(self.layers), dim, (channels + 1) * patch_size**2)

    def forward(
        self,
        tokens: Mapping[int, PairTokens],
        num_special: int,
        height: int,
        width: int,
        *,
        recompute: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`DPTHead.forward`."""
        p = self.patch_size

        def raw(tokens: list[Tensor]) -> Tensor:
            x = self.mlp(self.norm(torch.cat(tokens, dim=-1))).float()
            x = x.unflatten(-1, (p, p, -1)).unflatten(1, (height // p, width // p))
            return x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)

        pairs = [tokens[i] for i in self.layers]
        return predict_views(raw, self.activation, pairs, num_special, recompute=recompute)


class DPTHead(nn.Module):
    """Dense prediction transformer head (Ranftl et al. 2021) as VGGT uses it.

    Args:
        dim: width of the incoming tokens.
        layers: four block pairs to read, from shallow to deep.
        channels: values per pixel, without the confidence.
        patch_size: side of a patch in pixels.
        activation: see :func:`activate`.
        features: width of the fusion path.
        out_channels: width of each of the four projected levels.
    """

    def __init__(
        self,
        dim: int,
        *,
        layers: Sequence[int],
        channels: int,
        patch_size: int,
        activation: Activation,
        features: int = 256,
        out_channels: Sequence[int] = (256, 512, 1024, 1024),
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.patch_size = patch_size
        self.activation: Activation = activation
        self.features = features
        self.out_channels = c1, c2, c3, c4 = tuple(out_channels)
        self.norm = nn.LayerNorm(dim)
        self.projects = nn.ModuleList(nn.Conv2d(dim, c, 1) for c in out_channels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(c1, c1, kernel_size=4, stride=4),
                nn.ConvTranspose2d(c2, c2, kernel_size=2, stride=2),
                nn.Identity(),
                nn.Conv2d(c4, c4, kernel_size=3, stride=2, padding=1),
            ]
        )
        self.scratch = _Fusion(features, (c1, c2, c3, c4), channels + 1)

    def forward(
        self,
        tokens: Mapping[int, PairTokens],
        num_special: int,
        height: int,
        width: int,
        *,
        recompute: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Dense prediction.

        Args:
            tokens: per block pair, specials first.
            num_special: special tokens per view.
            height, width: image size in pixels.
            recompute: make activations anew in the backward pass, see :func:`over_views`.

        Returns:
            value [B, N, H, W, channels] and confidence [B, N, H, W].
        """
        grid = height // self.patch_size, width // self.patch_size
        aspect_ratio, like = width / height, self.norm.weight
        level_codes = [position_code(c, *grid, aspect_ratio, like) for c in self.out_channels]
        pixel_code = position_code(self.features // 2, height, width, aspect_ratio, like)

        def raw(tokens: list[Tensor]) -> Tensor:
            levels = []
            for i, (project, resize) in enumerate(
                zip(self.projects, self.resize_layers, strict=True)
            ):
                x = self.norm(torch.cat(tokens[2 * i : 2 * i + 2], dim=-1))
                x = project(x.transpose(1, 2).unflatten(2, grid)) + level_codes[i]
                levels.append(resize(x))
            x = self.scratch.fuse(levels)
            x = F.interpolate(x, size=(height, width), mode="bilinear", align_corners=True)
            x += pixel_code
            return self.scratch.output_conv2(x).permute(0, 2, 3, 1)

        pairs = [tokens[i] for i in self.layers]
        return predict_views(raw, self.activation, pairs, num_special, recompute=recompute)


class _Fusion(nn.Module):
    """The coarse-to-fine path of DPT; named ``scratch`` in the checkpoints."""

    def __init__(self, features: int, channels: Sequence[int], out: int) -> None:
        super().__init__()
        for i, c in enumerate(channels, start=1):
            self.add_module(f"layer{i}_rn", nn.Conv2d(c, features, 3, padding=1, bias=False))
            # The coarsest level has no finer-level skip to fold in.
            self.add_module(f"refinenet{i}", _FusionBlock(features, with_skip=i < len(channels)))
        self.num_levels = len(channels)
        self.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, out, 1)
        )

    def fuse(self, levels: Sequence[Tensor]) -> Tensor:
        skips = [self.get_submodule(f"layer{i}_rn")(x) for i, x in enumerate(levels, start=1)]
        x = None
        for i in range(self.num_levels, 0, -1):
            size = skips[i - 2].shape[-2:] if i > 1 else [2 * s for s in skips[0].shape[-2:]]
            x = self.get_submodule(f"refinenet{i}")(x, skips[i - 1], size)
        return self.output_conv1(x)


class _FusionBlock(nn.Module):
    def __init__(self, features: int, *, with_skip: bool) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(features, features, 1)
        if with_skip:
            self.resConfUnit1 = _ResidualConv(features)
        self.resConfUnit2 = _ResidualConv(features)

    def forward(self, x: Tensor | None, skip: Tensor, size: Sequence[int]) -> Tensor:
        x = skip if x is None else x + self.resConfUnit1(skip)
        x = self.resConfUnit2(x)
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
        return self.out_conv(x)


class _ResidualConv(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # The public model's in-place ReLU also rectifies the shortcut; its weights rely on that.
        x = x.relu()
        return x + self.conv2(self.conv1(x).relu())


def position_code(
    channels: int,
    height: int,
    width: int,
    aspect_ratio: float,
    like: Tensor,
    ratio: float = 0.1,
) -> Tensor:
    """``ratio`` times a sine-cosine code of a pixel's place on the image plane: [channels, H, W].

    Coordinates span the image with unit half-diagonal, so that aspect ratios are comparable. The
    type and the device are those of ``like``.
    """
    diagonal = (aspect_ratio**2 + 1) ** 0.5
    exponent = torch.arange(channels // 4, device=like.device, dtype=torch.float64)
    frequency = 100.0 ** -(exponent / (channels // 4))
    codes = []
    for count, span in ((width, aspect_ratio / diagonal), (height, 1 / diagonal)):
        edge = span * (count - 1) / count
        axis = torch.linspace(-edge, edge, count, device=like.device, dtype=torch.float32)
        angle = frequency[:, None] * axis.double()
        codes.append(torch.cat([angle.sin(), angle.cos()]).to(like.dtype))
    horizontal = codes[0][:, None, :].expand(-1, height, -1)
    vertical = codes[1][:, :, None].expand(-1, -1, width)
    return ratio * torch.cat([horizontal, vertical])
