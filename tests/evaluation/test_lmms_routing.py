"""Routing records: the same at any batch size, every token counted once, kept through a kill, joined from all ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import llava_moe  # noqa: F401  (before anything that may import torchvision)

import torch  # isort: skip

from llava_moe.evaluation import EvaluationError, routing_records
from llava_moe.evaluation.lmms import LlavaMoe
from llava_moe.moe import Routing
from llava_moe.moe.capacity import DROPPED
from tests.evaluation.trained import (
    MOE_PART,
    adapter,
    answers,
    checkpoint,
    documents,
    losses,
    option_requests,
    requests,
)
from tests.tiny_families import write_family_checkpoint

EVERY = {(task, i) for task, splits in documents().items() for i in range(len(splits["test"]))}


def recorded(path: Path, folder: Path, batch_size: int) -> list[dict[str, Any]]:
    lm = adapter(path, batch_size=batch_size, routing=folder)
    answers(lm)
    losses(lm)
    lm.clean()
    routing_records.merge(folder, EVERY)
    assert lm.recorder is not None
    assert not lm.recorder.path.exists()
    return routing_records.read(folder)


@pytest.mark.parametrize(("family", "kind"), [("llava", "moe"), ("llava", "capacity"), ("llava_next", "moe")])
def test_routing_records_do_not_depend_on_the_batch(tmp_path: Path, family: str, kind: str) -> None:
    path = checkpoint(family, kind)
    alone, together = (recorded(path, tmp_path / str(size), size) for size in (1, 8))
    assert len(alone) == len(together) == 18 * 5
    places = {"0", "2", "projector.0"} if kind == "moe" else {"0", "2"}
    for one, other in zip(alone, together, strict=True):
        name = ("task", "doc_id", "option", "tokens")
        assert {key: one[key] for key in name} == {key: other[key] for key in name}
        pictures = documents()[one["task"]]["test"][one["doc_id"]]["pictures"]
        assert set(one["layers"]) == (places if pictures else places - {"projector.0"})
        for place, layer in one["layers"].items():
            same = other["layers"][place]
            for key in ("text", "image", "answer", "dropped"):
                assert layer.get(key) == same.get(key), (one["task"], one["doc_id"], place, key)
            assert layer["entropy"] == pytest.approx(same["entropy"], abs=2e-4)
            assert layer["top_weight"] == pytest.approx(same["top_weight"], abs=2e-4)
    lines = [len(json.dumps(line, separators=(",", ":"))) for line in alone]
    assert max(lines) <= 150 + 3 * (130 + 3 * 4 * 4)  # the bound that the module states: 3 layers, 4 experts
    assert (tmp_path / "1" / routing_records.FILE).stat().st_size < sum(lines) / 4


def test_routing_records_count_the_tokens(tmp_path: Path) -> None:
    lines = recorded(checkpoint("llava", "moe"), tmp_path, 8)
    said = answers(adapter(checkpoint("llava", "moe")))
    of = {
        (r.args[4], r.args[3]): (answer, r.args[1]["max_new_tokens"])
        for r, answer in zip(requests(), said, strict=True)
    }
    for line in lines:
        pictures = documents()[line["task"]]["test"][line["doc_id"]]["pictures"]
        tokens = line["tokens"]
        assert tokens["image"] == 4 * len(pictures)
        for name, layer in line["layers"].items():
            for kind in routing_records.KINDS:
                wanted = 2 * (tokens[kind] if name != "projector.0" else tokens["image"] * (kind == "image"))
                assert sum(layer.get(kind, [])) == wanted, (line, name, kind)
            assert layer["dropped"] == 0
        if line["option"] is not None:
            assert tokens["answer"] >= 2  # a word and the end
            continue
        (_, given, length), limit = of[line["task"], line["doc_id"]]
        assert tokens["text"] + tokens["image"] == given
        assert tokens["answer"] == min(length, limit - 1)
    assert any(line["option"] is None and line["tokens"]["answer"] < 2 for line in lines)  # some end before the others


def test_routing_is_that_of_the_layers(tmp_path: Path) -> None:
    """Loads, entropy and top weight of a prompt against the router's own output, for one question alone."""
    path = checkpoint("llava", "moe")
    lm = adapter(path, routing=tmp_path)
    given = requests({"max_new_tokens": 1})[:1]
    answers(lm, given)
    lm.clean()
    routing_records.merge(tmp_path)
    (line,) = routing_records.read(tmp_path)
    prompt = lm.reader.encode(_question(given[0]))
    entry = lm.vision.encode(prompt.shown.keys, lambda: lm.reader.pictures(_question(given[0])))  # type: ignore[union-attr]
    from llava_moe.evaluation.vision_reuse import encoder_outputs

    with torch.inference_mode():
        routings = lm.model(input_ids=prompt.ids.long()[None], **encoder_outputs(entry)).routings
    is_image = prompt.ids == lm.model.config.image_token_id
    for (_, layer), routing in routings.items():
        found = line["layers"][str(layer)]
        assert found["image"] == routing.load_E(is_image).int().tolist()
        assert found["text"] == routing.load_E(~is_image).int().tolist()
        entropy = -(routing.probs_TE * routing.probs_TE.log()).sum(-1)
        for place, mask in ((0, ~is_image), (1, is_image)):
            assert found["entropy"][place] == pytest.approx(float(entropy[mask].mean()), abs=1e-4)
            top = routing.weight_TK.max(-1).values[mask].mean()
            assert found["top_weight"][place] == pytest.approx(float(top), abs=1e-4)
        assert found["entropy"][2] is None
        assert "answer" not in found


