"""How much faster a model gets if attention blocks are dropped, predicted for this machine."""

from collections.abc import Sequence
from functools import partial

import torch

from hess.footprint.estimate import estimate_footprint
from hess.footprint.throughput import measure_throughput
from hess.models.base import Model


def predict_speedups(
    model: Model, *, num_views: int, height: int, width: int, sparsities: Sequence[float]
) -> list[float]:
    """Time of the dense model over that at each block sparsity.

    Takes some seconds: the machine is measured. Sparse attention counts as if it were as fast per
    operation as dense attention, which docs/performance.md compares.

    Args:
        model: its weights say the device and the precision.
        num_views, height, width: the input.
        sparsities: dropped shares of the attention map, in [0, 1].

    Raises:
        ConfigError, LayoutError: as :func:`estimate_footprint`.
    """
    estimate = partial(estimate_footprint, model, num_views=num_views, height=height, width=width)
    dense = estimate()
    sparse = [estimate(block_sparsity=share) for share in sparsities]
    device = next(model.parameters()).device
    dtypes: set[torch.dtype] = {work.dtype for work in dense.work if work.flops}
    throughput = {dtype: measure_throughput(device, dtype) for dtype in dtypes}
    return [dense.seconds(throughput) / each.seconds(throughput) for each in sparse]
