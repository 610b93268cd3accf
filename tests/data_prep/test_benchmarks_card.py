"""Which files hold the wanted splits, and the card that names them alone."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from data_prep.benchmarks.card import Selection, select
from data_prep.benchmarks.known import KNOWN, load_known
from data_prep.errors import PrepareError
from data_prep.manifest import ManifestError
from llava_moe.evaluation.suites import BENCHMARKS

LISTING = [
    ".gitattributes",
    "README.md",
    "big.zip",
    "dataset_infos.json",
    "data/test-00000-of-00002.parquet",
    "data/test-00001-of-00002.parquet",
    "data/train-00000-of-00001.parquet",
    "extra/val/a.parquet",
    "extra/val/deep/b.parquet",
]
FEATURES = [{"name": "question", "dtype": "string"}]


def card(**head: Any) -> str:
    return f"---\n{yaml.safe_dump(head)}---\n# A title\n---\nmore\n"


def files(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"split": split, "path": path} for split, path in pairs]


FULL = card(
    license="mit",
    dataset_info=[
        {
            "config_name": "default",
            "features": FEATURES,
            "splits": [
                {"name": "train", "num_bytes": 900, "num_examples": 90},
                {"name": "test", "num_bytes": 100, "num_examples": 10},
            ],
            "download_size": 5,
            "dataset_size": 1000,
        },
        {"config_name": "extra", "features": FEATURES, "splits": [{"name": "val", "num_examples": 3}]},
    ],
    configs=[
        {"config_name": "default", "data_files": files(("train", "data/train-*"), ("test", ["data/test-*"]))},
        {"config_name": "extra", "data_files": files(("val", "extra/**/*.parquet"))},
    ],
)


def pick(text: str, listing: list[str] = LISTING, **wants: str) -> Selection:
    by_config = {None if config == "none" else config: frozenset(split.split()) for config, split in wants.items()}
    return select("a/b", text, listing, by_config)


def head_of(selection: Selection) -> dict[str, Any]:
    assert selection.card is not None
    first, front, body = selection.card.split("---\n", 2)
    assert first == ""
    assert body == "# A title\n---\nmore\n"
    return yaml.safe_load(front)


def test_one_split_of_one_configuration() -> None:
    found = pick(FULL, none="test")
    assert found.files == ("data/test-00000-of-00002.parquet", "data/test-00001-of-00002.parquet")
    head = head_of(found)
    assert head["license"] == "mit"
    assert head["configs"] == [{"config_name": "default", "data_files": files(("test", ["data/test-*"]))}]
    # `datasets` compares these splits with what it loads, so the others must go
    assert head["dataset_info"] == [
        {
            "config_name": "default",
            "features": FEATURES,
            "splits": [{"name": "test", "num_bytes": 100, "num_examples": 10}],
            "dataset_size": 100,
        }
    ]


def test_several_configurations_and_patterns_with_folders() -> None:
    found = pick(FULL, default="test", extra="val")
    assert found.files[2:] == ("extra/val/a.parquet", "extra/val/deep/b.parquet")
    assert [entry["config_name"] for entry in head_of(found)["configs"]] == ["default", "extra"]


def test_a_card_that_is_right_as_it_is_stays() -> None:
    listing = [name for name in LISTING if name.startswith("data/test") or name == "README.md"]
    text = card(configs=[{"config_name": "only", "data_files": files(("test", "data/test-*"))}])
    assert pick(text, listing, none="test") == Selection(tuple(listing[1:]), None)
    assert pick(text, [*listing, "other.zip"], none="test").card is None  # what it does not name is not missed


def test_files_that_are_gone_already_do_not_make_a_card_right() -> None:
    """A mirror that was made from a mirror: the publisher's card still names the splits that were left out."""
    listing = [name for name in LISTING if name.startswith("data/test")]
    assert [entry["config_name"] for entry in head_of(pick(FULL, listing, none="test"))["configs"]] == ["default"]
    splits = [{"name": "train", "num_examples": 90}, {"name": "test", "num_examples": 10}]
    assert head_of(pick(card(dataset_info={"splits": splits}), listing, none="test"))["dataset_info"][0]["splits"] == [
        splits[1]
    ]


