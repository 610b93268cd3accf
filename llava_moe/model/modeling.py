"""The stock LLaVA class with MoE layers in its decoder: one class for the dense and for the sparse model.

Surgery happens inside `__init__` and from the config alone, so `from_pretrained` rebuilds the same modules before it
loads. Attention, cache, generation and saving stay transformers' own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModel, slice_logits_to_keep

from llava_moe.model.configuration import LlavaMoeConfig
from llava_moe.model.context import routing_context
from llava_moe.model.head import VocabularyProjection, vocabulary_projection
from llava_moe.model.loss import OFF
from llava_moe.model.native import NativeLayer, watch_native
from llava_moe.model.packing import packed_inputs
from llava_moe.model.projectors import PROJECTORS
from llava_moe.model.sites import activation_name, install_moe, install_vision_moe, projector_moe
from llava_moe.model.vision_skip import check_computed, skip_unused_layers
from llava_moe.moe import Experts, Router, Routing, RoutingScope, SharedExperts, SiteKey


class CheckpointError(ValueError):
    """A checkpoint does not hold what its config promises."""


def _refuse_partial(source: str, info: dict[str, Any]) -> None:
    """Raises CheckpointError when tensors are missing or of another shape, or decoder tensors have no place."""
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        key, found, wanted = mismatched[0]
        rest = f" and {len(mismatched) - 1} more" if len(mismatched) > 1 else ""
        raise CheckpointError(
            f"{source}: {key} is {tuple(found)} in the files, config.json asks for {tuple(wanted)}{rest}; "
            "weights and config.json do not match"
        )
    missing = sorted(info["missing_keys"])
    # Stock files may hold parts of a tower that are not built here (a pooling head); a decoder must match in full.
    unused = sorted(key for key in info["unexpected_keys"] if "language_model" in key)
    if not missing and not unused:
        return
    expertless = any(".mlp.experts." in key or ".mlp.router." in key for key in missing)
    hint = "make the MoE checkpoint with `llava-moe upcycle`" if expertless else "weights and config.json do not match"
    said = [f"{what} {_some(keys)}" for what, keys in (("missing", missing), ("not used", unused)) if keys]
    raise CheckpointError(f"{source}: {'; '.join(said)}; {hint}")


def _some(keys: list[str], limit: int = 4) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


@dataclass
class LlavaMoeOutput(LlavaCausalLMOutputWithPast):  # type: ignore[misc]  # transformers types it as Any
    """The stock output plus the routings of this forward, by site; the loss is cross-entropy alone."""

    routings: dict[SiteKey, Routing] | None = None


# What the mixins are mixed into, for the type checker; at run time they have no base of their own.
_InnerBase: Any = LlavaModel if TYPE_CHECKING else object
_OuterBase: Any = LlavaForConditionalGeneration if TYPE_CHECKING else object


class _InitMixin:
    """Lets our modules draw their own initial values; transformers knows nothing of them."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Router | Experts | SharedExperts):
            module.reset_parameters()
        elif getattr(module, "image_newline", module) is not None:  # stock code draws it, and a merge may have none
            super()._init_weights(module)  # type: ignore[misc]


