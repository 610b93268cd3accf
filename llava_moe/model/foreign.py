"""Experts in the decoder of any image-text-to-text class of transformers: Qwen2.5-VL, SmolVLM, PaliGemma, InternVL, ...

One factory makes two classes from each stock pair, when they are first asked for: a config with one key more, `moe`,
and a model that puts MoE layers into its decoder inside `__init__`, from the config alone. Their model_type is `moe_`
and the stock one, so transformers without this package refuses a checkpoint instead of filling it with random blocks.
`import llava_moe` registers the names; a modelling file is imported only with the first checkpoint that needs it.

What these classes do with pictures is theirs; experts in towers and projectors, the training program and calibration on
samples are for LLaVA models alone. `llava-moe upcycle` makes such a checkpoint from a stock one.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import ModelOutput

from llava_moe.config import UpcycleSection
from llava_moe.model.configuration import MoePart, MoeSection
from llava_moe.model.context import routing_context
from llava_moe.model.families import FAMILIES
from llava_moe.model.modeling import _InitMixin, _refuse_partial
from llava_moe.model.native import NativeLayer, watch_native
from llava_moe.model.sites import activation_name, install_moe
from llava_moe.moe import RoutingScope, SiteKey

PREFIX = "moe_"
# All but the families that have classes of their own here.
FOREIGN_TYPES = tuple(name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in FAMILIES)
_ForeignBase: Any = PreTrainedModel if TYPE_CHECKING else object


def is_foreign(model_type: str | None) -> bool:
    """Whether this is the model_type of a stock class that this file can extend, or of one that it has extended."""
    return str(model_type).removeprefix(PREFIX) in FOREIGN_TYPES


class ForeignConfigMixin:
    """What our configs of stock classes have in common."""

    moe: dict[str, Any] | None

    @property
    def moe_section(self) -> MoeSection | None:
        return None if self.moe is None else MoeSection.from_dict(self.moe)

    @property
    def decoder_part(self) -> MoePart | None:
        """The experts of the decoder.

        Raises:
            ValueError: the section names another part.
        """
        section = self.moe_section
        others = [] if section is None else [name for name in section.parts() if name != "decoder"]
        if others:
            raise ValueError(
                f"config.json: moe.{others[0]}: of a {self.model_type} only the decoder can have experts; towers and "  # type: ignore[attr-defined]
                "projectors are known for LLaVA models"
            )
        return None if section is None else section.decoder


class ForeignMixin(_InitMixin, _ForeignBase):
    """Turns a stock image-text-to-text class into ours; dense when `config.moe` is None.

    The output has one key more, `routings`, by site; the loss is the stock one, without any balance loss.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scope = RoutingScope()
        decoder = decoder_of(self)
        part = config.decoder_part
        if part is not None:
            install_moe(decoder, "decoder", part, activation_name(config.get_text_config(decoder=True)), self.scope)
        self.native_layers: dict[SiteKey, NativeLayer] = watch_native(decoder, self.scope)
        self.post_init()

    @property
    def routes(self) -> bool:
        """Whether any layer sends tokens to experts."""
        return self.config.moe is not None or bool(self.native_layers)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but nothing may be missing.

        Raises:
            CheckpointError: tensors that the config promises are not in the files or have another shape.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        options = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, by name
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **options)
        _refuse_partial(str(pretrained_model_name_or_path), info)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        self._weight_conversions = None  # the names on disk are those of the class, whatever the model came from
        super().save_pretrained(save_directory, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Refuses the reentrant kind, which keeps the value of the balance loss and silently loses its gradient."""
        asked = gradient_checkpointing_kwargs or {}
        if asked.get("use_reentrant"):
            raise ValueError("use_reentrant=True loses the gradient of the balance loss; use use_reentrant=False")
        super().gradient_checkpointing_enable({"use_reentrant": False, **asked}, **kwargs)


def decoder_of(model: Any) -> Any:
    """The language model inside a stock class.

    Raises:
        ValueError: transformers knows none, or it is half of an encoder-decoder.
    """
    found = model.get_decoder()
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in model.base_model.named_children())
    if found is model or found is model.base_model or not isinstance(found, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__}: transformers names no decoder inside of it; its parts are {children}"
        )
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder; experts go into decoder-only language models; its parts "
            f"are {children}"
        )
    return found


@functools.cache
def foreign_config_class(stock_type: str) -> type[Any]:
    """Our config of a stock model_type, and with it the registration of both classes.

    Raises:
        ValueError: transformers has no image-text-to-text class of that name.
    """
    if stock_type not in FOREIGN_TYPES:
        raise ValueError(f"transformers has no image-text-to-text class for the model_type {stock_type!r}")
    stock: Any = CONFIG_MAPPING[stock_type]

    @strict
    class Config(ForeignConfigMixin, stock):  # type: ignore[misc]
        model_type = PREFIX + stock_type
        moe: dict[str, Any] | None = None

        def __post_init__(self, **kwargs: Any) -> None:
            super().__post_init__(**kwargs)
            _ = self.decoder_part  # refuses a section that makes no sense

    _name(Config, stock.__name__, f"`{stock.__name__}` with the key `moe`.")
    model = _model_class(stock_type, Config)
    AutoConfig.register(Config.model_type, Config, exist_ok=True)
    AutoModelForImageTextToText.register(Config, model, exist_ok=True)
    return Config


def foreign_model_class(config: Any) -> type[Any]:
    """The model class of one of our configs of stock classes."""
    found: Any = AutoModelForImageTextToText._model_mapping[type(config)]  # type: ignore[attr-defined]
    return found  # type: ignore[no-any-return]


def foreign_config(config: PretrainedConfig) -> Any:
    """A stock config as ours, dense; one of ours as it is."""
    if isinstance(config, ForeignConfigMixin):
        return config
    values = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    return foreign_config_class(config.model_type).from_dict(values)


def check_section(config: Any, section: UpcycleSection) -> None:
    """Raises ValueError where an upcycling asks for what is known of LLaVA models alone."""
    if not isinstance(config, ForeignConfigMixin):
        return
    kind = config.model_type.removeprefix(PREFIX)  # type: ignore[attr-defined]
    others = [name for name in section.parts() if name != "decoder"]
    if others:
        raise ValueError(f"upcycle.{others[0]}: of a {kind} only the decoder can get experts")
    if section.calibration is not None:
        raise ValueError(
            f"upcycle.calibration: samples are rendered for LLaVA models and not for a {kind}; leave it out and use an "
            "upcycler that looks at the weights alone"
        )


def _model_class(stock_type: str, config: type[Any]) -> type[Any]:
    stock: Any = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[stock_type])
    signature = inspect.signature(stock.forward)

    class Model(ForeignMixin, stock):  # type: ignore[misc]
        config_class = config

        # generate() and the Trainer read forward's signature, so the stock one is shown.
        @functools.wraps(stock.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if not self.routes:
                return stock.forward(self, *args, **kwargs)
            given = signature.bind_partial(self, *args, **kwargs).arguments
            ids, embeds, mask = (given.get(key) for key in ("input_ids", "inputs_embeds", "attention_mask"))
            context = routing_context(ids, embeds, mask, _image_token(self.config), self.training)
            self.scope.set_context(context)
            with self.scope.recording() as routings:
                outputs = stock.forward(self, *args, **kwargs)
            if isinstance(outputs, ModelOutput):
                outputs["routings"] = routings
            return outputs

    _name(Model, stock.__name__, f"`{stock.__name__}`, dense or with experts in its decoder.")
    names = (stock.__name__, stock_type)
    mapping: list[Any] = next(
        (found for name in names if (found := get_checkpoint_conversion_mapping(name)) is not None), []
    )
    # Each expert has its own tensors on disk, as in transformers' Qwen MoE files and in our own.
    mapping = mapping + get_checkpoint_conversion_mapping("qwen2_moe")
    register_checkpoint_conversion_mapping(config.model_type, mapping, overwrite=True)
    return Model


def _name(made: type[Any], stock: str, doc: str) -> None:
    """Gives a class of the factory the name that config.json and messages show."""
    made.__name__ = made.__qualname__ = f"Moe{stock}"
    made.__doc__ = doc


def _image_token(config: Any) -> int | None:
    found = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    return found if isinstance(found, int) else None


def register_foreign() -> None:
    """Makes `moe_<model_type>` known to AutoConfig for every stock class, without importing any of them; idempotent."""
    for stock_type in FOREIGN_TYPES:
        if PREFIX + stock_type not in CONFIG_MAPPING:
            AutoConfig.register(PREFIX + stock_type, _placeholder(stock_type))


def _placeholder(stock_type: str) -> Any:
    """Stands for a config class until a config is made; that registers the real classes in its place."""

    def from_dict(config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return foreign_config_class(stock_type).from_dict(config_dict, **kwargs)

    def build(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
        return foreign_config_class(stock_type)(*args, **kwargs)

    members = {"__new__": build, "from_dict": staticmethod(from_dict), "__module__": __name__}
    return type(f"MoeConfigOf_{stock_type}", (), members)
