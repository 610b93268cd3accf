"""Benchmarks prepared from an imitated Hub: what is fetched, verified, recorded, resumed and refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

from data_prep.benchmarks import cli, prepare
from data_prep.state import RunLock
from llava_moe.evaluation import mirror
from tests.data_prep.benchmark_runs import GQA, MMBENCH, MME, MME_FILE, POPE, TEXTVQA, run
from tests.data_prep.fake_hub import FakeHub
from tests.evaluation.imitations import write_all

ANSWER = SimpleNamespace(headers={}, request=None)


def test_only_what_is_read_comes_and_scoring_finds_it(hub: FakeHub, folder: Path, known: Path) -> None:
    tasks = ["gqa", "textvqa_val_ocr", "pope", "mmbench_en_dev_static"]
    assert run(folder, known, *tasks) == 0
    found = {(one.task, one.source.config, one.source.split): one.rows for one in mirror.check(folder, tasks)}
    assert found == {
        ("gqa", "testdev_balanced_instructions", "testdev"): 6,
        ("gqa", "testdev_balanced_images", "testdev"): 4,
        ("textvqa_val_ocr", None, "validation"): 3,
        ("pope", None, "test"): 8,
        ("mmbench_en_dev_static", "en", "dev"): 5,
    }
    held = {path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet") if path.is_file()}
    assert held == {
        f"{GQA}/testdev_balanced_images/testdev-00000-of-00001.parquet",
        f"{GQA}/testdev_balanced_instructions/testdev-00000-of-00001.parquet",
        f"{TEXTVQA}/data/validation-00000-of-00001.parquet",
        f"{POPE}/{MME_FILE}",
        f"{MMBENCH}/en/dev-00000-of-00001.parquet",
    }
    assert (folder / TEXTVQA / "README.upstream.md").read_bytes() == (hub.root / TEXTVQA / "README.md").read_bytes()
    assert (folder / GQA / "README.md").read_bytes() == (hub.root / GQA / "README.md").read_bytes()
    assert os.readlink(folder / "lmms-lab") == "lmms-lab-encoder"
    licences = {repo: record.licence for repo, record in mirror.read_manifest(folder).items()}
    assert licences == {GQA: "mit", TEXTVQA: "unknown", POPE: "unknown", MMBENCH: "unknown"}  # GQA's card says it
    assert not any((folder / ".partial").rglob("*.parquet"))


def test_what_is_trimmed_loads_as_the_whole_does(hub: FakeHub, folder: Path, known: Path, tmp_path: Path) -> None:
    import datasets

    assert run(folder, known, "textvqa_val", "pope") == 0
    for name in (TEXTVQA, POPE):
        with mirror.offline(folder, cache=tmp_path / "arrow"):
            ours = datasets.load_dataset(name, token=True)
        with mirror.offline(hub.root, cache=tmp_path / "arrow"):
            theirs = datasets.load_dataset(name, token=True)
        split = "validation" if name == TEXTVQA else "test"
        assert list(ours) == [split]
        assert ours[split].features == theirs[split].features
        assert ours[split].remove_columns("image").to_list() == theirs[split].remove_columns("image").to_list()


def test_the_record_holds_commit_sizes_checksums_and_rows(hub: FakeHub, folder: Path, known: Path) -> None:
    assert run(folder, known, "mme") == 0
    record = json.loads((folder / "mirror.json").read_text())["datasets"][MME]
    assert record["revision"] == hub.commit(MME)
    assert (record["origin"], record["licence"]) == ("hub", "mine")
    assert record["rows"] == {"default": {"test": 8}}
    assert set(record["files"]) == {MME_FILE, "README.md"}
    assert record["files"][MME_FILE]["size"] == (hub.root / MME / MME_FILE).stat().st_size
    assert mirror.check(folder, ["mme"])[0].revision == hub.commit(MME)


def test_a_second_run_asks_nobody(hub: FakeHub, folder: Path, known: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, known, "mme", "pope") == 0
    hub.asked.clear()
    hub.fetched.clear()
    assert run(folder, known, "mme", "pope") == 0
    assert hub.asked == hub.fetched == []
    assert "[1/2] lmms-lab-encoder/MME (default/test): ready" in capsys.readouterr().out


def test_another_split_is_added_at_the_same_commit(hub: FakeHub, folder: Path, known: Path) -> None:
    assert run(folder, known, "mmbench_en_dev_static") == 0
    first = hub.commit(MMBENCH)
    hub.fetched.clear()
    assert run(folder, known, "mmbench_cn_dev_rules") == 0
    assert hub.asked[-1] == (MMBENCH, first)
    assert hub.fetched == [f"{MMBENCH}/README.md", f"{MMBENCH}/cn/dev-00000-of-00001.parquet"]
    assert [one.rows for one in mirror.check(folder, ["mmbench_en_dev_static", "mmbench_cn_dev_rules"])] == [5, 2]
    assert mirror.read_manifest(folder)[MMBENCH].rows == {"en": {"dev": 5}, "cn": {"dev": 2}}
    assert run(folder, known, "--check") == 0


def test_a_wrong_file_is_thrown_away_and_fetched_again(
    hub: FakeHub, folder: Path, known: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(path: Path) -> None:
        if path.suffix == ".parquet":
            path.write_bytes(path.read_bytes()[:-1] + b"?")

    hub.spoil = spoil
    assert run(folder, known, "mme", "pope") == 1
    errors = capsys.readouterr().err
    assert f"error: {MME}: {MME_FILE} arrived with" in errors
    assert f"2 of 2 data sets are not ready: {MME}, {POPE}" in errors
    assert not (folder / MME).exists()
    assert not (folder / "mirror.json").exists()
    hub.spoil = lambda path: None
    assert run(folder, known, "mme", "pope") == 0


def test_an_interruption_keeps_what_was_fetched(hub: FakeHub, folder: Path, known: Path) -> None:
    def interrupt(path: Path) -> None:
        if "instructions" in path.parent.name:
            raise KeyboardInterrupt

    hub.spoil = interrupt
    assert run(folder, known, "mme", "gqa") == 130
    assert set(mirror.read_manifest(folder)) == {MME}
    with pytest.raises(ValueError, match=r"lmms-lab-encoder/GQA does not exist"):
        mirror.check(folder, ["gqa"])
    hub.spoil, hub.fetched = (lambda path: None), []
    assert run(folder, known, "mme", "gqa") == 0
    assert hub.fetched == []  # both files of GQA had arrived


def test_one_failure_does_not_stop_the_others(
    hub: FakeHub, folder: Path, known: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.broken = {
        GQA: GatedRepoError("403", response=ANSWER),
        MME: RepositoryNotFoundError("404 not found\nmore", response=ANSWER),
        POPE: OfflineModeIsEnabled("offline"),
        TEXTVQA: ValueError("odd answer"),
    }
    assert run(folder, known, "gqa", "mme", "pope", "textvqa_val", "mmbench_en_dev_static") == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith(f"error: {GQA}: its terms must be accepted at https://huggingface.co/datasets/{GQA}")
    assert errors[1].startswith(f"error: {MME}: the Hub has no such public data set (404 not found); look at ")
    assert errors[2] == f"error: {POPE}: HF_HUB_OFFLINE forbids to ask the Hub; unset it, or use --from DIR"
    assert errors[3] == f"error: {TEXTVQA}: ValueError: odd answer; run again later, or use --from DIR"
    assert errors[4].startswith("error: 4 of 5 data sets are not ready")
    assert set(mirror.read_manifest(folder)) == {MMBENCH}


def test_rows_that_the_card_denies_are_refused(
    hub: FakeHub, folder: Path, known: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = hub.root / MME / "README.md"
    card.write_text(card.read_text().replace("num_examples: 8", "num_examples: 9"))
    for _ in range(2):
        assert run(folder, known, "mme") == 1
        assert "the split has 8 rows, README.md states 9" in capsys.readouterr().err
        assert mirror.read_manifest(folder) == {}


def test_a_full_disk_is_said_before_the_download(
    hub: FakeHub, folder: Path, known: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "free_space", lambda place: 100)
    assert run(folder, known, "mme") == 1
    assert "are needed on the disk of" in capsys.readouterr().err
    assert hub.fetched == [f"{MME}/README.md"]


def test_the_dry_run_says_what_is_known_and_touches_nothing(
    hub: FakeHub, folder: Path, known: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, known, "mme", "pope", "gqa", "--dry-run", "--from", str(hub.root.parent)) == 0
    said = capsys.readouterr().out
    assert f"{MME}: to download\n  default/test: 8 rows, 5 kB\n  commit: the newest, which mirror.json will" in said
    assert f"{POPE}: to download\n  default/test: unknown number of rows, size unknown" in said
    assert "  licence: unknown\n  read by: pope" in said
    assert "to download: about 5 kB and 2 data set(s) of unknown size; free in" in said
    assert hub.asked == hub.fetched == []
    assert not folder.exists()
    assert run(folder, known, "mme", "--dry-run", "--from", str(hub.root)) == 0
    assert f"{MME}: from {hub.root / MME}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda place: (place / MME_FILE).unlink(), f"{MME_FILE} is missing"),
        (lambda place: (place / MME_FILE).write_bytes(b"x"), "has 1 bytes, recorded are"),
        (lambda place: (place / "README.md").write_bytes(b"#" * 7), "README.md has 7 bytes"),
        (
            lambda place: (place / MME_FILE).write_bytes((place / MME_FILE).read_bytes()[:-5] + b"?????"),
            "recorded is",
        ),
    ],
)
def test_the_check_finds_every_change(
    hub: FakeHub, folder: Path, known: Path, spoil: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, known, "mme", "pope") == 0
    assert run(folder, known, "--check") == 0
    assert f"{MME}: 2 files and 8 rows are as recorded" in capsys.readouterr().out
    hub.asked.clear()
    assert callable(spoil)
    spoil(folder / MME)
    assert run(folder, known, "--check") == 1
    assert message in (outcome := capsys.readouterr()).err
    assert f"{POPE}: 3 files and 8 rows are as recorded" in outcome.out
    assert run(folder, known, "pope", "--check") == 0
    assert hub.asked == []
    for name in (MME_FILE, "README.md"):
        (folder / MME / name).unlink(missing_ok=True)
    assert run(folder, known, "mme") == 0
    assert run(folder, known, "--check") == 0


def test_the_check_names_what_was_never_prepared(
    hub: FakeHub, folder: Path, known: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, known, "--check") == 1
    assert "mirror.json does not exist, so there is nothing to compare with" in capsys.readouterr().err
    assert run(folder, known, "mmbench_en_dev_static") == 0
    assert run(folder, known, "mme", "mmbench_cn_dev_rules", "--check") == 1
    errors = capsys.readouterr().err
    assert f"{MME}: not recorded in mirror.json; needed by mme" in errors
    assert f"{MMBENCH}: cn/dev not recorded; needed by mmbench_cn_dev_rules" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name suites or tasks; suites are core, libmoe12"),
        (["corre"], "did you mean 'core'"),
        (["quickstart"], "nothing of it is read from the Hub"),
        (["mme", "--from", "/no/such"], "--from /no/such: no such folder"),
        (["mme", "--known", "/no/such.yaml"], "/no/such.yaml: No such file"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*arguments, "--mirror", str(tmp_path / "mirror")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "mirror").exists()


def test_two_runs_do_not_meet(hub: FakeHub, folder: Path, known: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.mkdir()
    with RunLock(folder / ".lock"):
        assert run(folder, known, "mme") == 1
    assert f"another run works in {folder}" in capsys.readouterr().err


def test_a_suite_is_all_that_its_tasks_read(tmp_path: Path, known: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_all(tmp_path / "mirror")
    assert run(tmp_path / "mirror", known, "core", "--offline") == 0
    assert len(mirror.read_manifest(tmp_path / "mirror")) == 9
    assert "is ready: llava-moe eval CHECKPOINT" in capsys.readouterr().out
    assert run(tmp_path / "mirror", known, "core", "--check") == 0
