"""The vocabulary projection of a LLaVA model: the bare linear map of the stock class, or what its decoder does besides.

Some decoders change their logits after the projection: Granite divides them, Cohere multiplies them, Gemma 2 caps them,
Phi-2 adds a bias.
transformers' LLaVA classes do none of this: a Gemma 2 inside of them has other logits, another loss and, when sampling,
other answers than Gemma 2 itself. Ours do what the decoder does where config.json says so (`logit_scale`,
`logit_softcap`, `logit_bias`): assembling writes these keys. A stock checkpoint has none of them and stays what it was
trained as.

Shapes: D hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from llava_moe.model.loss import AUTO, OFF, fused_cross_entropy, project, resolve_fused_loss


class VocabularyProjection(nn.Linear):
    """h (..., D) -> logits (..., V): z = scale * (h W^T + b), then softcap * tanh(z / softcap).

    A linear layer with the parameters of one, so that tying, saving and reading it need no special case.

    Args:
        scale: what the logits are multiplied by; None does nothing.
        softcap: what no logit exceeds (Gemma 2, 2408.00118, section 2); None does nothing.
        bias: whether there is b (Phi-2).

    Raises:
        ValueError: a number is not above 0.
    """

    def __init__(
        self,
        hidden: int,
        vocabulary: int,
        scale: float | None = None,
        softcap: float | None = None,
        bias: bool = False,
        **options: Any,
    ) -> None:
        for key, value in (("logit_scale", scale), ("logit_softcap", softcap)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"config.json: {key}={value} must be a number above 0, or null")
        super().__init__(hidden, vocabulary, bias=bias, **options)
        self.scale = scale
        self.softcap = softcap
        self.fused_loss = OFF  # how training takes the loss, set by `choose_fused_loss`

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:  # nn.Linear calls it input
        """The logits; or, with targets (N,) for inputs (N, D), their summed cross-entropy by `fused_loss`.

        The loss is made in here because ZeRO-3 has the matrix whole only while its module runs.
        """
        changes = self.scale, self.softcap
        if targets is None:
            return project(input, self.weight, self.bias, *changes)
        return fused_cross_entropy(self.fused_loss, input, targets, self.weight, self.bias, *changes)

    def with_weight(self, linear: nn.Module) -> VocabularyProjection:
        """The same changes behind another matrix, which is not copied: what resizing the vocabulary makes is bare."""
        has_bias = self.bias is not None
        if not isinstance(linear, nn.Linear) or (linear.bias is not None) != has_bias:
            kind = "with a bias" if has_bias else "without bias"
            raise ValueError(f"the vocabulary projection of this model is a linear map {kind}, and not {linear}")
        sizes = linear.in_features, linear.out_features
        made = VocabularyProjection(*sizes, self.scale, self.softcap, has_bias, device="meta")
        made.weight, made.bias, made.fused_loss = linear.weight, linear.bias, self.fused_loss
        return made.train(linear.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}, softcap={self.softcap}"


def vocabulary_projection(config: Any) -> VocabularyProjection:
    """The head that a config of ours asks for."""
    text = config.text_config
    changes = config.logit_scale, config.logit_softcap, config.logit_bias
    return VocabularyProjection(text.hidden_size, text.vocab_size, *changes)


def logit_changes(decoder: Any) -> dict[str, float]:
    """`logit_scale` and `logit_softcap` of a decoder, from its config; empty where it does nothing to its logits.

    These are the keys that transformers' decoders read: `logits_scaling` divides (Granite), `logit_scale` multiplies
    (Cohere), `final_logit_softcapping` caps (Gemma).
    """
    scale, divisor = (getattr(decoder, key, None) for key in ("logit_scale", "logits_scaling"))
    softcap = getattr(decoder, "final_logit_softcapping", None)
    found = float(1.0 if scale is None else scale) / float(1.0 if divisor is None else divisor)
    changes = {} if found == 1.0 else {"logit_scale": found}
    return changes if softcap is None else {**changes, "logit_softcap": float(softcap)}


def choose_fused_loss(model: Any, asked: str, device: str) -> str:
    """Sets how a model takes its loss in training, and returns what it came to: liger, chunked or off.

    Args:
        asked: auto, liger, chunked or off, see `llava_moe.model.loss`.
        device: kind of the device that will train.

    Raises:
        ValueError: the name is unknown, the kernel cannot be had here, or the vocabulary projection is not ours.
    """
    head, kind = model.lm_head, resolve_fused_loss(asked, device)
    if isinstance(head, VocabularyProjection):
        head.fused_loss = kind
    elif asked not in (AUTO, OFF):
        raise ValueError(
            f"speed.fused_loss={asked}: the vocabulary projection of this model is a {type(head).__name__}, which "
            "makes logits alone; set speed.fused_loss=off"
        )
    else:
        kind = OFF
    return kind
