"""A reversible swap of the global attentions of a model."""

from collections.abc import Collection
from types import TracebackType
from typing import Self

from torch import nn

from hess.errors import AlreadySparsifiedError, ConfigError, HessError
from hess.models.base import GlobalAttentionSite, Model
from hess.models.layers import Attention


class StandIn(nn.Module):
    """Stands in for a global :class:`Attention`; shares its submodules, so its weights.

    Subclasses compute the attention their way, from ``dense.project`` to ``dense.merge``.
    """

    def __init__(self, dense: Attention) -> None:
        super().__init__()
        for name, child in dense.named_children():
            self.add_module(name, child)
        self.training = dense.training
        # In a tuple, so that it is no submodule and adds no keys to the state dict.
        self._dense = (dense,)

    @property
    def dense(self) -> Attention:
        """The attention that this one replaces."""
        return self._dense[0]


class Swap:
    """Attentions replaced by others: back on leaving the ``with`` block or after :meth:`restore`.

    Weights and state-dict keys stay, and restoring puts the very same modules back.

    Args:
        replacements: sites and what shall stand there from now on.
    """

    def __init__(self, replacements: Collection[tuple[GlobalAttentionSite, StandIn]]) -> None:
        self._replaced = list(replacements)
        for site, stand_in in self._replaced:
            setattr(site.parent, site.attribute, stand_in)

    def restore(self) -> None:
        """Put the dense attentions back. Doing it again changes nothing."""
        while self._replaced:
            site, stand_in = self._replaced.pop()
            stand_in.dense.training = stand_in.training
            setattr(site.parent, site.attribute, stand_in.dense)

    def __enter__(self) -> Self:
        if not self._replaced:
            raise HessError(
                "this run has been restored; call sparsify() or the transform's apply() again"
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def check_dense(model: Model) -> None:
    """Raise :class:`AlreadySparsifiedError` if a global attention of ``model`` is replaced."""
    if any(isinstance(site.module, StandIn) for site in model.global_attention_sites()):
        raise AlreadySparsifiedError(
            "this needs the dense model, but the model is sparsified already; leave the first "
            "sparsify() or transform, or call its restore()"
        )


def dense_sites(
    model: Model, layers: Collection[int] | None = None
) -> list[tuple[GlobalAttentionSite, Attention]]:
    """The global attentions that may be replaced, in execution order.

    Args:
        model: none of its attentions may be replaced already.
        layers: global layers, from 0; None: all.

    Raises:
        AlreadySparsifiedError: an attention of the model is replaced already.
        ConfigError: an unknown layer, none at all, or one that is no :class:`Attention`.
    """
    check_dense(model)
    sites = model.global_attention_sites()
    chosen = set(range(len(sites)) if layers is None else layers)
    if not chosen or not chosen <= set(range(len(sites))):
        raise ConfigError(
            f"layers must name at least one of the global layers 0 to {len(sites) - 1}, "
            f"found {sorted(chosen)}"
        )
    found = []
    for site in sites:
        if site.layer_idx in chosen:
            if not isinstance(site.module, Attention):
                raise ConfigError(
                    f"global layer {site.layer_idx} must be an Attention, found "
                    f"{type(site.module)}"
                )
            found.append((site, site.module))
    return found
