"""The training data of a run: plain LLaVA files as they are, anything else through a clean index; packed if asked for.

Plain are JSON and jsonl files with an image folder, all of whose records are used once. A mixture with limits or
weights, another kind of source, the policy to skip what is broken, and packing, which must know the exact length of
every sample, need the check that writes an index; unless the recipe names one, it is made at the start of the run and
kept in its folder, so that a run that goes on does not check or tokenise again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import TrainerCallback

from llava_moe.config import DataSection, RecipeError, RunConfig
from llava_moe.data.check import check_sources, raise_problems
from llava_moe.data.check_report import as_text
from llava_moe.data.checking import Limits, MixtureReport, check_mixture, processor_mark
from llava_moe.data.collator import Collator
from llava_moe.data.dataset import ConversationDataset
from llava_moe.data.feature_store import FeatureStore
from llava_moe.data.index import RecordIndex
from llava_moe.data.indexed import IndexedDataset, OnProblem, exact_lengths, has_visuals
from llava_moe.data.mixture import Mixture, SourceSpec, load_mixture
from llava_moe.data.packing import PackedDataset, PackingCollator
from llava_moe.data.processing import LlavaMoeProcessor
from llava_moe.data.progress import counting
from llava_moe.data.records import open_plain, walk
from llava_moe.data.schema import DataError, Sample
from llava_moe.model.packing import check_packing
from llava_moe.training.places import check_places
from llava_moe.training.rank_zero import on_first_rank

INDEX = "data_index"
_FACTS = "data_index.json"
_CHECKED = "data_checked.json"
Sources = list[tuple[Path, Path]] | Path
"""(data file, image folder) pairs, or the folder of an index."""


def plain_sources(config: RunConfig) -> list[tuple[Path, Path]] | None:
    """The files of a recipe that needs no index; None where it needs one.

    Raises:
        RecipeError: it names no data, or names it twice; or a value is refused.
    """
    data = config.data
    _check_section(data)
    grouped = config.train.get("train_sampling_strategy") == "group_by_length"
    if data.group_by_modality and (data.packing or not grouped):
        raise RecipeError("data.group_by_modality needs train.train_sampling_strategy: group_by_length and no packing")
    check_places(config)
    if data.index is not None or data.mixture is not None or data.on_problem != "refuse" or data.packing:
        return None
    if any(not _is_plain(_spec(source)) for source in data.sources):
        return None
    return [(Path(source.path), Path(str(source.image_folder))) for source in data.sources]


def _check_section(data: DataSection) -> None:
    named = {"sources": bool(data.sources), "mixture": data.mixture is not None, "index": data.index is not None}
    given = [name for name, there in named.items() if there]
    if not given:
        raise RecipeError("data.sources is empty: name at least one LLaVA JSON file and its image folder")
    if len(given) > 1:
        raise RecipeError(f"data.{given[0]} and data.{given[1]} both name the training data; give one of them")
    if data.on_problem not in get_args(OnProblem):
        raise RecipeError(f"data.on_problem={data.on_problem}: must be one of {', '.join(get_args(OnProblem))}")


def _spec(source: Any) -> SourceSpec:
    return SourceSpec(**dataclasses.asdict(source))


def _is_plain(spec: SourceSpec) -> bool:
    is_json = Path(spec.path).suffix in (".json", ".jsonl")
    return is_json and (spec.limit, spec.weight, spec.split) == ("all", 1.0, None) and spec.image_folder is not None


def mixture_of(config: RunConfig) -> Mixture:
    """The mixture of a recipe; its seed is that of the recipe."""
    if config.data.mixture is not None:
        return load_mixture(config.data.mixture, config.seed)
    return Mixture(tuple(_spec(source) for source in config.data.sources), config.seed)


def check_plain(config: RunConfig, sources: list[tuple[Path, Path]]) -> None:
    """Decodes every image of plain files, once for a run: what was found is kept in its folder.

    Raises:
        DataError: records or images have problems.
    """
    if config.data.check_images:
        on_first_rank(lambda: _check_plain(sources, Path(config.output_dir) / _CHECKED))


def _check_plain(sources: list[tuple[Path, Path]], known: Path) -> None:
    readers, problems = open_plain(sources)
    # whether the image files are there is looked at in every start, see ConversationDataset
    facts = json.dumps([[str(reader.path), str(reader.image_folder), reader.mark()] for reader in readers], indent=2)
    if not problems and known.is_file() and known.read_text() == facts:
        return
    with counting("checking images") as progress:
        check_sources(sources, progress=progress).raise_if_broken()
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(facts)


def prepare_index(config: RunConfig, processor: LlavaMoeProcessor) -> Path:
    """The index that the recipe names, or one that rank 0 writes into the folder of the run.

    Raises:
        DataError: records have problems, and `data.on_problem` is "refuse".
    """
    if config.data.index is not None:
        return Path(config.data.index)
    index = Path(config.output_dir) / INDEX
    on_first_rank(lambda: _make_index(config, processor, index))
    return index


def _make_index(config: RunConfig, processor: LlavaMoeProcessor, index: Path) -> None:
    data = config.data
    mixture, mark = mixture_of(config), processor_mark(processor)
    limits = Limits(data.max_length, data.overlong, decode=data.check_images)
    parts = [dataclasses.asdict(mixture), dataclasses.asdict(limits), mark]
    facts = json.dumps(parts, indent=2)
    known = Path(config.output_dir) / _FACTS
    if known.is_file() and known.read_text() == facts and _is_current(index):
        return
    report = _check(mixture, processor, limits, index)
    refused = report.counts.keys() - ({"overlong"} if data.overlong != "error" else set())
    if data.on_problem == "refuse" and refused:
        shown = [message for kind in report.examples if kind in refused for message in report.examples[kind]]
        raise_problems(shown, report.records, sum(report.counts[kind] for kind in refused))
    print(as_text(report), flush=True)
    known.write_text(facts)


def _is_current(index: Path) -> bool:
    try:
        RecordIndex(index)
    except DataError:
        return False
    return True


def _check(mixture: Mixture, processor: LlavaMoeProcessor, limits: Limits, index: Path) -> MixtureReport:
    index.parent.mkdir(parents=True, exist_ok=True)
    with counting("checking the data") as progress:
        return check_mixture(mixture, processor=processor, limits=limits, index=index, progress=progress)


def samples_of(sources: Sources) -> Iterable[Sample]:
    """All samples, without their images."""
    if isinstance(sources, Path):
        return RecordIndex(sources)
    return (found.sample for found in walk(open_plain(sources)[0]) if found.sample is not None)


def training_data(
    config: RunConfig, processor: LlavaMoeProcessor, sources: Sources, store: FeatureStore | None, attention: str
) -> tuple[Any, Any]:
    """The data set of a run and its collator.

    Args:
        attention: what the decoder came to use.

    Raises:
        DataError: see `ConversationDataset` and `IndexedDataset`.
    """
    data = config.data
    overlong: Any = data.overlong  # checked there
    dataset: ConversationDataset
    if isinstance(sources, Path):
        on_problem: Any = data.on_problem
        dataset = IndexedDataset(sources, processor, data.max_length, overlong, store, on_problem)
    else:
        dataset = ConversationDataset(sources, processor, data.max_length, overlong, store)
    dataset.hands_over = True  # `skipping.Skips` takes what breaks now
    collator = Collator.of(processor, None if store is None else store.feature_shape)
    if data.group_by_modality:
        dataset.has_image = has_visuals(dataset)  # type: ignore[attr-defined]  # the Trainer's sampler asks for it
    if not data.packing:
        return dataset, collator
    packed = PackedDataset(dataset, exact_lengths(dataset), data.max_length, config.seed)
    return packed, PackingCollator.for_attention(collator, processor.pad_token_id, attention)


class PackingCheck(TrainerCallback):  # type: ignore[misc]  # transformers types it as Any
    """Measures before the first step, on the device that will train, that packed samples do not see each other."""

    def __init__(self, collator: PackingCollator) -> None:
        self.collator = collator

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        mixed: Any = contextlib.nullcontext()
        if args.bf16:
            mixed = torch.autocast(args.device.type, torch.bfloat16)
        with mixed:
            check_packing(
                model, flat=self.collator.flat, varlen=self.collator.varlen, tolerance=0.05 if args.bf16 else None
            )
