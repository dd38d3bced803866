"""What a model transform is, and one way to put any method, policy or transform, to work."""

from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol, runtime_checkable

from hess.errors import ConfigError
from hess.models.base import GlobalAttentionSite, Model
from hess.models.swap import StandIn, Swap
from hess.policies.base import Policy
from hess.sparsification import SparsityStats, sparsify


class Applied(Protocol):
    """A model with a method at work in it.

    Attributes:
        stats: what was dropped so far.
    """

    stats: SparsityStats


@runtime_checkable
class Transform(Protocol):
    """A way to save attention that is no choice of blocks, so no :class:`Policy`."""

    name: ClassVar[str]

    def settings(self) -> dict[str, object]:
        """All parameters that shape the outputs, as JSON values for reports."""
        ...

    def check_model(self, model: Model) -> None:
        """Raise ``ProfileError`` or ``ConfigError`` if the transform does not fit ``model``."""
        ...

    def apply(self, model: Model) -> AbstractContextManager[Applied]:
        """Change ``model`` until the context is left; then it is bit-identical to before.

        Raises:
            AlreadySparsifiedError: another method is at work in the model.
        """
        ...


Method = Policy | Transform


class TransformRun(Swap):
    """A transformed model: as before on leaving the ``with`` block or after ``restore()``.

    Attributes:
        stats: what was dropped so far.
    """

    def __init__(
        self,
        replacements: Collection[tuple[GlobalAttentionSite, StandIn]],
        stats: SparsityStats,
    ) -> None:
        super().__init__(replacements)
        self.stats = stats


def applied(
    model: Model,
    method: Method,
    *,
    layers: Collection[int] | None = None,
    dense_below: int = 0,
    **block_options: Any,
) -> AbstractContextManager[Applied]:
    """``model`` with ``method`` at work in it, whichever kind it is.

    Args:
        model: changed in place until the context is left.
        method: a policy is put to work by :func:`sparsify`, a transform by its ``apply``.
        layers, dense_below: as for :func:`sparsify`; for policies only.
        block_options: its options that say how block masks are made and computed (block sizes,
            backend). They mean nothing to a transform.

    Raises:
        ConfigError: ``layers`` or ``dense_below`` for a transform, which it would not heed.
        HessError: what :func:`sparsify` or the transform raises.
    """
    if not isinstance(method, Transform):
        return sparsify(model, method, layers=layers, dense_below=dense_below, **block_options)
    if layers is not None or dense_below != 0:
        raise ConfigError(
            f"layers and dense_below are for block-sparse policies; transform {method.name!r} "
            f"would not heed them, found layers={layers}, dense_below={dense_below}"
        )
    method.check_model(model)
    return method.apply(model)
