"""The page holds every part that it was given, stands alone, and leaves out what it was not given."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import llava_moe  # noqa: F401  (before anything that may import torchvision)
from llava_moe.evaluation import EvaluationError, lmms, run
from llava_moe.evaluation.report import ReportInputs, ReportSample, pick_samples, write_report
from tests.evaluation import fakes


def score(n: int, metric: str, moe: float, dense: float, low: float, high: float) -> dict[str, Any]:
    return {
        "n": n,
        "metric": metric,
        "moe": moe,
        "dense": dense,
        "blind": 0.3,
        "majority": 0.2,
        "moe_ci": [moe - 0.05, moe + 0.05],
        "dense_ci": [dense - 0.05, dense + 0.05],
        "difference_ci": [low, high],
        "blind_ci": [0.25, 0.35],
        "blind_source": "dense model on blank pictures",
        "majority_ci": [0.15, 0.25],
    }


def full_inputs() -> ReportInputs:
    """Made-up values for every part of the page."""
    layers = [f"layer {i}" for i in range(4)]
    families = ("shapes_open", "emoji_kind", "shapes_yesno", "presence", "counting", "choice")
    tasks = {
        name: score(300, "balanced_accuracy" if name in ("shapes_yesno", "presence") else "accuracy", m, d, lo, hi)
        for name, m, d, lo, hi in zip(
            families,
            (0.81, 0.72, 0.78, 0.7, 0.52, 0.61),
            (0.79, 0.73, 0.7, 0.76, 0.5, 0.61),
            (-0.01, -0.04, 0.02, -0.1, -0.03, -0.05),
            (0.05, 0.02, 0.14, -0.02, 0.07, 0.05),
            strict=True,
        )
    }
    tasks["all_yesno"] = score(600, "balanced_accuracy", 0.74, 0.73, -0.02, 0.04)
    history = [{"step": i, "loss": 0.3 + 3 * math.exp(-i / 60) + 0.1 * math.sin(i)} for i in range(1, 400)]
    balanced = [{**point, "balance_loss": 1 + 0.3 * math.exp(-point["step"] / 50)} for point in history]
    return ReportInputs(
        title="Quickstart <report>",
        facts={"recipe": "scripts/recipes/quickstart", "profile": "default", "processor": "2 cores"},
        results={
            "tasks": tasks,
            "seconds": {"pretrain": 120.0, "dense SFT": 610.0, "upcycle": 4.0, "MoE SFT": 300.0, "scoring": 95.0},
            "upcycle": {"max_abs_logit_error": 3.2e-6},
            "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        },
        notices=["emoji pictures could not be fetched: drawn shapes stand for them"],
        losses={"pretrain": history[:150], "dense SFT": history, "MoE SFT": balanced},
        expert_load={layer: [0.4 - 0.05 * i, 0.2, 0.15, 0.25 + 0.05 * i] for i, layer in enumerate(layers)},
        family_load={
            family: {
                layer: [0.1 + 0.1 * ((i + j) % 3), 0.3, 0.2, 0.4 - 0.1 * ((i + j) % 3)]
                for j, layer in enumerate(layers)
            }
            for i, family in enumerate(families)
        },
        parameters={"total": 161_200_000, "active for each token": 63_400_000},
        samples=[
            ReportSample(
                Image.new("RGB", (96, 64 + 8 * i), fakes.COLOURS[fakes.NAMES[i % 5]]),
                family=families[i % 6],
                question="What colour is shown? <b>\nA. red\nB. blue",
                target=fakes.NAMES[i % 5],
                moe_answer="" if i == 0 else "red",
                moe_correct=i % 5 == 0,
                dense_answer="blue",
                dense_correct=i % 5 == 2,
            )
            for i in range(8)
        ],
    )


class Page(HTMLParser):
    """Collects headings, tags and attributes, and the open tags at the end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_every_part_is_there(tmp_path: Path) -> None:
    write_report(tmp_path / "deep" / "report.html", full_inputs())
    text = (tmp_path / "deep" / "report.html").read_text()
    page = Page(text)
    words = " ".join(page.text)
    for heading in ("What was run", "Scores", "Training loss", "Expert load", "By question family", "Time", "Samples"):
        assert heading in words, heading
    for fact in (
        "Quickstart <report>",
        "2 cores",
        "161.2 M",
        "3.2e-06",
        "emoji pictures could not be fetched",
        "all yes/no together",
        "▲ better",
        "▼ worse",
        "+2.0",
        "-1.0 to +5.0",
        "balance loss",
        "2.13.0",
    ):
        assert fact in re.sub(r"\s+", " ", words), fact
    assert len(page.attributes("svg")) == 3 + 3 + 4  # one a stage, one a layer
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in page.attributes("svg"))
    assert len(page.attributes("img")) == 8
    assert all(attributes["alt"] for attributes in page.attributes("img"))
    assert "What colour is shown? <b>" in words  # shown, not obeyed
    assert "(nothing)" in words


def test_stands_alone(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", full_inputs())
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert not page.attributes("script")
    assert not page.attributes("link")
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert links
    assert all(value is not None and value.startswith(("data:", "#")) for value in links)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    defined = re.findall(r'<(?:clipPath|path|g) id="([pm][0-9a-f]{10})"', text)
    assert len(defined) == len(set(defined)), "two figures share an id"
    assert ids
    assert "#010203" not in text  # the ink that stands for the page's own


def test_empty_parts_are_left_out(tmp_path: Path) -> None:
    full = full_inputs()
    write_report(tmp_path / "report.html", ReportInputs("t", {}, {"tasks": dict(full.results["tasks"])}))
    words = " ".join(Page((tmp_path / "report.html").read_text()).text)
    for heading in ("Substitutes were used", "Training loss", "Expert load", "Time", "Samples"):
        assert heading not in words


def test_bad_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="at least one task"):
        write_report(tmp_path / "report.html", ReportInputs("t", {}, {"tasks": {}}))
    with pytest.raises(EvaluationError, match="stage 'sft' holds no point with a loss"):
        write_report(tmp_path / "report.html", replace(full_inputs(), losses={"sft": [{"step": 1}]}))
    loads = {"a": {"layer": [0.5, 0.5]}, "b": {"layer": [1.0]}}
    with pytest.raises(EvaluationError, match="different layers"):
        write_report(tmp_path / "report.html", replace(full_inputs(), family_load=loads))


def test_picked_samples_are_mixed_and_wrong_ones_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fakes.FakeModel()
    monkeypatch.setattr(lmms, "load_checkpoint", lambda pretrained, dtype: (fake, fakes.FakeProcessor()))
    data, checkpoint = fakes.write_records(tmp_path / "data"), fakes.write_checkpoint(tmp_path / "checkpoint")
    tasks = ["local_gqa", "local_mmbench"]
    run.evaluate(checkpoint, data, tasks, tmp_path / "moe")
    run.evaluate(checkpoint, data, tasks, tmp_path / "dense", blank_images=True)
    samples = pick_samples(tmp_path / "moe", tmp_path / "dense", data, count=5)
    families = [sample.family for sample in samples]
    assert families == ["shapes_open", "emoji_kind", "choice", "shapes_open", "emoji_kind"]
    wrong = samples[1]
    assert (wrong.target, wrong.moe_answer, wrong.moe_correct) == ("purple", "WHITE", False)
    assert wrong.dense_answer == "GREY"
    assert wrong.image.getpixel((0, 0)) == fakes.COLOURS["white"]
    assert samples[2].question.startswith("What color is shown? There are several options:\nA. ")
    assert "Answer with" not in samples[2].question
