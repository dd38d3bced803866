"""Bytes of all tensors alive at once, counted op by op: the twin that checks the estimate."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside a ``with`` block, count the bytes of every tensor that is made and still alive.

    Counts storages, so a view costs nothing, on any device ("meta" too, which needs no memory).
    Exact and the same on every machine; what a kernel allocates and frees within one call is not
    seen, nor what an allocator keeps for later.

    Attributes:
        current: bytes alive now that were made inside the block.
        peak: the most there has been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        inputs = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if _is_tensor(x)}
        result = func(*args, **kwargs)
        for tensor in filter(_is_tensor, tree_leaves(result)):
            if id(tensor.untyped_storage()) not in inputs:
                self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; storages that several share count once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({id(s): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def peak_live_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Weights of ``model`` plus the peak of what ``run`` makes beside them."""
    with LiveBytes() as live:
        run()
    return weight_bytes(model) + live.peak
