"""A small dense checkpoint in, a larger dense one out: the decoder grows, all else is copied (2408.06567).

Works on the decoder of a LLaVA checkpoint, with the output side of its projector, and on a causal language model alone.
The methods are those of `llava_moe.moe.growth`; here their tensors are read and written one by one.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from llava_moe.config import GrowSection, NamedSection
from llava_moe.model.assemble import check_checkpoint, fingerprint, whole_directory
from llava_moe.model.families import is_ours
from llava_moe.model.layout import StoredModel, empty_model
from llava_moe.model.measuring import TOLERANCE, Agreement, Scratch, builtin_batches, compare, load_tools, scratch_bytes
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.offload import WHOLE_MODEL_BYTES, open_model
from llava_moe.model.streaming import MAX_SHARD_BYTES, CheckpointWriter, TensorInfo, check_space
from llava_moe.moe.growth import FAMILIES, GROWERS, Contract, DecoderNames, DecoderShape, Grower, family_of, read_shape
from llava_moe.moe.growth.base import Places
from llava_moe.registry import near_misses

PROVENANCE = "grow.json"
_PROJECTOR = "model.multi_modal_projector"
_NEWLINE = "model.image_newline"  # a vector of the hidden width, in models with tiles
_PROJECTORS = ("mlp2x_gelu", "linear")  # whose parameters are known here
_TARGET_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
)
_WIDTH_KEYS = _TARGET_KEYS[:-1]
Read = Callable[[str], Tensor]


@dataclasses.dataclass(frozen=True)
class GrowthPlan:
    """All that a growth will do.

    Attributes:
        parent: the small checkpoint.
        growers: applied one after the other: width, then depth.
        config: that of the result.
        model: the empty result.
        infos: every tensor of the result by its name on disk.
        made: names on disk, by those in the model, of the tensors that a grower makes.
        projector: likewise those of the projector.
        copied: names on disk of the rest.
    """

    parent: StoredModel
    growers: dict[str, Grower]
    config: Any
    model: Any
    infos: dict[str, TensorInfo]
    made: dict[str, str]
    projector: dict[str, str]
    copied: tuple[str, ...]

    @property
    def source(self) -> DecoderShape:
        """The decoder of the parent."""
        return next(iter(self.growers.values())).source

    @property
    def target(self) -> DecoderShape:
        """The grown decoder."""
        return list(self.growers.values())[-1].target

    @property
    def exact(self) -> bool:
        """Whether every step promises to keep the logits."""
        return all(grower.contract is Contract.EXACT for grower in self.growers.values())

    def tensor(self, name: str) -> Tensor:
        """One tensor of the grown decoder, from the few of the parent that it needs."""
        read: Read = self.parent.read
        for grower in self.growers.values():
            read = _through(grower, read)
        return read(name)


def _through(grower: Grower, read: Read) -> Read:
    return lambda name: grower.target_tensor(name, read)


def grow(
    section: GrowSection,
    out: Path,
    whole_bytes: int = WHOLE_MODEL_BYTES,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    finish: Callable[[Path, dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Writes the larger checkpoint and returns its provenance, which is also saved beside it.

    Args:
        section: what to do.
        out: the directory to write; it appears when it is complete.
        whole_bytes: models that take no more in float32 are loaded whole to be compared.
        max_shard_bytes: a file of weights is at most this large.
        finish: called with the finished directory and the provenance, before the directory takes its name.

    Raises:
        CheckpointError: the parent is no dense checkpoint of a known family, the disk is full, or the result breaks its
            contract; nothing is left then.
        ValueError: the target cannot be reached.
    """
    plan = make_growth_plan(section, out)
    tools = load_tools(plan.parent.path, pictures=is_ours(plan.config))
    batches = builtin_batches(tools, int(plan.config.get_text_config().max_position_embeddings))
    checkpoint = sum(info.nbytes for info in plan.infos.values())
    check_space(out, checkpoint + scratch_bytes(plan.config.get_text_config(), batches))
    with whole_directory(out) as partial:
        tools.save_pretrained(partial)
        _save_configs(plan, partial)
        with CheckpointWriter(partial, plan.infos, max_shard_bytes) as writer:
            _write(plan, writer)
        scratch = Scratch(partial / "scratch")
        agreement = compare(
            lambda: open_model(section.parent, whole_bytes), lambda: open_model(partial, whole_bytes), batches, scratch
        )
        shutil.rmtree(scratch.folder)
        _check_exact(plan, agreement)
        provenance = _provenance(section, plan, agreement)
        (partial / PROVENANCE).write_text(json.dumps(provenance, indent=2))
        if finish is not None:
            finish(partial, provenance)
    return provenance


