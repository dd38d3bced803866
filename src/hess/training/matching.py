"""Optional loss that makes all layers tell where patches are, whichever model they belong to."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MatchingLoss(nn.Module):
    """Patches that see the same place should have similar descriptors, in every layer.

    Stands in for VGGT's tracking loss. One linear descriptor per block pair; InfoNCE over all
    patches of other views, with soft targets from the distance of the patches' mean points. It
    weighs all layers alike, so it does not choose where the model does its matching.

    Args:
        dim: width of the tokens.
        num_layers: block pairs.
        descriptor_dim: width of a descriptor.
        radius: distance (mean point distance is 1) over which matches fade.
    """

    def __init__(
        self, dim: int, num_layers: int, *, descriptor_dim: int = 32, radius: float = 0.1
    ) -> None:
        super().__init__()
        self.radius = radius
        self.describe = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, descriptor_dim))
            for _ in range(num_layers)
        )
        self.log_temperature = nn.Parameter(torch.full((num_layers,), 2.3))

    def forward(self, layers: list[Tensor], points: Tensor) -> Tensor:
        """Mean loss over the layers.

        Args:
            layers: patch tokens per block pair, [B, N, P, dim].
            points: mean world point per patch, [B, N, P, 3].
        """
        batch, num_views, patches, _ = points.shape
        flat = points.flatten(1, 2)
        squared = torch.cdist(flat, flat).square()
        view = torch.arange(num_views, device=points.device).repeat_interleave(patches)
        same_view = view[:, None] == view[None]
        target = (squared / (-2 * self.radius**2)).masked_fill(same_view, -1e4).softmax(-1)
        nearest = squared.masked_fill(same_view, torch.inf).amin(-1)
        has_match = (nearest < (2 * self.radius) ** 2).float()
        total = points.new_zeros(())
        for i, tokens in enumerate(layers):
            descriptor = self.describe[i](tokens).float().view(batch, num_views * patches, -1)
            descriptor = F.normalize(descriptor, dim=-1)
            logits = descriptor @ descriptor.mT * self.log_temperature[i].exp()
            log_prob = logits.masked_fill(same_view, -1e4).log_softmax(-1)
            entropy = -(target * log_prob).sum(-1)
            total = total + (entropy * has_match).sum() / has_match.sum().clamp_min(1)
        return total / len(layers)
