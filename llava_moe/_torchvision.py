"""Lets a CUDA build of torchvision import beside a CPU build of torch.

The registry's torchvision wheel is linked against CUDA. Under a CPU-only torch its C library cannot load, and then
`import torchvision` raises "operator torchvision::nms does not exist" - which in turn breaks transformers and timm.
Declaring the schemas of the two missing operators before torchvision is imported is enough: all the pure-Python parts
work, and the operators themselves still raise when called. Nothing is done where torchvision loads by itself.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_DECLARED: list[Any] = []  # the torch.library handle must stay alive, or the declarations vanish


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Runs once, at the first import of torchvision, and finds nothing itself."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            _declare_missing_operators()
        return None


def _declare_missing_operators() -> None:
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or torch.version.cuda is not None:
        return
    library = Path(spec.origin).with_name("_C.so")
    try:
        ctypes.CDLL(str(library))
    except OSError:
        declared = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(declared)


def install() -> None:
    """Puts the hook in place; costs nothing until torchvision is imported, and is idempotent."""
    already = any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path)
    if not already and "torchvision" not in sys.modules:
        sys.meta_path.insert(0, _BeforeTorchvision())
