"""Tasks that a language model judges: the judge is named and asked before anything is computed, or the run is refused.

Without a judge lmms-eval still prints a score for these tasks: 0 for HallusionBench, the nearest string for MathVista.
Its scorers find the judge in two ways, which `set_up` brings together:

- "openai" tasks (HallusionBench) post to OPENAI_API_URL, read when their module is imported. They know no local server:
  with API_TYPE=local they fail inside a try block and count every answer as wrong.
- "server" tasks (MathVista, MM-Vet, LLaVA-Bench) go through `lmms_eval.llm_judge`, which API_TYPE selects; "local"
  posts to LLM_JUDGE_URL, without a key; "openai" puts /chat/completions behind OPENAI_API_URL, which the tasks above
  want whole.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_moe.evaluation import EvaluationError
from llava_moe.evaluation.suites import BENCHMARKS

CHAT = "/chat/completions"
OPENAI_URL = f"https://api.openai.com/v1{CHAT}"
DEFAULT_MODEL = "gpt-4o-2024-11-20"  # lmms-eval's
FIXED_MODEL = "gpt-4"  # the name that HallusionBench's scorer asks for, whatever is configured
OPENAI_MODULES = {"hallusion_bench_image": "lmms_eval.tasks.hallusion_bench.utils"}
VARIABLES = ("MODEL_VERSION", "API_TYPE", "OPENAI_API_URL", "OPENAI_API_KEY", "LLM_JUDGE_URL")
KEY_VARIABLES = {"openai": "OPENAI_API_KEY", "azure": "AZURE_API_KEY"}


@dataclass(frozen=True)
class Judge:
    """Who judges.

    Attributes:
        kind: "openai", "azure" or "local".
        url: where chat completions are posted.
        model: name of the model that is asked for.
    """

    kind: str
    url: str
    model: str

    def describe(self) -> dict[str, str]:
        """For the records; without any key."""
        return {"kind": self.kind, "url": self.url, "model": self.model}


def judged(tasks: Sequence[str]) -> list[str]:
    """Those of the tasks that need a judge."""
    return [name for name in tasks if name in BENCHMARKS and BENCHMARKS.get(name).judge != "none"]


def find_judge(
    tasks: Sequence[str], url: str | None, model: str | None, environment: Mapping[str, str] = os.environ
) -> Judge | None:
    """The judge that the tasks need; None if they need none.

    Args:
        tasks: names of tasks.
        url: an OpenAI-compatible server of one's own, from the command line.
        model: the judge's model; by default MODEL_VERSION, or what lmms-eval uses.
        environment: the variables of the process.

    Raises:
        EvaluationError: a task needs a judge and there is none; names the tasks and the variable.
    """
    needing = judged(tasks)
    if not needing:
        if url is not None:
            raise EvaluationError(f"--judge {url} was given, but none of the tasks ({', '.join(tasks)}) has a judge")
        return None
    name = model or environment.get("MODEL_VERSION") or DEFAULT_MODEL
    if url is not None:
        if not url.startswith(("http://", "https://")):
            raise EvaluationError(f"--judge {url!r} is no URL; give for example http://127.0.0.1:8000/v1")
        base = url.rstrip("/").removesuffix(CHAT)
        return Judge("local", f"{base}{CHAT}", name)
    kind = environment.get("API_TYPE", "openai")
    variable = KEY_VARIABLES.get(kind)
    if variable is None:
        raise EvaluationError(
            f"API_TYPE={kind!r} is no judge that every judged task understands; use openai or azure, or --judge URL"
        )
    if not environment.get(variable):
        raise EvaluationError(
            f"{', '.join(needing)}: a language model judges the answers, and {variable} is not set; set it, give the "
            "URL of a server of your own (--judge http://127.0.0.1:8000/v1), or leave these tasks out: "
            f"--tasks ...,{','.join('-' + name for name in needing)}"
        )
    if kind == "azure":
        if not environment.get("AZURE_ENDPOINT"):
            raise EvaluationError(f"{', '.join(needing)}: API_TYPE=azure needs AZURE_ENDPOINT, which is not set")
        return Judge(kind, environment["AZURE_ENDPOINT"], name)
    given = environment.get("OPENAI_API_URL")
    return Judge(kind, OPENAI_URL if given is None else f"{given.rstrip('/').removesuffix(CHAT)}{CHAT}", name)


def ask(judge: Judge, tasks: Sequence[str], environment: Mapping[str, str] = os.environ, timeout: float = 60.0) -> None:
    """Asks the judge one short question under every model name that the tasks will use.

    Raises:
        EvaluationError: it does not answer; says what it said.
    """
    import requests

    if judge.kind == "azure":  # the path depends on the deployment; lmms-eval's client knows it
        return
    key = environment.get(KEY_VARIABLES.get(judge.kind, ""), "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for model in model_names(judge, tasks):
        payload: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": "Say yes."}],
            "max_tokens": 16,
        }
        where = f"the judge at {judge.url} (model {model!r})"
        try:
            response = requests.post(judge.url, json=payload, headers=headers, timeout=timeout)
        except requests.RequestException as error:
            raise EvaluationError(f"{where} cannot be reached: {type(error).__name__}") from error
        if response.status_code != 200:
            said = " ".join(response.text.split())[:200]
            served = f"; serve it under the name {FIXED_MODEL} too" if model == FIXED_MODEL else ""
            raise EvaluationError(f"{where} answers with status {response.status_code}: {said}{served}")
        try:
            response.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise EvaluationError(f"{where} does not answer like an OpenAI chat endpoint") from error


def model_names(judge: Judge, tasks: Sequence[str]) -> list[str]:
    """The model names under which the tasks ask; one of them has its own."""
    kinds = {BENCHMARKS.get(name).judge for name in judged(tasks)}
    return [judge.model] * ("server" in kinds) + [FIXED_MODEL] * ("openai" in kinds)


@contextlib.contextmanager
def judging(judge: Judge, tasks: Sequence[str]) -> Iterator[None]:
    """`set_up` for a while; the environment is as before afterwards."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    try:
        set_up(judge, tasks)
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def set_up(judge: Judge, tasks: Sequence[str]) -> None:
    """Puts the judge where the scorers of the tasks look for it.

    Raises:
        EvaluationError: a scorer was imported with another endpoint before.
    """
    os.environ["MODEL_VERSION"] = judge.model
    if judge.kind == "local":
        # The "openai" modules keep what they find at import; only then is the switch turned to "local".
        os.environ["API_TYPE"], os.environ["OPENAI_API_URL"] = "openai", judge.url
        os.environ["OPENAI_API_KEY"] = "none"  # a real one is for OpenAI, and would be sent to this server
        os.environ["LLM_JUDGE_URL"] = judge.url
    else:
        os.environ["API_TYPE"] = judge.kind
    if judge.kind == "openai":
        os.environ["OPENAI_API_URL"] = judge.url
    for name in judged(tasks):
        if name in OPENAI_MODULES:
            module = importlib.import_module(OPENAI_MODULES[name])
            if judge.url != module.API_URL:
                raise EvaluationError(
                    f"task {name!r}: its scorer was loaded for {module.API_URL} before; start a new process"
                )
    if judge.kind == "local":
        os.environ["API_TYPE"] = "local"
    elif judge.kind == "openai":  # llm_judge puts /chat/completions behind what it finds
        os.environ["OPENAI_API_URL"] = judge.url.removesuffix(CHAT)
