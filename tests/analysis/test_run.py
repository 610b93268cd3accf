"""`llava-moe analyze run`: pages of finished, unfinished, dense and old runs, and of several at once."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llava_moe import cli
from llava_moe.analysis import ANALYSES, Analysis, AnalysisError, curves, maps
from llava_moe.analysis.numbers import as_markdown, summarise
from llava_moe.analysis.records import read_runs
from llava_moe.analysis.run import analyze
from llava_moe.training import runner
from tests.analysis.logs import ALARM, old, rows, write_run
from tests.tiny import write_llava_json
from tests.training.runs import MOE_PARTS, make_config


class _Page(HTMLParser):
    """Headings, labels of the figures, and what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.figures: list[str] = []
        self.fetched: list[str] = []
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self._inside = tag
        if tag == "svg":
            self.figures.append(str(found["aria-label"]))
        links = [str(found.get(key)) for key in ("href", "src", "xlink:href") if found.get(key)]
        self.fetched += [link for link in links if not link.startswith(("#", "data:"))]
        self.fetched += [tag] if tag in ("script", "link", "iframe") else []

    def handle_data(self, data: str) -> None:
        if self._inside in ("h1", "h2", "h3") and data.strip():
            self.headings.append(data)


def page_of(path: Path) -> _Page:
    text = path.read_text()
    defined = [i for i in re.findall(r'\sid="([^"]+)"', text) if f"#{i}" in text]
    assert len(defined) == len(set(defined)), "two figures share an id that is referred to"
    found = _Page(text)
    assert found.fetched == []
    return found


def has(page: _Page, *starts: str) -> None:
    for start in starts:
        assert any(label.startswith(start) for label in page.figures), start


def test_a_sparse_run_beside_its_dense_control(tmp_path: Path) -> None:
    log = rows()
    log[-1]["alarms"] = [ALARM]
    sparse, dense = write_run(tmp_path / "moe", log), write_run(tmp_path / "control", rows(sites=()))
    page = page_of(analyze([sparse, dense], tmp_path / "out"))
    has(page, "loss, as minimised: moe from", "cross-entropy: moe from", "switch loss: moe", "norm of the gradient")
    assert all("control from" in label for label in page.figures if label.startswith(("loss", "cross-entropy")))
    has(page, "seconds per step", "tokens per second", "waiting for data", "peak memory", "local gqa accuracy")
    has(page, "learning rate, moe: projector from 0.000975", "learning rate, control")
    has(page, "largest violation", "entropy of the router over ln E: layer 0", "dead experts: layer 0", "drop rate")
    has(page, "switch loss, by layer: layer 0 from 1 to 1; layer 2 from 1.02 to 1.02")
    for site in (0, 2, 4):
        has(page, f"Load of the experts of layer {site} over", f"Slots of each expert of layer {site}")
    assert "Routing of moe" in page.headings
    assert not any("control" in heading for heading in page.headings[1:])
    assert "model FLOPs utilisation" not in str(page.figures)  # null in every row
    assert "experts of a token" not in str(page.figures)  # two, always
    text = (tmp_path / "out" / "index.html").read_text()
    assert (
        "imbalance in layer 2: largest violation 0.9 (limit 0.85) at step 400. Advice: raise balance.losses.switch"
        in text
    )
    assert "control: no routing in the log" in text


def test_the_numbers(tmp_path: Path) -> None:
    log = rows()
    log[10]["alarms"] = [ALARM]
    log[30]["alarms"] = [{**ALARM, "value": 0.95}]
    found = summarise(read_runs([write_run(tmp_path / "moe", log)])[0])
    assert json.loads(json.dumps(found)) == found
    last = log[-4:]  # a tenth of 40
    assert (found["stage"], found["last_step"], found["rows"]) == ("moe-stage", 400, 40)
    assert found["at_the_end"]["loss"] == pytest.approx(sum(r["loss"] for r in last) / 4)
    assert found["at_the_end"]["switch"] == pytest.approx(1.02)
    assert found["median"]["useful_tokens"] == 0.95
    assert "mfu" not in found["median"]
    layer = found["layers"]["2"]
    assert layer["load"] == pytest.approx([sum(r["layers"]["2"]["load"][e] for r in last) / 4 for e in range(4)])
    assert layer["entropy_share"] == pytest.approx(sum(r["layers"]["2"]["entropy_share"] for r in last) / 4)
    assert (layer["dead_in_last_row"], found["layers"]["0"]["dead_in_last_row"]) == ([3], [])
    (alarm,) = found["alarms"]
    assert (alarm["first_step"], alarm["last_step"], alarm["times"], alarm["value"]) == (110, 310, 2, 0.95)
    text = as_markdown([found])
    assert "| moe | moe-stage | finished after 400 steps |" in text
    assert "- imbalance in layer 2: largest violation 0.95 (limit 0.85) at step 110, 2 times up to step 310. " in text
    assert re.search(r"\| 2 \| 0\.\d+ \|.*\| 3 \|", text)


