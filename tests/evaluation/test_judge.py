"""Judged tasks: refused without a judge before anything is computed; the judge is asked once; scorers find it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as DatasetImage

import llava_moe  # noqa: F401  (before anything that may import torchvision)
from llava_moe.evaluation import EvaluationError, lmms, prepared, run
from llava_moe.evaluation.judge import FIXED_MODEL, Judge, ask, find_judge, judged, judging
from llava_moe.evaluation.suites import SUITES
from tests.evaluation import fakes

REPO = Path(__file__).parents[2]
JUDGE = SUITES.get("judge").tasks


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server: Any = self.server
        server.seen.append((self.path, content["model"], self.headers.get("Authorization")))
        reply_text = server.reply if len(server.seen) <= server.silent_after else ""
        known = content["model"] in server.models and self.path == "/v1/chat/completions"
        reply = (
            {"model": content["model"], "choices": [{"message": {"content": reply_text}}]} if known else {"error": "no"}
        )
        body = json.dumps(reply if server.sane else {"hello": 1}).encode()
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Any]:
    made: Any = HTTPServer(("127.0.0.1", 0), _Handler)
    made.seen, made.models, made.sane, made.reply = [], {"mine", FIXED_MODEL}, True, "correct"
    made.silent_after = 10**9
    made.url = f"http://127.0.0.1:{made.server_port}/v1"
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_tasks_without_a_judge_need_none() -> None:
    assert judged(SUITES.get("core").tasks) == []
    assert find_judge(["gqa", "docvqa_val"], None, None, {}) is None
    with pytest.raises(EvaluationError, match=r"--judge http://x was given, but none of the tasks \(gqa\)"):
        find_judge(["gqa"], "http://x", None, {})


def test_missing_judge_is_refused_and_names_tasks_and_variable() -> None:
    with pytest.raises(EvaluationError, match=r"mmvet, llava_in_the_wild: .*OPENAI_API_KEY is not set.*--judge http"):
        find_judge(["gqa", "mmvet", "llava_in_the_wild"], None, None, {})
    with pytest.raises(EvaluationError, match="AZURE_API_KEY is not set"):
        find_judge(["mmvet"], None, None, {"API_TYPE": "azure"})
    with pytest.raises(EvaluationError, match="needs AZURE_ENDPOINT"):
        find_judge(["mmvet"], None, None, {"API_TYPE": "azure", "AZURE_API_KEY": "k"})
    with pytest.raises(EvaluationError, match="API_TYPE='dummy' is no judge"):
        find_judge(["mmvet"], None, None, {"API_TYPE": "dummy"})
    with pytest.raises(EvaluationError, match="is no URL"):
        find_judge(["mmvet"], "localhost:8000", None, {})


@pytest.mark.parametrize("given", ["http://h/v1", "http://h/v1/", "http://h/v1/chat/completions"])
def test_urls_are_taken_with_and_without_their_tail(given: str) -> None:
    expected = "http://h/v1/chat/completions"
    local = find_judge(["mmvet"], given, "mine", {"OPENAI_API_KEY": "k"})
    assert local == Judge("local", expected, "mine")
    keyed = find_judge(["mmvet"], None, None, {"OPENAI_API_KEY": "k", "OPENAI_API_URL": given, "MODEL_VERSION": "m"})
    assert keyed == Judge("openai", expected, "m")
    assert "k" not in keyed.describe().values()


def test_judge_is_asked_under_each_name_that_the_tasks_use(server: Any) -> None:
    judge = find_judge(JUDGE, server.url, "mine", {})
    assert judge is not None
    ask(judge, JUDGE, {})
    assert server.seen == [("/v1/chat/completions", "mine", None), ("/v1/chat/completions", FIXED_MODEL, None)]
    ask(Judge("openai", judge.url, "mine"), ["mmvet"], {"OPENAI_API_KEY": "k"})
    assert server.seen[-1] == ("/v1/chat/completions", "mine", "Bearer k")


def test_a_judge_that_cannot_judge_is_refused(server: Any) -> None:
    url = f"{server.url}/chat/completions"
    with pytest.raises(EvaluationError, match=r"\(model 'other'\) answers with status 404"):
        ask(Judge("local", url, "other"), ["mmvet"], {})
    server.models.remove(FIXED_MODEL)
    with pytest.raises(EvaluationError, match="serve it under the name gpt-4 too"):
        ask(Judge("local", url, "mine"), JUDGE, {})
    server.sane = False
    with pytest.raises(EvaluationError, match="does not answer like an OpenAI chat endpoint"):
        ask(Judge("local", url, "mine"), ["mmvet"], {})
    with pytest.raises(EvaluationError, match="cannot be reached: ConnectionError"):
        ask(Judge("local", "http://127.0.0.1:9/v1/chat/completions", "mine"), ["mmvet"], {}, timeout=2)


_CHILD = """
import sys
import llava_moe
from llava_moe.evaluation.judge import Judge, set_up
kind, url = sys.argv[1:]
set_up(Judge(kind, url + "/chat/completions", "mine"), ["hallusion_bench_image", "mmvet"])
from lmms_eval.tasks.hallusion_bench.utils import evaluate_by_chatgpt
row = {"question": "q", "gt_answer_details": "a", "model_prediction": "p"}
print(evaluate_by_chatgpt([row], "model_prediction", "c", save_json_path=sys.argv[0] or "/dev/null")[0]["c"])
import os
from lmms_eval.llm_judge import Request, ServerConfig, get_server
server = get_server(server_name=os.environ["API_TYPE"], config=ServerConfig(model_name=os.environ["MODEL_VERSION"]))
print(server.evaluate(Request(messages=[{"role": "user", "content": "x"}])).content)
from llava_moe.evaluation import EvaluationError
try:
    set_up(Judge(kind, "http://other/chat/completions", "mine"), ["hallusion_bench_image"])
