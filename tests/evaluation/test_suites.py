"""Suites and the catalogue against the task files of the installed lmms-eval; limits; the scorers of our own tasks."""

from __future__ import annotations

import re
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_moe.evaluation import EvaluationError
from llava_moe.evaluation.suites import BENCHMARKS, SUITES, check_limit, expand, score_of
from llava_moe.evaluation.tasks import LOCAL_TASKS, TASKS_FOLDER, scorers

OFFICIAL = [name for name in BENCHMARKS.names() if name not in LOCAL_TASKS]


class _Loader(yaml.SafeLoader):
    """Reads `!function x` as text."""


_Loader.add_constructor("!function", lambda loader, node: f"!function {node.value}")


def _read(path: Path) -> dict[str, Any]:
    """A task file over what it includes, as lmms-eval merges them."""
    config: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    included = config.pop("include", None)
    return {**(_read(path.parent / included) if included else {}), **config}


@pytest.fixture(scope="module")
def task_files() -> dict[str, Path]:
    """The file of each task of the catalogue: ours, or lmms-eval's (found by text, its own index takes ten seconds)."""
    spec = util.find_spec("lmms_eval")
    assert spec is not None
    assert spec.origin is not None
    found: dict[str, Path] = {}
    for folder in (Path(spec.origin).parent / "tasks", TASKS_FOLDER):
        for path in sorted(folder.rglob("*.yaml")):
            name = re.search(r"^task: *[\"']?([\w.-]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
            if name and name[1] in OFFICIAL:
                assert name[1] not in found, f"{name[1]}: {path} and {found[name[1]]}; lmms-eval's would win silently"
                found[name[1]] = path
    return found


@pytest.mark.parametrize("name", OFFICIAL)
def test_catalogue_agrees_with_the_task_files(task_files: dict[str, Path], name: str) -> None:
    benchmark, config = BENCHMARKS.get(name), _read(task_files[name])
    questions = benchmark.sources[0]
    assert (config["dataset_path"], config.get("dataset_name"), config["test_split"]) == (
        questions.repo,
        questions.config,
        questions.split,
    )
    named = [metric["metric"] for metric in config["metric_list"]]
    assert set(benchmark.metrics) <= set(named)
    prompt = (config.get("lmms_eval_specific_kwargs") or {}).get("default", {})
    assert bool(prompt.get("ocr", False)) is bool(benchmark.ocr)


def test_own_tasks_differ_from_the_official_ones_only_where_they_say(task_files: dict[str, Path]) -> None:
    def differing(ours: str, official: str) -> set[str]:
        a, b = _read(task_files[ours]), _read(task_files[official])
        ignored = {"task", "dataset_kwargs", "metadata", "tag", "model_specific_generation_kwargs", "metric_list"}
        return {
            key
            for key in (a.keys() | b.keys()) - ignored
            if not key.startswith(("doc_to", "process")) and a.get(key) != b.get(key)
        }

    assert differing("textvqa_val_ocr", "textvqa_val") == {
        "lmms_eval_specific_kwargs"
    }  # ocr, and other models' prompts
    assert differing("pope_first_sentence", "pope") == {"lmms_eval_specific_kwargs"}  # other models' prompts
    for ours, official in (("textvqa_val_ocr", "textvqa_val"), ("pope_first_sentence", "pope")):
        a, b = (_read(task_files[name])["lmms_eval_specific_kwargs"]["default"] for name in (ours, official))
        assert {**a, "ocr": None} == {**b, "ocr": None}
    assert _read(task_files["textvqa_val_ocr"])["lmms_eval_specific_kwargs"]["default"]["ocr"] is True
    assert differing("hallusion_bench_rules", "hallusion_bench_image") <= {"generation_kwargs"}  # written out


def test_suites_hold_what_they_promise() -> None:
    assert SUITES.names() == ["core", "libmoe12", "libmoe16", "llava15", "judge", "quickstart"]
    for suite in SUITES.names():
        tasks = SUITES.get(suite).tasks
        assert len(set(tasks)) == len(tasks)
        assert all(task in BENCHMARKS for task in tasks), suite
    count = {suite: len(SUITES.get(suite).tasks) for suite in SUITES.names()}
    assert (count["libmoe12"], count["libmoe16"], count["llava15"]) == (12, 16, 12)
    assert {"textvqa_val", "textvqa_val_ocr", "mmmu_val", "mme"} <= set(SUITES.get("core").tasks)
    assert all(BENCHMARKS.get(task).judge == "none" for task in SUITES.get("core").tasks)
    assert all(BENCHMARKS.get(task).judge != "none" for task in SUITES.get("judge").tasks)


def test_names_of_suites_and_tasks_expand_once_each() -> None:
    assert expand(["quickstart", "local_gqa", "gqa"]) == [*LOCAL_TASKS.names(), "gqa"]
    assert expand(["docvqa_val"]) == ["docvqa_val"]  # not in the catalogue; lmms-eval's index decides later
    with pytest.raises(EvaluationError, match="unknown suite or task 'libmoe_12'; did you mean 'libmoe12'"):
        expand(["libmoe_12"], known=["docvqa_val"])
    with pytest.raises(EvaluationError, match="did you mean 'docvqa_val'"):
        expand(["docvqa_vall"], known=["docvqa_val"])
    with pytest.raises(EvaluationError, match="no task given; suites are core"):
        expand([])
    without = expand(["libmoe12", "-mathvista_testmini_format", "gqa"])
    assert without == [name for name in SUITES.get("libmoe12").tasks if name != "mathvista_testmini_format"]
    assert not {"mmvet", "llava_in_the_wild"} & set(expand(["llava15", "-judge"]))
    with pytest.raises(EvaluationError, match=r"-pope leaves out what is not there \(gqa\)"):
        expand(["gqa", "-pope"])


def test_limits_that_spoil_a_score_are_refused() -> None:
    check_limit(["mme", "gqa"], 4)
    check_limit(["ocrbench"], None)
    with pytest.raises(EvaluationError, match=r"limit 5 splits .* 'mme' .* for example 6"):
        check_limit(["gqa", "mme"], 5)
    with pytest.raises(EvaluationError, match="'ocrbench' divides"):
        check_limit(["ocrbench"], 4)
    with pytest.raises(EvaluationError, match="from 1 on, not 0"):
        check_limit(["gqa"], 0)


def test_score_is_the_sum_of_its_metrics_and_a_missing_one_is_named() -> None:
    mme = BENCHMARKS.get("mme")
    assert score_of(mme, {"mme_perception_score": 1500.0, "mme_cognition_score": 300.0}) == 1800.0
    with pytest.raises(EvaluationError, match="'mme': the scorer returned mme_perception_score, but not mme_cognition"):
        score_of(mme, {"mme_perception_score": 1500.0})


def test_credits_of_single_answers() -> None:
    def credit(name: str, sample: dict[str, Any]) -> float | None:
        judge = BENCHMARKS.get(name).credit
        assert judge is not None
        return judge(sample)

    assert credit("textvqa_val", {"exact_match": 0.6}) == 0.6
    assert credit("mme", {"mme_cognition_score": {"score": 1.0}}) == 1.0
    assert credit("mme", {"mme_perception_score": {"score": 0.0}}) == 0.0
    assert credit("seedbench", {"seed_all": {"pred": "a", "answer": "A"}}) == 1.0
    vista = {"filtered_resps": ["(B) two"], "llm_as_judge_eval": {"true_false": True, "extraction": ""}}
    assert credit("mathvista_testmini_format", vista) == 1.0
    unjudged = BENCHMARKS.get("mathvista_testmini_format").unjudged
    assert unjudged is not None
    assert unjudged(vista)  # the judge extracted nothing, and the nearest string happened to be right
    assert not unjudged({**vista, "filtered_resps": [""]})  # there was nothing to extract from
    row = {"id": "validation_Art_1", "question_type": "multiple-choice", "answer": "B", "parsed_pred": ["B"]}
    assert credit("mmmu_val", {"mmmu_acc": row}) == 1.0
    assert credit("mmmu_val", {"mmmu_acc": {**row, "parsed_pred": ["A"]}}) == 0.0
    rotated = {"index": 10**6 + 3, "answer": "A", "prediction": "A", "A": "x", "B": "y", "C": "nan", "D": "nan"}
    assert credit("mmbench_en_dev_static", {"gpt_eval_score": rotated}) is None
    assert credit("mmbench_en_dev_static", {"gpt_eval_score": {**rotated, "index": 3}}) == 1.0
    assert credit("mmbench_en_dev_static", {"gpt_eval_score": {**rotated, "index": 3, "prediction": "B"}}) == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("No", "no"),
        ("no, there is none", "no"),
        ("Yes.", "yes"),
        ("There is not a dog. Yes.", "no"),
        ("Yes, there is. Not a cat.", "yes"),
        ("", "yes"),  # LLaVA's rule: whatever holds no negation
        ("Nothing", "yes"),
    ],
)
def test_first_sentence_rule_of_pope(text: str, answer: str) -> None:
    assert scorers.first_sentence_answer(text) == answer


