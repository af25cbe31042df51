"""What was made last, kept for whoever asks again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class Recent(Generic[V]):
    """At most so many values by their keys; the one asked for longest ago is forgotten before another is made."""

    def __init__(self, most: int):
        self.most, self.values = most, dict[Hashable, V]()

    def ask(self, key: Hashable, make: Callable[[], V]) -> V:
        if key not in self.values:
            if len(self.values) >= self.most:
                del self.values[next(iter(self.values))]
            self.values[key] = make()
        self.values[key] = self.values.pop(key)
        return self.values[key]
