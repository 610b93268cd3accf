from pathlib import Path

import numpy as np
import pytest

from llava_moe.data.mixture import Limit, Mixture, SourceSpec, load_mixture
from llava_moe.data.schema import DataError


def drawn(limit: str = "all", weight: float = 1.0, total: int = 10, seed: int = 0, place: int = 0) -> list[int]:
    return SourceSpec("a.json", "images", limit, weight).draw(total, seed, place).tolist()


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [
        ("all", list(range(10))),
        ("first:3", [0, 1, 2]),
        ("end:3", [7, 8, 9]),
        ("first:30%", [0, 1, 2]),
        ("end:25%", [7, 8, 9]),  # 2.5, rounded up
        ("first:10", list(range(10))),
        ("100%", list(range(10))),
    ],
)
def test_limits(limit: str, wanted: list[int]) -> None:
    assert drawn(limit) == wanted


def test_a_random_draw_follows_from_the_seed_and_the_place() -> None:
    first = drawn("random:40", total=1000)
    assert len(set(first)) == 40
    assert first == sorted(first) == drawn("random:40", total=1000)
    assert first == drawn("random:4%", total=1000) == drawn("4%", total=1000)
    assert first != drawn("random:40", total=1000, seed=1)
    assert first != drawn("random:40", total=1000, place=1)
    assert 300 < np.mean(first) < 700  # of the whole source, not of its beginning


def test_percentages_that_should_be_whole_are_not_rounded_up() -> None:
    assert [Limit.parse(f"{n}%").size(1000) for n in range(1, 101)] == [10 * n for n in range(1, 101)]
    assert Limit.parse("0.1%").size(100) == 1


def test_weights_repeat_and_thin_out() -> None:
    assert drawn(weight=2) == list(range(10)) * 2
    assert drawn("first:2", weight=3) == [0, 1] * 3
    half = drawn(weight=0.5)
    assert len(half) == len(set(half)) == 5
    assert half == drawn(weight=0.5) != drawn(weight=0.5, seed=3)
    more = drawn("first:4", weight=1.5)
    assert more[:4] == [0, 1, 2, 3]
    assert len(set(more[4:])) == 2
    assert set(more[4:]) <= {0, 1, 2, 3}
    with pytest.raises(DataError, match=r"a\.json: limit first:1 with weight 0\.1 leaves no record"):
        drawn("first:1", weight=0.1)


@pytest.mark.parametrize(
    "limit", ["10", "some", "random", "random:", "first:0", "first:1.5", "0%", "101%", "-3", "last:3"]
)
def test_a_limit_that_means_nothing_is_refused(limit: str) -> None:
    with pytest.raises(DataError, match=r"source a\.json: limit='"):
        SourceSpec("a.json", limit=limit)


def test_more_than_there_is_cannot_be_asked_for() -> None:
    with pytest.raises(DataError, match=r"source a\.json: limit random:11 asks for more than the 10 records"):
        drawn("random:11")


@pytest.mark.parametrize("weight", [0, -1, float("nan"), 1e9, True, "2"])
def test_weights_are_bounded(weight: float) -> None:
    with pytest.raises(DataError, match=r"source a\.json: weight="):
        SourceSpec("a.json", weight=weight)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_yaml(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.yaml",
        "seed: 5\nsources:\n  - {path: a.json, image_folder: images}\n"
        '  - {path: "s/*.tar", weight: 2, limit: 10%}\n  - b.jsonl\n  - {path: hf, split: train, limit: first:3}\n',
    )
    mixture = load_mixture(path)
    assert mixture.seed == 5
    assert mixture.sources == (
        SourceSpec("a.json", "images"),
        SourceSpec("s/*.tar", None, "10%", 2),
        SourceSpec("b.jsonl"),
        SourceSpec("hf", None, "first:3", 1.0, "train"),
    )
    assert load_mixture(path, seed=9).seed == 9


def test_the_form_of_recipes() -> None:
    sources = [{"path": "a.json", "image_folder": "images"}, {"path": "b.json", "image_folder": "other"}]
    mixture = Mixture.parse(sources, "data", seed=3)
    assert mixture == Mixture((SourceSpec("a.json", "images"), SourceSpec("b.json", "other")), 3)
    assert [source.draw(4, 0, 0).tolist() for source in mixture.sources] == [[0, 1, 2, 3]] * 2


def test_the_form_of_llava_next(tmp_path: Path) -> None:
    text = "datasets:\n  - json_path: a.json\n    sampling_strategy: random:50%\n  - json_path: b.jsonl\n"
    mixture = load_mixture(write(tmp_path / "m.yaml", text))
    assert mixture.sources == (SourceSpec("a.json", limit="random:50%"), SourceSpec("b.jsonl"))


def test_a_data_file_is_a_mixture_of_one(tmp_path: Path) -> None:
    assert load_mixture(tmp_path / "x" / "a.json").sources == (SourceSpec(f"{tmp_path}/x/a.json", f"{tmp_path}/x"),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sources: []", "at least one source"),
        ("source: []", "unknown key 'source'; did you mean 'sources'"),
        ("sources: [{pth: a.json}]", "source 0: unknown key 'pth'; did you mean 'path'"),
        ("sources: [{limit: all}]", "source 0 has no `path`"),
        ("sources: [3]", "source 0 is int, expected a mapping"),
        ("sources: {path: a}", "`sources` must be a list of sources, found dict"),
        ("sources: [{path: a, weight: lots}]", "source 0: source a: weight='lots'"),
        ("sources: [{path: a, limit: 500}]", "source 0: source a: limit='500'"),
        ("sources: [{path: 3}]", "path=3 must be a path"),
        ("seed: -1\nsources: [a]", "seed=-1 must be"),
        ("sources: [", "not readable as YAML"),
        ("", "`sources` must be a list of sources, found NoneType"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path / "m.yaml", text)
    with pytest.raises(DataError) as caught:
        load_mixture(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    with pytest.raises(DataError, match="no such mixture"):
        load_mixture(tmp_path / "gone.yaml")
