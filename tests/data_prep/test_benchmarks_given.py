"""Benchmarks from what people have already: caches, other mirrors, folders made by hand."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from data_prep.benchmarks import prepare
from llava_moe.evaluation import mirror
from tests.data_prep.benchmark_runs import GQA, MMBENCH, MME, MME_FILE, TEXTVQA, run
from tests.data_prep.fake_hub import FakeHub
from tests.evaluation.imitations import gqa, mmbench, mme
from tests.evaluation.imitations_files import write


@pytest.mark.parametrize("layout", ["mirror", "former", "bare", "cache", "home"])
def test_copies_are_taken_from_where_people_have_them(
    hub: FakeHub, folder: Path, known: Path, tmp_path: Path, layout: str
) -> None:
    commit = "b" * 40
    paths = {
        "mirror": MME,
        "former": "lmms-lab/MME",
        "bare": "MME",
        "cache": f"datasets--lmms-lab--MME/snapshots/{commit}",
        "home": f"hub/datasets--lmms-lab-encoder--MME/snapshots/{commit}",
    }
    there = tmp_path / "there" / paths[layout]
    there.parent.mkdir(parents=True)
    (hub.root / MME).rename(there)
    assert run(folder, known, "mme", "--from", str(tmp_path / "there"), "--offline") == 0
    assert hub.asked == []
    record = mirror.read_manifest(folder)[MME]
    assert record.revision == (commit if "snapshots" in paths[layout] else None)
    assert record.origin == str(there)
    assert (folder / MME / MME_FILE).samefile(there / MME_FILE)  # linked, not copied
    assert not (folder / MME / "README.md").samefile(there / "README.md")  # ours may be rewritten
    assert run(folder, known, "mme", "--check") == 0


def test_another_mirror_brings_its_commits_and_is_believed_only_as_far_as_its_checksums(
    hub: FakeHub, folder: Path, known: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first"
    assert run(first, known, "textvqa_val") == 0
    assert run(folder, known, "textvqa_val", "--from", str(first), "--offline") == 0
    assert mirror.read_manifest(folder)[TEXTVQA].revision == hub.commit(TEXTVQA)
    upstream = "README.upstream.md"
    assert (folder / TEXTVQA / upstream).read_bytes() == (hub.root / TEXTVQA / "README.md").read_bytes()
    file = first / TEXTVQA / "data/validation-00000-of-00001.parquet"
    file.unlink()
    write(tmp_path / "other", gqa())
    file.write_bytes((tmp_path / "other" / GQA / "testdev_balanced_images/testdev-00000-of-00001.parquet").read_bytes())
    assert run(tmp_path / "second", known, "textvqa_val", "--from", str(first), "--offline") == 1
    assert "arrived with" in capsys.readouterr().err


def test_a_copy_that_is_not_enough_is_told_and_not_taken(
    hub: FakeHub, folder: Path, known: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    for age, (letter, name) in enumerate([("a", "en/dev-00000-of-00001.parquet"), ("b", "README.md")]):
        snapshot = cache / f"datasets--lmms-lab--MMBench/snapshots/{letter * 40}"
        for wanted in {name, "README.md"}:
            (snapshot / wanted).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(hub.root / MMBENCH / wanted, snapshot / wanted)
        os.utime(snapshot, (age, age))
    assert run(folder, known, "mmbench_en_dev_static", "--from", str(cache), "--offline") == 0
    assert mirror.read_manifest(folder)[MMBENCH].revision == "a" * 40  # the newer one has no data
    capsys.readouterr()
    other = tmp_path / "other"
    assert run(other, known, "mmbench_cn_dev_rules", "--from", str(cache), "--offline") == 1
    assert "is not taken: lmms-lab-encoder/MMBench, configuration 'cn': no file" in capsys.readouterr().err
    assert run(other, known, "mmbench_cn_dev_rules", "--from", str(cache)) == 0
    assert mirror.read_manifest(other)[MMBENCH].origin == "hub"
    assert "note: the copy in" in capsys.readouterr().out


def test_files_of_two_commits_are_not_mixed(
    hub: FakeHub, folder: Path, known: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, known, "mmbench_en_dev_static") == 0
    place = f"datasets--lmms-lab--MMBench/snapshots/{'c' * 40}"
    (tmp_path / "cache" / place).parent.mkdir(parents=True)
    (hub.root / MMBENCH).rename(tmp_path / "cache" / place)
    assert run(folder, known, "mmbench_cn_dev_rules", "--from", str(tmp_path / "cache")) == 1
    assert f"at {'c' * 40}: they are not mixed" in capsys.readouterr().err
    assert mirror.check(folder, ["mmbench_en_dev_static"])[0].rows == 5


def test_a_mirror_made_by_hand_is_recorded_where_it_is(hub: FakeHub, folder: Path, known: Path) -> None:
    write(folder, mmbench())
    assert run(folder, known, "mmbench_en_dev_static", "--offline") == 0
    record = mirror.read_manifest(folder)[MMBENCH]
    assert record.revision is None
    assert set(record.files) >= {"README.md", "cn/dev-00000-of-00001.parquet", "en/test-00000-of-00001.parquet"}
    assert run(folder, known, "mmbench_cn_dev_rules", "--offline") == 0  # its files are there, too
    assert mirror.read_manifest(folder)[MMBENCH].rows == {"en": {"dev": 5}, "cn": {"dev": 2}}
    assert hub.asked == []


def test_nothing_unrecorded_is_overwritten(
    hub: FakeHub, folder: Path, known: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, mme())
    (folder / MME / MME_FILE).write_bytes(b"mine")
    assert run(folder, known, "mme") == 1
    assert "cannot be read as parquet" in (error := capsys.readouterr().err)
    assert "It is not of this program: move it away, or give the folder that holds it with --from" in error
    assert (folder / MME / MME_FILE).read_bytes() == b"mine"


def test_what_is_put_there_by_hand_after_a_failed_download_is_taken(hub: FakeHub, folder: Path, known: Path) -> None:
    hub.spoil = lambda path: path.write_bytes(b"cut") if path.suffix == ".parquet" else None
    assert run(folder, known, "mme") == 1
    assert (folder / ".partial" / MME / "README.md").is_file()
    write(folder, mme())
    hub.asked.clear()
    assert run(folder, known, "mme") == 0
    assert hub.asked == []


def test_a_run_that_was_killed_while_it_moved_files_goes_on(
    hub: FakeHub, folder: Path, known: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move, moved = prepare._move, []

    def killed(source: Path, target: Path) -> None:
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        move(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(prepare, "_move", killed)
        assert run(folder, known, "gqa") == 130
    assert moved[0].is_file()
    with pytest.raises(ValueError, match="'gqa'"):
        mirror.check(folder, ["gqa"])
    assert run(folder, known, "gqa") == 0
    assert [one.rows for one in mirror.check(folder, ["gqa"])] == [6, 4]
    assert run(folder, known, "--check") == 0
