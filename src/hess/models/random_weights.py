"""Random weights for a model on the meta device: full size without a download."""

import torch

from hess.models.aggregator import IMAGE_MEAN, IMAGE_STD
from hess.models.base import Model
from hess.models.layers import LayerScale, use_precision

_POOL = 2**20 + 7  # odd, so that rows of a matrix do not repeat
_BUFFERS = {"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}


def fill_randomly(
    model: Model,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layer_scale: float = 0.01,
) -> Model:
    """Give ``model``, which is on the meta device, small random weights.

    What it computes means nothing; memory and time are those of the real one. Each tensor is made
    in its final precision, so no second copy is needed. Matrices and tokens are cut from one pool
    of normal numbers (standard deviation 0.02), norms are 1, biases 0.

    Args:
        model: changed in place and returned, in evaluation mode.
        seed: of the pool.
        dtype: precision, as in ``load_model``.
        device: where the weights live.
        layer_scale: the value of every LayerScale.
    """
    use_precision(model, model.backbone_parts(), dtype)
    model.to_empty(device=device)
    generator = torch.Generator().manual_seed(seed)
    pool = (torch.randn(_POOL, generator=generator) * 0.02).to(device)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = parameter.detach().view(-1)
            if isinstance(module, LayerScale):
                values.fill_(layer_scale)
            elif parameter.ndim == 1:
                values.fill_(1.0 if name == "weight" else 0.0)
            else:
                for piece in values.split(_POOL):
                    piece.copy_(pool[: len(piece)])
        for name, buffer in module.named_buffers(recurse=False):
            buffer.copy_(torch.tensor(_BUFFERS[name]).view_as(buffer))
    return model.eval().requires_grad_(False)