except EvaluationError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "openai"])
def test_both_kinds_of_scorers_find_the_judge(server: Any, tmp_path: Path, kind: str) -> None:
    script = tmp_path / "child.py"
    script.write_text(_CHILD.replace('sys.argv[0] or "/dev/null"', f'"{tmp_path / "replies.json"}"'))
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPO), "HOME": str(tmp_path), "OPENAI_API_KEY": "k"}
    done = subprocess.run(
        [sys.executable, script, kind, server.url],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.split("\n") if " | WARNING " not in line]
    assert lines[:2] == ["1", "correct"]
    assert "start a new process" in lines[2]
    assert [row[:2] for row in server.seen] == [("/v1/chat/completions", FIXED_MODEL), ("/v1/chat/completions", "mine")]
    keys = [row[2] for row in server.seen]  # a server of one's own does not get the key that is for OpenAI
    assert all("k" not in (key or "").split() for key in keys) if kind == "local" else keys == ["Bearer k"] * 2


def test_the_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_VERSION", "before")
    for name in ("API_TYPE", "LLM_JUDGE_URL", "OPENAI_API_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with judging(Judge("local", "http://h/v1/chat/completions", "mine"), ["mmvet"]):
        found = {name: os.environ.get(name) for name in ("MODEL_VERSION", "API_TYPE", "LLM_JUDGE_URL")}
    assert found == {"MODEL_VERSION": "mine", "API_TYPE": "local", "LLM_JUDGE_URL": "http://h/v1/chat/completions"}
    assert os.environ["MODEL_VERSION"] == "before"
    assert not {"API_TYPE", "LLM_JUDGE_URL", "OPENAI_API_URL", "OPENAI_API_KEY"} & set(os.environ)


@pytest.mark.slow
def test_a_judged_benchmark_from_a_mirror(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MM-Vet's own scorer asks the server that --judge names; a judge that falls silent fails the task, loudly."""
    folder = tmp_path / "mirror" / "lmms-lab-encoder" / "MMVet" / "data"
    folder.mkdir(parents=True)
    rows = [
        {
            "question_id": f"v1_{i}",
            "image": fakes.picture(i),
            "question": "What color?",
            "answer": "red",
            "capability": "rec",
        }
        for i in range(3)
    ]
    texts = {name: Value("string") for name in rows[0]}
    features = Features({**texts, "image": DatasetImage()})
    Dataset.from_list(rows, features=features).to_parquet(folder / "test-00000-of-00001.parquet")
    spec = util.find_spec("lmms_eval")
    assert spec is not None
    assert spec.origin is not None
    from lmms_eval.tasks import TaskManager

    path = str(Path(spec.origin).parent / "tasks" / "mmvet")
    manager = TaskManager(include_path=[path], include_defaults=False, model_name="llava_moe")
    monkeypatch.setattr(prepared, "index", lambda include_defaults: manager)
    monkeypatch.setattr(lmms, "load_checkpoint", lambda pretrained, dtype: (fakes.FakeModel(), fakes.FakeProcessor()))
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "arrow"))
    checkpoint = fakes.write_checkpoint(tmp_path / "checkpoint")

    def ask_for(*more: str) -> dict[str, Any]:
        parser = argparse.ArgumentParser()
        run.add_arguments(parser)
        command = [
            str(checkpoint),
            "--tasks",
            "mmvet",
            "--mirror",
            str(tmp_path / "mirror"),
            "--out",
            str(tmp_path / "out"),
        ]
        run.main(parser.parse_args([*command, "--judge", server.url, "--judge-model", "mine", *more]))
        found: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text())
        return found

    server.reply = "0.5"
    results = ask_for()
    assert results["tasks"]["mmvet"]["headline"]["value"] == 50.0
    assert results["tasks"]["mmvet"]["unjudged"] == 0
    assert results["about"]["mmvet"]["judge"] == {
        "kind": "local",
        "url": f"{server.url}/chat/completions",
        "model": "mine",
    }
    assert len(server.seen) == 1 + 3  # one question first
    assert ask_for() == results
    assert len(server.seen) == 1 + 3 + 1  # a finished task is not judged again
    (checkpoint / "model.safetensors").write_bytes(b"other weights")
    server.silent_after = len(server.seen) + 1
    with pytest.raises(EvaluationError, match="mmvet: the judge gave no verdict on 3 of 3 answers"):
        ask_for()
    assert not (tmp_path / "out" / "results.json").exists()
