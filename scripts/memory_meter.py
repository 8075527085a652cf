"""How much tensor memory a piece of code holds at most, counted storage by storage as operations create them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryMeter(TorchDispatchMode):
    """Inside the ``with`` block: bytes of storages made there that live now, and the most that ever lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then count what is new in its result."""
        before = {id(s) for leaf in tree_leaves((args, kwargs)) if (s := _storage(leaf)) is not None}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            storage = _storage(leaf)
            if storage is not None and id(storage) not in self._seen and id(storage) not in before:
                self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _storage(value: Any) -> Any:
    return value.untyped_storage() if isinstance(value, torch.Tensor) else None
