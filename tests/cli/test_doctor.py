"""`llava-moe doctor` with everything there, with packages missing, and where nothing can be imported."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from llava_moe import doctor
from llava_moe.cli import main


def run_doctor(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    return int(stopped.value.code or 0), capsys.readouterr().out


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)


def line(output: str, name: str) -> str:
    return next(row for row in output.splitlines() if f" {name} " in row)


def test_all_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    code, output = run_doctor(capsys)
    assert code == 0
    for name in ("python", "machine", "bfloat16", "torch", "transformers", "deepspeed", "lmms-eval", "gradio", "gguf"):
        assert line(output, name)
    for feature in doctor._FEATURES:
        assert "ready" in line(output, feature)
    assert "not ready" not in line(output, "train in one process, chat")


@pytest.mark.parametrize(
    ("package", "feature"),
    [
        ("deepspeed", "train with DeepSpeed"),
        ("lmms-eval", "eval"),
        ("datasets", "eval"),
        ("gradio", "demo"),
        ("gguf", "quickstart"),
    ],
)
def test_a_missing_extra_spoils_its_feature_alone(package: str, feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {finding.name: finding for finding in doctor.features()}
    hide(monkeypatch, package)
    after = {finding.name: finding for finding in doctor.features()}
    assert not after[feature].good
    assert f"{package} is missing" in after[feature].remark
    assert "bash scripts/install.sh" in after[feature].remark
    spoilt = {name for name in after if after[name] != before[name]}
    assert spoilt <= {feature, "quickstart"}


def test_a_missing_core_package_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide(monkeypatch, "timm")
    code, output = run_doctor(capsys)
    assert code == 1
    assert "missing" in line(output, "timm")
    assert output.count("not ready") == len(doctor._FEATURES)


def test_a_version_out_of_range_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.6.0+cpu" if name == "torch" else version(name))
    assert [p for p in doctor.problems() if "torch 2.6.0+cpu is not" in p]
    torch = next(finding for finding in doctor.packages() if finding.name == "torch")
    assert torch.remark == f"tested with {doctor.pins()['torch']}"


def test_a_broken_torch_is_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    code, output = run_doctor(capsys)
    assert code == 1
    assert "cannot be imported" in output


def test_no_constraints_file_is_no_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(doctor, "CONSTRAINTS", doctor.Path(str(tmp_path)) / "absent.txt")
    assert doctor.pins() == {}
    assert all(not finding.remark for finding in doctor.packages())


def test_it_runs_where_nothing_is_installed() -> None:
    """As a file, in an isolated interpreter that sees the standard library alone."""
    done = subprocess.run([sys.executable, "-I", "-S", doctor.__file__], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "not installed: bash scripts/install.sh" in done.stdout
    assert not done.stderr


@pytest.mark.slow
def test_the_command_starts_without_the_packages_it_asks_for() -> None:
    """`import llava_moe` must not fail where doctor is needed most."""
    program = (
        "import importlib.util as util, sys\n"
        "import torch, transformers\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('timm', 'omegaconf'): raise ModuleNotFoundError(name)\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'timm' else find(name, *rest)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from llava_moe.cli import main\n"
        "main(['doctor'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "No module named" in done.stdout or "omegaconf" in done.stdout
