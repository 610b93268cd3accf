"""The shipped manifest is complete, agrees with the recipes, and a wrong one is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.fetch import address
from data_prep.manifest import UNKNOWN, ManifestError, load_manifest
from data_prep.plan import download_path
from llava_moe.config import load_recipe

REPO = Path(__file__).parents[2]
MIXTURES = load_manifest()
FILES = [file for mixture in MIXTURES.values() for file in mixture.files]


def test_both_mixtures_with_all_their_sources() -> None:
    assert list(MIXTURES) == ["llava_pretrain", "llava_mix665k"]
    assert [file.name for file in MIXTURES["llava_mix665k"].archives] == [
        "coco-train2017",
        "gqa",
        "ocr-vqa",
        "textvqa",
        "visual-genome-part1",
        "visual-genome-part2",
    ]
    assert len(FILES) == 9
    assert sum(file.size for file in FILES) == 100_968_602_762


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_is_described(file: Any) -> None:
    assert file.size > 1_000_000
    assert file.licence
    assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
    assert file.seen, "say where the checksum was seen"
    assert file.hub is None or re.fullmatch(r"[0-9a-f]{40}", file.hub.revision), "a commit, not a branch"
    url, _ = address(file)
    assert url.startswith(("https://", "http://images.cocodataset.org/"))
    assert url.endswith(file.filename)


def test_checksums_and_download_places_are_all_different() -> None:
    assert len({file.sha256 for file in FILES}) == len(FILES)
    assert len({download_path(Path("data"), file) for file in FILES}) == len(FILES)


def test_hub_files_come_from_a_fixed_commit() -> None:
    url, headers = address(MIXTURES["llava_pretrain"].record_file)
    assert url == (
        "https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain/resolve/"
        "70f9d1e5e1a697fe35830875cfc7de1dd590d727/blip_laion_cc_sbu_558k.json"
    )
    assert "user-agent" in {key.lower() for key in headers}


def test_the_layout_is_the_one_of_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/data")
    places = {(f"/data/{m.json}", f"/data/{m.image_folder}") for m in MIXTURES.values()}
    recipes = sorted((REPO / "scripts/recipes/siglip_vicuna_7b").glob("*.yaml"))
    found = {(s.path, s.image_folder) for recipe in recipes for s in load_recipe(recipe).data.sources}
    assert len(recipes) >= 4
    assert found == places


@pytest.mark.parametrize(
    ("name", "member", "path"),
    [
        ("pretrain-images", "00453/004539375.jpg", "00453/004539375.jpg"),
        ("coco-train2017", "train2017/000000000009.jpg", "000000000009.jpg"),
        ("coco-train2017", "train2017/", None),
        ("gqa", "images/2370799.jpg", "2370799.jpg"),
        ("ocr-vqa", "images/0140282033.gif", "0140282033.gif"),
        ("ocr-vqa", "ocr_vqa/images/0140282033.jpg", "0140282033.jpg"),
        ("ocr-vqa", "__MACOSX/images/._0140282033.jpg", None),
        ("textvqa", "train_images/0a1b2c.jpg", "0a1b2c.jpg"),
        ("visual-genome-part1", "VG_100K/2.jpg", "2.jpg"),
        ("visual-genome-part1", "VG_100K_2/2.jpg", None),
        ("visual-genome-part2", "VG_100K_2/2.jpg", "2.jpg"),
    ],
)
def test_members(name: str, member: str, path: str | None) -> None:
    unpack = next(file.unpack for file in FILES if file.name == name)
    assert unpack is not None
    assert unpack.path_of(member) == path


@pytest.fixture
def raw() -> dict[str, Any]:
    return yaml.safe_load((REPO / "data_prep/manifest.yaml").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"][0].update(sise=1), r"files\[0\]: unknown keys \['sise'\]"),
        (lambda m: m["files"][0].pop("size"), r"missing keys \['size'\]"),
        (lambda m: m["files"][0].update(size="1 GB"), r"files\[0\]\.size: expected int, found '1 GB'"),
        (lambda m: m["files"][0].update(sha256="abc"), r"sha256: expected 64 hexadecimal digits or `unknown`"),
        (lambda m: m["files"][0].update(url="http://x/y"), "give either `url` or `hub`"),
        (lambda m: m["files"][1]["unpack"].update(members="a"), "needs exactly one group, found 0"),
        (lambda m: m["files"][1]["unpack"].update(members="("), r"unpack\.members: "),
        (lambda m: m["files"][1].pop("unpack"), "exactly one must have no `unpack`"),
        (lambda m: m["files"].append(m["files"][1]), "a name occurs twice"),
        (lambda m: m.update(files={}), r"files: expected a list"),
        (lambda m: m.pop("json"), r"missing keys \['json'\]"),
    ],
)
def test_a_wrong_manifest_is_refused(raw: dict[str, Any], tmp_path: Path, change: Any, message: str) -> None:
    change(raw["llava_pretrain"])
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ManifestError, match=message) as caught:
        load_manifest(path)
    assert "llava_pretrain" in str(caught.value)


def test_an_unknown_checksum_is_allowed(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["llava_pretrain"]["files"][0]["sha256"] = UNKNOWN
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert load_manifest(path)["llava_pretrain"].record_file.known_sha256 is None


@pytest.mark.parametrize("text", ["a: [", "just words", "[]"])
def test_not_a_manifest(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(text)
    with pytest.raises(ManifestError, match=r"m\.yaml: "):
        load_manifest(path)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"gone\.yaml: No such file"):
        load_manifest(tmp_path / "gone.yaml")
