"""`llava-moe import` and `llava-moe export` as they are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_moe.cli import main


def test_out_and_in(dense_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", str(dense_checkpoint), "--to", str(tmp_path / "stock")])
    said = capsys.readouterr().out
    assert "llava with a llama decoder" in said
    assert "largest logit difference" in said
    main(["import", str(tmp_path / "stock"), "--to", str(tmp_path / "back"), "--template", "chatml"])
    assert "template chatml, image mode square, 0 rows added" in capsys.readouterr().out
    assert (tmp_path / "back" / "import.json").is_file()


@pytest.mark.parametrize("command", ["import", "export"])
def test_help_and_a_wrong_path(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--to DIRECTORY" in said
    assert f"llava-moe {command}" in said
    with pytest.raises(SystemExit) as stopped:
        main([command, str(tmp_path / "nowhere"), "--to", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "nowhere: no such checkpoint directory" in capsys.readouterr().err
