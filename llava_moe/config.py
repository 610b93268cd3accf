"""Recipes: strict, typed YAML with dotted overrides. Dataclasses only; torch is not imported here.

A recipe is an instance of `RunConfig`. It may name one other recipe under `base:` (a path relative to itself), whose
values it then overrides. An unknown key is an error that suggests the nearest known one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llava_moe.registry import near_misses


class RecipeError(ValueError):
    """A recipe or an override is wrong; the message names the file or the override and the key."""


@dataclass
class ModelSection:
    """What is trained: a checkpoint of ours, or the parts of a first one."""

    checkpoint: str | None = None  # a directory; when null, the parts below are assembled into <output_dir>/initial
    family: str | None = None  # llava, llava_next, llava_onevision; null: the one that goes with data.image_mode
    vision_tower: str | None = None  # a directory or hub id, timm:, open_clip:, fused: or s2:, see model/vision_load.py
    vision_weights: str | None = None  # safetensors for timm: and open_clip:; null means random, to be asked for
    image_size: int | None = None  # for timm:, SigLIP2 NaFlex and DINOv2; given for another it must be its own
    language_model: str | None = None  # directory or hub id of a causal LM
    projector: str = "mlp2x_gelu"
    projector_args: dict[str, Any] | None = None  # options of the projector, e.g. {factor: 2}
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str = "default"  # default drops the CLS token, full keeps everything
    random_weights: bool = False  # build tower (and LM) from their configs without weights: for smoke runs
    attn_implementation: str = "auto"  # auto: FlashAttention where it runs, else sdpa; see model/attention.py
    dtype: str = "float32"  # of the loaded weights: float32, bfloat16


@dataclass
class StageSection:
    """Which parts learn, and how fast. A part that is not named is frozen."""

    name: str = MISSING
    learning_rates: dict[str, float] = field(default_factory=dict)
    weight_decay: Any = 0.0  # one number, or {part: number} for parts that learn; the others then have none

    def decay_of(self, part: str) -> float:
        """Weight decay of a part of `learning_rates`."""
        decay = self.weight_decay
        return float(decay.get(part, 0.0) if isinstance(decay, dict) else decay)

    def check_decay(self) -> None:
        """Raises RecipeError where a value is no number of at least 0, or a named part does not learn."""
        by_part = isinstance(self.weight_decay, dict)
        for part, value in (self.weight_decay if by_part else {"": self.weight_decay}).items():
            where = f"stage.weight_decay.{part}" if by_part else "stage.weight_decay"
            if by_part and part not in self.learning_rates:
                raise RecipeError(
                    f"{where}: the part does not learn; {near_misses(str(part), list(self.learning_rates))}"
                )
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise RecipeError(f"{where}: {value!r} must be a number of at least 0")


@dataclass
class SourceSection:
    """One source of a mixture, usually a LLaVA JSON file; see data/mixture.py and data/sources."""

    path: str = MISSING  # *.json, *.jsonl, *.parquet, *.tar, a pattern of them, or a folder of Dataset.save_to_disk
    image_folder: str | None = MISSING  # what image names are relative to; null where the images lie in the data
    limit: str = "all"  # all, first:N, end:N, random:N (N a number or N%), N%
    weight: float = 1.0  # how often its records come in an epoch
    split: str | None = None  # of a saved data set that has several


@dataclass
class DataSection:
    """Training data and how a record becomes tokens."""

    sources: list[SourceSection] = field(default_factory=list)
    mixture: str | None = None  # a YAML file of sources in the place of `sources`
    index: str | None = None  # what llava-moe check-data wrote, in the place of `sources`
    on_problem: str = "refuse"  # a broken record or image: refuse to train, or skip it; skipped ones are counted
    group_by_modality: bool = False  # with group_by_length: no step mixes samples with and without images
    packing: bool = False  # several samples in a row of max_length tokens, which never see one another
    template: str | None = None  # null keeps the one saved with the checkpoint
    template_options: dict[str, Any] | None = None  # e.g. {llava_next_labels: true}; null keeps the saved ones
    image_mode: str | None = None  # square, pad, anyres, anyres_max_N; null keeps the saved one
    tiling: dict[str, Any] | None = None  # of anyres: grids, merge, ..., see data/processor_parts.py; null keeps them
    num_frames: int | None = None  # frames of a video that are shown at most; null keeps the saved number
    max_length: int = 2048
    overlong: str = "error"  # error, skip, truncate; what was skipped or cut is counted and reported
    feature_cache: str | None = None  # folder for the features of a frozen tower; null computes them each time
    check_images: bool = True  # decode every image before compute is spent


@dataclass
class BalanceSection:
    """What keeps the experts in use: balance losses, and controllers that act after every step."""

    # name: coefficient, or name: {coefficient: 0.01, option: value}; null leaves out what the base recipe names.
    # The mean over layers is multiplied by the coefficient.
    losses: dict[str, Any] = field(default_factory=dict)
    # name: {option: value}; null likewise
    controllers: dict[str, Any] = field(default_factory=dict)

    def weighted_losses(self) -> dict[str, tuple[float, dict[str, Any]]]:
        """Coefficient and options of each loss.

        Raises:
            RecipeError: an entry has another form, or its coefficient is no number of at least 0.
        """
        return {n: _weighted(f"balance.losses.{n}", v) for n, v in self.losses.items() if v is not None}

    def controller_options(self) -> dict[str, dict[str, Any]]:
        """Options of each controller.

        Raises:
            RecipeError: an entry is no mapping.
        """
        for name, value in self.controllers.items():
            if value is not None and not isinstance(value, dict):
                raise RecipeError(f"balance.controllers.{name}={value!r} must be a mapping of options; {{}} for none")
        return {name: dict(value) for name, value in self.controllers.items() if value is not None}


def _weighted(where: str, value: Any) -> tuple[float, dict[str, Any]]:
    options = dict(value) if isinstance(value, dict) else {"coefficient": value}
    if "coefficient" not in options:
        raise RecipeError(
            f"{where} needs a coefficient: write a number, or {{coefficient: 0.01, ...}} with its options"
        )
    coefficient = options.pop("coefficient")
    number = isinstance(coefficient, int | float) and not isinstance(coefficient, bool)
    if not number or not 0 <= coefficient < math.inf:
        raise RecipeError(f"{where}: coefficient={coefficient!r} must be a number of at least 0")
    return float(coefficient), options


@dataclass
class NamedSection:
    """A registry name and its options."""

    name: str = MISSING
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class PartSection:
    """What the dense blocks of one part of the model (decoder, vision tower, projector) become."""

    layers: Any = "alternate"  # all, alternate (0, 2, 4, ...), every_N, first_half, second_half, or a list of indices
    num_experts: Any = 4  # one number, or a list with one for each layer
    router: NamedSection = field(default_factory=lambda: NamedSection("top_k"))
    experts: NamedSection = field(default_factory=lambda: NamedSection("stacked"))
    upcycler: NamedSection = field(default_factory=lambda: NamedSection("copy"))
    shared: dict[str, Any] | None = None  # options of the experts that see every token; null for none
    capacity: dict[str, Any] | None = None  # options of the bound on an expert's tokens; null is dropless
    allow_noncausal: bool = False  # admits a router that looks at later tokens into the decoder


@dataclass
class CalibrationSection:
    """Real samples for the upcyclers that look at activations, and for the measured error against the parent."""

    path: str = MISSING  # a LLaVA JSON file
    image_folder: str = MISSING
    num_samples: int = 32


@dataclass
class UpcycleSection:
    """How a dense checkpoint becomes an MoE one; a part that is not named stays dense."""

    parent: str = MISSING
    seed: int = 0
    decoder: PartSection | None = None
    vision: PartSection | None = None
    projector: PartSection | None = None
    calibration: CalibrationSection | None = None  # null measures on a built-in text and picture

    def parts(self) -> dict[str, PartSection]:
        """The parts that get experts, by name."""
        named = {"decoder": self.decoder, "vision": self.vision, "projector": self.projector}
        return {name: part for name, part in named.items() if part is not None}


@dataclass
class GrowSection:
    """How a small dense checkpoint becomes a larger dense one (llava-moe grow)."""

    parent: str = MISSING  # a LLaVA checkpoint, whose decoder grows, or that of a causal language model
    target: dict[str, Any] = field(default_factory=dict)  # sizes by their keys in the config: hidden_size: 4096, ...
    width: NamedSection | None = None  # a grower for all sizes but the number of layers
    depth: NamedSection | None = None  # a grower for num_hidden_layers; null leaves that to the one for the width


@dataclass
class SpeedSection:
    """The same results, sooner or in less memory."""

    fused_loss: str = "auto"  # auto (liger on a GPU that has it), liger, chunked, off; see model/loss.py
    compile_layers: bool = False  # torch.compile of each decoder layer; see training/compiling.py


@dataclass
class LoraSection:
    """Low-rank adapters on the decoder (LoRA, 2106.09685) through peft; see training/lora.py and docs/lora.md."""

    rank: int = 128  # of each adapter; of stacked experts, of each expert
    alpha: float = 256.0  # the adapters are scaled by alpha / rank
    dropout: float = 0.0  # of an adapter's input; experts take none
    targets: list[str] = field(default_factory=list)  # attention, mlp, experts, or ends of paths; empty is all
    rslora: bool = False  # scale by alpha / sqrt(rank) (2312.03732)
    quantize: str | None = None  # nf4: the frozen linear layers in 4 bits (QLoRA, 2305.14314)


@dataclass
class ScoringSection:
    """Scores on small local tasks while the run trains; see training/scoring.py."""

    data: str = MISSING  # folder with the parquet files of the tasks, as `llava-moe eval --data`
    tasks: list[str] = MISSING  # local tasks: local_gqa, local_pope, local_mmbench
    every: int = MISSING  # score after every so many steps; a multiple of train.logging_steps
    limit: int | None = None  # only the first so many records of each task; null takes all
    batch_size: int = 16  # prompts that are answered together


@dataclass
class TelemetrySection:
    """What is watched of the routing while a run trains, and what is done when it collapses."""

    every: int = 1  # the routing of every N-th micro-batch is measured; 0 measures none
    images: bool = True  # for each expert, the share of image tokens
    dead_share: float = 0.1  # an expert is dead below this share of an even load
    on_collapse: str = "warn"  # or stop: a run whose routing has collapsed ends with an error
    alarms: dict[str, Any] = field(default_factory=dict)  # name: {option: value}, null for off; training/alarms.py


@dataclass
class RunConfig:
    """One training run. `train` is handed to transformers' TrainingArguments and checked against its fields."""

    output_dir: str = MISSING
    seed: int = 0
    stage: StageSection = field(default_factory=StageSection)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    balance: BalanceSection = field(default_factory=BalanceSection)
    telemetry: TelemetrySection = field(default_factory=TelemetrySection)
    speed: SpeedSection = field(default_factory=SpeedSection)
    upcycle: UpcycleSection | None = None
    grow: GrowSection | None = None
    scoring: ScoringSection | None = None  # null trains without scoring
    lora: LoraSection | None = None  # null trains the parts of stage.learning_rates as they are
    deepspeed: str | None = None  # a DeepSpeed JSON; null trains with plain DDP
    expert_parallel: int | None = None  # ranks that share the decoder's experts (ZeRO-1, 2); null: all on every rank
    train: dict[str, Any] = field(default_factory=dict)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a recipe, its base, and dotted overrides such as `train.learning_rate=1e-4`.

    Raises:
        RecipeError: the file is missing or not YAML, a key is unknown, a value has the wrong type, or a required
            value is absent.
    """
    path = Path(path)
    merged: Any = OmegaConf.structured(RunConfig)
    for source, layer in _layers(path):
        merged = _merge(merged, layer, str(source))
    raw: Any
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise RecipeError(f"override {override!r} is not of the form key.key=value")
        try:
            raw = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise RecipeError(f"override {override!r}: {_first_line(error)}") from error
        merged = _merge(merged, raw, f"override {override!r}")
    return _to_object(merged, path)


def dump_resolved(config: RunConfig, path: Path) -> None:
    """Writes the resolved recipe, which can be run again as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")  # a kill must not leave half a recipe under the name
    partial.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    partial.rename(path)


