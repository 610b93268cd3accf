"""Check every record and image of a mixture before training, and write a clean index of what can be used.

MIXTURE is a recipe (its `data` section says all there is to know), a YAML file with `sources`, or a single data file.
The exit status is 0 if every record can be used, 1 if there are problems, 2 if the check could not run.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from llava_moe.config import RunConfig, load_recipe
from llava_moe.data.check_report import as_json, as_text
from llava_moe.data.checking import OVERLONG, Limits, check_mixture
from llava_moe.data.image_marks import DEFAULT_DISTANCE, Benchmarks
from llava_moe.data.mixture import Mixture, SourceSpec, load_mixture
from llava_moe.data.processing import load_processor
from llava_moe.data.progress import counting
from llava_moe.data.schema import DataError

REPORT = "report.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `llava-moe check-data`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("mixture", metavar="MIXTURE", help="a recipe, a mixture (YAML) or a data file")
    add("--image-folder", metavar="DIR", help="of a single data file; by default the folder it is in")
    add("--processor", metavar="CHECKPOINT", help="count tokens and render the template as this checkpoint does")
    add("--max-length", type=int, metavar="N", help="longest sample in tokens; by default that of the recipe")
    add("--overlong", choices=OVERLONG, help="what longer samples are; by default as in the recipe, or error")
    add("--max-pixels", type=int, default=Limits.max_pixels, metavar="N", help="of one image (%(default)s)")
    add("--benchmark", action="append", default=[], metavar="NAME=PLACE", help="look for the images of this folder")
    text = f"bits of 128 in which images that look the same may differ ({DEFAULT_DISTANCE})"
    add("--distance", type=int, default=DEFAULT_DISTANCE, metavar="N", help=text)
    add("--drop-benchmark-images", action="store_true", help="leave records with such images out of the index")
    add("--index", metavar="DIR", help="write the clean index here, for data.index, and report.json beside it")
    add("--seed", type=int, help="of random limits and weights; by default that of the recipe or mixture")
    add("--no-decode", action="store_true", help="only look whether the images are there; do not open them")
    add("--workers", type=int, metavar="N", help="processes, 0 for none; by default one for each core")


def main(arguments: argparse.Namespace) -> None:
    """Runs the check, prints the report and ends the process with its status."""
    if arguments.workers is not None and arguments.workers < 0:
        raise DataError(f"--workers {arguments.workers}: must be at least 0")
    if arguments.drop_benchmark_images and not arguments.benchmark:
        raise DataError("--drop-benchmark-images: name the benchmarks with --benchmark NAME=PLACE")
    mixture, recipe = read_mixture(arguments)
    processor = _processor(arguments.processor, recipe)
    limits = Limits(
        max_length=_first(arguments.max_length, recipe and processor and recipe.data.max_length),
        overlong=_first(arguments.overlong, recipe and recipe.data.overlong, "error"),
        max_pixels=arguments.max_pixels,
        drop_benchmark_images=arguments.drop_benchmark_images,
        decode=not arguments.no_decode,
    )
    benchmarks = Benchmarks(_places(arguments.benchmark), arguments.distance) if arguments.benchmark else None
    with counting("checking records") as progress:
        report = check_mixture(
            mixture,
            processor=processor,
            limits=limits,
            benchmarks=benchmarks,
            index=arguments.index,
            workers=arguments.workers,
            progress=progress,
        )
    print(as_text(report))
    if arguments.index is not None:
        (Path(arguments.index) / REPORT).write_text(json.dumps(as_json(report), indent=2), encoding="utf-8")
        print(f"index of {report.kept:,} samples: {arguments.index}; train on it with data.index={arguments.index}")
    sys.exit(0 if report.is_clean else 1)


def read_mixture(arguments: argparse.Namespace) -> tuple[Mixture, RunConfig | None]:
    """The mixture, and the recipe where it is that of one.

    Raises:
        DataError, RecipeError: the file is neither, or a value in it is refused.
    """
    path = Path(arguments.mixture)
    if path.suffix.lower() not in (".yaml", ".yml"):
        folder = arguments.image_folder or str(path.parent)
        return Mixture((SourceSpec(str(path), folder),), arguments.seed or 0), None
    if arguments.image_folder is not None:
        raise DataError("--image-folder belongs to a single data file; in a mixture every source names its own")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (yaml.YAMLError, UnicodeDecodeError):
        raw = None  # reading it as a mixture says what is wrong
    if not isinstance(raw, dict) or not {"data", "base"} & raw.keys():
        return load_mixture(path, arguments.seed), None
    recipe = load_recipe(path)
    seed = recipe.seed if arguments.seed is None else arguments.seed
    if recipe.data.index is not None:
        raise DataError(f"{path}: its data.index names an index, which is checked already; name its sources instead")
    if recipe.data.mixture is not None:
        return load_mixture(recipe.data.mixture, seed), recipe
    return Mixture.parse([asdict(source) for source in recipe.data.sources], f"{path}: data", seed), recipe


def _processor(checkpoint: str | None, recipe: RunConfig | None) -> Any:
    """That of the named checkpoint, or of the recipe's where it is there already; None without either."""
    own = recipe.model.checkpoint if recipe is not None else None
    if checkpoint is None and (own is None or not Path(own).is_dir()):
        return None
    names = ("template", "template_options", "image_mode", "tiling", "num_frames")
    options = {name: getattr(recipe.data, name) for name in names} if recipe is not None else {}
    return load_processor(Path(checkpoint or str(own)), **options)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _places(named: list[str]) -> dict[str, str]:
    places = {}
    for item in named:
        name, equals, place = item.partition("=")
        if not (name and equals and place):
            raise DataError(f"--benchmark {item}: write NAME=PLACE, for example pope=data/coco_val2014")
        places[name] = place
    return places
