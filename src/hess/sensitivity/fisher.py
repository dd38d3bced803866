"""Traces of the empirical Fisher matrix of every head's query, key and value projection."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class _Tap:
    """Inputs and outputs of one site's ``qkv`` layer during the forward pass."""

    linear: nn.Linear
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


class FisherProbe:
    """Records one forward pass and turns scalar errors of it into traces.

    Made by :func:`fisher_probe`. Per scene: run the model, then call :meth:`traces` once for
    each error, the last time with ``last=True``.
    """

    def __init__(self, model: Model) -> None:
        self._num_heads = model.num_heads
        self._taps = [_Tap(layer) for layer in qkv_layers(model)]

    @contextmanager
    def _recording(self) -> Iterator[None]:
        handles = [tap.linear.register_forward_hook(_recorder(tap)) for tap in self._taps]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.clear()

    def clear(self) -> None:
        """Forget the recorded forward pass."""
        for tap in self._taps:
            tap.inputs.clear()
            tap.outputs.clear()

    def traces(self, error: Tensor, layout: TokenLayout, *, last: bool) -> FisherTraces:
        """Traces of ``error``, a differentiable scalar of the recorded forward pass (Eq. 5-6).

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
        for layer, tap in enumerate(self._taps):
            if len(tap.outputs) != 1 or tap.outputs[0].ndim != 3 or len(tap.outputs[0]) != 1:
                found = [tuple(x.shape) for x in tap.outputs]
                raise LayoutError(
                    f"global layer {layer} must run once per forward, for one scene [1, tokens, "
                    f"3*C]; found outputs {found}"
                )
            layout.check(tap.outputs[0])
        weights = [tap.linear.weight for tap in self._taps]
        outputs = [tap.outputs[0] for tap in self._taps]
        # An error that a site cannot reach has a gradient of exactly zero there.
        gradients = torch.autograd.grad(
            error, [*weights, *outputs], retain_graph=not last, materialize_grads=True
        )
        rows = layout.patch_index.to(error.device)
        traces, patch_traces = [], []
        for tap, weight_grad, output_grad in zip(
            self._taps, gradients[: len(weights)], gradients[len(weights) :], strict=True
        ):
            traces.append(_squared_norms(weight_grad, self._num_heads))
            query_grad = output_grad[0, rows, : output_grad.shape[-1] // 3]
            patch_grad = query_grad.mT @ tap.inputs[0][0, rows]
            patch_traces.append(patch_grad.double().unflatten(0, (self._num_heads, -1)))
        if last:
            self.clear()
        return FisherTraces(
            traces=torch.stack(traces, dim=1).cpu(),
            patch_traces=torch.stack([g.square().sum((1, 2)) for g in patch_traces]).cpu(),
        )


@contextmanager
def fisher_probe(model: Model) -> Iterator[FisherProbe]:
    """Prepare ``model`` for calibration and undo all of it afterwards.

    Inside: evaluation mode, at least float32 (half-precision parameters and buffers are widened
    in place), gradients on, and ``requires_grad`` for the global sites' ``qkv`` weights only.

    Raises:
        ConfigError: the model has no global attention sites.
        LayoutError: a site has no fused ``qkv`` layer.
    """
    probe = FisherProbe(model)
    tensors = [*model.parameters(), *model.buffers()]
    dtypes = [t.dtype for t in tensors]
    requires_grad = [(p, p.requires_grad) for p in model.parameters()]
    training = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for tensor in tensors:
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = tensor.data.float()
        model.requires_grad_(False)
        for layer in qkv_layers(model):
            layer.weight.requires_grad_(True)
        with probe._recording(), torch.enable_grad():
            yield probe
    finally:
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
    norms = [_squared_norms(layer.weight, model.num_heads) for layer in qkv_layers(model)]
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


def _recorder(tap: _Tap) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def record(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        tap.inputs.append(args[0].detach())
        tap.outputs.append(output)

    return record


def _squared_norms(qkv_weight: Tensor, num_heads: int) -> Tensor:
    """[projection, head] squared norms of the head slices of [3 * heads * head_dim, C]."""
    slices = qkv_weight.double().unflatten(0, (3, num_heads, -1))
    return slices.square().sum((2, 3))
