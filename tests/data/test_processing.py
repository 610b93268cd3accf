import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from llava_moe.data.conversation import IGNORE_INDEX, TemplateError
from llava_moe.data.processing import LlavaMoeProcessor, load_processor
from llava_moe.data.schema import DataError, Turn
from llava_moe.data.templates import TEMPLATES
from llava_moe.registry import RegistryError
from tests.tiny import (
    tiny_chat_tokenizer,
    tiny_image,
    tiny_llama_tokenizer,
    tiny_siglip_processor,
    tiny_tokenizer,
)

from transformers import CLIPImageProcessorPil, LlavaProcessor, SiglipImageProcessorPil  # isort: skip

TURNS = [Turn("user", "<image>\nWhat is the colour?"), Turn("assistant", "red")]
WIDE = (40, 20)


def clip_processor(**changes: object) -> LlavaMoeProcessor:
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    tokenizer = changes.pop("tokenizer", None) or tiny_llama_tokenizer()
    settings = {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "template": "v1",
        **changes,
    }
    return LlavaMoeProcessor(image_processor, tokenizer, **settings)


def test_siglip_sample():
    processor = tiny_siglip_processor()
    assert (processor.image_shape, processor.num_image_tokens) == ((3, 16, 16), 4)
    sample = processor.encode_sample(TURNS, [tiny_image(0)])
    assert sample["pixel_values"].shape == (1, 3, 16, 16)
    assert sample["pixel_values"].dtype == torch.float32
    assert int((sample["input_ids"] == processor.image_token_id).sum()) == 4
    assert sample["labels"].shape == sample["input_ids"].shape
    learned = sample["labels"][sample["labels"] != IGNORE_INDEX]
    assert processor.tokenizer.decode(learned) == "red<|im_end|>"


def test_clip_counts_tokens_like_the_stock_processor():
    # 2 x 2 patches and the class token, which "default" drops again
    assert clip_processor().num_image_tokens == 4
    assert clip_processor(vision_feature_select_strategy="full").num_image_tokens == 5


@pytest.mark.parametrize("image_mode", ["square", "pad"])
@pytest.mark.parametrize("make", [tiny_siglip_processor, clip_processor])
def test_the_stock_call_gives_the_same_ids_and_pixels(make, image_mode: str):
    processor = make(image_mode=image_mode)
    ours = processor.encode_prompt(TURNS[:1], [tiny_image(0, WIDE)])
    rendered = processor.text_encoder.template.render(TURNS[:1], add_generation_prompt=True)
    text = "".join(segment.text for segment in rendered)
    stock = processor(images=[tiny_image(0, WIDE)], text=text, return_tensors="pt")
    assert torch.equal(stock["input_ids"][0], ours["input_ids"])
    assert torch.equal(stock["pixel_values"], ours["pixel_values"])


def test_pad_shows_the_whole_image_and_square_crops_it():
    edge_marked = Image.new("RGB", WIDE, "white")
    edge_marked.paste("black", (0, 0, 6, 20))
    square = clip_processor(image_mode="square").encode_images([edge_marked])
    padded = clip_processor(image_mode="pad").encode_images([edge_marked])
    assert square.std() < 0.5 < padded.std()
    # the corner of the padded image has the mean colour, which normalises to nearly zero
    assert padded[0, :, 0, 0].abs().max() < 0.02


def test_several_images_and_no_image():
    processor = tiny_siglip_processor()
    two = processor.encode_sample([Turn("user", "<image><image>\nAnd?"), TURNS[1]], [tiny_image(0), tiny_image(1)])
    assert two["pixel_values"].shape == (2, 3, 16, 16)
    assert int((two["input_ids"] == processor.image_token_id).sum()) == 8
    assert "pixel_values" not in processor.encode_sample([Turn("user", "What?"), TURNS[1]], [])
    with pytest.raises(DataError, match=r"1 <image> marker\(s\)"):
        processor.encode_sample(TURNS, [])