def make_growth_plan(section: GrowSection, out: Path) -> GrowthPlan:
    """Works out everything, and reads no weight.

    Raises:
        CheckpointError, ValueError: as `grow`.
    """
    if Path(section.parent).resolve() == out.resolve():
        raise CheckpointError(f"{out}: the result would replace its own parent; choose another destination")
    parent = StoredModel(_check_parent(section.parent))
    if getattr(parent.config, "moe", None) is not None:
        raise CheckpointError(f"{section.parent}: a mixture of experts; growth starts from a dense checkpoint")
    text = parent.config.get_text_config()
    tied = bool(parent.model.all_tied_weights_keys)
    raw = {**text.to_dict(), "tie_word_embeddings": tied}
    source = read_shape(raw)
    growers = _growers(section, source, _target(section, source, text), _names(raw, parent))
    for grower in growers.values():
        raw = grower.grow_config(raw)
    config = _grown_config(parent, raw)
    infos, made, projector, copied = _tensors(parent, growers, source.layers)
    plan = GrowthPlan(parent, growers, config, empty_model(config), infos, made, projector, copied)
    _check_places(plan)
    return plan


def _check_parent(path: str) -> Path:
    """The directory of a LLaVA checkpoint or of a language model of a known family.

    Raises:
        CheckpointError: it is neither.
    """
    folder = Path(path)
    config = folder / "config.json"
    if config.is_file() and json.loads(config.read_text()).get("model_type") in FAMILIES:
        return folder
    return check_checkpoint(folder)


