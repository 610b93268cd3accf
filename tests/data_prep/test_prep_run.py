"""Whole runs on small files in upstream's layout, served from loopback."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from data_prep import cli, plan
from data_prep.cli import main
from data_prep.manifest import load_manifest
from tests.data_prep import upstream
from tests.data_prep.runs import FILES, report_of, run, trained_on
from tests.data_prep.server import Host
from tests.data_prep.upstream import DEAD, mix_files, mix_records, picture, write_manifest

REPO = Path(__file__).parents[2]


def test_pretrain_from_the_network(manifest: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(manifest, data, mixture="llava_pretrain", dropped="0") == 0
    target = data / "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"
    assert target.read_bytes() == FILES["pretrain-records"]  # nothing dropped: the published bytes
    assert (data / "LLaVA-Pretrain/images/00453/004539375.jpg").read_bytes() == picture(shade=0)
    report = report_of(data, "LLaVA-Pretrain/blip_laion_cc_sbu_558k.report.json")
    assert report["written"]["same_as_upstream"] is True
    assert report["written"]["sha256"] == hashlib.sha256(FILES["pretrain-records"]).hexdigest()
    assert report["folders"] == {"LLaVA-Pretrain/images": {"records": 3, "images": 3, "dead": 0}}
    assert "3 of 3 records are ready" in capsys.readouterr().out


def test_mix_from_the_network(manifest: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(manifest, data) == 0
    instruct = data / "LLaVA-Instruct"
    kept = [record for record in mix_records() if record.get("image") not in DEAD]
    assert json.loads((instruct / "llava_v1_5_mix665k.json").read_text()) == kept
    assert trained_on(data) == len(kept) == 16
    for folder in ("coco/train2017", "gqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2"):
        assert list((instruct / folder).iterdir()), folder
    assert (instruct / "ocr_vqa/images/0002.jpg").read_bytes() == picture("GIF")

    report = report_of(data)
    reasons = {found["image"]: found["reason"].split(" (")[0] for found in report["dropped"]}
    assert reasons == {
        "ocr_vqa/images/0004.jpg": "a web page",
        "ocr_vqa/images/0005.jpg": "a placeholder of 1 x 1 pixels",
        "ocr_vqa/images/0006.jpg": "cannot be decoded",
        "ocr_vqa/images/0007.jpg": "missing",
        "ocr_vqa/images/0008.jpg": "empty file",
    }
    assert [mix_records()[found["index"]]["id"] for found in report["dropped"]] == [d["id"] for d in report["dropped"]]
    assert report["folders"]["ocr_vqa"] == {"records": 9, "images": 8, "dead": 5}
    assert report["folders"]["coco"] == {"records": 4, "images": 3, "dead": 0}
    assert report["formats"] == {"JPEG": 10, "GIF": 2, "PNG": 1}
    assert (report["text_only"], report["records"], report["written"]["records"]) == (2, 21, 16)
    output = capsys.readouterr()
    assert "16 of 21 records are ready" in output.out
    assert "not JPEG: 2 GIF, 1 PNG" in output.out
    assert "1 files of another ending got a .jpg name too" in output.err


def test_a_second_run_fetches_and_unpacks_nothing(manifest: Path, data: Path, host: Host) -> None:
    assert run(manifest, data) == 0
    before, first = len(host.requests), (data / "LLaVA-Instruct/llava_v1_5_mix665k.json").read_bytes()
    assert run(manifest, data, "--offline") == 0
    assert len(host.requests) == before
    assert (data / "LLaVA-Instruct/llava_v1_5_mix665k.json").read_bytes() == first


def test_too_many_dead_images_are_an_error(manifest: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(manifest, data, dropped="0.2") == 1
    error = capsys.readouterr().err
    assert "5 of 21 records (23.8%) cannot be trained on, more than --max-dropped 0.2" in error
    assert "1 x ocr_vqa/images: " in error
    assert not (data / "LLaVA-Instruct/llava_v1_5_mix665k.json").exists()
    assert len(report_of(data)["dropped"]) == 5
    assert report_of(data)["written"] is None


def test_dry_run_says_all_and_touches_nothing(
    manifest: Path, data: Path, host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(manifest, data, "--dry-run") == 0
    output = capsys.readouterr().out
    assert not data.exists()
    assert host.requests == []
    for file in load_manifest(manifest)["llava_mix665k"].files:
        assert f"download {host.url}/{file.name}" in output
        assert f"licence of {file.name}: " in output
    total = sum(len(content) for name, content in FILES.items() if "pretrain" not in name)
    assert f"to download {total / 1000:.0f} kB" in output
    assert "disk needed " in output
    assert ", free " in output


def test_a_small_disk_is_refused_before_anything_is_fetched(
    manifest: Path, data: Path, host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "free_space", lambda _: 10_000)
    assert run(manifest, data, "--dry-run") == 0
    assert "NOT ENOUGH" in capsys.readouterr().out
    assert run(manifest, data) == 1
    assert "are needed on the disk of" in capsys.readouterr().err
    assert host.requests == []


def test_deleting_archives_needs_less_disk_and_keeps_the_images(manifest: Path, data: Path) -> None:
    made = plan.make_plan(load_manifest(manifest)["llava_mix665k"], data, [], cli.State(data / "state.json"))
    archives = [step.to_fetch for step in made.steps]
    assert made.space(False) - made.space(True) == sum(archives) - max(archives)
    assert run(manifest, data, "--delete-archives") == 0
    assert not list((data / "downloads").rglob("*.zip"))
    assert (data / "downloads/mix665k-records/mix665k-records.json").is_file()  # upstream's records are always kept
    assert trained_on(data) == 16
    assert run(manifest, data, "--offline") == 0


def test_offline_names_what_is_missing(manifest: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(manifest, data, "--offline") == 1
    error = capsys.readouterr().err
    assert "--offline, and not found in" in error
    assert all(name in error for name in mix_files())


def test_an_unknown_checksum_is_recorded_and_then_held(
    tmp_path: Path, data: Path, host: Host, addresses: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path / "m.yaml", FILES, addresses, gqa={"sha256": "unknown"})
    assert run(manifest, data) == 0
    sha256 = hashlib.sha256(FILES["gqa"]).hexdigest()
    assert f"gqa: nobody states its checksum; recorded sha256 {sha256}" in capsys.readouterr().err
    assert json.loads((data / "downloads/state.json").read_text())["gqa"]["sha256"] == sha256
    shutil.rmtree(data / "LLaVA-Instruct/gqa")
    (data / "downloads/gqa/gqa.zip").unlink()
    changed = bytearray(FILES["gqa"])
    changed[60] ^= 255
    host.files["/gqa.zip"] = bytes(changed)
    assert run(manifest, data) == 1
    assert "the first copy, recorded in downloads/state.json, has" in capsys.readouterr().err


def test_other_records_are_refused(
    tmp_path: Path, data: Path, addresses: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path / "m.yaml", FILES, addresses)
    raw = yaml.safe_load(manifest.read_text())
    raw["llava_mix665k"]["records"] = 665298
    manifest.write_text(yaml.safe_dump(raw))
    assert run(manifest, data) == 1
    assert "21 records, 2 of them without image; llava_mix665k has 665298 and 2" in capsys.readouterr().err


def test_records_that_training_refuses_are_dropped_with_their_reason(
    tmp_path: Path, data: Path, host: Host, addresses: dict[str, str]
) -> None:
    records = mix_records()
    records[0]["conversations"][0]["value"] = "no marker"
    content = json.dumps(records).encode()
    host.files["/mix665k-records.json"] = content
    manifest = write_manifest(tmp_path / "m.yaml", {**FILES, "mix665k-records": content}, addresses)
    assert run(manifest, data) == 0
    first = report_of(data)["dropped"][0]
    assert (first["index"], first["id"]) == (0, "000000000009")
    assert "1 image(s) but 0 <image> marker(s)" in first["reason"]
    assert trained_on(data) == 15


def test_no_decode_only_looks_for_files(manifest: Path, data: Path) -> None:
    assert run(manifest, data, "--no-decode") == 0
    assert [found["image"] for found in report_of(data)["dropped"]] == ["ocr_vqa/images/0007.jpg"]
    assert report_of(data)["decoded"] is False


def test_dead_pictures_are_fetched_again(manifest: Path, data: Path, host: Host, tmp_path: Path) -> None:
    host.files["/I/7.jpg"] = picture(shade=7)
    host.files["/I/4.gif"] = picture("GIF")
    listing = {"0007": f"{host.url}/I/7.jpg", "0004": f"{host.url}/I/4.gif", "0006": f"{host.url}/I/6.jpg"}
    (tmp_path / "dataset.json").write_text(json.dumps({key: {"imageURL": url} for key, url in listing.items()}))
    assert run(manifest, data, "--ocr-vqa-urls", str(tmp_path / "dataset.json")) == 0
    report = report_of(data)
    assert report["refetched"] == 2
    assert report["not_refetched"] == {
        "0005.jpg": "no address in dataset.json",
        "0006.jpg": f"{host.url}/I/6.jpg answers 404",
        "0008.jpg": "no address in dataset.json",
    }
    assert trained_on(data) == 18


def test_two_runs_in_one_folder_are_refused(manifest: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with cli._alone(data):
        assert run(manifest, data) == 1
    assert "another run works in" in capsys.readouterr().err
    assert run(manifest, data) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llava_mix"], "unknown mixture 'llava_mix'; known: llava_pretrain, llava_mix665k"),
        (["llava_pretrain", "--from", "/no/such/place"], "--from /no/such/place: no such folder"),
        (["llava_pretrain", "--connections", "0"], "--connections 0: must be at least 1"),
        (["llava_pretrain", "--max-dropped", "5"], "--max-dropped 5.0: must be between 0 and 1"),
        (["llava_pretrain", "--manifest", "/no/list"], "/no/list: No such file or directory"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.strip() == f"error: {message}"


def test_data_comes_from_the_environment_as_in_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATA", raising=False)
    assert cli.parser().parse_args(["x"]).data == REPO / "playground/data"
    monkeypatch.setenv("DATA", "elsewhere")
    assert cli.parser().parse_args(["x"]).data == REPO / "elsewhere"
    monkeypatch.setenv("DATA", "/abs")
    assert cli.parser().parse_args(["x"]).data == Path("/abs")


def hub_files(host: Host) -> None:
    """The Hub's addresses, each of which leads to its storage."""
    for file in (file for mixture in load_manifest().values() for file in mixture.files if file.hub):
        address = f"/datasets/{file.hub.repo}/resolve/{file.hub.revision}/{file.hub.file}"
        host.redirects[address] = f"/{file.name}.{'json' if file.name.endswith('records') else 'zip'}"


