"""Times our lmms-eval adapter at several batch sizes beside lmms-eval's own `llava_hf`, on the same checkpoint.

    python -m scripts.bench.eval --checkpoint runs/quickstart/control/model --data runs/quickstart/data/eval

The checkpoint, one of ours and dense, is written once more for transformers' own LLaVA class (a tower of ours stays
what it is, as this process has it registered), and both adapters answer the same questions through the same lmms-eval
in one process. `llava_hf` answers one question at a time and asserts so; ours is timed at each batch size, with the
features of pictures kept and (at the middle size) without. What is timed is `generate_until`: reading the documents,
pictures, prompts and answers, not loading or scoring. All cases run one after the other and the whole `--rounds` times,
on a machine that should do nothing else; reported is the fastest round of each, and how many answers equal those of
`llava_hf` and those of our first batch size.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import llava_moe  # noqa: F401  before anything that may import torchvision

import torch  # isort: skip
import transformers  # isort: skip
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.processing_llava import LlavaProcessor

from llava_moe.evaluation import records
from llava_moe.evaluation.lmms import LlavaMoe, load_checkpoint
from llava_moe.evaluation.machinery import offline, run_lmms_eval
from llava_moe.evaluation.tasks import LOCAL_TASKS

OTHER = "llava_hf"
_SAME = (
    *("image_token_index", "image_seq_length", "projector_hidden_act", "vision_feature_select_strategy"),
    *("vision_feature_layer", "multimodal_projector_bias", "tie_word_embeddings"),
)


def stock_adapter(checkpoint: Path) -> Any:
    """lmms-eval's own adapter on a checkpoint of transformers' class."""
    if "decord" not in sys.modules:
        # llava_hf imports two names of decord, which reads videos, and uses them for videos only; none is shown here,
        # and no default dependency of lmms-eval brings the package.
        stub = types.ModuleType("decord")
        stub.VideoReader, stub.cpu = None, None  # type: ignore[attr-defined]
        sys.modules["decord"] = stub
    from lmms_eval.models.simple.llava_hf import LlavaHf

    return LlavaHf(pretrained=str(checkpoint), device="cpu", device_map="cpu", dtype="float32", batch_size=1)


def write_stock(checkpoint: Path, folder: Path) -> Path:
    """The same weights for `LlavaForConditionalGeneration`, with the same processor; no tensor may be left over."""
    model, processor = load_checkpoint(str(checkpoint), torch.float32)
    config = model.config
    if config.model_type != "llava_moe" or config.moe is not None or config.projector != "mlp2x_gelu":
        raise SystemExit(f"{checkpoint}: give a dense checkpoint of ours without tiles, with projector mlp2x_gelu")
    template = processor.text_encoder.template.jinja
    if processor.image_mode != "square" or template is None:
        raise SystemExit(f"{checkpoint}: give one with image mode square and a template that llava_hf can render")
    processor.tokenizer.chat_template = template  # the language model's own may put a system message in front
    options = {key: getattr(config, key) for key in _SAME}
    stock = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=config.vision_config, text_config=config.text_config, **options)
    )
    stock.load_state_dict(model.state_dict())
    stock.generation_config = model.generation_config
    stock.save_pretrained(folder)
    LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        chat_template=template,
        image_token=processor.image_token,
        num_additional_image_tokens=processor.num_additional_image_tokens,
    ).save_pretrained(folder)
    return folder


class Timed:
    """Runs one adapter over the task; its answers and the seconds of `generate_until`."""

    def __init__(self, adapter: Any, task: str, data: Path, limit: int) -> None:
        self.adapter = adapter
        self.sources = {task: records.data_file(data, LOCAL_TASKS.get(task))}
        self.arguments = {"tasks": [task], "batch_size": adapter.batch_size, "limit": limit}
        self.task = task

    def run(self) -> tuple[float, dict[int, str]]:
        seconds: list[float] = []
        generate = self.adapter.generate_until

        def timed(requests: Any) -> Any:
            start = time.perf_counter()
            found = generate(requests)
            seconds.append(time.perf_counter() - start)
            return found

        with tempfile.TemporaryDirectory() as out, _attribute(self.adapter, "generate_until", timed):
            raw = run_lmms_eval(self.adapter, self.sources, Path(out), self.arguments, silent=True)
        assert raw is not None
        said = {int(s["doc_id"]): str(s["filtered_resps"][0]).strip() for s in raw["samples"][self.task]}
        return sum(seconds), said


@contextlib.contextmanager
def _attribute(target: Any, name: str, value: Any) -> Iterator[None]:
    setattr(target, name, value)
    try:
        yield
    finally:
        delattr(target, name)


def cases(args: argparse.Namespace, stock: Path) -> dict[str, Callable[[], Any]]:
    """What makes the adapter of each case; a model is loaded anew for each run, outside of the time."""
    own = partial(LlavaMoe, str(args.checkpoint), device="cpu")
    found: dict[str, Callable[[], Any]] = {OTHER: partial(stock_adapter, stock)}
    found |= {f"ours, batch {size}": partial(own, batch_size=size) for size in args.batch_sizes}
    middle = args.batch_sizes[len(args.batch_sizes) // 2]
    return found | {f"ours, batch {middle}, pictures not kept": partial(own, batch_size=middle, vision_cache_mib=0)}


def hardware() -> dict[str, Any]:
    """What the numbers belong to."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = lines[0] if lines else name
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and answers of every case."""
    machine = hardware()
    seconds: dict[str, list[float]] = {}
    said: dict[str, dict[int, str]] = {}
    counters: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, offline(active=True):
        made = cases(args, write_stock(args.checkpoint, Path(folder) / "stock"))
        for _ in range(args.rounds):
            for name, make in made.items():
                adapter = make()
                took, said[name] = Timed(adapter, args.task, args.data, args.limit).run()
                seconds.setdefault(name, []).append(took)
                counters[name] = adapter.counters() if isinstance(adapter, LlavaMoe) else {}
                print(f"{name}: {took:.1f} s", flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    rows = summary(seconds, said, counters, f"ours, batch {args.batch_sizes[0]}")
    return {"task": args.task, "hardware": machine, "versions": versions, "rows": rows}


def summary(
    seconds: dict[str, list[float]], said: dict[str, dict[int, str]], counters: dict[str, dict[str, float]], first: str
) -> dict[str, dict[str, Any]]:
    """What is reported of each case; `first` is our reference for the answers."""
    rows = {}
    for name, taken in seconds.items():
        count = len(said[name])
        rows[name] = {
            "questions": count,
            "distinct_answers": len(set(said[name].values())),
            "seconds": [round(s, 2) for s in taken],
            "questions_per_second": round(count / min(taken), 2),
            "times_llava_hf": round(min(seconds[OTHER]) / min(taken), 2),
            "same_as_llava_hf": sum(said[name][i] == said[OTHER][i] for i in said[name]),
            "same_as_first_batch_size": sum(said[name][i] == said[first][i] for i in said[name]),
            **counters[name],
        }
    return rows


def table(found: dict[str, Any]) -> str:
    """The rows in Markdown."""
    machine = found["hardware"]
    lines = [
        f"`{found['task']}` on {machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores, float32; "
        "the fastest round of each.",
        "",
        "| adapter | questions/s | times llava_hf | same answers as llava_hf | as our first batch size | padding "
        "| pictures encoded, reused |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in found["rows"].items():
        ours = "padding_share" in row
        padding = f"{100 * row['padding_share']:.1f} %" if ours else ""
        pictures = f"{row['pictures_encoded']}, {row['pictures_reused']}" if ours else ""
        count = row["questions"]
        lines.append(
            f"| {name} | {row['questions_per_second']} | {row['times_llava_hf']} | {row['same_as_llava_hf']}/{count} "
            f"| {row['same_as_first_batch_size']}/{count} | {padding} | {pictures} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a dense checkpoint of ours")
    parser.add_argument("--data", type=Path, required=True, help="folder with the task's parquet file")
    parser.add_argument("--task", default="local_gqa", choices=LOCAL_TASKS.names())
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--batch-sizes", type=lambda text: [int(size) for size in text.split(",")], default=[1, 4, 16, 32, 64]
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/eval"))
    args = parser.parse_args()
    found = measure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "cpu.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (args.out / "cpu.md").write_text(table(found), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
