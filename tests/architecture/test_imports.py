"""Who may import whom, and how long things may be; read from the source, nothing is executed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "llava_moe"
FILES = sorted(PACKAGE.rglob("*.py"))
LEAST_FILES = 55  # as many as there were when this was written: an empty walk would prove nothing
MAX_FILE, MAX_FUNCTION = 400, 60

# Each unit may import the units named here and itself.
ALLOWED: dict[str, set[str]] = {
    "registry": set(),
    "_torchvision": set(),
    "config": {"registry"},
    "moe": {"registry"},
    "data": {"registry"},
    "model": {"moe", "config", "registry"},
    "_register": {"model", "data"},
    "__init__": {"_register", "_torchvision"},
    "model_card": {"model"},
    "training": {"planning", "evaluation", "model_card", "model", "moe", "data", "config", "registry"},
    "evaluation": {"model_card", "model", "moe", "data", "config", "registry"},
    "analysis": {"evaluation", "moe", "data", "config", "registry"},
    "serve": {"model", "moe", "data", "config", "registry"},
    "compare": {"training", "evaluation", "planning", "model", "moe", "data", "config", "registry"},
    "planning": {"model", "moe", "config", "registry"},
}
# Thin programs at the top: train, upcycle, cli, doctor, ... may import everything, and nothing imports them but each
# other; `cli` holds what turns an error into an exit code.
FORBIDDEN_ROOTS = {"scripts", "playground", "tests", "data_prep", "benchmarks"}


def unit_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports_of(tree: ast.AST, path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import, also of those inside functions; relative ones are made absolute."""
    package = ["llava_moe", *path.relative_to(PACKAGE).parent.parts]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from llava_moe import model` imports the unit `model`
            found += [
                (node.lineno, f"{module}.{alias.name}" if module == "llava_moe" else module) for alias in node.names
            ]
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def violations(path: Path) -> list[str]:
    unit, found = unit_of(path), []
    for line, name in imports_of(parse(path), path):
        parts = name.split(".")
        if parts[0] in FORBIDDEN_ROOTS:
            found.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
        if parts[0] != "llava_moe" or len(parts) == 1 or unit not in ALLOWED:
            continue
        if parts[1] != unit and parts[1] not in ALLOWED[unit]:
            found.append(f"{path.relative_to(ROOT)}:{line} ({unit}) imports {name}")
    return found


def test_the_walk_sees_the_package() -> None:
    assert len(FILES) >= LEAST_FILES
    assert {"moe", "model", "data", "training", "evaluation", "registry", "config"} <= {unit_of(path) for path in FILES}


def test_every_folder_has_a_row_in_the_table() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= set(ALLOWED)


def test_import_table() -> None:
    assert [violation for path in FILES for violation in violations(path)] == []


def test_moe_uses_torch_and_nothing_else() -> None:
    allowed = {"torch", "llava_moe"} | set(sys.stdlib_module_names)
    foreign = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in FILES
        if unit_of(path) == "moe"
        for line, name in imports_of(parse(path), path)
        if name.split(".")[0] not in allowed
    ]
    assert foreign == []


def test_the_walk_finds_a_planted_violation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    planted = tmp_path / "moe" / "bad.py"
    planted.parent.mkdir()
    planted.write_text(
        "def f():\n    from llava_moe.model import sites\nfrom .. import training\nimport tests.tiny\n"
        "from llava_moe import data\nfrom .types import Routing\nfrom llava_moe.registry import Registry\n"
    )
    assert {violation.split(" imports ")[1] for violation in violations(planted)} == {
        "llava_moe.model",
        "llava_moe.training",
        "tests.tiny",
        "llava_moe.data",
    }


def test_files_beside_the_package_are_short() -> None:
    beside = [
        path
        for folder in ("tests", "data_prep", "playground", "scripts", "benchmarks")
        for path in (PACKAGE.parent / folder).rglob("*.py")
    ]
    assert len(beside) > 200
    long = [str(path) for path in beside if len(path.read_text(encoding="utf-8").splitlines()) > MAX_FILE]
    assert long == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE
    functions = (n for n in ast.walk(parse(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if (f.end_lineno or 0) - f.lineno + 1 > MAX_FUNCTION}
    assert long == {}


_BLOCKED = """
import importlib.abc, sys
blocked = {"transformers", "omegaconf", "timm", "torchvision", "PIL", "accelerate", "yaml", "huggingface_hub"}
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in blocked else real(name, package)
sys.meta_path.insert(0, Blocker())
import torch
from llava_moe.moe import EXPERTS, ROUTERS, MlpSpec, MoELayer
spec = MlpSpec(8, 16, "silu", True, False, "gate_proj", "up_proj", "down_proj")
layer = MoELayer(ROUTERS.get("top_k").build(8, 4, {}), EXPERTS.get("stacked").build(spec, 4, {}))
assert layer(torch.randn(2, 3, 8)).shape == (2, 3, 8)
assert not blocked & {name.split(".")[0] for name in sys.modules}
print("works")
"""


@pytest.mark.slow
def test_moe_works_where_only_torch_is_installed() -> None:
    result = subprocess.run(
        [sys.executable, "-c", _BLOCKED], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout.strip() == "works", result.stderr[-2000:]