def _layers(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The recipe's own mapping, after that of its base."""
    raw = _read_yaml(path)
    base = raw.pop("base", None)
    if base is None:
        return [(path, raw)]
    base_path = path.parent / str(base)
    base_raw = _read_yaml(base_path)
    if "base" in base_raw:
        raise RecipeError(f"{base_path}: a base recipe may not have a base itself (asked for by {path})")
    return [(base_path, base_raw), (path, raw)]


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe")
    try:
        # OmegaConf's own loader reads 1e-4 as a number, which plain YAML 1.1 does not.
        raw = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        raise RecipeError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections")
    return {str(key): value for key, value in raw.items()}


def _merge(merged: DictConfig, raw: Any, source: str) -> DictConfig:
    _check_keys(raw, RunConfig, source, "")
    try:
        return OmegaConf.merge(merged, raw)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise RecipeError(f"{source}: {key or 'value'}: {_first_line(error)}") from error


def _check_keys(raw: Any, schema: Any, source: str, prefix: str) -> None:
    """Raises RecipeError for a key that the dataclass does not have, before omegaconf says so less kindly."""
    if not isinstance(raw, dict) or not dataclasses.is_dataclass(schema):
        return
    known = {f.name: f.type for f in dataclasses.fields(schema)}
    for key, value in raw.items():
        if key not in known:
            raise RecipeError(f"{source}: unknown key {prefix}{key}; {near_misses(str(key), list(known))}")
        child = _SECTIONS.get(str(known[key]).replace(" | None", ""))
        if child is not None:
            _check_keys(value, child, source, f"{prefix}{key}.")
        elif str(known[key]) == "list[SourceSection]" and isinstance(value, list):
            for i, item in enumerate(value):
                _check_keys(item, SourceSection, source, f"{prefix}{key}[{i}].")


_SECTIONS: dict[str, type] = {
    section.__name__: section
    for section in (
        ModelSection,
        StageSection,
        DataSection,
        BalanceSection,
        TelemetrySection,
        SpeedSection,
        NamedSection,
        PartSection,
        CalibrationSection,
        UpcycleSection,
        GrowSection,
        ScoringSection,
        LoraSection,
    )
}


def _to_object(merged: DictConfig, path: Path) -> RunConfig:
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise RecipeError(f"{path}: {key or 'value'} must be set: {_first_line(error)}") from error
    assert isinstance(config, RunConfig)
    config.balance.weighted_losses()
    config.balance.controller_options()
    config.stage.check_decay()
    return config


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
