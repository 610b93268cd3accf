"""Main of `llava-moe doctor`: what is installed, what runs with it, and the command that adds what is missing.

Where the package itself cannot be imported: `python llava_moe/doctor.py`.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

OURS = "llava-moe"
CONSTRAINTS = Path(__file__).parents[1] / "requirements" / "constraints.txt"
_INSTALL = "bash scripts/install.sh"
_SHOWN = "torch torchvision transformers accelerate timm deepspeed peft lmms-eval datasets gradio gguf"
# extra of pyproject.toml: distributions that scripts/install.sh adds beside it
_BESIDE = {"eval": ("lmms-eval",)}
_FEATURES: dict[str, tuple[str, ...]] = {  # the extras that each needs
    "train in one process, chat": (),
    "train with DeepSpeed": ("train",),
    "LoRA on a base in 4 bits": ("qlora",),
    "eval": ("eval",),
    "demo": ("demo",),
    "analyze": ("analysis",),
    "quickstart": ("train", "eval", "quickstart"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    name: str
    found: str
    good: bool
    remark: str = ""


def installed(name: str) -> str | None:
    """The version of a distribution, or None. Nothing is imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def problems(extra: str | None = None) -> list[str]:
    """Requirements that are not met: of the core, or those that an extra of pyproject.toml adds to it."""
    from packaging.requirements import Requirement

    found = [f"{name} is missing" for name in _BESIDE.get(extra or "", ()) if installed(name) is None]
    for requirement in map(Requirement, importlib.metadata.requires(OURS) or []):
        marker = requirement.marker
        of_core = marker is None or marker.evaluate({"extra": ""})
        of_extra = marker is not None and not of_core and extra is not None and marker.evaluate({"extra": extra})
        if not (of_core if extra is None else of_extra):
            continue
        version = installed(requirement.name)
        if version is None:
            found.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} {version} is not {requirement.specifier}")
    return found


def pins() -> dict[str, str]:
    """Distribution (lower case) to the version that was tested; empty when the file is not at hand."""
    if not CONSTRAINTS.is_file():
        return {}
    lines = (line.split("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines())
    return {name.lower(): version for name, _, version in (line.partition("==") for line in lines) if version}


def packages() -> list[Finding]:
    """The packages that matter most, with the pinned version where another one is installed."""
    pinned, findings = pins(), []
    for name in _SHOWN.split():
        version, pin = installed(name), pinned.get(name)
        remark = "" if version is None or pin in (None, version.split("+")[0]) else f"tested with {pin}"
        findings.append(Finding(name, version or "missing", version is not None, remark))
    return findings


def machine() -> list[Finding]:
    """Python, cores and memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return [
        Finding("python", sys.version.split()[0], sys.version_info >= (3, 11), sys.platform),
        Finding("machine", f"{cores} cores, {memory:.0f} GiB", True),
    ]


def torch_facts() -> list[Finding]:
    """What only the imported library can tell; an import that fails is a finding and not a crash."""
    try:
        import torch
        import torchvision  # noqa: F401  only whether it can be imported

        from llava_moe import _torchvision
        from llava_moe.training.stage import resolve_bf16

        bf16 = resolve_bf16("auto")
    except (ImportError, OSError, RuntimeError) as error:
        return [Finding("torch, torchvision", "cannot be imported", False, str(error).splitlines()[0][:120])]
    gpu = torch.cuda.is_available()
    device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}" if gpu else "CPU"
    hooked = bool(_torchvision._DECLARED)
    return [
        Finding("device", device, True, f"torch built for CUDA {torch.version.cuda}".replace("CUDA None", "CPU")),
        Finding("bfloat16", "native" if bf16 else "emulated", True, "" if bf16 else "bf16: auto trains in float32"),
        Finding("torchvision", "hooked" if hooked else "real", True, "CUDA build under CPU torch" if hooked else ""),
    ]


def features() -> list[Finding]:
    """Each feature: ready, or the command that makes it so."""
    core, findings = problems(), []
    for name, extras in _FEATURES.items():
        lacking = core + [problem for extra in extras for problem in problems(extra)]
        remark = "; ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        remark += f" -> {_INSTALL}" if lacking else ""
        findings.append(Finding(name, "not ready" if lacking else "ready", not lacking, remark))
    return findings


def main() -> None:
    """Prints the table; exits with code 1 when not even the core can be used."""
    absent = [name for name in ("rich", "packaging") if find_spec(name) is None]
    if absent or installed(OURS) is None:
        print(f"{', '.join(absent) or OURS} is not installed: {_INSTALL}")
        sys.exit(1)
    from rich.console import Console
    from rich.table import Table

    facts = [] if problems() else torch_facts()
    usable = bool(facts) and all(fact.good for fact in facts)
    table = Table("", "found", "", title=f"{OURS} {installed(OURS)}")
    for group in ([*machine(), *facts], packages(), features()):
        for finding in group:
            table.add_row(finding.name, f"[{'green' if finding.good else 'red'}]{finding.found}[/]", finding.remark)
        table.add_section()
    Console(soft_wrap=not sys.stdout.isatty()).print(table)
    sys.exit(0 if usable else 1)


if __name__ == "__main__":
    main()
