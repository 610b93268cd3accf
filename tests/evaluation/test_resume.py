"""The journal of answers: nothing is asked twice, nothing is taken from other weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_moe.evaluation import EvaluationError, resume

SETTINGS = {"weights": "w1", "dtype": "float32", "blank_images": False}
HASHES = {"gqa": "g1", "pope": "p1"}


class Request:
    def __init__(self, doc_id: int, task: str = "gqa", second: Any = None, context: str = "") -> None:
        settings = {"max_new_tokens": 16} if second is None else second
        self.args = (context or f"question {doc_id}", settings, lambda doc: [], doc_id, task, "test")


class Adapter:
    """Answers with the prompt and the task, two at a time in reverse order, and counts."""

    batch_size = 2

    def __init__(self) -> None:
        self.on_answers: Any = None
        self.unrecorded: set[int] = set()
        self.asked: list[tuple[str, int]] = []
        self.task_dict = {task: {"test": [{"target": f"t{i}"} for i in range(40)]} for task in HASHES}
        self.fail_after = 10**9

    def _answer(self, requests: list[Request], text: Any) -> list[Any]:
        from lmms_eval.api.instance import GenerationResult, TokenCounts

        found: dict[int, Any] = {}
        for start in range(0, len(requests), self.batch_size):
            places = range(len(requests))[::-1][start : start + self.batch_size]
            if len(self.asked) + len(places) > self.fail_after:
                raise RuntimeError("killed")
            batch = [requests[place] for place in places]
            self.asked.extend((request.args[4], request.args[3]) for request in batch)
            answers = [GenerationResult(text(one), TokenCounts(input_tokens=3, output_tokens=1)) for one in batch]
            self.on_answers(batch, answers)
            found |= dict(zip(places, answers, strict=True))
        return [found[place] for place in range(len(requests))]

    def is_recorded(self, request: Request) -> bool:
        return request.args[3] not in self.unrecorded

    def generate_until(self, requests: list[Request]) -> list[Any]:
        return self._answer(requests, lambda request: f"{request.args[4]}: {request.args[0]} é\u2028\n")

    def loglikelihood(self, requests: list[Request]) -> list[Any]:
        return self._answer(requests, lambda request: (0.5 + request.args[3], request.args[3] == 0))


def run(
    folder: Path, requests: list[Request], method: str = "generate_until", rank: int = 0, **changes: Any
) -> tuple[list[Any], Adapter, resume.Journal]:
    adapter = Adapter()
    adapter.fail_after = changes.pop("fail_after", 10**9)
    adapter.unrecorded = changes.pop("unrecorded", set())
    journal = resume.Journal(folder, rank, SETTINGS | changes.pop("settings", {}), HASHES | changes.pop("hashes", {}))
    resume.attach(adapter, journal)
    try:
        return getattr(adapter, method)(requests), adapter, journal
    finally:
        journal.close()


def test_answers_are_taken_from_the_journal_in_order(tmp_path: Path) -> None:
    requests = [Request(i) for i in range(5)] + [Request(i, "pope") for i in range(3)]
    first, adapter, journal = run(tmp_path, requests)
    assert (len(adapter.asked), journal.answered, journal.reused) == (8, 8, 0)
    again, adapter, journal = run(tmp_path, [*requests[::-1], Request(9)])
    assert (adapter.asked, journal.answered, journal.reused) == ([("gqa", 9)], 1, 8)
    assert again[:8] == first[::-1]
    assert again[0].text == "pope: question 2 é\u2028\n"
    assert again[0].token_counts.output_tokens == 1


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"weights": "w2"}},
        {"settings": {"dtype": "bfloat16"}},
        {"settings": {"blank_images": True}},
        {"hashes": {"gqa": "g2"}},
    ],
)
def test_nothing_is_taken_from_other_weights_settings_or_data(tmp_path: Path, change: dict[str, Any]) -> None:
    requests = [Request(i) for i in range(3)]
    run(tmp_path, requests)
    _, adapter, _ = run(tmp_path, requests, **{key: dict(value) for key, value in change.items()})
    assert len(adapter.asked) == 3
    _, adapter, _ = run(tmp_path, requests)  # the old answers are still there, under their own keys
    assert adapter.asked == []


def test_prompt_generation_settings_and_method_are_part_of_the_key(tmp_path: Path) -> None:
    run(tmp_path, [Request(0)])
    for other in (Request(0, context="question 0, with OCR tokens"), Request(0, second={"max_new_tokens": 17})):
        _, adapter, _ = run(tmp_path, [other])
        assert len(adapter.asked) == 1
    _, adapter, _ = run(tmp_path, [Request(0, second="yes")], method="loglikelihood")
    assert len(adapter.asked) == 1


def test_loglikelihood_pairs_survive_and_continuations_may_be_functions(tmp_path: Path) -> None:
    from lmms_eval.api.instance import unwrap_generation_output

    requests = [Request(i, second=lambda doc: doc["target"]) for i in range(2)]
    first, _, _ = run(tmp_path, requests, method="loglikelihood")
    again, adapter, _ = run(tmp_path, requests, method="loglikelihood")
    assert adapter.asked == []
    assert [unwrap_generation_output(result)[0] for result in again] == [(0.5, True), (1.5, False)]
    assert again == first
    other = [Request(i, second=lambda doc: doc["target"] + "!") for i in range(2)]
    assert len(run(tmp_path, other, method="loglikelihood")[1].asked) == 2


def test_equal_requests_are_answered_each(tmp_path: Path) -> None:
    requests = [Request(0, second={"do_sample": True, "temperature": 1.0})] * 3
    assert len(run(tmp_path, requests)[1].asked) == 3
    assert len(run(tmp_path, requests + requests[:1])[1].asked) == 1


def test_an_answer_without_its_routing_line_is_asked_again(tmp_path: Path) -> None:
    requests = [Request(i) for i in range(4)]
    run(tmp_path, requests)
    _, adapter, journal = run(tmp_path, requests, unrecorded={2})
    assert adapter.asked == [("gqa", 2)]
    assert journal.reused == 3


def test_a_crash_keeps_the_batches_that_were_answered(tmp_path: Path) -> None:
    requests = [Request(i) for i in range(40)]
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, requests, fail_after=35)
    kept = 34  # whole batches
    results, adapter, journal = run(tmp_path, requests)
    assert (journal.reused, len(adapter.asked)) == (kept, 40 - kept)
    assert [result.text for result in results] == [f"gqa: question {i} é\u2028\n" for i in range(40)]


def test_a_cut_line_is_answered_again_and_other_ranks_are_read(tmp_path: Path) -> None:
    requests = [Request(i) for i in range(4)]
    run(tmp_path, requests[:2], rank=0)
    run(tmp_path, requests[2:], rank=1)
    for rank in (0, 1):
        path = tmp_path / resume.FOLDER / f"rank{rank}.jsonl"
        path.write_bytes(path.read_bytes()[:-7])  # the second line of each lost its end
    _, adapter, journal = run(tmp_path, requests, rank=0)
    assert (journal.reused, adapter.asked) == (2, [("gqa", 2), ("gqa", 0)])
    lines = (tmp_path / resume.FOLDER / "rank0.jsonl").read_text().splitlines()
    assert [json.loads(line)["doc_id"] for line in lines] == [1, 2, 0]  # the cut line is gone, not glued to the next
    assert run(tmp_path, requests, rank=0)[1].asked == []


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    run(tmp_path, [Request(0)])
    path = tmp_path / resume.FOLDER / "rank0.jsonl"
    path.write_text(path.read_text() + "[1]\n")
    with pytest.raises(EvaluationError, match=r"rank0\.jsonl, line 2, is no recorded answer.*delete the file"):
        run(tmp_path, [Request(0)])
