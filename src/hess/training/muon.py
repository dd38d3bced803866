"""Muon (Jordan et al. 2024): momentum, made orthogonal before it is applied."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximate U Vᵀ of each matrix [..., r, c] by a quintic Newton-Schulz iteration.

    Runs in bfloat16; singular values end between about 0.7 and 1.2, which is close enough.
    """
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon over matrices, all of one shape at a time.

    A matrix of three times as many rows as columns is taken for a fused query-key-value weight
    and its three parts are orthogonalised separately.

    Args:
        matrices: two-dimensional parameters.
        lr: step length; the update of a square matrix has spectral norm about 1.
        momentum: of the Nesterov average of gradients.
        weight_decay: decoupled, times ``lr``.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        by_shape = defaultdict(list)
        for matrix in matrices:
            by_shape[tuple(matrix.shape)].append(matrix)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([{"params": group} for group in by_shape.values()], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = group["params"]
            rows, columns = parameters[0].shape
            state = self.state[parameters[0]]
            gradients = torch.stack([p.grad for p in parameters])
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradients)
            average = state["momentum"].lerp_(gradients, 1 - group["momentum"])
            update = gradients.lerp(average, group["momentum"])
            if rows == 3 * columns:
                parts = orthogonalise(update.unflatten(1, (3, columns)))
                update = parts.flatten(1, 2)
            else:
                update = orthogonalise(update) * max(1, rows / columns) ** 0.5
            for parameter, direction in zip(parameters, update, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction, alpha=-group["lr"])