def _question(request: Any) -> Any:
    from llava_moe.evaluation.requests import generations

    return generations([request])[0]


@pytest.mark.parametrize("part", ["projector", "vision"])
def test_experts_outside_of_the_decoder_alone(tmp_path: Path, part: str) -> None:
    """No layer of the decoder has a routing; a question without a picture has a line without layers."""
    path = write_family_checkpoint(tmp_path / "model", "llava", {part: {**MOE_PART, "layers": [0]}})
    found = {}
    for batch_size in (1, 8):
        lines = recorded(path, tmp_path / str(batch_size), batch_size)
        found[batch_size] = [(line["task"], line["doc_id"], line["option"], line["layers"]) for line in lines]
    assert found[1] == found[8]
    shown = [len(documents()[task]["test"][doc_id]["pictures"]) for task, doc_id, *_ in found[1]]
    loads = [sum(layers[f"{part}.0"]["image"]) if layers else 0 for *_, layers in found[1]]
    assert loads == [2 * 4 * number for number in shown]


def test_measure_against_loops() -> None:
    """Empty slots, dropped ones, padding, and a router that uses every expert."""
    generator = torch.Generator().manual_seed(0)
    for slots in (2, 4):
        logits = torch.randn(12, 4, generator=generator)
        index = torch.stack([torch.randperm(4, generator=generator)[:slots] for _ in range(12)])
        dropped = torch.zeros(12, dtype=torch.long)
        if slots == 2:
            index[3, 1], index[7] = 4, 4
            dropped[3], dropped[7] = 1, 2
        weight = torch.rand(12, slots, generator=generator).masked_fill(index == 4, 0.0)
        routing = Routing(logits, logits.softmax(-1), index, weight, {DROPPED: dropped})
        kinds = torch.tensor([3, 0, 1, 1, 2, 2, 3, 3, 1, 0, 0, 2])  # two rows of six
        found = routing_records.measure(routing, kinds, 2)
        assert found.shape == (2, 3, 12)
        for row in range(2):
            for kind in range(3):
                tokens = [t for t in range(6 * row, 6 * row + 6) if kinds[t] == kind]
                for expert in range(4):
                    assert found[row, kind, expert] == sum(int((index[t] == expert).sum()) for t in tokens)
                probs = [routing.probs_TE[t] for t in tokens]
                sums = [float(sum(p[e] for p in probs)) for e in range(4)]
                entropy = sum(-float(sum(x * x.log() for x in p)) for p in probs)
                top, lost = sum(float(weight[t].max()) for t in tokens), sum(int(dropped[t]) for t in tokens)
                wanted = [*sums, len(tokens), entropy, top, lost]
                assert found[row, kind, 4:].tolist() == pytest.approx(wanted, abs=1e-5)
        line = routing_records._layer(found[0])
        loads = [round(float(v), 2) for v in found[0, 1, 4:8]] if slots == 4 else found[0, 1, :4].int().tolist()
        assert line["image"] == loads
        assert line["dropped"] == int(found[0, :, -1].sum())


