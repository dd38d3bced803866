"""Traces of the empirical Fisher matrix of every head's query, key and value projection."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hess.attention.layout import TokenLayout
from hess.errors import ConfigError, LayoutError
from hess.models.base import GlobalAttentionSite, Model

PROJECTIONS = ("query", "key", "value")


@dataclass(frozen=True, kw_only=True)
class FisherTraces:
    """Squared gradient norms of one error in one scene, float64 on the CPU.

    Args:
        traces: ``|grad_W e|^2`` for W = W_Q^h, W_K^h, W_V^h: [projection, layer, head].
        patch_traces: the same for W_Q^h with the gradient that comes from patch-query rows
            alone, the only rows that sparsification changes: [layer, head].
    """

    traces: Tensor
    patch_traces: Tensor


class _Tap(torch.autograd.Function):
    """Identity on the output of a layer; shows its input and the passing gradient to ``measure``.

    The input is saved through autograd, so that activation checkpointing makes it anew instead of
    holding it. ``switch`` requires a gradient, so that the graph starts at the first tap although
    no weight requires one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        inputs: Tensor,
        switch: Tensor,
        measure: Callable[[Tensor, Tensor], None],
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.measure = measure
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, None]:
        (inputs,) = ctx.saved_tensors
        ctx.measure(inputs, gradient)
        return gradient, None, gradient.new_zeros(()), None