def test_prompts_are_padded_on_the_left():
    processor = tiny_siglip_processor()
    short = processor.encode_prompt([Turn("user", "What?")], [])
    long = processor.encode_prompt(TURNS[:1], [tiny_image(0)])
    batch = processor.pad_prompts([short, long])
    missing = len(long["input_ids"]) - len(short["input_ids"])
    assert missing > 0
    assert batch["input_ids"][0].tolist() == [processor.pad_token_id] * missing + short["input_ids"].tolist()
    assert batch["attention_mask"][0].tolist() == [0] * missing + [1] * len(short["input_ids"])
    assert batch["input_ids"][1].tolist() == long["input_ids"].tolist()
    assert torch.equal(batch["pixel_values"], long["pixel_values"])
    assert "pixel_values" not in processor.pad_prompts([short])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(("make", "kind"), [(tiny_siglip_processor, "llama3"), (clip_processor, "phi3")])
def test_saving_and_loading_changes_nothing(tmp_path: Path, make, kind: str, template: str):
    processor = make(template=template, image_mode="pad", tokenizer=tiny_chat_tokenizer(kind))
    processor.save_pretrained(tmp_path)
    loaded = load_processor(tmp_path)
    assert (loaded.template, loaded.template_options, loaded.image_mode) == (template, {}, "pad")
    assert json.loads((tmp_path / "processor_config.json").read_text())["template"] == template
    assert loaded.image_processor.backend == "pil"
    before, after = (one.encode_sample(TURNS, [tiny_image(0, WIDE)]) for one in (processor, loaded))
    assert all(torch.equal(before[key], after[key]) for key in ("input_ids", "labels", "pixel_values"))
    assert processor.stop_token_ids == loaded.stop_token_ids
    assert processor.stop_strings == loaded.stop_strings


def test_options_of_the_template_are_saved_with_it(tmp_path: Path):
    options = {"llava_next_labels": True}
    processor = tiny_siglip_processor("qwen_1_5", tokenizer=tiny_chat_tokenizer("gpt2"), template_options=options)
    learned = processor.encode_text(TURNS, 1)["labels"]
    assert learned[0] == processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    processor.save_pretrained(tmp_path)
    loaded = load_processor(tmp_path)
    assert (loaded.template, loaded.template_options) == ("qwen_1_5", options)
    assert torch.equal(loaded.encode_text(TURNS, 1)["labels"], learned)
    loaded.template_options = {}
    assert loaded.encode_text(TURNS, 1)["labels"][0] == IGNORE_INDEX
    assert load_processor(tmp_path, template_options={}).encode_text(TURNS, 1)["labels"][0] == IGNORE_INDEX
    # another template does not inherit them, the same one does
    assert load_processor(tmp_path, template="v1").template_options == {}
    assert load_processor(tmp_path, template="gemma", template_options=options).template_options == options
    assert load_processor(tmp_path, template="qwen_1_5").template_options == options
    with pytest.raises(DataError, match="template 'v1' has no option 'llava_next_labels'") as caught:
        load_processor(tmp_path, template="v1", template_options=options)
    assert str(tmp_path) in str(caught.value)


def test_settings_can_be_replaced_while_loading(tmp_path: Path):
    tiny_siglip_processor(template="chatml").save_pretrained(tmp_path)
    loaded = load_processor(tmp_path, template="v1", image_mode="pad")
    assert (loaded.template, loaded.image_mode) == ("v1", "pad")
    loaded.template = "plain"
    assert loaded.text_encoder.template.name == "plain"


def test_stop_tokens_follow_the_template():
    tokenizer = tiny_llama_tokenizer()
    processor = tiny_siglip_processor(template="chatml", tokenizer=tokenizer)
    assert tokenizer.convert_ids_to_tokens(processor.stop_token_ids) == ["</s>", "<|im_end|>"]
    processor.template = "v1"
    assert tokenizer.convert_ids_to_tokens(processor.stop_token_ids) == ["</s>"]
    processor.template = "plain"
    assert tokenizer.convert_ids_to_tokens(processor.stop_token_ids) == ["</s>", "<0x0A>"]
    # a full stop and the newline can be one token, so the id alone is not enough
    assert processor.stop_strings == ["\n"]
    processor.template = "v1"
    assert processor.stop_strings == []