@pytest.mark.parametrize("count", [1, 3])
def test_an_unfinished_run_is_shown_as_far_as_it_came(count: int, tmp_path: Path) -> None:
    """Its last line is still being written; a step that ran again counts as it was last."""
    log = rows()[:count]
    run = write_run(tmp_path / "moe", [{**log[0], "loss": 99.0}, *log], finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    (read,) = read_runs([run])
    drawn = curves.losses([read])[0]
    assert f'aria-label="loss, as minimised: moe from {log[0]["loss"]:.4g} to {log[-1]["loss"]:.4g}"' in drawn
    assert maps.load(read, "2").startswith("<svg")
    assert summarise(read)["status"] == f"not finished: step {10 * count} of 400 is the last in its log"


def test_a_log_of_an_older_version(tmp_path: Path) -> None:
    run = write_run(tmp_path / "moe", [old(row) for row in rows()], name="telemetry.jsonl")
    page = page_of(analyze([run]))
    has(page, "entropy of the router over ln E: layer 0 from 0.9875 to 0.5", "Load of the experts of layer 4")
    has(page, "learning rate, moe: largest part from 0.000975 to 0")
    assert not any(label.startswith(("Slots of each", "tokens per second")) for label in page.figures)
    assert "moe: a log of an older version" in (run / "analysis" / "index.html").read_text()


def test_many_layers_are_heat_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of 16 experts over 600 lines, and a tower layer behind those of the decoder; as if three were many."""
    monkeypatch.setattr(curves, "MAX_LINES", 2)
    log = rows(600, 1, sites=(2, 10), experts=16)
    for row in log:
        row["layers"]["vision.1"] = {k: v for k, v in row["layers"]["2"].items() if k != "image_share"}
    page = page_of(analyze([write_run(tmp_path / "moe", log)]))
    has(page, "largest violation (MaxVio) by layer over the steps; at the end: 2 ")
    assert sum(label.startswith("Load of the experts") for label in page.figures) == 3
    assert sum(label.startswith("Slots of each") for label in page.figures) == 2
    (label,) = [label for label in page.figures if label.startswith("dead experts by layer")]
    assert re.findall(r"(\S+) \d+(?:,|$)", label.split("end: ")[1]) == ["2", "10", "vision.1"]


def test_a_real_run(moe_checkpoint: Path, tmp_path: Path) -> None:
    """What training writes is what is read here."""
    data = write_llava_json(tmp_path / "data", 8, text_only_every=4)
    config = make_config(
        tmp_path,
        moe_checkpoint,
        data,
        stage={"learning_rates": MOE_PARTS},
        balance={"losses": {"switch": 0.1}},
        train={"max_steps": 4},
    )
    runner.train(config)
    (read,) = read_runs([Path(config.output_dir)])
    found = summarise(read)
    assert (found["stage"], found["status"], found["planned_steps"]) == ("test", "finished after 4 steps", 4)
    assert {"loss", "cross_entropy", "grad_norm", "switch"} <= found["at_the_end"].keys()
    assert {"seconds_per_step", "tokens_per_second", "useful_tokens", "data_wait_share"} <= found["median"].keys()
    assert found["peak_memory_gib"] > 0
    assert set(found["layers"]) == {"0", "2"}
    for layer in found["layers"].values():
        assert {"load", "image_share", "image_tokens", "entropy_share", "confidence", "num_dead"} <= layer.keys()
    assert len(curves.speed([read])) >= 4
    assert all("projector from 0.01" in drawn for drawn in curves.rates([read]))
    assert curves.layers(read, "losses/switch", "switch", "")
    assert maps.modality(read, "2")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / seed / "moe", rows(50)) for seed in ("a", "b")]
    assert [run.label for run in read_runs(runs)] == ["a/moe", "b/moe"]


def _no_run(folder: Path) -> list[Path]:
    write_run(folder / "runs" / "moe", rows(20))
    return [folder / "runs"]


def _empty(folder: Path) -> list[Path]:
    return [write_run(folder / "moe", [])]


def _cut_in_the_middle(folder: Path) -> list[Path]:
    run = write_run(folder / "moe", rows(30))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:20], lines[2]]))
    return [run]


def _other_json(folder: Path) -> list[Path]:
    return [write_run(folder / "moe", [{"id": 1}])]


def _twice(folder: Path) -> list[Path]:
    return [write_run(folder / "moe", rows(20)), folder / "x" / ".." / "moe"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: [folder / "nowhere"], "nowhere: no such directory"),
        (_no_run, r"runs: no run directory, for it holds neither metrics\.jsonl nor telemetry\.jsonl; runs in it: moe"),
        (_empty, r"metrics\.jsonl holds no row yet: .*train\.logging_steps"),
        (_cut_in_the_middle, r"metrics\.jsonl: line 2 is not JSON"),
        (_other_json, r"metrics\.jsonl: line 1 is no row of a run's log: it has no step"),
        (_twice, "moe is named twice"),
    ],
)
def test_what_cannot_be_analysed_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(AnalysisError, match=message):
        analyze(make(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "moe", rows(100, sites=()))
    cli.main(["analyze", "run", str(run), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.strip() == f"analyze: {tmp_path / 'out' / 'index.html'}"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"index.html", "summary.json", "summary.md"}
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["analyze", "run", str(run), "--out", str(tmp_path / "file")])
    assert stopped.value.code == 2
    assert "is a file; name a directory" in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(AnalysisError, match=r"plots need matplotlib, .*pip install 'llava-moe\[analysis\]'"):
        analyze([write_run(tmp_path / "moe", rows(20))])


def test_a_further_analysis_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Count(Analysis):
        """Counts."""

        summary = "counts"

        @staticmethod
        def add_arguments(parser: Any) -> None:
            parser.add_argument("file", type=Path)

        @staticmethod
        def run(arguments: Any) -> Path:
            arguments.file.write_text("counted")
            return arguments.file

    monkeypatch.setitem(ANALYSES._entries, "count", Count)
    cli.main(["analyze", "count", str(tmp_path / "found")])
    assert (tmp_path / "found").read_text() == "counted"