def test_routing_needs_experts_and_greedy_answers(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no layers with experts"):
        adapter(checkpoint("llava", "dense"), routing=tmp_path)
    lm = adapter(checkpoint("llava", "moe"), routing=tmp_path)
    with pytest.raises(EvaluationError, match=r"task 'one', document 0 .*num_beams > 1; leave it out"):
        answers(lm, requests({"num_beams": 2})[:1])


def killed_run(path: Path, folder: Path, run: str) -> tuple[LlavaMoe, list[Any]]:
    """A run that has answered half of its questions and one option; the adapter that goes on."""
    lm = adapter(path, routing=folder, routing_run=run)
    answers(lm, requests()[:9])
    lm.loglikelihood(option_requests()[1:2])
    assert lm.recorder is not None
    with lm.recorder.path.open("a") as file:
        file.write('{"task": "one", "doc')  # cut by the kill
    return adapter(path, batch_size=8, routing=folder, routing_run="weights and tasks"), requests()


def test_lines_of_a_killed_run_are_kept(tmp_path: Path) -> None:
    path = checkpoint("llava", "moe")
    lm, given = killed_run(path, tmp_path, "weights and tasks")
    assert [lm.is_recorded(request) for request in given] == [True] * 9 + [False] * 9
    assert [lm.is_recorded(request) for request in option_requests()[:4]] == [False, True, False, False]
    answers(lm, given[9:])
    lm.clean()
    asked = {(request.args[4], request.args[3]) for request in given}
    routing_records.merge(tmp_path, asked)
    names = [(line["task"], line["doc_id"], line["option"]) for line in routing_records.read(tmp_path)]
    assert names == sorted({(*name, None) for name in asked} | {("one", 0, 1)}, key=lambda n: (*n[:2], n[2] or -1))


@pytest.mark.parametrize("run", ["other weights", ""])
def test_lines_of_another_run_are_not(tmp_path: Path, run: str) -> None:
    path = checkpoint("llava", "moe")
    stale = tmp_path / "routing.rank3.jsonl"
    stale.write_text(json.dumps({"run": run}) + "\n")
    lm, given = killed_run(path, tmp_path, run)
    assert not any(lm.is_recorded(request) for request in given)
    assert not stale.exists()
    answers(lm, given[9:])
    lm.clean()
    with pytest.raises(EvaluationError, match=r"9 questions have no routing record, the first is document \d"):
        routing_records.merge(tmp_path, {(request.args[4], request.args[3]) for request in given})


def test_ranks_are_joined_without_repetitions(tmp_path: Path) -> None:
    path, given = checkpoint("llava", "moe"), requests()
    model = LlavaMoe(pretrained=str(path), device="cpu").model
    for rank in (0, 1):
        lm = adapter(path, batch_size=4)
        lm.recorder = routing_records.RoutingRecorder(model, tmp_path, rank, 2, "run")
        lm.answerer.recorder, lm.answerer.model, lm.answerer.vision.model = lm.recorder, model, model
        lm.answerer.vision.summarise = routing_records.measure_pictures
        answers(lm, given[rank::2] + given[:1])  # a padded rank answers one again
        lm.clean()
    routing_records.merge(tmp_path, {(request.args[4], request.args[3]) for request in given})
    joined = routing_records.read(tmp_path)
    alone = tmp_path / "alone"
    lm = adapter(path, routing=alone)
    answers(lm)
    lm.clean()
    routing_records.merge(alone)
    assert [line["tokens"] for line in joined] == [line["tokens"] for line in routing_records.read(alone)]
    assert len(joined) == 18


def test_foreign_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "routing.rank0.jsonl").write_text("{}\n")
    with pytest.raises(EvaluationError, match=r"routing\.rank0\.jsonl: no routing records of this program"):
        adapter(checkpoint("llava", "moe"), routing=tmp_path)
