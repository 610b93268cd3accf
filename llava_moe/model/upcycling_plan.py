"""What an upcycling will write, worked out from configs and headers: everything that can be refused is refused here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_moe.config import PartSection, UpcycleSection
from llava_moe.model.assemble import check_checkpoint
from llava_moe.model.configuration import LlavaMoeConfig, MoePart, MoeSection
from llava_moe.model.foreign import check_section, decoder_of, is_foreign
from llava_moe.model.layout import Piece, StoredModel, empty_model, stock_pieces
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.sites import activation_name, find_blocks, mlp_spec
from llava_moe.model.streaming import TensorInfo
from llava_moe.model.upcycling_layer import BlockPlan
from llava_moe.moe import EXPERTS, UPCYCLERS, MlpSpec, Upcycler
from llava_moe.moe.upcycling import BranchTrainMix, Copy, DenseMlp

_NAMED = ("all", "alternate", "every_N", "first_half", "second_half")
_ROOTS = {"vision": "model.vision_tower", "projector": "model.multi_modal_projector"}


def select_layers(choice: Any, num_layers: int, key: str = "upcycle.decoder.layers") -> list[int]:
    """Turns all, alternate, every_N, first_half, second_half or a list of indices into indices.

    Raises:
        ValueError: the choice is none of these or names a layer that does not exist.
    """
    named = {
        "all": range(num_layers),
        "alternate": range(0, num_layers, 2),
        "first_half": range(num_layers // 2),
        "second_half": range(num_layers // 2, num_layers),
    }
    if isinstance(choice, str) and re.fullmatch(r"every_[1-9]\d*", choice):
        return list(range(0, num_layers, int(choice.removeprefix("every_"))))
    if isinstance(choice, str) and choice in named:
        return list(named[choice])
    if not isinstance(choice, list | tuple):
        raise ValueError(f"{key}={choice!r}: must be one of {', '.join(_NAMED)} or a list of indices")
    layers = [int(i) for i in choice]
    wrong = [i for i in layers if not 0 <= i < num_layers]
    if wrong or not layers:
        raise ValueError(f"{key}={layers}: there are layers 0..{num_layers - 1}")
    return layers


def moe_part(section: PartSection, name: str, num_layers: int) -> MoePart:
    """What a recipe's part becomes in config.json, before its upcycler had a say in the expert width.

    Raises:
        ValueError: layers or numbers of experts make no sense.
    """
    raw = {
        "layers": [0] if name == "projector" else select_layers(section.layers, num_layers, f"upcycle.{name}.layers"),
        "num_experts": section.num_experts,
        "router": {"name": section.router.name, "args": dict(section.router.args)},
        "experts": {"name": section.experts.name, "args": dict(section.experts.args)},
        "shared": section.shared,
        "capacity": section.capacity,
        "allow_noncausal": section.allow_noncausal,
    }
    return MoePart.from_dict(raw, f"moe.{name}")


def build_upcycler(section: PartSection, name: str) -> tuple[Upcycler, list[str], bool]:
    """The upcycler of a part; and for `branch_train_mix` the checkpoints, and whether the parent is an expert too.

    `checkpoints` and `with_parent` are options of the program and not of the method, which sees tensors only.

    Raises:
        ValueError: the name or an option is unknown or refused, or checkpoints are missing.
    """
    kind = UPCYCLERS.get(section.upcycler.name)
    args = dict(section.upcycler.args)
    if not issubclass(kind, BranchTrainMix):
        return kind.build(args), [], False
    where = f"upcycle.{name}.upcycler.args"
    checkpoints, with_parent = args.pop("checkpoints", None), args.pop("with_parent", False)
    if not isinstance(checkpoints, list | tuple) or not checkpoints:
        raise ValueError(f"{where}.checkpoints={checkpoints!r}: name the fine-tuned checkpoints in a list")
    if not isinstance(with_parent, bool):
        raise ValueError(f"{where}.with_parent={with_parent!r} must be true or false")
    return kind.build(args), [str(path) for path in checkpoints], with_parent


def num_layers_of(model: Any, name: str) -> int:
    """How many layers a part of the model has; a projector is one block."""
    return 1 if name == "projector" else len(find_blocks(model.get_submodule(_root(model, name))).layers)


def _root(model: Any, name: str) -> str:
    """Where a part of the model lies."""
    if name != "decoder":
        return _ROOTS[name]
    decoder = decoder_of(model)
    return next(path for path, module in model.named_modules() if module is decoder)


def block_path(model: Any, name: str, index: int) -> str:
    """The module path of a feed-forward block, the same in the dense and in the sparse model."""
    root = _root(model, name)
    if name == "projector":
        return root
    return f"{root}.{find_blocks(model.get_submodule(root)).block_path(index)}"


@dataclass(frozen=True)
class PartPlan:
    """One part of the model that gets experts.

    Attributes:
        moe: its section of config.json, with the widths that the upcycler asks for.
        blocks: the blocks to replace, in the order of their layers.
    """

    name: str
    moe: MoePart
    upcycler: Upcycler
    blocks: tuple[BlockPlan, ...]


@dataclass(frozen=True)
class Plan:
    """All that an upcycling will do.

    Attributes:
        parent: the dense checkpoint; its files are the model for order and names.
        sources: the checkpoints whose mean all other tensors are; the parent alone for most methods.
        config: that of the result.
        model: the empty result.
        infos: every tensor of the result by its name on disk.
        pieces: for each tensor of each MoE layer, by its name in the model, the tensors on disk.
        kept: names on disk of what the result has from the parent, or from the mean of the sources.
    """

    parent: StoredModel
    sources: tuple[StoredModel, ...]
    parts: tuple[PartPlan, ...]
    config: LlavaMoeConfig
    model: Any
    infos: dict[str, TensorInfo]
    pieces: dict[str, tuple[Piece, ...]]
    kept: tuple[str, ...]

    def dense(self, block: BlockPlan, upcycler: Upcycler) -> Iterator[DenseMlp]:
        """Reads the dense blocks that an upcycler takes, one by one."""
        if not isinstance(upcycler, BranchTrainMix):
            yield read_block(block, self.sources)
            return
        for source in self.sources:
            yield read_block(block, (source,))


def mean_of(key: str, sources: Sequence[StoredModel]) -> Tensor:
    """A parameter of one checkpoint, or the mean of that of several in the dtype of the first.

    Raises:
        CheckpointError: a tensor of whole numbers differs between them, and has no mean.
    """
    if len(sources) == 1:
        return sources[0].read(key)
    first = sources[0].read(key)
    # As `llava_moe.moe.upcycling.mean_tensor`, but with one of the tensors in memory at a time.
    total = first.to(torch.promote_types(first.dtype, torch.float32))
    for source in sources[1:]:
        tensor = source.read(key)
        if first.is_floating_point():
            total = total + tensor
        elif not torch.equal(tensor, first):
            raise CheckpointError(f"{source.path}: {key} differs from that of {sources[0].path} and has no mean")
    return (total / len(sources)).to(first.dtype) if first.is_floating_point() else first


def read_block(block: BlockPlan, sources: Sequence[StoredModel]) -> DenseMlp:
    """A dense block, all tensors in one dtype."""
    spec = block.spec
    names = [spec.up_name] if spec.fused_gate or not spec.gated else [str(spec.gate_name), spec.up_name]

    def read(name: str, kind: str) -> Tensor:
        return mean_of(f"{block.path}.{name}.{kind}", sources)

    def joined(kind: str) -> Tensor:
        tensors = [read(name, kind) for name in names]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    if not spec.bias:
        return DenseMlp(joined("weight"), read(spec.down_name, "weight"), None, None)
    return DenseMlp(joined("weight"), read(spec.down_name, "weight"), joined("bias"), read(spec.down_name, "bias"))


def make_plan(section: UpcycleSection, out: Path) -> Plan:
    """Works out everything, and reads no weight.

    Raises:
        CheckpointError: the parent is no dense checkpoint, or is the destination; a named checkpoint differs from it.
        ValueError: the section asks for something that does not exist or does not fit.
    """
    if Path(section.parent).resolve() == out.resolve():
        raise CheckpointError(f"{out}: the result would replace its own parent; choose another output_dir")
    if not section.parts():
        raise ValueError("upcycle names no part of the model; give it a section decoder, vision or projector")
    made = {name: build_upcycler(part, name) for name, part in section.parts().items()}
    for name, (upcycler, _, _) in made.items():
        if upcycler.needs != "nothing" and section.calibration is None:
            raise ValueError(
                f"upcycle.calibration is missing: upcycler {section.parts()[name].upcycler.name!r} of the {name} looks "
                f"at {upcycler.needs} on real samples; name a data file (path) and its image_folder there"
            )
    parent = StoredModel(check_checkpoint(section.parent, is_foreign))
    check_section(parent.config, section)
    if parent.config.moe is not None:
        raise CheckpointError(f"{section.parent}: already a mixture of experts; upcycling starts from a dense one")
    sources = _sources(parent, section, made)
    config = sparse_config(section, parent.model)
    embedding = f"{parent.name_of(parent.model.get_input_embeddings())}.weight"
    # As `save_pretrained` notes them.
    config.dtype = str(parent.info(embedding).dtype).removeprefix("torch.")
    config.architectures = [type(parent.model).__name__]
    model = empty_model(config)
    assert config.moe_section is not None
    parts = tuple(
        PartPlan(name, part, made[name][0], tuple(_blocks(parent.model, model, name, part)))
        for name, part in config.moe_section.parts().items()
    )
    infos, pieces, kept = _tensors(parent, model, parts)
    return Plan(parent, sources, parts, config, model, infos, pieces, kept)


def sparse_config(section: UpcycleSection, dense: Any) -> LlavaMoeConfig:
    """The config of the result; the dense model may be an empty one, see `llava_moe.model.layout.empty_model`.

    Raises:
        ValueError: the section asks for something that does not exist or does not fit.
    """
    moe = {
        name: _part(dense, part, name, build_upcycler(part, name)[0], f"upcycle.{name}")
        for name, part in section.parts().items()
    }
    return dense.config.__class__.from_dict({**dense.config.to_dict(), "moe": MoeSection(**moe).to_dict()})


def _part(dense: Any, section: PartSection, name: str, upcycler: Upcycler, where: str) -> MoePart:
    """The section of config.json with the upcycler's widths.

    Raises:
        ValueError: the kind of experts or the shared experts do not go with the upcycler.
    """
    part = moe_part(section, name, num_layers_of(dense, name))
    kind = EXPERTS.get(part.experts.name)
    if hasattr(kind, "from_dense") and not isinstance(upcycler, Copy):
        raise ValueError(f"{where}.upcycler: experts {part.experts.name!r} share the dense block as it is; use copy")
    specs = _specs(dense, name, part)
    pairs = list(zip(specs, part.num_experts, strict=True))
    widths = {upcycler.expert_spec(spec, number).intermediate for spec, number in pairs}
    shared_widths = {upcycler.shared_width(spec, number) for spec, number in pairs}
    if len(widths) > 1 or len(shared_widths) > 1:
        raise ValueError(
            f"{where}.num_experts={section.num_experts}: upcycler {section.upcycler.name!r} would make experts of "
            f"different widths {sorted(widths)}; all layers of a part have experts of one width, so give one number"
        )
    width, shared_width = widths.pop(), shared_widths.pop()
    if shared_width is not None and part.shared is not None:
        raise ValueError(
            f"{where}.shared: upcycler {section.upcycler.name!r} makes the shared experts itself; leave it out"
        )
    shared = part.shared if shared_width is None else {"num": 1, "width": shared_width, "mix": "sum"}
    return replace(part, expert_width=None if width == specs[0].intermediate else width, shared=shared)


def _specs(dense: Any, name: str, part: MoePart) -> list[MlpSpec]:
    """The dense blocks of the layers of a part."""
    config = dense.config
    if name == "projector":
        activation = str(config.projector_hidden_act)
    else:
        text = config.get_text_config(decoder=True)
        activation = activation_name(text if name == "decoder" else config.vision_config)
    return [mlp_spec(dense.get_submodule(block_path(dense, name, index)), activation) for index in part.layers]


def _blocks(dense: Any, sparse: Any, name: str, part: MoePart) -> list[BlockPlan]:
    blocks = []
    for index, number, spec in zip(part.layers, part.num_experts, _specs(dense, name, part), strict=True):
        path = block_path(dense, name, index)
        state = sparse.get_submodule(path).state_dict()
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        blocks.append(BlockPlan(name, index, path, spec, number, shapes))
    return blocks


def _sources(
    parent: StoredModel, section: UpcycleSection, made: dict[str, tuple[Upcycler, list[str], bool]]
) -> tuple[StoredModel, ...]:
    """The checkpoints of branch_train_mix; otherwise the parent."""
    mixes = {name: (paths, with_parent) for name, (_, paths, with_parent) in made.items() if paths}
    if not mixes:
        return (parent,)
    paths, with_parent = next(iter(mixes.values()))
    count = len(paths) + with_parent
    if any(other != (paths, with_parent) for other in mixes.values()):
        raise ValueError("upcycle: all parts with branch_train_mix must name the same checkpoints and with_parent")
    for part_name in mixes:
        wanted = section.parts()[part_name].num_experts
        numbers = set(wanted) if isinstance(wanted, list | tuple) else {wanted}
        if numbers != {count}:
            raise ValueError(
                f"upcycle.{part_name}.num_experts={wanted}: branch_train_mix makes one expert of each of the "
                f"{len(paths)} checkpoints{' and one of the parent' if with_parent else ''}, so it must be {count}"
            )
    for part_name, (upcycler, _, _) in made.items():
        if upcycler.needs != "nothing":
            method = section.parts()[part_name].upcycler.name
            raise ValueError(
                f"upcycle.{part_name}.upcycler={method!r} runs the dense model on samples, but beside branch_train_mix "
                f"the dense {part_name} is a mean of several models and cannot be run; take one that reads only weights"
            )
    others = [StoredModel(check_checkpoint(path, is_foreign)) for path in paths]
    for other in others:
        _check_same_shapes(parent, other)
    return (*([parent] if with_parent else []), *others)


def _check_same_shapes(parent: StoredModel, other: StoredModel) -> None:
    """Raises CheckpointError that names the first tensor of another shape."""
    for key in [*parent.state, *(key for key in other.state if key not in parent.state)]:
        found = [tuple(state[key].shape) if key in state else "missing" for state in (parent.state, other.state)]
        if found[0] != found[1]:
            raise CheckpointError(
                f"{other.path}: {key} is {found[1]}, and {found[0]} in {parent.path}; branch_train_mix needs "
                "checkpoints of equal shapes"
            )


def _tensors(
    parent: StoredModel, model: Any, parts: tuple[PartPlan, ...]
) -> tuple[dict[str, TensorInfo], dict[str, tuple[Piece, ...]], tuple[str, ...]]:
    """What will be on disk: the parent's tensors in their order, each block's place taken by its MoE layer."""
    blocks = {f"{block.path}.": block for part in parts for block in part.blocks}
    infos: dict[str, TensorInfo] = {}
    pieces: dict[str, tuple[Piece, ...]] = {}
    kept: list[str] = []
    placed: set[str] = set()
    for name, key in parent.keys.items():
        path = next((path for path in blocks if key.startswith(path)), None)
        if path is None:
            infos[name] = parent.reader.infos[name]
            kept.append(name)
        elif path not in placed:
            placed.add(path)
            for layer_key, layer_pieces, layer_infos in _layer_tensors(parent, model, blocks[path]):
                pieces[layer_key] = layer_pieces
                infos.update(layer_infos)
    return infos, pieces, tuple(kept)


def _layer_tensors(
    parent: StoredModel, model: Any, block: BlockPlan
) -> list[tuple[str, tuple[Piece, ...], dict[str, TensorInfo]]]:
    """(name in the model, tensors on disk, their dtypes and shapes) of one MoE layer.

    The names are those that transformers gives them, but behind whatever the parent's file calls the block.
    """
    down = f"{block.path}.{block.spec.down_name}.weight"
    tail = f"{block.spec.down_name}.weight"
    stock = stock_pieces(parent.model, down, parent.state[down])[0].name.removesuffix(tail)
    mine = parent.located(down)[0].name.removesuffix(tail)
    names = [key for key in parent.state if key.startswith(f"{block.path}.")]
    dtypes = [parent.info(key).dtype for key in names]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    # Buffers that a controller moves stay float32 under the cast.
    layer = model.get_submodule(block.path).to(dtype)
    found = []
    for key, tensor in layer.state_dict().items():
        parameter = tensor.to("meta")
        layer_pieces = tuple(
            replace(piece, name=mine + piece.name.removeprefix(stock))
            for piece in stock_pieces(model, f"{block.path}.{key}", parameter)
        )
        infos = {piece.name: TensorInfo.of(piece.of(parameter)) for piece in layer_pieces}
        found.append((f"{block.path}.{key}", layer_pieces, infos))
    return found
