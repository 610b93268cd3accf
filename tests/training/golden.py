"""Golden losses: every kind of stage, trained for five steps on a tiny model, one stage from the end of another.

`tests/golden/losses.json` holds loss and gradient norm of every step. They may be written anew only where a change is
meant to move them (another initial value, another default, a corrected formula), never to make a test pass:

    python -m tests.training.golden "why the numbers have moved"

The reason, the versions and the numbers go into one commit with the change. What is no such reason: a faster kernel,
another order of the same sums, a refactoring, a new option that is off.

Everything is float32 on one thread. AdamW divides by the root of the second moment, which turns the rounding of a
gradient that should be zero into a step of full size; `adam_epsilon` is so large here that rounding stays rounding on
another CPU.
"""

from __future__ import annotations

import contextlib
import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llava_moe  # noqa: F401  before anything that may import torchvision

import torch  # isort: skip
import transformers  # isort: skip

from llava_moe.train import run as train
from llava_moe.upcycle import run as upcycle
from tests.tiny import tiny_image, write_llava_json
from tests.tiny_families import SIZES, write_family_checkpoint, write_mixed_json
from tests.tiny_model import write_tiny_checkpoint
from tests.training.runs import write_recipe

FILE = Path(__file__).parents[1] / "golden" / "losses.json"
STEPS = 5
RATE = 1e-3
LANGUAGE = {"projector": RATE, "decoder": RATE, "embeddings": RATE}
WHOLE = {**LANGUAGE, "vision_tower": RATE / 5}
BALANCE = {"losses": {"switch": 0.1, "z": 0.01}}
_TRAIN = {"max_steps": STEPS, "adam_epsilon": 1e-3, "gradient_accumulation_steps": 2}
_PART = {"num_experts": 4, "router": {"name": "top_k", "args": {"k": 2}}}
Numbers = dict[str, dict[str, list[float]]]


def write_video_json(folder: Path, n: int = 4) -> tuple[Path, Path]:
    """Records with a video as the list of its frames, of two and of three in turn."""
    frames = folder / "frames"
    frames.mkdir(parents=True)
    records = []
    for index in range(n):
        names = [f"{index}-{frame}.png" for frame in range(2 + index % 2)]
        for frame, name in enumerate(names):
            tiny_image(index + frame, SIZES[index % len(SIZES)]).save(frames / name)
        turns = [
            {"from": "human", "value": "<video>\nWhat is it?"},
            {"from": "gpt", "value": "a red square"},
        ]
        records.append({"id": f"video-{index}", "video": names, "conversations": turns})
    path = folder / "data.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path, frames


class Chain:
    """The stages of a folder.

    Attributes:
        numbers: by stage, what has been trained so far.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.numbers: Numbers = {}
        self.data = write_llava_json(folder / "data", 8, text_only_every=4)

    def stage(self, name: str, start: Path, rates: dict[str, float], /, **sections: Any) -> Path:
        """Trains, and returns the final checkpoint; `source` among the sections is other data."""
        source = sections.pop("source", self.data)
        sections["stage"] = {"name": name, "learning_rates": rates, "weight_decay": 0.01}
        recipe = write_recipe(self.folder / name, start, source, **{"train": _TRAIN, **sections})
        train(str(recipe))
        out = self.folder / name / "out"
        rows = [row for row in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in row]
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        self.numbers[name] = {key: [row[key] for row in rows] for key in ("loss", "grad_norm")}
        return out / "model"

    def upcycled(self, name: str, parent: Path, **parts: Any) -> Path:
        """Makes an MoE checkpoint; a dense part is a key with its section."""
        recipe = write_recipe(self.folder / name, parent, self.data, upcycle={"parent": str(parent), **parts})
        return upcycle(str(recipe))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sums of several threads come in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_chain(folder: Path) -> Numbers:
    """Trains every stage below `folder`.

    pretrain -> sft -> upcycled -> moe (experts and routers alone; everything), the way of LLaVA and MoE-LLaVA;
    pretrain -> prefinetune -> upcycled tower and projector -> moe, the way of CuMo and LibMoE;
    and models with tiles: several images in a record (anyres), and videos as frames.
    """
    with one_thread():
        chain = Chain(folder)
        start = write_tiny_checkpoint(folder / "start")
        first = chain.stage(
            "pretrain", start, {"projector": RATE}, data={"template": "plain"}, source=_captions(folder)
        )
        chat = {"template": "chatml"}
        sft = chain.stage("sft", first, LANGUAGE, data=chat)
        sparse = chain.upcycled("upcycled", sft, decoder={**_PART, "layers": "alternate"})
        chain.stage("moe_experts_and_routers", sparse, {"experts": RATE, "router": RATE}, balance=BALANCE)
        chain.stage("moe_all", sparse, {**LANGUAGE, "experts": RATE, "router": RATE}, balance=BALANCE)
        whole = chain.stage("prefinetune", first, WHOLE, data=chat)
        towers = chain.upcycled("upcycled_tower", whole, vision={**_PART, "layers": [0, 1]}, projector=_PART)
        rates = {"vision_tower": RATE, "decoder": RATE, "embeddings": RATE, "experts": RATE, "router": RATE}
        chain.stage("moe_tower_and_projector", towers, rates, balance=BALANCE)
        tiled = write_family_checkpoint(folder / "tiled", "llava_next")
        chain.stage("anyres", tiled, WHOLE, source=write_mixed_json(folder / "mixed"), data={"max_length": 256})
        video = write_family_checkpoint(folder / "onevision", "llava_onevision")
        chain.stage("video", video, WHOLE, source=write_video_json(folder / "videos"), data={"max_length": 256})
        return chain.numbers


def _captions(folder: Path) -> tuple[Path, Path]:
    """The template of the first stage takes a picture and nothing but one answer."""
    return write_llava_json(folder / "captions", 8)


def write(reason: str) -> None:
    """Trains, and writes the file anew."""
    with tempfile.TemporaryDirectory() as folder:
        numbers = run_chain(Path(folder))
    made = {
        "reason": reason,
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__, "cpu": platform.machine()},
        "stages": numbers,
    }
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].strip():
        sys.exit('say why the numbers have moved: python -m tests.training.golden "reason"')
    write(sys.argv[1])
