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

import torch
from torch import Tensor, nn


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

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear calls it so
        logits = super().forward(input)
        if self.scale is not None:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def with_weight(self, linear: nn.Module) -> VocabularyProjection:
        """The same changes behind another matrix, which is not copied: what resizing the vocabulary makes is bare."""
        has_bias = self.bias is not None
        if not isinstance(linear, nn.Linear) or (linear.bias is not None) != has_bias:
            kind = "with a bias" if has_bias else "without bias"
            raise ValueError(f"the vocabulary projection of this model is a linear map {kind}, and not {linear}")
        sizes = linear.in_features, linear.out_features
        made = VocabularyProjection(*sizes, self.scale, self.softcap, has_bias, device="meta")
        made.weight, made.bias = linear.weight, linear.bias
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
