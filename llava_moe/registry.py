"""One exact-name registry for each idea that a recipe can name (routers, losses, projectors, templates, ...)."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, overload

T = TypeVar("T")


class RegistryError(ValueError):
    """An unknown name was asked for, or a taken name was registered again."""


def near_misses(name: str, known: list[str]) -> str:
    """A tail for error messages: the closest known names, or all of them when none is close."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {', '.join(repr(c) for c in close)}?"
    return f"known: {', '.join(sorted(known)) or 'none'}"


class Registry(Generic[T]):
    """Maps exact names to objects; the tests run over `names()`, so what is registered is tested.

    Example:
        >>> ROUTERS: Registry[type] = Registry("router")
        >>> ROUTERS.register("mine", dict)
        >>> ROUTERS.get("mine")
        <class 'dict'>
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    @overload
    def register(self, name: str, obj: T) -> T: ...

    @overload
    def register(self, name: str) -> Callable[[T], T]: ...

    def register(self, name: str, obj: T | None = None) -> T | Callable[[T], T]:
        """Adds `obj` under `name`; without `obj` it is a decorator.

        Raises:
            RegistryError: the name is taken.
        """
        if obj is None:
            return lambda decorated: self.register(name, decorated)
        if name in self._entries:
            raise RegistryError(f"{self.kind} {name!r} is registered twice; choose another name")
        self._entries[name] = obj
        return obj

    def get(self, name: str) -> T:
        """The object of that name.

        Raises:
            RegistryError: the name is unknown; the message lists the near misses.
        """
        if name not in self._entries:
            raise RegistryError(f"unknown {self.kind} {name!r}; {near_misses(name, self.names())}")
        return self._entries[name]

    def names(self) -> list[str]:
        """All names in the order of registration."""
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