def _target(section: GrowSection, source: DecoderShape, text: Any) -> DecoderShape:
    """The shape that the recipe asks for; what it does not name stays.

    Raises:
        ValueError: a key is unknown, or a value is no whole number above 0.
    """
    for key, value in section.target.items():
        if key not in _TARGET_KEYS:
            raise ValueError(f"grow.target has no key {key!r}; {near_misses(key, list(_TARGET_KEYS))}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"grow.target.{key}={value!r} must be a whole number of at least 1")
    if not section.target:
        raise ValueError(f"grow.target is empty; name at least one of {', '.join(_TARGET_KEYS)}")
    # The width of a head stays: its rotary positions are learned for it.
    sizes = {**text.to_dict(), "head_dim": source.head_dim, "tie_word_embeddings": source.tied_head, **section.target}
    try:
        return read_shape(sizes)
    except ValueError as error:
        raise ValueError(f"grow.target={section.target}: {error}") from error


def _growers(
    section: GrowSection, source: DecoderShape, target: DecoderShape, names: DecoderNames
) -> dict[str, Grower]:
    """Width first, then depth, each only where it is named.

    Raises:
        ValueError: a needed grower is not named, or it refuses the two shapes.
    """
    if target == source:
        raise ValueError(f"grow.target={section.target}: the parent is of this size already")
    wider = dataclasses.replace(target, layers=source.layers) != source
    if section.width is None and wider:
        keys = [key for key in section.target if key in _WIDTH_KEYS]
        raise ValueError(f"grow.width is missing: grow.target changes {', '.join(keys)}; name a grower, e.g. fpi")
    if section.width is None and section.depth is None:
        raise ValueError(
            "grow.depth is missing: grow.target changes num_hidden_layers; name a grower, e.g. interpolate"
        )
    middle = target
    if section.depth is not None:
        middle = dataclasses.replace(target, layers=source.layers)
    found = {}
    if section.width is not None:
        found["width"] = _grower("width", section.width, source, middle, names)
    if section.depth is not None:
        found["depth"] = _grower("depth", section.depth, middle, target, names)
    return found


def _grower(key: str, named: NamedSection, source: DecoderShape, target: DecoderShape, names: DecoderNames) -> Grower:
    try:
        return GROWERS.get(named.name).build(named.args, source, target, names)
    except ValueError as error:
        raise ValueError(f"grow.{key}: {error}") from error


def _names(raw: dict[str, Any], parent: StoredModel) -> DecoderNames:
    """The names of the family's tensors as they are in the parent's model, where the decoder may be a part of it."""
    names = family_of(raw).names
    stem = parent.name_of(parent.model.get_input_embeddings()).removesuffix(names.embedding.removeprefix("model"))
    replaced = {
        field.name: getattr(names, field.name).replace("model.", f"{stem}.", 1)
        for field in dataclasses.fields(names)
        if field.name != "head"
    }
    return dataclasses.replace(names, **replaced)


def _grown_config(parent: StoredModel, text: dict[str, Any]) -> Any:
    if is_ours(parent.config):
        if parent.config.projector not in _PROJECTORS:
            raise ValueError(
                f"grow: the projector {parent.config.projector!r} cannot grow with the hidden width; known: "
                f"{', '.join(_PROJECTORS)}"
            )
        config = type(parent.config).from_dict({**parent.config.to_dict(), "text_config": text})
    else:
        config = type(parent.config).from_dict(text)
    embedding = f"{parent.name_of(parent.model.get_input_embeddings())}.weight"
    config.dtype = str(parent.info(embedding).dtype).removeprefix("torch.")
    config.architectures = [type(parent.model).__name__]
    return config


def _tensors(
    parent: StoredModel, growers: dict[str, Grower], source_layers: int
) -> tuple[dict[str, TensorInfo], dict[str, str], dict[str, str], tuple[str, ...]]:
    """What will be on disk: everything in the decoder's order, then what does not belong to it."""
    last = list(growers.values())[-1]
    shapes = last.tensor_names()
    infos: dict[str, TensorInfo] = {}
    made, projector, copied = {}, {}, []
    for key, shape in shapes.items():
        like = _counterpart(key, source_layers)
        made[key] = _renumbered(parent.located(like)[0].name, like, key)
        infos[made[key]] = TensorInfo(parent.info(like).dtype, shape)
    decoder = {_counterpart(key, source_layers) for key in shapes}
    for name, key in parent.keys.items():
        info = parent.reader.infos[name]
        if key in decoder or key in parent.model.all_tied_weights_keys:
            continue
        if key.startswith(f"{_PROJECTOR}.") or key == _NEWLINE:
            projector[key] = name
            infos[name] = TensorInfo(info.dtype, _projector_shape(key, info.shape, last.target.hidden))
        elif not is_ours(parent.config) or key.startswith(("model.language_model.", "lm_head.")):
            raise CheckpointError(f"{parent.path}: {key} is no tensor of a decoder of this family, and cannot grow")
        else:
            infos[name] = info
            copied.append(name)
    return infos, made, projector, tuple(copied)


def _counterpart(key: str, source_layers: int) -> str:
    """A tensor of the parent that has the same place in a layer."""
    head, found, tail = key.partition(".layers.")
    if not found:
        return key
    layer, _, rest = tail.partition(".")
    return f"{head}{found}{int(layer) % source_layers}.{rest}"


def _renumbered(name: str, like: str, key: str) -> str:
    """The name on disk of `key`, from that of its counterpart `like`."""
    if like == key:
        return name
    old, new = (k.partition(".layers.")[2].partition(".")[0] for k in (like, key))
    return name.replace(f".layers.{old}.", f".layers.{new}.", 1)


def _projector_shape(key: str, shape: tuple[int, ...], hidden: int) -> tuple[int, ...]:
    return (hidden, hidden) if key.endswith("linear_2.weight") else (hidden, *shape[1:])


def _projector_tensor(key: str, tensor: Tensor, places: Places) -> Tensor:
    """Its outputs are copied as those of the embeddings are; what the second layer sums over is divided."""
    grown = tensor.index_select(0, places.source)
    if not key.endswith("linear_2.weight"):
        return grown
    return (grown.index_select(1, places.source).float() / places.count).to(tensor.dtype)


def _check_places(plan: GrowthPlan) -> None:
    """Raises CheckpointError where the model of the grown config has other tensors than will be written."""
    state = {key: tuple(tensor.shape) for key, tensor in plan.model.state_dict().items()}
    for key, name in {**plan.made, **plan.projector}.items():
        if state.get(key) != plan.infos[name].shape:
            raise CheckpointError(
                f"{plan.parent.path}: {key} would be {plan.infos[name].shape}, but the grown config asks for "
                f"{state.get(key, 'no such tensor')}"
            )


def _save_configs(plan: GrowthPlan, folder: Path) -> None:
    plan.config.save_pretrained(folder)
    generation = plan.parent.path / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
    else:
        plan.model.generation_config.save_pretrained(folder)


def _write(plan: GrowthPlan, writer: CheckpointWriter) -> None:
    places = Places.modulo(plan.target.hidden, plan.source.hidden)
    with Progress(console=Console(stderr=True)) as progress:
        for key, name in progress.track(plan.made.items(), description="growing"):
            writer.write(name, plan.tensor(key).to(plan.infos[name].dtype))
        for key, name in plan.projector.items():
            writer.write(name, _projector_tensor(key, plan.parent.read(key), places))
        for name in progress.track(plan.copied, description="copying the rest"):
            writer.copy(name, plan.parent.reader)


def _check_exact(plan: GrowthPlan, agreement: Agreement) -> None:
    """Raises CheckpointError where rounding does not explain how far an exact result is from its parent."""
    dtypes = {plan.infos[name].dtype for name in plan.made.values()}
    # Divided weights are rounded to the dtype they are stored in.
    tolerance = max([TOLERANCE, *(torch.finfo(dtype).eps for dtype in dtypes if dtype.itemsize < 4)])
    if plan.exact and not agreement.within(tolerance):
        raise CheckpointError(
            f"growing {plan.parent.path} is not exact: logits of up to {agreement.max_abs_logit:.1f} differ by "
            f"{agreement.max_abs_logit_error:.2e}, more than the {tolerance} of them that rounding explains"
        )


def _provenance(section: GrowSection, plan: GrowthPlan, agreement: Agreement) -> dict[str, Any]:
    def count(model: Any) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    return {
        "parent": str(section.parent),
        "parent_fingerprint": fingerprint(section.parent),
        "section": dataclasses.asdict(section),
        "versions": {name: version(name) for name in ("llava-moe", "torch", "transformers")},
        "source": dataclasses.asdict(plan.source),
        "target": dataclasses.asdict(plan.target),
        "contract": {key: grower.contract.value for key, grower in plan.growers.items()},
        "left_out": plan.parent.strays,
        "exact": plan.exact,
        "measured_on": "built-in text and picture",
        "num_tokens": agreement.num_tokens,
        "max_abs_logit_error": agreement.max_abs_logit_error,
        "max_abs_logit": agreement.max_abs_logit,
        "greedy_agreement": agreement.greedy_agreement,
        "parameters": {"parent": count(plan.parent.model), "grown": count(plan.model)},
    }