@pytest.mark.slow
def test_the_script_from_another_folder_and_the_hub(tmp_path: Path, host: Host, addresses: dict[str, str]) -> None:
    hub_files(host)
    published = {name: url for name, url in addresses.items() if name in ("gqa", "textvqa", "coco-train2017")}
    others = {name: url for name, url in addresses.items() if "visual" in name}
    manifest = write_manifest(tmp_path / "manifest.yaml", FILES, {**published, **others})
    command = ["bash", str(REPO / "scripts/prepare_data.sh"), "llava_pretrain", "llava_mix665k", "--data", "here"]
    command += ["--manifest", str(manifest), "--max-dropped", "0.5", "--workers", "2"]
    environment = {**os.environ, "HF_ENDPOINT": host.url, "HF_TOKEN": "hf_secret"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "16 of 21 records are ready" in done.stdout
    assert trained_on(tmp_path / "here") == 16
    assert {path for path, _ in host.requests} >= set(host.redirects)


@pytest.mark.slow
@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_goes_on(manifest: Path, data: Path, host: Host, signal_number: int, code: int) -> None:
    host.delay = 0.2
    command = [sys.executable, "-m", "data_prep", "llava_pretrain", "--data", str(data), "--manifest", str(manifest)]
    process = subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not host.requests and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal_number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert ("run the same command again to go on" in error) == (code == 130)
    host.delay = 0.0
    assert run(manifest, data, mixture="llava_pretrain", dropped="0") == 0
    assert (
        upstream.pretrain_files()["pretrain-records"]
        == (data / "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json").read_bytes()
    )


def test_the_script_without_arguments_is_one_clear_line() -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = str(REPO / "scripts/prepare_data.sh")
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: usage: bash scripts/prepare_data.sh llava_pretrain|llava_mix665k")