class FisherProbe:
    """Records one forward pass and turns scalar errors of it into traces.

    Made by :func:`fisher_probe`. Per scene: run the model, then call :meth:`traces` once for
    each error, the last time with ``last=True``.

    No weight gradient is stored: each is made from the input of its layer and the gradient of its
    output when the backward pass comes by, reduced to its squared norms, and dropped.
    """

    def __init__(self, model: Model) -> None:
        self._layers = qkv_layers(model)
        self._num_heads = model.num_heads
        self._switch = torch.zeros((), device=self._layers[0].weight.device, requires_grad=True)
        self._runs: list[list[torch.Size]] = [[] for _ in self._layers]
        self._measurement: _Measurement | None = None

    @contextmanager
    def _recording(self) -> Iterator[None]:
        handles = [
            layer.register_forward_hook(partial(self._record, index))
            for index, layer in enumerate(self._layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.clear()

    def clear(self) -> None:
        """Forget the recorded forward pass."""
        for runs in self._runs:
            runs.clear()

    def traces(self, error: Tensor, layout: TokenLayout, *, last: bool) -> FisherTraces:
        """Traces of ``error``, a differentiable scalar of the recorded forward pass (Eq. 5-6).

        A site that the error does not depend on gets exactly zero.

        Args:
            error: scalar.
            layout: token order of the scene, which tells patch rows.
            last: whether the graph may be freed; the record is cleared with it.

        Raises:
            ConfigError: the error does not depend on the recorded forward pass.
            LayoutError: a site did not run exactly once, for one scene, in this layout.
        """
        if not error.requires_grad:
            raise ConfigError(
                "the error has no gradient: run the forward pass inside fisher_probe, with "
                "gradients enabled"
            )
        for index, shapes in enumerate(self._runs):
            if len(shapes) != 1 or len(shapes[0]) != 3 or shapes[0][0] != 1:
                raise LayoutError(
                    f"global layer {index} must run once per forward, for one scene [1, tokens, "
                    f"3*C]; found outputs {[tuple(shape) for shape in shapes]}"
                )
            layout.check(torch.empty(shapes[0], device="meta"))
        measurement = _Measurement(
            len(self._layers), self._num_heads, layout.patch_index.to(self._switch.device)
        )
        self._measurement = measurement
        try:
            (reached,) = torch.autograd.grad(
                error, self._switch, retain_graph=not last, allow_unused=True
            )
        finally:
            self._measurement = None
        if reached is None:
            raise ConfigError(
                "the error depends on no global layer: make it from the predictions of the "
                "forward pass inside fisher_probe"
            )
        if last:
            self.clear()
        return FisherTraces(
            traces=measurement.traces.cpu(), patch_traces=measurement.patch_traces.cpu()
        )

    def _record(
        self, index: int, _layer: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        # Activation checkpointing runs the layer again during the backward pass; that is no
        # second run.
        if self._measurement is None:
            self._runs[index].append(output.shape)
        measure = partial(self._measure, index)
        tapped: Tensor = _Tap.apply(output, args[0], self._switch, measure)
        return tapped

    def _measure(self, index: int, inputs: Tensor, gradient: Tensor) -> None:
        if self._measurement is not None:
            self._measurement.enter(index, inputs, gradient)


class _Measurement:
    """The traces of one error, entered layer by layer while its backward pass runs."""

    def __init__(self, num_layers: int, num_heads: int, rows: Tensor) -> None:
        self.num_heads = num_heads
        self.rows = rows
        zeros = partial(torch.zeros, dtype=torch.float64, device=rows.device)
        self.traces = zeros(len(PROJECTIONS), num_layers, num_heads)
        self.patch_traces = zeros(num_layers, num_heads)

    def enter(self, index: int, inputs: Tensor, gradient: Tensor) -> None:
        """Measure a layer from its ``inputs`` [1, S, C] and its output's ``gradient``."""
        x, g = inputs[0].to(gradient.dtype), gradient[0]
        self.traces[:, index] = _squared_norms(g.mT @ x, 3, self.num_heads)
        query = g[self.rows, : g.shape[1] // 3]
        self.patch_traces[index] = _squared_norms(query.mT @ x[self.rows], 1, self.num_heads)


@contextmanager
def fisher_probe(model: Model, *, recompute: bool = True) -> Iterator[FisherProbe]:
    """Prepare ``model`` for calibration and undo all of it afterwards.

    Inside: evaluation mode, at least float32 (half-precision parameters and buffers are widened
    in place), gradients on but required by no parameter. What comes before the first global layer
    records no graph.

    Args:
        recompute: make the activations of blocks and heads anew in the backward pass instead of
            holding them; the traces are the same.

    Raises:
        ConfigError: the model has no global attention sites.
        LayoutError: a site has no fused ``qkv`` layer.
    """
    probe = FisherProbe(model)
    tensors = [*model.parameters(), *model.buffers()]
    dtypes = [t.dtype for t in tensors]
    requires_grad = [(p, p.requires_grad) for p in model.parameters()]
    training = [(m, m.training) for m in model.modules()]
    recompute_before = model.recompute
    try:
        model.eval()
        model.recompute = recompute
        model.requires_grad_(False)
        for tensor in tensors:
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = tensor.data.float()
        with probe._recording(), torch.enable_grad():
            yield probe
    finally:
        model.recompute = recompute_before
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            if tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)
        for module, mode in training:
            module.training = mode


@torch.no_grad()
def weight_norms(model: Model) -> Tensor:
    """``|W_Q^h|^2``, ``|W_K^h|^2``, ``|W_V^h|^2``: float64 [projection, layer, head].

    With QK-norm the trace scales as the inverse of these, so ``trace * norm`` does not depend on
    the scale of a head's weights.
    """
    norms = [_squared_norms(layer.weight, 3, model.num_heads) for layer in qkv_layers(model)]
    return torch.stack(norms, dim=1).cpu()


def qkv_layers(model: Model) -> list[nn.Linear]:
    """Fused projection of every global layer; its rows are query, key, value, head by head.

    Raises:
        ConfigError: the model has no global attention sites.
        LayoutError: a site has no such layer.
    """
    sites = model.global_attention_sites()
    if not sites:
        raise ConfigError("the model declares no global attention sites: nothing to calibrate")
    return [_qkv_layer(site, model.num_heads) for site in sites]


def _qkv_layer(site: GlobalAttentionSite, num_heads: int) -> nn.Linear:
    linear = getattr(site.module, "qkv", None)
    if not isinstance(linear, nn.Linear) or linear.out_features % (3 * num_heads):
        raise LayoutError(
            f"global layer {site.layer_idx} ({type(site.module).__name__}) needs a fused linear "
            f"layer 'qkv' with 3 * {num_heads} * head_dim rows, found {linear}"
        )
    return linear


def _squared_norms(weight: Tensor, projections: int, num_heads: int) -> Tensor:
    """[projection, head] squared norms of the slices of [projections * heads * head_dim, C]."""
    slices = weight.double().unflatten(0, (projections, num_heads, -1))
    return slices.square().sum((2, 3))
