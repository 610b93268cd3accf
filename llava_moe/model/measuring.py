"""How far a made model is from its parent, on real tokens, with one of the two in memory at a time.

What the parent answers is written to a scratch folder; then the other model runs and is compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import AutoProcessor, AutoTokenizer

from llava_moe.model.merge import merge_rule
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.streaming import bytes_of, clear_when_full

Batch = Mapping[str, Any]
TOLERANCE = 1e-5  # of the logits in float32, as a share of the largest one where that is above 1
_DISTURBANCE = 2.0**-22  # relative, of a block's output: what another order of its sums makes of it in float32
_SLACK = 8.0  # by which logits may differ more than in the one draw of such disturbances that is tried
_LOGIT_ROWS = 512  # logits are compared so many tokens at a time: a vocabulary is much wider than a decoder
_TEXT = ("input_ids", "attention_mask")
_INPUTS = (*_TEXT, "pixel_values", "image_sizes", "num_tiles", "is_video", "batch_num_images")

TEXT = """\
The harbour wakes before the town does. By five the first boats have turned their lights off, and the men on the pier
count boxes of herring while gulls walk between their boots. A woman in a yellow coat writes the weights into a narrow
book; she has done so for twenty years and rarely looks up. "Eleven," somebody calls, "and two of mackerel." The price
is settled with a nod. Further along, where the stones are dry, a boy paints the hull of a small sailing boat. He has
chosen blue, although his grandfather says that blue boats are unlucky, and he works from left to right so that the
wind does not blow dust into what is still wet. At seven the bakery opens, the square fills with bicycles, and the
smell of bread covers that of salt and diesel. Nobody hurries yet. The ferry will not come before nine, and until then
the day belongs to those who live here."""


@dataclass(frozen=True)
class Agreement:
    """How two models differ.

    Attributes:
        max_abs_logit_error: largest difference of a logit.
        max_abs_logit: largest logit of the parent.
        greedy_agreement: share of the tokens after which both find the same next token most probable.
        num_tokens: how many tokens were compared.
        layer_errors: for each site |made(x) - dense(x)| / |dense(x)| on the inputs x that the parent's block was given.
        rounding_error: largest difference of a logit of the parent when the outputs of its blocks at the sites are
            disturbed at random in their last bits.
    """

    max_abs_logit_error: float
    max_abs_logit: float
    greedy_agreement: float
    num_tokens: int
    layer_errors: dict[str, float] = field(default_factory=dict)
    rounding_error: float = 0.0

    def within(self, tolerance: float = TOLERANCE) -> bool:
        """Whether rounding explains the difference of the logits.

        That is a share of the largest logit, or, where every block by itself is as near to the parent's as that share,
        what the last bits of the blocks' outputs make of the parent's own logits: a trained decoder may amplify them
        a thousandfold, and another seed of the router rounds otherwise.
        """
        allowed = tolerance * max(1.0, self.max_abs_logit)
        if max(self.layer_errors.values(), default=0.0) <= tolerance:
            allowed = max(allowed, _SLACK * self.rounding_error)
        return self.max_abs_logit_error <= allowed


def builtin_batches(tools: Any, max_tokens: int = 1024) -> list[Batch]:
    """One paragraph of ordinary English, after a drawn picture where there is a processor for it.

    Args:
        tools: from `load_tools`.
        max_tokens: what is beyond is cut off.
    """
    if getattr(tools, "tiling", None) is not None:
        found = tools.encode_raw(TEXT, _picture())
    elif hasattr(tools, "image_processor"):
        found = tools(images=_picture(), text=f"{tools.image_token}\n{TEXT}", return_tensors="pt")
    else:
        found = tools(TEXT, return_tensors="pt")
    batch = {key: found[key] for key in _INPUTS if key in found}
    return [{key: value[:, :max_tokens] if key in _TEXT else value for key, value in batch.items()}]


def load_tools(path: Path, pictures: bool) -> Any:
    """The processor of a vision-language checkpoint (`pictures`), or the tokenizer of a language model alone.

    Raises:
        CheckpointError: there is none.
    """
    kind: Any = AutoProcessor if pictures else AutoTokenizer
    try:
        return kind.from_pretrained(path)
    except (OSError, ValueError) as error:
        what = "processor" if pictures else "tokenizer"
        raise CheckpointError(f"{path}: no {what} can be loaded from there: {str(error).splitlines()[0]}") from error


def _picture(size: int = 224) -> Image.Image:
    """A sky over a sea with a boat: smooth areas, edges and several colours."""
    image = Image.linear_gradient("L").resize((size, size))
    image = Image.merge("RGB", (image.point(lambda v: v // 2), image, image.point(lambda v: 255 - v // 3)))
    draw = ImageDraw.Draw(image)
    unit = size // 16
    draw.ellipse((11 * unit, unit, 14 * unit, 4 * unit), fill=(250, 220, 90))
    draw.rectangle((0, 11 * unit, size, size), fill=(20, 70, 110))
    draw.polygon(
        [(3 * unit, 11 * unit), (11 * unit, 11 * unit), (9 * unit, 13 * unit), (5 * unit, 13 * unit)], fill="red"
    )
    draw.polygon([(7 * unit, 3 * unit), (7 * unit, 10 * unit), (10 * unit, 10 * unit)], fill="white")
    return image


def model_inputs(batch: Batch) -> dict[str, Any]:
    """What the forward takes, without labels."""
    return {key: batch[key] for key in _INPUTS if key in batch}


def _mask(batch: Batch) -> Tensor:
    """(B, S), True for real tokens."""
    return batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"]).bool()


@torch.no_grad()
def _logits(model: Any, batch: Batch) -> Iterator[Tensor]:
    """The logits of all real tokens of a batch, some rows (R, V) at a time."""
    kept: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda module, args, output: kept.append(output[0]))
    try:
        model(**model_inputs(batch), logits_to_keep=1, use_cache=False)
    finally:
        hook.remove()
    hidden_TD = kept.pop()[_mask(batch)]
    head = model.get_output_embeddings()
    for rows_RD in hidden_TD.split(_LOGIT_ROWS):
        yield head(rows_RD).float()


def scratch_bytes(text_config: Any, batches: Sequence[Batch]) -> int:
    """What `compare` writes to its scratch folder, about: logits, and inputs and outputs of the layers on one batch."""
    tokens = [batch["input_ids"].numel() for batch in batches]
    layers = 2 * max(tokens) * text_config.hidden_size * text_config.num_hidden_layers
    return int(4 * (sum(tokens) * text_config.vocab_size + layers))


class Scratch:
    """Tensors that wait on disk until they are compared."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, tuple[torch.dtype, torch.Size]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, key: str, tensor: Tensor) -> None:
        self._known[key] = (tensor.dtype, tensor.shape)
        raw = bytes_of(tensor)
        with clear_when_full(self.folder.parent, raw.nbytes), (self.folder / key).open("wb") as handle:
            handle.write(raw)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def get(self, key: str) -> Tensor:
        dtype, shape = self._known[key]
        raw = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        with (self.folder / key).open("rb") as handle:
            handle.readinto(raw.numpy().data)
        return raw.view(dtype).reshape(shape)


