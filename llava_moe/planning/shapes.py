"""The config of the model that a recipe would train, and that model without weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from llava_moe.config import ModelSection, RecipeError, RunConfig
from llava_moe.model.families import FAMILIES, build_model, family_of, is_ours, our_config
from llava_moe.model.head import logit_changes
from llava_moe.model.projectors import PROJECTORS
from llava_moe.model.upcycling_plan import sparse_config
from llava_moe.model.vision_load import count_tokens, read_tower
from llava_moe.planning.recipes import Library

First = Callable[[RunConfig], tuple[str, Mapping[str, Any]]]
"""Family and further config values of a first model, by its recipe."""


class ConfigNotFoundError(ValueError):
    """The config of a model is neither in the library nor on this machine nor on the hub."""


_ROW_MULTIPLE = 64  # as `assemble` pads an embedding that needs another row


def plain_first(config: RunConfig) -> tuple[str, Mapping[str, Any]]:
    """Pictures are shown whole unless the recipe names another family."""
    return config.model.family or "llava", {}


def shape_of(config: RunConfig, library: Library, first: First = plain_first) -> Any:
    """The config of the model that the run would train.

    A checkpoint that is not there yet is followed to the recipe that makes it, and so on to the parts of the first.

    Raises:
        ConfigNotFoundError: a config of the parts is not at hand.
        ValueError: the parts do not fit each other.
    """
    return _shape(config, library, first, ())


def _shape(config: RunConfig, library: Library, first: First, chain: tuple[str, ...]) -> Any:
    if config.upcycle is not None:
        parent = _checkpoint_shape(str(config.upcycle.parent), library, first, chain)
        if parent.moe is not None:
            raise RecipeError(f"upcycle.parent={config.upcycle.parent}: already a mixture of experts")
        return sparse_config(config.upcycle, model_on_meta(parent))
    if config.model.checkpoint is not None:
        return _checkpoint_shape(config.model.checkpoint, library, first, chain)
    family, values = first(config)
    return _assembled(library, json.dumps(asdict(config.model)), family, json.dumps(dict(values)))


@lru_cache(maxsize=32)  # all stages of a chain ask for its first model
def _assembled(library: Library, section: str, family: str, values: str) -> Any:
    return assembled_shape(ModelSection(**json.loads(section)), library, family, json.loads(values))


def _checkpoint_shape(checkpoint: str, library: Library, first: First, chain: tuple[str, ...]) -> Any:
    if (Path(checkpoint) / "config.json").is_file():
        return _ours(AutoConfig.from_pretrained(checkpoint), checkpoint)
    if checkpoint in chain:
        raise RecipeError(f"{checkpoint}: made from itself, by way of {' -> '.join(chain)}")
    made = library.maker_of(checkpoint)
    if made is not None:
        return _shape(made[1], library, first, (*chain, checkpoint))
    return _ours(hub_config(checkpoint, library), checkpoint)


def _ours(found: Any, checkpoint: str) -> Any:
    config = our_config(found)
    if not is_ours(config):
        raise RecipeError(f"{checkpoint}: its model_type is {found.model_type!r}, which is no LLaVA model")
    return config


def hub_config(name: str, library: Library) -> Any:
    """The config of a directory or hub model: from the library where it has one, so that no network is asked.

    Raises:
        ConfigNotFoundError: there is none.
    """
    known = library.known_config(name)
    if known is not None and not Path(name).is_dir():
        values = {key: value for key, value in known["config"].items() if key != "model_type"}
        return AutoConfig.for_model(known["config"]["model_type"], **values)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigNotFoundError(str(error).splitlines()[0]) from error


def assembled_shape(
    section: ModelSection, library: Library, family: str = "llava", values: Mapping[str, Any] | None = None
) -> Any:
    """The config of a first model, as `llava_moe.model.assemble` would put it together.

    Raises:
        ConfigNotFoundError: a part has no config at hand.
        ValueError: a part is not named, or does not fit the others.
    """
    if section.vision_tower is None or section.language_model is None:
        raise RecipeError("model: name a checkpoint, or a vision_tower and a language_model to assemble one")
    text = hub_config(section.language_model, library)
    # how pixels are scaled changes no size
    vision = read_tower(section, lambda name: hub_config(name, library), lambda name: ([0.5] * 3, [0.5] * 3)).config
    known = library.known_config(section.language_model) or {}
    rows = int(known.get("tokenizer_length", 0)) + 1  # the image token
    if rows > text.vocab_size:
        text.vocab_size = -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE
    config = FAMILIES.get(family).config(
        vision_config=vision,
        text_config=text,
        projector=section.projector,
        projector_args=section.projector_args,
        vision_feature_layer=section.vision_feature_layer,
        vision_feature_select_strategy=section.vision_feature_select_strategy,
        tie_word_embeddings=bool(text.tie_word_embeddings),
        logit_bias=_head_has_bias(text.model_type, text.to_json_string(use_diff=False)),
        **logit_changes(text),
        **(values or {}),
    )
    with torch.device("meta"):
        projector = PROJECTORS.get(section.projector)(config)
    features = _features(
        vision.model_type,
        vision.to_json_string(use_diff=False),
        section.vision_feature_layer,
        section.vision_feature_select_strategy,
        str(section.vision_tower),
    )
    config.image_seq_length = projector.num_output_tokens(features)
    return config


@lru_cache(maxsize=16)
def _head_has_bias(model_type: str, serialised: str) -> bool:
    raw = {key: value for key, value in json.loads(serialised).items() if key != "model_type"}
    with torch.device("meta"), no_init_weights():
        head = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **raw)).get_output_embeddings()
    return head.bias is not None


@lru_cache(maxsize=16)  # several stages begin with the same tower
def _features(model_type: str, serialised: str, layer: int, strategy: str, name: str) -> int:
    """How many features of a picture the projector is given."""
    raw = {key: value for key, value in json.loads(serialised).items() if key != "model_type"}
    with torch.device("meta"), no_init_weights():
        tower = AutoModel.from_config(AutoConfig.for_model(model_type, **raw)).eval()
    section = ModelSection(vision_tower=name, vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    return count_tokens(tower, section)[0]


def model_on_meta(config: Any) -> Any:
    """The model of a config with all parameters on the meta device; one object for equal configs.

    Whoever changes `requires_grad` changes it for the next caller too, who therefore sets it anew.
    """
    return _model_on_meta(str(config.model_type), config.to_json_string(use_diff=False))


@lru_cache(maxsize=6)
def _model_on_meta(model_type: str, serialised: str) -> Any:
    family = family_of(model_type)
    assert family is not None  # only configs of ours come here
    config = family.config.from_dict({k: v for k, v in json.loads(serialised).items() if k != "model_type"})
    with torch.device("meta"), no_init_weights():
        model = build_model(config)
    model.tie_weights()
    return model.eval()
