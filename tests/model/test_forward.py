"""The forward's own additions: loss at label positions, features for pixels, dummy pictures, routings, padding."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from llava_moe.model.modeling import LlavaMoeForConditionalGeneration
from llava_moe.moe import BALANCE_LOSSES
from llava_moe.training.objective import balance_terms
from tests.model.inputs import NUM_WORDS, gradients, logits_of, picture_batch
from tests.tiny_model import IMAGE_TOKENS, TINY_MOE, tiny_model

both_kinds = pytest.mark.parametrize("moe", [None, TINY_MOE], ids=["dense", "sparse"])


@both_kinds
def test_loss_equals_the_textbook_formula(moe: dict[str, Any] | None) -> None:
    model = tiny_model(moe)
    batch = picture_batch(model, batch=3)
    output = model(**batch)
    log_probs = output.logits.log_softmax(-1)
    terms = [
        -log_probs[row, position - 1, label]
        for row in range(3)
        for position, label in enumerate(batch["labels"][row].tolist())
        if label != -100
    ]
    torch.testing.assert_close(output.loss, torch.stack(terms).mean())
    summed = model(**batch, num_items_in_batch=7).loss
    torch.testing.assert_close(summed, torch.stack(terms).sum() / 7)
    torch.testing.assert_close(model(**batch, num_items_in_batch=torch.tensor(7)).loss, summed)


def test_dense_loss_equals_the_stock_class() -> None:
    model = tiny_model()
    stock = LlavaForConditionalGeneration(model.config).eval()
    stock.load_state_dict(model.state_dict())
    batch = picture_batch(model)
    torch.testing.assert_close(model(**batch).loss, stock(**batch).loss)
    assert torch.equal(logits_of(model, **batch), logits_of(stock, **batch))


@both_kinds
def test_loss_only_is_the_same_loss_with_the_same_gradients(moe: dict[str, Any] | None) -> None:
    model = tiny_model(moe)
    batch, found = picture_batch(model), []
    for loss_only in (False, True):
        model.zero_grad()
        output = model(**batch, loss_only=loss_only)
        assert (output.logits is None) == loss_only
        output.loss.backward()
        found.append((output.loss.detach(), gradients(model)))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@both_kinds
@pytest.mark.parametrize("loss_only", [False, True])
def test_batch_without_labels_has_loss_zero(moe: dict[str, Any] | None, loss_only: bool) -> None:
    model = tiny_model(moe).train()
    batch = picture_batch(model)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = model(**batch, loss_only=loss_only).loss
    assert float(loss.detach()) == 0
    loss.backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())
    assert all((gradient == 0).all() for gradient in gradients(model).values())


@both_kinds
def test_text_only_batch_with_a_dummy_picture(moe: dict[str, Any] | None) -> None:
    """The loss is that of the text; projector and tower take part with a gradient of zero, not NaN and not None."""
    model = tiny_model(moe).train()
    ids = torch.randint(0, NUM_WORDS, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    side = model.config.vision_config.image_size
    expected = model(**batch).loss.detach()
    output = model(**batch, pixel_values=torch.zeros(1, 3, side, side))
    assert torch.equal(output.loss.detach(), expected)
    output.loss.backward()
    projector = dict(model.model.multi_modal_projector.named_parameters())
    assert projector
    assert all(p.grad is not None and (p.grad == 0).all() for p in projector.values())
    used = model.model.vision_tower.get_submodule("encoder.layers.0").parameters()
    assert all(p.grad is not None and (p.grad == 0).all() for p in used)
    features = torch.zeros(1, IMAGE_TOKENS, model.config.vision_config.hidden_size)
    assert torch.equal(model(**batch, vision_features=features).loss, expected)


@pytest.mark.parametrize("vision", ["siglip", "clip", "timm"])
def test_vision_features_stand_for_pixels(vision: str) -> None:
    model = tiny_model(TINY_MOE, vision=vision)
    batch = picture_batch(model)
    pixels = batch.pop("pixel_values")
    config = model.config
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    features = states[config.vision_feature_layer]
    features = features[:, 1:] if config.vision_feature_select_strategy == "default" else features
    assert features.shape[1] == IMAGE_TOKENS
    expected = model(**batch, pixel_values=pixels)
    found = model(**batch, vision_features=features)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.loss, expected.loss)


def test_pixels_and_features_together_are_refused() -> None:
    model = tiny_model()
    batch = picture_batch(model)
    with pytest.raises(ValueError, match="pixel_values or vision_features, not both"):
        model(**batch, vision_features=torch.zeros(2, IMAGE_TOKENS, 24))


def test_placeholders_that_do_not_match_the_pictures_are_refused() -> None:
    model = tiny_model(TINY_MOE)
    batch = picture_batch(model)
    with pytest.raises(ValueError, match="tokens: 8, features"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:1]})


def test_dense_model_returns_no_routings_and_sparse_one_for_each_site() -> None:
    assert tiny_model()(input_ids=torch.ones(1, 3, dtype=torch.int64)).routings is None
    model = tiny_model(TINY_MOE)
    batch = picture_batch(model, batch=2, length=12)
    routings = model(**batch).routings
    assert sorted(routings) == [("decoder", 0), ("decoder", 2)]
    assert routings["decoder", 0].logits_TE.shape == (24, 4)
    assert routings["decoder", 2].index_TK.shape == (24, 2)


def test_context_knows_padding_pictures_and_rows() -> None:
    model = tiny_model(TINY_MOE)
    batch = picture_batch(model, batch=3, length=12)
    model(**batch)
    context = model.model.scope.context_of(("decoder", 0))
    assert torch.equal(context.token_mask_T, batch["attention_mask"].bool().flatten())
    assert torch.equal(context.modality_T, (batch["input_ids"] == model.config.image_token_id).long().flatten())
    assert int(context.modality_T.sum()) == 3 * IMAGE_TOKENS
    assert torch.equal(context.token_ids_T, batch["input_ids"].flatten())
    assert torch.equal(context.sequence_T, torch.arange(3).repeat_interleave(12))


def test_a_second_batch_of_another_shape_replaces_the_context() -> None:
    model = tiny_model(TINY_MOE)
    for batch, length in ((2, 12), (1, 20), (3, 9)):
        assert logits_of(model, **picture_batch(model, batch, length)).shape[:2] == (batch, length)


def test_embeddings_in_the_place_of_ids() -> None:
    model = tiny_model(TINY_MOE)
    ids = torch.randint(0, NUM_WORDS, (2, 7))
    embeds = model.get_input_embeddings()(ids)
    expected = logits_of(model, input_ids=ids)
    torch.testing.assert_close(logits_of(model, inputs_embeds=embeds), expected)
    assert model.model.scope.context_of(("decoder", 0)).modality_T is None
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds"):
        model()


def test_training_needs_to_know_the_padding() -> None:
    model = tiny_model(TINY_MOE).train()
    ids = torch.randint(0, NUM_WORDS, (2, 5))
    with pytest.raises(ValueError, match="needs a 2-D attention_mask"):
        model(input_ids=ids, attention_mask=torch.ones(2, 1, 5, 5, dtype=torch.bool))


@both_kinds
def test_padding_changes_nothing_for_real_tokens(moe: dict[str, Any] | None) -> None:
    model = tiny_model(moe)
    batch = picture_batch(model, batch=3, length=14)
    together = logits_of(model, **batch)
    for row in range(3):
        length = int(batch["attention_mask"][row].sum())
        alone = logits_of(
            model,
            input_ids=batch["input_ids"][row : row + 1, :length],
            attention_mask=torch.ones(1, length, dtype=torch.int64),
            pixel_values=batch["pixel_values"][row : row + 1],
        )
        torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-4, atol=1e-4)


def test_balance_losses_ignore_padding_through_the_whole_model() -> None:
    model = tiny_model(TINY_MOE)
    # the others need a router of their own
    options = {name: {"num_nodes": 2} if name == "locality" else {} for name in BALANCE_LOSSES.names()}
    names = [name for name in options if not BALANCE_LOSSES.get(name).requires]

    def terms(num_pads: int) -> dict[str, Tensor]:
        batch = picture_batch(model, batch=1, length=12)
        ids = torch.cat([batch["input_ids"], torch.zeros(1, num_pads, dtype=torch.int64)], dim=1)
        mask = (torch.arange(12 + num_pads) < 12).long().unsqueeze(0)
        routings = model(input_ids=ids, attention_mask=mask, pixel_values=batch["pixel_values"]).routings
        losses = {name: BALANCE_LOSSES.get(name).build(options[name]) for name in names}
        return balance_terms(routings, model.model.scope, losses)

    plain, padded = terms(0), terms(9)
    assert {"switch", "z", "sequence", "global_batch", "localised"} <= set(plain) == set(names)
    for name in plain:
        torch.testing.assert_close(plain[name], padded[name], rtol=1e-5, atol=1e-6)


ENABLE = ["gradient_checkpointing_enable", "activation_checkpointing_enable"]  # the older name and the newer one


def enable(model: LlavaMoeForConditionalGeneration, name: str, *args: Any) -> None:
    if not hasattr(model, name):
        pytest.skip(f"this transformers has no {name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        getattr(model, name)(*args)


def is_checkpointing(model: LlavaMoeForConditionalGeneration) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def loss_and_gradients(enable_name: str | None) -> tuple[Tensor, dict[str, Tensor]]:
    model = tiny_model(TINY_MOE).train()
    if enable_name is not None:
        enable(model, enable_name)
        assert is_checkpointing(model)
    batch = picture_batch(model, batch=3)
    output = model(**batch, loss_only=True, use_cache=False)
    assert sorted(output.routings) == [("decoder", 0), ("decoder", 2)]
    losses = {name: BALANCE_LOSSES.get(name).build({}) for name in ("switch", "z")}
    terms = balance_terms(output.routings, model.model.scope, losses)
    total = output.loss + 0.5 * terms["switch"] + 0.1 * terms["z"]
    total.backward()
    return total.detach(), gradients(model)


@pytest.mark.parametrize("name", ENABLE)
def test_checkpointing_changes_no_gradient(name: str) -> None:
    plain, expected = loss_and_gradients(None)
    recomputed, found = loss_and_gradients(name)
    torch.testing.assert_close(recomputed, plain)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, k=key: f"{k}: {m}")
    routers = [gradient for key, gradient in found.items() if ".router." in key]
    assert len(routers) == 2
    assert all(gradient.abs().sum() > 0 for gradient in routers)


@pytest.mark.parametrize("name", ENABLE)
def test_reentrant_checkpointing_is_refused(name: str) -> None:
    model = tiny_model(TINY_MOE)
    with pytest.raises(ValueError, match="loses the gradient of the balance loss"):
        enable(model, name, {"use_reentrant": True})
    assert not is_checkpointing(model)


def test_signature_is_the_stock_one() -> None:
    """generate() and the Trainer look at it to learn which inputs the model takes."""
    ours = inspect.signature(LlavaMoeForConditionalGeneration.forward)
    assert list(ours.parameters) == list(inspect.signature(LlavaForConditionalGeneration.forward).parameters)
    assert "pixel_values" in ours.parameters


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
def test_projectors(projector: str, tmp_path: Any) -> None:
    model = tiny_model(projector=projector)
    features = torch.randn(2, IMAGE_TOKENS, 24)
    module = model.model.multi_modal_projector
    assert module(features).shape == (2, module.num_output_tokens(IMAGE_TOKENS), 32)
    assert module.output_layer.out_features == 32
    model.save_pretrained(tmp_path, save_original_format=True)
    other = LlavaMoeForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(other.model.multi_modal_projector(features), module(features))


def test_several_feature_layers_are_joined() -> None:
    model = tiny_model(vision_feature_layer=[-2, -1])
    assert model.model.multi_modal_projector.linear_1.in_features == 48
    assert logits_of(model, **picture_batch(model)).shape[:2] == (2, 12)


def test_unknown_projector_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown projector 'mlp'"):
        tiny_model(projector="mlp")