def test_pope_yes_ratio_counts_the_answers() -> None:
    rows = [
        scorers.pope_process_results({"question_id": i, "answer": "no"}, [text])["pope_accuracy"]
        for i, text in enumerate(["Yes.", "No, none.", "yes", "no"])
    ]
    assert [row["score"] for row in rows] == [0.0, 1.0, 0.0, 1.0]
    assert scorers.answer_yes_ratio(rows) == 0.5
    with pytest.raises(ValueError, match="must be yes or no"):
        scorers.pope_process_results({"question_id": 1, "answer": "maybe"}, ["yes"])


def test_hallusion_rules() -> None:
    def row(truth: str, text: str, figure: str, question: str) -> dict[str, Any]:
        place = {"category": "VD", "subcategory": "chart", "set_id": "0", "figure_id": figure, "question_id": question}
        return scorers.hallusion_process_results({"gt_answer": truth, "question": "?", **place}, [text])["aAcc"]

    rows = [
        row("1", "Yes, it is.", "0", "0"),
        row("0", "No.", "1", "0"),
        row("1", "Notably, yes", "0", "1"),  # "Notably" holds no word no
        row("0", "I cannot tell", "1", "1"),  # neither: wrong whatever the reference is
    ]
    assert [r["score"] for r in rows] == [1.0, 1.0, 1.0, 0.0]
    assert scorers.hallusion_all(rows) == 75.0
    assert scorers.hallusion_by_question(rows) == 50.0
    assert scorers.hallusion_by_figure(rows) == 50.0
    with pytest.raises(ValueError, match="must be 0 or 1"):
        row("2", "Yes", "0", "0")