class MoeModelMixin(_InitMixin, _InnerBase):
    """Turns a stock inner model (tower, projector and decoder, without the head) into ours."""

    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scope = RoutingScope()
        skip_unused_layers(self.vision_tower, config.vision_feature_layer)
        self.multi_modal_projector: nn.Module = PROJECTORS.get(config.projector)(config)
        self._install(config)
        self.native_layers: dict[SiteKey, NativeLayer] = watch_native(self.language_model, self.scope)
        self.post_init()

    def _install(self, config: Any) -> None:
        """Puts the experts of every part in their place."""
        parts = {} if config.moe_section is None else config.moe_section.parts()
        if "decoder" in parts:
            install_moe(
                self.language_model, "decoder", parts["decoder"], activation_name(config.text_config), self.scope
            )
        if "vision" in parts:
            layer = config.vision_feature_layer
            install_vision_moe(self.vision_tower, config.vision_config, parts["vision"], layer, self.scope)
        if "projector" in parts:
            activation = config.projector_hidden_act
            self.multi_modal_projector = projector_moe(
                self.multi_modal_projector, activation, parts["projector"], self.scope
            )

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return self.picture_features(pixel_values, **kwargs)

    def picture_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Tower and projector, which are the same in all families: for each picture or tile its features (N, D).

        Args:
            pixel_values: (B, 3, H, W), or (B, N, C) features of the tower.
        """
        if pixel_values.ndim == 3:  # (B, N, C): features of a frozen tower, read from a cache
            features = self.multi_modal_projector(pixel_values.to(self.dtype))
            return BaseModelOutputWithPooling(pooler_output=list(features))  # type: ignore[arg-type]  # as stock does
        asked = kwargs.get("vision_feature_layer")
        check_computed(self.vision_tower, self.config.vision_feature_layer if asked is None else asked)
        return LlavaModel.get_image_features(self, pixel_values=pixel_values, **kwargs)

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        """As in the stock class, but a batch without placeholders may come with a dummy picture.

        Every rank must run the tower and the projector on every batch, or ZeRO waits for ever; the collator gives
        text-only batches one blank picture, and with an empty mask its gradient is zero. Outside training a picture
        without placeholders is a mistake of the caller and raises.
        """
        if self._is_dummy(input_ids):
            assert input_ids is not None
            return torch.zeros_like(input_ids, dtype=torch.bool).unsqueeze(-1)
        return super().get_placeholder_mask(input_ids, inputs_embeds=inputs_embeds, image_features=image_features)

    def _is_dummy(self, input_ids: Tensor | None) -> bool:
        """Whether the picture of this batch stands for no placeholder, and may."""
        return self.training and input_ids is not None and not bool((input_ids == self.config.image_token_id).any())


class MoeMixin(_InitMixin, _OuterBase):
    """Turns a stock LLaVA class into ours, dense when `config.moe` is None, else with the layers it describes.

    It returns cross-entropy and routings apart and never adds them: `training/objective.py` owns every coefficient.
    """

    config_class: Any = LlavaMoeConfig
    config: Any
    lm_head: Any
    # Inputs of forward that the stock class does not know; generate() refuses what is not in its signature.
    extra_inputs: ClassVar[tuple[str, ...]] = ()
    # Training checkpoints keep the in-memory names: the Trainer resumes by exactly these (see docs/architecture.md).
    save_original_format = False
    max_shard_size: int | str = "5GB"
    # Names of what is saved, where most of the model stays as it was loaded (training/lora.py); None is everything.
    saved_names: Callable[[], set[str]] | None = None
    adapters: Any = None  # what training/lora.py has put in

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # generate() and the Trainer read forward's signature, so the stock one is shown; one wrapper for each class.
        stock = next(base for base in cls.__mro__[1:] if base is not MoeMixin and "forward" in vars(base))

        @functools.wraps(stock.forward)  # type: ignore[attr-defined]
        def forward(self: Any, *args: Any, **kwargs: Any) -> LlavaMoeOutput:
            return MoeMixin.forward(self, *args, **kwargs)

        shown = inspect.signature(stock.forward)  # type: ignore[attr-defined]
        named = [p for p in shown.parameters.values() if p.kind is not p.VAR_KEYWORD]
        rest = [p for p in shown.parameters.values() if p.kind is p.VAR_KEYWORD]
        extra = [name for name in cls.extra_inputs if name not in shown.parameters]
        added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in extra]
        forward.__signature__ = shown.replace(parameters=[*named, *added, *rest])  # type: ignore[attr-defined]
        cls.forward = forward  # type: ignore[method-assign]

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        vision_features: Tensor | None = None,
        loss_only: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        sequence_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> LlavaMoeOutput:
        """The stock forward with four additions.

        Args:
            vision_features: (images, N, C) tower output in the place of `pixel_values`.
            loss_only: compute logits at label positions only and do not return them; the vocabulary projection is
                most of the work of a small decoder, and nearly all positions are prompt.
            num_items_in_batch: number of label tokens that the summed cross-entropy is divided by; the default is
                the number in this batch (at least 1, so a batch without any label has loss 0 and not NaN).
            sequence_ids: (B, S) of rows that hold several samples, see `llava_moe.model.packing`.
        """
        if sequence_ids is not None:
            kwargs = packed_inputs(sequence_ids, attention_mask, kwargs)
        if vision_features is not None and pixel_values is not None:
            raise ValueError("give pixel_values or vision_features, not both")
        self._set_context(input_ids, inputs_embeds, attention_mask, sequence_ids)
        with self.model.scope.recording() as routings:
            outputs = self.model(
                input_ids=input_ids,
                pixel_values=pixel_values if vision_features is None else vision_features,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
        hidden = outputs[0]
        loss = logits = None
        if labels is not None:
            loss, logits = self._cross_entropy(hidden, labels, num_items_in_batch, loss_only)
        else:
            logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
        return LlavaMoeOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            routings=routings if routings else None,
        )

    def _cross_entropy(
        self, hidden: Tensor, labels: Tensor, num_items: Tensor | int | None, loss_only: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Next-token cross-entropy: positions 0..S-2 predict labels 1..S-1."""
        targets = labels[:, 1:]
        at_label = targets != -100
        head, logits = self.lm_head, None if loss_only else self.lm_head(hidden)
        if loss_only and isinstance(head, VocabularyProjection) and head.fused_loss != OFF:
            total = head(hidden[:, :-1][at_label], targets[at_label])
        else:
            predicted = head(hidden[:, :-1][at_label]) if logits is None else logits[:, :-1][at_label]
            total = F.cross_entropy(predicted.float(), targets[at_label], reduction="sum")
        divisor = at_label.sum().clamp(min=1) if num_items is None else torch.as_tensor(num_items).clamp(min=1)
        return total / divisor.to(total.device), logits

    def _set_context(
        self,
        input_ids: Tensor | None,
        embeds: Tensor | None,
        attention_mask: Tensor | None,
        sequence_ids: Tensor | None = None,
    ) -> None:
        """Tells the MoE layers which tokens are padding and which stand for a picture."""
        if self.config.moe is None and not self.model.native_layers:
            return
        image_token, training = int(self.config.image_token_id), self.training
        context = routing_context(input_ids, embeds, attention_mask, image_token, training, sequence_ids)
        self.model.scope.set_context(context)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """As in transformers; what the head does besides projecting outlives a resized vocabulary."""
        ours, head = isinstance(new_embeddings, VocabularyProjection), self.lm_head
        self.lm_head = (
            head.with_weight(new_embeddings) if isinstance(head, VocabularyProjection) and not ours else new_embeddings
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but nothing may be missing.

        Raises:
            CheckpointError: tensors that the config promises are not in the files or have another shape, for example
                because a dense checkpoint is loaded with a config that has experts.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            output_loading_info=True,
            **{**kwargs, "ignore_mismatched_sizes": True},  # refused below, by name
        )
        _refuse_partial(str(pretrained_model_name_or_path), info)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        kwargs.setdefault("save_original_format", self.save_original_format)
        kwargs.setdefault("max_shard_size", self.max_shard_size)  # transformers' own default is ten times as much
        if self.saved_names is not None and kwargs.get("state_dict") is not None:  # ZeRO-3 has gathered all of it
            names = self.saved_names()
            kwargs["state_dict"] = {name: tensor for name, tensor in kwargs["state_dict"].items() if name in names}
        # What loading recorded depends on the files it read, and under ZeRO-3 holds renamings that were never applied;
        # without it the names on disk are those of the class, whatever the model came from.
        self._weight_conversions = None
        super().save_pretrained(save_directory, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Refuses the reentrant kind, which keeps the value of the balance loss and silently loses its gradient.

        transformers' newer `activation_checkpointing_enable` comes here too, with options of its own.
        """
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError("use_reentrant=True loses the gradient of the balance loss; use use_reentrant=False")
        asked = gradient_checkpointing_kwargs or {}
        super().gradient_checkpointing_enable({"use_reentrant": False, **asked}, **kwargs)


class LlavaMoeModel(MoeModelMixin, LlavaModel):  # type: ignore[misc]  # transformers types it as Any
    """LLaVA's inner model."""


class LlavaMoeForConditionalGeneration(MoeMixin, LlavaForConditionalGeneration):  # type: ignore[misc]
    """LLaVA (2304.08485, 2310.03744), dense or sparse."""

    def __init__(self, config: LlavaMoeConfig) -> None:
        # The stock constructor would build the stock inner model; its own parent's does the rest.
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = LlavaMoeModel(config)
        self.lm_head: nn.Module = vocabulary_projection(config)
        self.post_init()
