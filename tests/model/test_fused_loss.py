"""The fused loss: the value and the gradients of the plain one, and no tensor with the logits of all positions."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llava_moe.model import loss as fused
from llava_moe.model.head import VocabularyProjection, choose_fused_loss
from llava_moe.model.loss import CHUNKED, LIGER, OFF, resolve_fused_loss
from tests.model.inputs import gradients, picture_batch
from tests.tiny_model import TINY_MOE, tiny_model

POSITIONS, HIDDEN, VOCABULARY, ROWS = 11, 12, 37, 4  # three pieces, the last one shorter
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None and (torch.cuda.is_available() or INTERPRETED)
needs_liger = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_LIGER, reason="needs liger-kernel, and a GPU or TRITON_INTERPRET=1"),
]
BOTH = [CHUNKED, pytest.param(LIGER, marks=needs_liger)]
HEADS: dict[str, dict[str, Any]] = {
    "bare": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "scale": 1.7, "softcap": 5.0},
}


class Largest(TorchDispatchMode):
    """Rows of the tallest matrix that is as wide as the vocabulary, over all that torch computes (views left out)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows, self.products = width, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.products += func.name() in ("aten::mm", "aten::addmm")
        if func.is_view:
            return found
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor) and tensor.ndim >= 2 and tensor.shape[-1] == self.width:
                self.rows = max(self.rows, tensor.numel() // self.width)
        return found


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "CHUNK_LOGITS", ROWS * VOCABULARY)


def device_of(kind: str) -> str:
    return "cuda" if kind == LIGER and torch.cuda.is_available() else "cpu"