def compare(
    parent: Callable[[], Any],
    made: Callable[[], Any],
    batches: Sequence[Batch],
    scratch: Scratch,
    sites: Mapping[str, str] | None = None,
) -> Agreement:
    """Runs one model after the other over the same batches.

    Args:
        parent, made: open a model, which is let go before the other is opened.
        scratch: takes the parent's logits.
        sites: for `layer_errors`, module paths by the names of the sites; the same path in both models.
    """
    sites = {} if sites is None else sites
    # The layers are compared on one batch, with a picture if any has one: a batch of text never calls the tower.
    watched = next((i for i, batch in enumerate(batches) if "pixel_values" in batch), 0)
    rounding_error = _record(parent(), batches, scratch, sites, watched)
    return replace(_compare(made(), batches, scratch, sites, watched), rounding_error=rounding_error)


def _record(model: Any, batches: Sequence[Batch], scratch: Scratch, sites: Mapping[str, str], watched: int) -> float:
    """Keeps what the parent answers; by how much its logits differ at most when the sites are disturbed."""
    generator = torch.Generator().manual_seed(0)
    moved = 0.0

    def disturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # A sum of products is as wrong as its terms are large, whatever it comes to: for all values of a token alike.
        noise = torch.randn(output.shape, generator=generator).to(output)
        return output + _DISTURBANCE * noise * output.square().mean(dim=-1, keepdim=True).sqrt()

    def keep(site: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            scratch.put(f"{site}.inputs", args[0])
            scratch.put(f"{site}.outputs", output)

        return hook

    for number, batch in enumerate(batches):
        with ExitStack() as hooks:
            for site, path in sites.items() if number == watched else ():
                hooks.callback(model.get_submodule(path).register_forward_hook(keep(site)).remove)
            for part, logits_RV in enumerate(_logits(model, batch)):
                scratch.put(f"logits.{number}.{part}", logits_RV)
        if sites:
            with ExitStack() as hooks:
                for path in sites.values():
                    hooks.callback(model.get_submodule(path).register_forward_hook(disturb).remove)
                for part, logits_RV in enumerate(_logits(model, batch)):
                    moved = max(moved, float((logits_RV - scratch.get(f"logits.{number}.{part}")).abs().max()))
    return moved


def _compare(
    model: Any, batches: Sequence[Batch], scratch: Scratch, sites: Mapping[str, str], watched: int
) -> Agreement:
    error = largest = 0.0
    agreed = tokens = 0
    layer_errors: dict[str, float] = {}

    def check(site: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            # Called past its hooks, and before the real call, which then has the last word in the routing scope.
            if f"{site}.inputs" in scratch and site not in layer_errors:
                expected = scratch.get(f"{site}.outputs")
                found = module.forward(scratch.get(f"{site}.inputs"))
                layer_errors[site] = float((found - expected).norm() / expected.norm().clamp(min=1e-30))

        return hook

    for number, batch in enumerate(batches):
        with ExitStack() as hooks:
            for site, path in sites.items() if number == watched else ():
                hooks.callback(model.get_submodule(path).register_forward_pre_hook(check(site)).remove)
            for part, logits_RV in enumerate(_logits(model, batch)):
                expected_RV = scratch.get(f"logits.{number}.{part}")
                error = max(error, float((logits_RV - expected_RV).abs().max()))
                largest = max(largest, float(expected_RV.abs().max()))
                agreed += int((logits_RV.argmax(-1) == expected_RV.argmax(-1)).sum())
                tokens += len(logits_RV)
    return Agreement(error, largest, agreed / tokens, tokens, layer_errors)


@torch.no_grad()
def logit_error(one: Any, other: Any) -> tuple[float, float]:
    """Largest difference of two models' logits, and largest logit, on a random picture followed by random text."""
    generator = torch.Generator().manual_seed(0)
    config = one.config
    size = config.vision_config.image_size
    tile: dict[str, Any] = {}
    num_tokens = config.image_seq_length
    if hasattr(config, "image_grid_pinpoints"):
        tile = {"image_sizes": [(size, size)], "num_tiles": [1]}
        num_tokens += merge_rule(config).has_newline
    picture = torch.full((num_tokens,), config.image_token_id)
    text = torch.randint(0, config.image_token_id, (32,), generator=generator)
    ids = torch.cat([picture, text]).unsqueeze(0)
    pixels = torch.randn(1, 3, size, size, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **tile}
    expected = one(**inputs).logits
    return float((expected - other(**inputs).logits).abs().max()), float(expected.abs().max())
