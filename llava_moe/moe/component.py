"""What every named part of this package has in common: a frozen `Config`, filled from the plain mapping of a recipe."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from llava_moe.registry import near_misses

C = TypeVar("C")


class Component:
    """A part that a recipe names; `kind` is how error messages call it."""

    kind: ClassVar[str] = "component"

    @dataclasses.dataclass(frozen=True)
    class Config:
        """The options that a recipe may set under `args`."""

    @classmethod
    def parse(cls, args: Mapping[str, Any]) -> Any:
        """This part's `Config` from a recipe's mapping.

        Raises:
            ValueError: an option is unknown, is missing, or has a value of another type than its default.
        """
        fields = {field.name: field for field in dataclasses.fields(cls.Config)}
        where = f"{cls.kind} {cls.__name__}"
        for key, value in args.items():
            if key not in fields:
                raise ValueError(f"{where} has no option {key!r}; {near_misses(key, list(fields))}")
            check_type(f"{where}: {key}", value, _hints(cls.Config)[key])
        for name, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and name not in args:
                raise ValueError(f"{where} needs the option {name!r}")
        return cls.Config(**{key: _tuples(value) for key, value in args.items()})


def check_type(where: str, value: Any, wanted: Any) -> None:
    """Looks at scalars only: an int passes for a float, nothing passes for a bool but a bool.

    Raises:
        ValueError: the value has another type.
    """
    options = typing.get_args(wanted) or (wanted,)
    scalars = {option for option in options if option in (bool, int, float, str, type(None))}
    if len(scalars) < len(options):
        return
    admitted = scalars | ({int} if float in scalars else set())
    if type(value) not in admitted:
        names = " or ".join(sorted("null" if s is type(None) else s.__name__ for s in scalars))
        raise ValueError(f"{where}={value!r} must be {names}")


def _hints(config: type[C]) -> dict[str, Any]:
    return typing.get_type_hints(config)


def _tuples(value: Any) -> Any:
    """Lists become tuples: a frozen config holds nothing that can be changed."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


class Float32Buffers(nn.Module):
    """Keeps the buffers named in `float32_buffers` in float32 when the model is cast to another dtype.

    A selection bias that moves by 1e-3 a step would stand still in bfloat16.
    """

    float32_buffers: ClassVar[tuple[str, ...]] = ()

    @property
    def _keep_in_fp32_modules_strict(self) -> tuple[str, ...]:
        """What DeepSpeed asks every module for: ZeRO-3 in bfloat16 makes all tensors so, whatever dtype they name."""
        return self.float32_buffers

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Buffers:
        exact = {name: getattr(self, name) for name in self.float32_buffers}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = getattr(self, name)
            if after.dtype != torch.float32:
                setattr(self, name, before.to(device=after.device))
        return self


def check_k(where: str, k: int, num_experts: int) -> None:
    """Raises ValueError unless 1 <= k <= E."""
    if not 1 <= k <= num_experts:
        raise ValueError(f"{where}: k={k} must be between 1 and the {num_experts} experts")