def test_a_card_without_files_is_read_by_the_files_names() -> None:
    splits = [{"name": "train", "num_examples": 90}, {"name": "test", "num_examples": 10}]
    found = pick(card(dataset_info={"splits": splits}), none="test")
    assert found.files == ("data/test-00000-of-00002.parquet", "data/test-00001-of-00002.parquet")
    head = head_of(found)
    assert head["configs"] == [{"config_name": "default", "data_files": files(("test", "data/test-*"))}]
    assert head["dataset_info"] == [{"splits": splits[1:], "config_name": "default"}]


@pytest.mark.parametrize("text", ["", "# no head\n", "---\nno end\n", "---\n- a list\n---\n"])
def test_of_an_unknown_layout_everything_is_taken(text: str) -> None:
    listing = ["README.md", ".gitattributes", "x/one.parquet", "two.parquet"]
    assert pick(text, listing, none="test") == Selection(("x/one.parquet", "two.parquet"), None)


def test_a_configuration_without_splits_is_taken_whole() -> None:
    text = card(configs=[{"config_name": "c", "data_dir": "data"}, {"config_name": "d", "data_files": "extra/val/*"}])
    assert pick(text, c="test").files == tuple(name for name in LISTING if name.startswith("data/"))
    assert pick(text, d="val").files == ("extra/val/a.parquet", "extra/val/deep/b.parquet")


@pytest.mark.parametrize(
    ("text", "wants", "message"),
    [
        (FULL, {"none": "val"}, "a/b, configuration 'default' has no split 'val'; it has train, test"),
        (FULL, {"other": "val"}, "a/b has no configuration 'other'; its README.md names default, extra"),
        (
            card(configs=[{"config_name": "a"}, {"config_name": "b"}]),
            {"none": "test"},
            "a/b has no default configuration among a, b",
        ),
        (
            card(configs=[{"config_name": "a", "data_files": files(("test", "gone/*"))}]),
            {"none": "test"},
            "a/b, configuration 'a': no file matches 'gone/.*', which its README.md names",
        ),
        ("---\na: [\n---\n", {"none": "test"}, "a/b: the head of its README.md is no YAML"),
    ],
)
def test_what_the_card_does_not_have_is_named(text: str, wants: dict[str, str], message: str) -> None:
    with pytest.raises(PrepareError, match=message):
        pick(text, **wants)


def test_a_marked_configuration_is_the_default_one() -> None:
    parts = [{"config_name": "a", "data_files": "data/train-*"}, {"config_name": "b", "data_files": "data/test-*"}]
    parts[1]["default"] = True
    assert pick(card(configs=parts), none="test").files[0] == "data/test-00000-of-00002.parquet"


def test_the_known_facts_are_about_what_the_catalogue_reads() -> None:
    known = load_known()
    read: dict[str, set[str]] = {}
    for name in BENCHMARKS.names():
        for source in BENCHMARKS.get(name).sources:
            read.setdefault(source.repo, set()).add(f"{source.config or 'default'}/{source.split}")
    assert set(known) == set(read)
    for repo, facts in known.items():
        assert set(facts.splits) <= read[repo], repo


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a/b: {}", "a/b: expected a mapping with the text `licence`"),
        ("a/b: {licence: x, size: 3}", "further keys: revision, splits"),
        ("a/b: {licence: x, revision: abc}", "revision: expected a commit of 40 hexadecimal digits, found 'abc'"),
        ("a/b: {licence: x, splits: {test: {rows: 3}}}", "splits: expected `configuration/split"),
        ("a/b: {licence: x, splits: {a/test: {rows: many}}}", "found 'a/test': {'rows': 'many'}"),
        ("[", "not valid YAML"),
        ("- a", "expected data sets by name"),
    ],
)
def test_a_wrong_list_of_facts_is_named(tmp_path: Any, text: str, message: str) -> None:
    (tmp_path / "known.yaml").write_text(text)
    with pytest.raises(ManifestError, match=message):
        load_known(tmp_path / "known.yaml")
    with pytest.raises(ManifestError, match=f"{tmp_path}/none.yaml: No such file"):
        load_known(tmp_path / "none.yaml")
    assert KNOWN.is_file()
