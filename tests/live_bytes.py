"""How much memory the results of torch operations hold, on any device."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made inside the ``with`` block and still in use, and their peak.

    Memory that an operation takes and frees inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        before = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if _is_tensor(t)}
        for tensor in filter(_is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            place, size = storage.data_ptr(), storage.nbytes()
            if place in self._holders or place not in before:
                self._hold(tensor, place, size)
        return result

    def _hold(self, tensor: Tensor, place: int, size: int) -> None:
        if place not in self._holders:
            self._holders[place] = 0
            self.now += size
            self.peak = max(self.peak, self.now)
        self._holders[place] += 1
        weakref.finalize(tensor, self._release, place, size)

    def _release(self, place: int, size: int) -> None:
        self._holders[place] -= 1
        if not self._holders[place]:
            del self._holders[place]
            self.now -= size


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes() > 0
