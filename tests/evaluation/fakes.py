"""Tiny records, and a model that answers them from the picture alone: a wrong or missing picture shows in the score."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PilImage

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "blue": (30, 30, 220),
    "yellow": (230, 220, 30),
    "white": (250, 250, 250),
}
NAMES = list(COLOURS)
STOP, PAD, START = 2, 0, 1
FIRST_CODE = 10  # ids below are special; every later id is one character


def picture(index: int) -> PilImage.Image:
    return PilImage.new("RGB", (24 + index, 32), COLOURS[NAMES[index % 5]])


def write_records(folder: Path) -> Path:
    """Ten records a task; the same document has another picture in each task. One GQA answer is unanswerable."""
    folder.mkdir(parents=True, exist_ok=True)
    gqa, pope, mmbench = [], [], []
    for i in range(10):
        colour = NAMES[i % 5]
        answer = "purple" if i == 9 else colour
        family = "shapes_open" if i < 6 else "emoji_kind"
        question = "What color is the square?"
        gqa.append({"id": f"g{i}", "family": family, "image": picture(i), "question": question, "answer": answer})
        shown, asked = i + 3, NAMES[(i + 3 + i // 5) % 5]  # the first five are yes, the others no
        pope.append(
            {
                "id": f"p{i}",
                "question_id": str(i),
                "family": "presence" if i % 2 else "shapes_yesno",
                "image": picture(shown),
                "question": f"Is there a {asked} square in the image?",
                "answer": "yes" if asked == NAMES[shown % 5] else "no",
            }
        )
        shown = i + 1
        options = [NAMES[(shown + i + k) % 5] for k in range(4)]
        if NAMES[shown % 5] not in options:
            options[0] = NAMES[shown % 5]
        mmbench.append(
            {
                "id": f"m{i}",
                "index": i,
                "family": "choice",
                "image": picture(shown),
                "question": "What color is shown?",
                "hint": "nan",
                "source": "test",
                "split": "dev",
                "category": "color",
                "L2-category": "perception",
                "answer": "ABCD"[options.index(NAMES[shown % 5])],
                **dict(zip("ABCD", options, strict=True)),
            }
        )
    for name, rows in (("gqa", gqa), ("pope", pope), ("mmbench", mmbench)):
        kinds = {key: Value("int64" if isinstance(value, int) else "string") for key, value in rows[0].items()}
        Dataset.from_list(rows, features=Features({**kinds, "image": Image()})).to_parquet(folder / f"{name}.parquet")
    priors = {row["question"]: "red" if row in gqa else "yes" for row in gqa + pope}
    (folder / "priors.json").write_text(json.dumps(priors | {"What color is shown?": "A"}))
    return folder


def write_checkpoint(folder: Path) -> Path:
    """A folder that looks like a checkpoint; the fakes below stand for what is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


class CharTokenizer:
    pad_token_id = PAD

    def encode(self, text: str) -> list[int]:
        return [FIRST_CODE + ord(character) for character in text]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(token - FIRST_CODE) for token in ids if token >= FIRST_CODE)


class FakeProcessor:
    """One token per character; a picture is its mean colour."""

    template = "chatml"
    stop_token_ids = (STOP,)
    stop_strings: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.tokenizer = CharTokenizer()

    def encode_prompt(self, turns: Any, images: Any) -> dict[str, torch.Tensor]:
        encoded = {"input_ids": torch.tensor([START, *self.tokenizer.encode(turns[0].text)])}
        if images:
            colours = [image.resize((1, 1)).getpixel((0, 0)) for image in images]
            encoded["pixel_values"] = torch.tensor(colours, dtype=torch.float32).view(-1, 3, 1, 1)
        return encoded

    def encode_sample(self, turns: Any, images: Any) -> dict[str, torch.Tensor]:
        encoded = self.encode_prompt(turns[:1], images)
        answer = torch.tensor([*self.tokenizer.encode(turns[1].text), STOP])
        prompt = encoded["input_ids"]
        encoded["input_ids"] = torch.cat([prompt, answer])
        encoded["labels"] = torch.cat([torch.full_like(prompt, -100), answer])
        return encoded

    def pad_prompts(self, prompts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        width = max(len(prompt["input_ids"]) for prompt in prompts)
        ids = torch.full((len(prompts), width), PAD)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt["input_ids"]) :] = prompt["input_ids"]
            mask[row, width - len(prompt["input_ids"]) :] = 1
        padded = {"input_ids": ids, "attention_mask": mask}
        pixels = [prompt["pixel_values"] for prompt in prompts if "pixel_values" in prompt]
        return padded | ({"pixel_values": torch.cat(pixels)} if pixels else {})


def oracle(text: str, colour: str) -> str:
    """The answer to a prompt of the three tasks, given the colour in the picture."""
    question = text.split("\n\nAnswer")[0].split("\nAnswer")[0]
    if "Is there a" in question:
        return "Yes" if f"Is there a {colour} " in question else "No"
    if "There are several options" in question:
        lines = question.splitlines()
        return next((line[0] for line in lines if line[1:2] == "." and line[3:].strip() == colour), "E")
    return colour.upper()


@dataclass
class FakeModel:
    """Reads prompts and pictures out of tensors, as a real model must, and answers by `oracle`."""

    fail: bool = False
    dtype: torch.dtype = torch.float32
    calls: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)

    def to(self, device: torch.device) -> FakeModel:
        return self

    def eval(self) -> FakeModel:
        return self

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        if self.fail:
            raise RuntimeError("asked to fail")
        self.calls.append({"input_ids": input_ids, "attention_mask": attention_mask, **options})
        pixels = options.get("pixel_values", torch.zeros(0, 3, 1, 1)).flatten(1).tolist()
        tokenizer, answers, used = CharTokenizer(), [], 0
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            text = tokenizer.decode(ids[mask.bool()].tolist())
            self.prompts.append(text)
            num_images = text.count("<image>")
            shown = pixels[used : used + num_images]
            used += num_images
            answers.append([*tokenizer.encode(" " + oracle(text, _nearest(shown))), STOP])
        assert used == len(pixels), "more pictures than markers"
        width = max(map(len, answers)) + 1
        tail = torch.tensor([answer + [PAD] * (width - len(answer)) for answer in answers])
        return torch.cat([input_ids, tail], dim=1)


def _nearest(shown: list[list[float]]) -> str:
    if not shown:
        return "nothing"
    distances = {n: sum((a - b) ** 2 for a, b in zip(c, shown[0], strict=True)) for n, c in COLOURS.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] < 100 else "grey"
