"""One name, one object; unknown and taken names are errors that help."""

from __future__ import annotations

import pytest

from llava_moe.registry import Registry, RegistryError, near_misses


def make() -> Registry[int]:
    registry: Registry[int] = Registry("number")
    registry.register("three", 3)
    registry.register("seven", 7)
    return registry


def test_names_keep_their_order_and_objects() -> None:
    registry = make()
    assert registry.names() == list(registry) == ["three", "seven"]
    assert registry.get("seven") == 7
    assert len(registry) == 2
    assert "three" in registry
    assert "Three" not in registry


def test_register_as_decorator_returns_the_object() -> None:
    registry: Registry[type] = Registry("class")

    @registry.register("mine")
    class Mine:
        pass

    assert registry.get("mine") is Mine


def test_unknown_name_lists_near_misses() -> None:
    with pytest.raises(RegistryError, match="unknown number 'sevn'; did you mean 'seven'"):
        make().get("sevn")


def test_far_off_name_lists_everything() -> None:
    with pytest.raises(RegistryError, match="unknown number 'xyz'; known: seven, three"):
        make().get("xyz")


def test_empty_registry_says_so() -> None:
    with pytest.raises(RegistryError, match="known: none"):
        Registry("thing").get("a")


def test_taken_name_is_refused_and_keeps_the_first() -> None:
    registry = make()
    with pytest.raises(RegistryError, match="number 'three' is registered twice"):
        registry.register("three", 33)
    with pytest.raises(RegistryError, match="registered twice"):
        registry.register("three")(33)
    assert registry.get("three") == 3


def test_registry_error_is_a_value_error() -> None:
    """The command line turns ValueErrors into one line and exit code 2."""
    assert issubclass(RegistryError, ValueError)


def test_near_misses_offers_at_most_three() -> None:
    known = [f"alpha{i}" for i in range(9)]
    assert near_misses("alpha", known).count("'") == 6