def test_the_first_answer_begins_where_its_prompt_ends():
    processor = tiny_siglip_processor()
    turns = [*TURNS, Turn("user", "And?"), Turn("assistant", "blue")]
    encoded = processor.encode_text(turns, 1)
    start = processor.answer_start(turns)
    assert start == len(processor.encode_prompt(TURNS[:1], [tiny_image(0)])["input_ids"])
    assert (encoded["labels"][:start] == IGNORE_INDEX).all()
    assert encoded["labels"][start] == encoded["input_ids"][start]


def save_stock(path: Path, chat_template: str | None) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    image_processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    stock = LlavaProcessor(image_processor, tokenizer, 8, "full", chat_template=chat_template)
    stock.save_pretrained(path)


def test_a_stock_checkpoint_uses_the_chat_template_it_ships(tmp_path: Path):
    jinja = TEMPLATES.get("chatml").jinja
    save_stock(tmp_path, jinja)
    loaded = load_processor(tmp_path)
    assert (loaded.template, loaded.image_mode) == ("chat_template", "square")
    expected = tiny_siglip_processor(template="chatml").encode_text(TURNS, 1)["input_ids"]
    assert torch.equal(loaded.encode_text(TURNS, 1)["input_ids"], expected)


def test_the_chat_template_of_the_processor_wins_over_the_tokenizers():
    jinja = TEMPLATES.get("v1").jinja
    processor = clip_processor(template="chat_template", chat_template=jinja)
    expected = clip_processor(template="v1").encode_text(TURNS, 1)["input_ids"]
    assert torch.equal(processor.encode_text(TURNS, 1)["input_ids"], expected)


def test_a_stock_checkpoint_without_chat_template_needs_a_template(tmp_path: Path):
    save_stock(tmp_path, None)
    with pytest.raises(DataError, match="set template to one of plain, v1, chatml") as caught:
        load_processor(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert load_processor(tmp_path, template="chatml").template == "chatml"


def test_wrong_directories_are_named(tmp_path: Path):
    with pytest.raises(DataError, match="none is not a directory"):
        load_processor(tmp_path / "none")
    with pytest.raises(DataError, match=r"no processor_config.json"):
        load_processor(tmp_path)
    (tmp_path / "processor_config.json").write_text("{}")
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_processor(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(DataError, match="cannot be loaded"):
        load_processor(tmp_path)


def test_parts_that_do_not_fit_are_refused():
    image_processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    with pytest.raises(DataError, match="torchvision backend; use its PIL twin"):
        LlavaMoeProcessor(SimpleNamespace(backend="torchvision"), tiny_tokenizer(), 8, "full")
    with pytest.raises(DataError, match="patch_size is None"):
        LlavaMoeProcessor(image_processor, tiny_tokenizer(), None, "full")
    with pytest.raises(DataError, match="no image token '<picture>'"):
        LlavaMoeProcessor(image_processor, tiny_tokenizer(), 8, "full", image_token="<picture>")
    with pytest.raises(RegistryError, match="did you mean 'chatml'"):
        tiny_siglip_processor(template="chatlm")
    with pytest.raises(RegistryError, match="unknown image mode 'pda'; did you mean 'pad'"):
        tiny_siglip_processor(image_mode="pda")
    with pytest.raises(ValueError, match="write 'anyres' or 'anyres_max_N'"):
        tiny_siglip_processor(image_mode="anyres_9")
    with pytest.raises(DataError, match="image_mode 'anyres' needs a model with tiles"):
        tiny_siglip_processor(image_mode="anyres")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match="ships none"):
        LlavaMoeProcessor(image_processor, tokenizer, 8, "full")


def test_an_image_processor_without_one_fixed_size_is_refused():
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, do_center_crop=False)
    processor = LlavaMoeProcessor(image_processor, tiny_tokenizer(), 14, "full", template="chatml")
    with pytest.raises(DataError, match="set its size"):
        processor.encode_sample(TURNS, [tiny_image(0)])


def test_a_tokenizer_without_padding_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(DataError, match="no pad_token"):
        _ = tiny_siglip_processor(tokenizer=tokenizer).pad_token_id