def make_head(kind: str = OFF, dtype: torch.dtype = torch.float32, **options: Any) -> VocabularyProjection:
    head = VocabularyProjection(HIDDEN, VOCABULARY, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    head.fused_loss = kind
    return head.to(dtype)


def inputs(positions: int = POSITIONS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(positions, HIDDEN, generator=generator)
    return hidden, torch.randint(VOCABULARY, (positions,), generator=generator)


def results(head: VocabularyProjection, hidden: Tensor, target: Tensor, factor: float = 0.37) -> dict[str, Tensor]:
    """Loss and gradients, with a factor as the division by the tokens of a step has."""
    hidden = hidden.clone().requires_grad_()
    if head.fused_loss == OFF:
        loss = nn.functional.cross_entropy(head(hidden).float(), target, reduction="sum")
    else:
        loss = head(hidden, target)
    assert loss.dtype == torch.float32
    (loss * factor).backward()
    assert hidden.grad is not None
    return {"loss": loss.detach(), "hidden": hidden.grad} | gradients(head)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_value_and_gradients_are_those_of_the_plain_loss(kind: str, options: dict[str, Any]) -> None:
    if kind == LIGER and INTERPRETED and "softcap" in options:
        pytest.skip("triton's interpreter has no tanh of CUDA's library")
    device = device_of(kind)
    hidden, target = (x.to(device) for x in inputs())
    expected = results(make_head(**options).to(device), hidden, target)
    found = results(make_head(kind, **options).to(device), hidden, target)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6 if kind == CHUNKED else 1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("mixed", [True, False], ids=["autocast", "bfloat16"])
def test_lower_precision(kind: str, mixed: bool) -> None:
    """As near to float32 as the plain loss is, with gradients in the dtype of the parameters."""
    device = device_of(kind)
    hidden, target = (x.to(device) for x in inputs())
    exact = results(make_head(bias=True).to(device), hidden, target)
    dtype = torch.float32 if mixed else torch.bfloat16
    found = {}
    for name in (OFF, kind):
        head = make_head(name, dtype, bias=True).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            found[name] = results(head, hidden.to(dtype), target)
    for name, value in exact.items():
        plain, ours = (float((found[k][name].float() - value).norm() / value.norm()) for k in (OFF, kind))
        assert found[kind][name].dtype == (torch.float32 if name == "loss" else dtype)
        assert ours < max(3 * plain, 1e-3), name


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("learns", ["hidden", "weight", "bias"])
def test_only_what_learns_gets_a_gradient(kind: str, learns: str) -> None:
    device = device_of(kind)
    hidden, target = (x.to(device) for x in inputs())
    plain, ours = (make_head(k, bias=True).to(device) for k in (OFF, kind))
    expected = results(plain, hidden, target)
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(name == learns)
    hidden.requires_grad_(learns == "hidden")
    (ours(hidden, target) * 0.37).backward()
    found = gradients(ours) | ({} if hidden.grad is None else {"hidden": hidden.grad})
    assert list(found) == [learns]
    torch.testing.assert_close(found[learns], expected[learns], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", BOTH)
def test_without_any_position_the_loss_is_zero(kind: str) -> None:
    hidden, target = (x.to(device_of(kind)) for x in inputs(0))
    found = results(make_head(kind, bias=True).to(hidden.device), hidden, target)
    assert found.keys() == {"loss", "hidden", "weight", "bias"}
    assert all(not value.any() for value in found.values())


def test_without_gradients_there_is_one_product_for_each_piece() -> None:
    head, (hidden, target) = make_head(CHUNKED), inputs()
    expected = nn.functional.cross_entropy(head(hidden), target, reduction="sum")
    with torch.no_grad(), Largest(VOCABULARY) as seen:
        found = head(hidden, target)
    torch.testing.assert_close(found, expected.detach())
    assert not found.requires_grad
    assert (seen.products, seen.rows) == (3, ROWS)


@pytest.mark.parametrize(
    ("text", "moe", "changes"),
    [
        ("llama", None, {}),
        ("llama", TINY_MOE, {"tie_word_embeddings": True}),
        ("gemma2", None, {"logit_softcap": 4.0}),
        ("llama", None, {"logit_scale": 0.25}),
        ("phi", None, {"logit_bias": True}),
    ],
    ids=["dense", "moe-tied", "softcap", "scale", "bias"],
)
def test_a_model_never_holds_the_logits_of_all_positions(text: str, moe: Any, changes: dict[str, Any]) -> None:
    found: dict[str, dict[str, Tensor]] = {}
    rows: dict[str, int] = {}
    for kind in (OFF, CHUNKED):
        model = tiny_model(moe, text, **changes).train()
        assert choose_fused_loss(model, kind, "cpu") == kind
        width, batch = model.lm_head.weight.shape[0], picture_batch(model, batch=3)
        with pytest.MonkeyPatch.context() as patch, Largest(width) as seen:
            patch.setattr(fused, "CHUNK_LOGITS", ROWS * width)
            loss = model(**batch, loss_only=True, use_cache=False, num_items_in_batch=7).loss
            loss.backward()
        found[kind], rows[kind] = {"loss": loss.detach()} | gradients(model), seen.rows
    positions = int((batch["labels"][:, 1:] != -100).sum())
    assert rows == {OFF: positions, CHUNKED: ROWS}
    assert positions > 2 * ROWS
    assert found[OFF].keys() == found[CHUNKED].keys()
    for name, value in found[OFF].items():
        torch.testing.assert_close(found[CHUNKED][name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_logits_that_are_asked_for_are_there() -> None:
    """Scoring and generation see all of them, with the same loss."""
    model = tiny_model().train()
    batch = picture_batch(model)
    plain = model(**batch, use_cache=False)
    choose_fused_loss(model, CHUNKED, "cpu")
    again = model(**batch, use_cache=False)
    assert torch.equal(again.logits, plain.logits)
    assert torch.equal(again.loss, plain.loss)


def test_the_choice_outlives_a_resized_vocabulary() -> None:
    model = tiny_model()
    choose_fused_loss(model, CHUNKED, "cpu")
    model.resize_token_embeddings(model.lm_head.weight.shape[0] + 64)
    assert model.lm_head.fused_loss == CHUNKED


def test_names_and_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, there=there: object() if there else None)
        assert resolve_fused_loss("auto", "cpu") == OFF
        assert resolve_fused_loss("auto", "cuda") == (LIGER if there else OFF)
        assert resolve_fused_loss(CHUNKED, "cuda") == CHUNKED
        with pytest.raises(ValueError, match=r"fused_loss=liger needs a GPU; on a CPU use chunked"):
            resolve_fused_loss(LIGER, "cpu")
    with pytest.raises(ValueError, match=r"liger-kernel is not installed: pip install"):
        resolve_fused_loss(LIGER, "cuda")
    for device in ("cpu", None):
        with pytest.raises(ValueError, match=r"speed\.fused_loss='chunkd' is unknown; did you mean 'chunked'"):
            resolve_fused_loss("chunkd", device)


def test_a_foreign_head_is_refused() -> None:
    model = tiny_model()
    model.lm_head = nn.Sequential(model.lm_head)
    assert choose_fused_loss(model, "auto", "cpu") == OFF
    with pytest.raises(ValueError, match=r"speed\.fused_loss=chunked: the vocabulary projection .* is a Sequential"):
        choose_fused_loss(model, CHUNKED, "cpu")
