"""A cache of the most recently used values."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class LRU(Generic[V]):
    """At most `capacity` values by key; the least recently used is evicted before a new one is made."""

    def __init__(self, capacity: int):
        self.capacity, self.values = capacity, dict[Hashable, V]()

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        if key not in self.values:
            if len(self.values) >= self.capacity:
                del self.values[next(iter(self.values))]
            self.values[key] = make()
        self.values[key] = self.values.pop(key)
        return self.values[key]
