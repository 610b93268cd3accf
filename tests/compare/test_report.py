"""Conclusions say what the tests found and no more; the report holds them, bold only where shown."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from llava_moe.compare import conclusions, figures, report_tables
from llava_moe.compare.answers import Answers
from llava_moe.compare.conclusions import conclude
from llava_moe.compare.report import HTML, JSON, MARKDOWN, MethodFacts, ReportInputs, write_report
from llava_moe.compare.stats import Analysis, Difference, analyse
from llava_moe.compare.variance import Part
from llava_moe.evaluation import EvaluationError
from tests.compare import simulate, synthetic


@pytest.fixture(scope="module")
def inputs() -> ReportInputs:
    return synthetic.inputs()


@pytest.fixture(scope="module")
def folder(inputs: ReportInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("report")
    write_report(where, inputs)
    return where


def difference(value: float, half: float, p_holm: float, a: str = "m", seeds: int = 3) -> Difference:
    parts = (Part(0.0, 4), Part((half / 2) ** 2, 400))
    interval = (value - half, value + half)
    return Difference(a, "dense", value, interval, 0.001, parts, 0.0, seeds, 2, p_holm=p_holm, detectable=0.019)


def texts(analysis: Analysis, kind: str) -> list[str]:
    return [sentence.text for sentence in conclude(analysis) if sentence.kind == kind]


# --- numbers in words --------------------


def test_numbers_are_written_plainly() -> None:
    assert [conclusions.points(v) for v in (0.0214, -0.0214, 0.0002, -0.0004)] == ["+2.1", "-2.1", "0.0", "0.0"]
    assert conclusions.interval((0.004, 0.0381)) == "[0.4, 3.8]"
    assert [conclusions.p_value(p) for p in (0.0004, 0.0312, 1.0)] == ["< .001", "= .031", "= 1"]
    assert [conclusions.names(n) for n in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def test_a_shown_difference_is_a_sentence_with_its_numbers(inputs: ReportInputs) -> None:
    overall = replace(inputs.analysis.overall, to_dense=(difference(0.021, 0.017, 0.011),), to_random=(), pairs=())
    shown = texts(replace(inputs.analysis, overall=overall, tasks=inputs.analysis.tasks[:1]), "shown")
    assert shown == ["m is better than the dense control on gqa (+2.1 points [0.4, 3.8], p = .011 after Holm)."]


def test_what_could_not_be_seen_is_said(inputs: ReportInputs) -> None:
    found = (difference(0.01, 0.02, 0.6, "a"), difference(0.02, 0.015, 0.07, "b"))
    overall = replace(inputs.analysis.overall, to_dense=found, to_random=(), pairs=())
    analysis = replace(inputs.analysis, overall=overall, tasks=inputs.analysis.tasks[:1])
    assert texts(analysis, "shown") == []
    opened = texts(analysis, "open")
    assert opened[0] == (
        "No difference from the dense control is shown on gqa for a and b; one under 1.9 points could not have been "
        "seen reliably (80 % power)."
    )
    # leaves out 0 alone, and is no finding after the correction
    assert opened[1].startswith(
        "b against the dense control on gqa: +2.0 points [0.5, 3.5] leaves out 0 on its own, but"
    )
    assert opened[1].endswith("over 2 comparisons: not a finding.")


# --- from simulated answers --------------------


def test_planted_effects_become_conclusions_and_nothing_else_does(inputs: ReportInputs) -> None:
    shown = texts(inputs.analysis, "shown")
    assert any(s.startswith("sigmoid_bias is better than the dense control on the mean over tasks") for s in shown)
    assert any(s.startswith("noisy is worse than the dense control on the mean over tasks") for s in shown)
    true = dict(zip(synthetic.NAMES, synthetic.TRUE, strict=True)) | {
        "the dense control": synthetic.TRUE[0],
        "the random router": synthetic.TRUE[1],
    }
    for sentence in shown:
        found = re.match(r"(\w+) is (better|worse) than (.+) on ", sentence)
        assert found, sentence
        assert (true[found[1]] > true[found[3]]) == (found[2] == "better"), sentence
        assert true[found[1]] != true[found[3]], sentence
    assert len(shown) == len(set(shown))


def test_equal_methods_get_no_conclusion() -> None:
    rng = np.random.default_rng(1)
    drawn = simulate.answers(rng, [0.6] * 5, 3, 200)
    analysis = analyse([drawn], "dense", "random")
    assert texts(analysis, "shown") == []
    assert "The methods cannot be ranked on task: every one may be the best." in texts(analysis, "open")
    assert any(s.startswith("3 seeds are few") for s in texts(analysis, "limit"))


def test_with_one_seed_nothing_is_claimed_however_large() -> None:
    rng = np.random.default_rng(1)
    analysis = analyse([simulate.answers(rng, [0.3, 0.3, 0.9], 1, 300)], "dense", "random")
    assert analysis.overall.to_dense[0].p_holm < 1e-6
    assert texts(analysis, "shown") == []
    assert texts(analysis, "open")[0] == "One seed: no claim about m2 and random against the dense control on task."
    assert any(s.startswith("There is one seed") for s in texts(analysis, "limit"))


def test_seed_and_question_variance_are_told_apart() -> None:
    rng = np.random.default_rng(2)
    noisy_seeds = analyse([simulate.answers(rng, [0.6] * 5, 3, 2000, seed_sd=0.4)], "dense", None)
    few_questions = analyse([simulate.answers(rng, [0.6] * 5, 6, 60, seed_sd=0.0)], "dense", None)
    assert any("more seeds would narrow the intervals" in s for s in texts(noisy_seeds, "limit"))
    assert any("more questions would narrow the intervals" in s for s in texts(few_questions, "limit"))
    assert not any("seeds are few" in s for s in texts(few_questions, "limit"))


def test_failed_cells_are_limits(inputs: ReportInputs) -> None:
    limits = [s.text for s in conclude(inputs.analysis, {"remoe": [1], "top_k": []}) if s.kind == "limit"]
    assert "remoe failed with seed 1: what stands here is of its other seeds, where it has any." in limits
    assert not any(s.startswith("top_k") for s in limits)


def test_methods_without_common_seeds_or_answers_are_named() -> None:
    rng = np.random.default_rng(3)
    drawn = simulate.answers(rng, [0.6] * 4, 4, 100)
    drawn.scores_MSQ[0, 2:] = np.nan
    drawn.scores_MSQ[2, :2] = np.nan
    drawn.scores_MSQ[3] = np.nan
    limits = texts(analyse([drawn], "dense", "random"), "limit")
    assert "m2 has no seed in common with the dense control: they are not compared." in limits
    assert any(s.startswith("No cell of m3 has answers") for s in limits)


# --- the files --------------------


class _Page(HTMLParser):
    """Checks that tags close in order, and collects what would be fetched, what is bold and what each table holds."""

    VOID = frozenset({"meta", "br", "img", "link", "use", "path", "rect", "circle"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.bold: list[str] = []
        self.figures: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "link", "img", "iframe") or (values.get("src") or "").startswith("http"):
            self.fetched.append(tag)
        if tag == "svg":
            self.figures.append(values.get("aria-label") or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass  # opens nothing

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "strong" in self.open:
            self.bold.append(data)


def bold_by_rule(inputs: ReportInputs) -> list[str]:
    analysis = inputs.analysis
    found = [*analysis.overall.to_dense, *analysis.overall.to_random, *analysis.overall.pairs]
    found += [one for task in analysis.tasks for one in task.to_dense]
    return [conclusions.points(one.value) for one in found if one.shown]


def test_the_page_is_whole_and_fetches_nothing(folder: Path, inputs: ReportInputs) -> None:
    page = _Page()
    text = (folder / HTML).read_text(encoding="utf-8")
    page.feed(text)
    assert page.open == []
    assert page.fetched == []
    assert len(page.figures) == 10  # scores, 2 differences, 3 costs, 2 of balance, 2 curves
    assert all(page.figures)
    assert "Traceback: &lt;lambda&gt; &amp; more" in text
    assert "Undefined" not in text
    for failure in inputs.failures:
        assert failure.method in text


def test_bold_is_what_the_corrected_tests_show(folder: Path, inputs: ReportInputs) -> None:
    page = _Page()
    page.feed((folder / HTML).read_text(encoding="utf-8"))
    by_task = {
        conclusions.points(task.scores[one.a].value, ""): one
        for task in inputs.analysis.tasks
        for one in task.to_dense
        if one.shown
    }
    expected = [
        value for value in bold_by_rule(inputs) if value not in {conclusions.points(o.value) for o in by_task.values()}
    ]
    assert set(expected) | set(by_task) <= set(page.bold)
    assert len(page.bold) == len(bold_by_rule(inputs))
    markdown = (folder / MARKDOWN).read_text(encoding="utf-8")
    assert len(re.findall(r"\*\*[^*]+\*\*", markdown)) == len(page.bold) > 2


def test_no_bold_where_an_interval_holds_zero(inputs: ReportInputs) -> None:
    for table in report_tables.all_tables(inputs).values():
        for cell in (cell for row in table.rows for cell in row if cell.bold):
            low, high = map(float, re.findall(r"-?\d+\.\d", cell.small)[-2:])
            assert low > 0 or high < 0
    crossing = difference(0.01, 0.02, p_holm=0.001)
    assert not crossing.shown
    assert not replace(crossing, interval=(0.001, 0.02), p_holm=0.06).shown
    assert not replace(crossing, interval=(0.001, 0.02), num_seeds=1).shown
    assert replace(crossing, interval=(0.001, 0.02)).shown


def test_markdown_holds_the_same_tables(folder: Path, inputs: ReportInputs) -> None:
    text = (folder / MARKDOWN).read_text(encoding="utf-8")
    tables = report_tables.all_tables(inputs)
    assert set(tables) == {"main", "tasks", "costs", "stability", "pairs", "seeds"}
    for table in tables.values():
        start = text.index(f"## {table.title}\n")
        lines = [line for line in text[start:].split("\n\n")[1].splitlines() if line]
        assert len(lines) == len(table.rows) + 2, table.name
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert columns == {len(table.head) + 1}, table.name
    for sentence in conclude(inputs.analysis, {"remoe": [1]}):
        assert f"- {sentence.text}" in text
    assert "not matched" in text
    assert "sigmoid\\_bias" in text


def test_numbers_are_saved(folder: Path, inputs: ReportInputs) -> None:
    saved = json.loads((folder / JSON).read_text(encoding="utf-8"))
    score = saved["analysis"]["overall"]["scores"]["sigmoid_bias"]
    assert score["value"] == pytest.approx(inputs.analysis.overall.scores["sigmoid_bias"].value)
    assert list(saved["analysis"]["overall"]["scores"]["remoe"]["by_seed"]) == ["0", "2"]
    one = saved["analysis"]["overall"]["to_dense"][0]
    assert one["variance"]["questions"]["variance"] > 0
    assert saved["failures"][0]["log"].startswith("loss is nan")


def test_a_report_without_facts_of_training_still_stands(tmp_path: Path, inputs: ReportInputs) -> None:
    bare = ReportInputs("bare", inputs.analysis, {name: MethodFacts() for name in inputs.methods})
    write_report(tmp_path, bare)
    page = _Page()
    page.feed((tmp_path / HTML).read_text(encoding="utf-8"))
    assert len(page.figures) == 3
    assert set(report_tables.all_tables(bare)) == {"main", "tasks", "pairs", "seeds"}


def test_stability_and_brittleness_by_hand(inputs: ReportInputs) -> None:
    facts = MethodFacts(
        checkpoints={0: [(1, 0.5), (2, 0.54)], 1: [(1, 0.6), (2, 0.6)]}, without_top={0: (0.6, 0.5), 1: (0.5, 0.5)}
    )
    made = report_tables.all_tables(replace(inputs, methods=dict(inputs.methods) | {"top_k": facts}))["stability"]
    row = next(row for row in made.rows if row[0].text == "top_k")
    # variances 0.0008 and 0: root of the mean 0.02
    assert [cell.text for cell in row[1:]] == ["2.0", "2", "55.0", "50.0", "-5.0"]
    assert row[-1].small == "-10.0, 0.0"


def test_missing_facts_and_curves_that_never_meet_are_refused(tmp_path: Path, inputs: ReportInputs) -> None:
    with pytest.raises(EvaluationError, match="no facts of sigmoid_bias, "):
        write_report(tmp_path, replace(inputs, methods={}))
    apart = MethodFacts(losses={0: [(1, 0.5)], 1: [(2, 0.5)]})
    with pytest.raises(EvaluationError, match="losses of 'top_k' share no step between seeds 0, 1"):
        write_report(tmp_path, replace(inputs, methods=dict(inputs.methods) | {"top_k": apart}))
    assert list(tmp_path.iterdir()) == []


def test_pareto_front_by_hand() -> None:
    points = [(1.0, 50.0), (2.0, 49.0), (2.0, 60.0), (3.0, 60.0), (4.0, 61.0)]
    assert figures._front(points) == [(1.0, 50.0), (2.0, 60.0), (4.0, 61.0)]


def test_a_method_that_failed_on_one_task_is_in_the_table_of_tasks(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    first, second = (simulate.answers(rng, [0.6, 0.6, 0.7], 3, 100, task=task) for task in ("a", "b"))
    second.scores_MSQ[2] = np.nan
    analysis = analyse([first, second], "dense", "random")
    write_report(tmp_path, ReportInputs("holes", analysis, {name: MethodFacts() for name in first.methods}))
    text = (tmp_path / MARKDOWN).read_text(encoding="utf-8")
    assert re.search(r"^\| m2 \| [^|]+ \| failed \|", text, re.MULTILINE)
    assert "No cell of m2 has answers to all tasks" in text


def test_methods_of_one_cost_stand_side_by_side() -> None:
    assert figures._side_by_side([1.0, 5.0, 1.01, 1.0]) == [-7.0, 0.0, 7.0, 0.0]
    assert figures._side_by_side([2.0, 2.0]) == [-3.5, 3.5]
    assert figures._side_by_side([2.0]) == [0.0]


def test_one_task_needs_no_second_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    drawn = simulate.answers(rng, [0.5, 0.5, 0.6], 2, 100)
    answers = Answers("pope", drawn.methods, drawn.seeds, drawn.questions, drawn.scores_MSQ)
    analysis = analyse([answers], "dense", None)
    write_report(tmp_path, ReportInputs("one", analysis, {name: MethodFacts() for name in drawn.methods}))
    text = (tmp_path / MARKDOWN).read_text(encoding="utf-8")
    assert "## Scores on pope" in text
    assert "By task" not in text
    assert "above random" not in text
