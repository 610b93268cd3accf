"""A model whose answers are known: it looks at the pictures it is shown and the prompt it is given, at nothing else.

The pictures of a question have its colours. So an answer is only right if the prompt of the question and its pictures
arrive together, in their order; document numbers and references are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms

from llava_moe.evaluation.registry import MODEL_ID
from llava_moe.evaluation.tasks import TASKS_FOLDER
from tests.evaluation.imitations import imitations
from tests.evaluation.imitations_files import Colour, code_of

Known = dict[tuple[Colour, ...], list[tuple[str, str]]]
AT_A_LOSS = "I cannot tell."
FOLDERS = ("gqa", "mmbench", "pope", "textvqa", "scienceqa", "mme", "ai2d", "mmstar", "mmmu")


def index_of_core() -> Any:
    """lmms-eval's index of the folders that the suite `core` needs, and of ours; the whole index takes ten seconds."""
    from lmms_eval.tasks import TaskManager

    spec = util.find_spec("lmms_eval")
    assert spec is not None
    assert spec.origin is not None
    official = Path(spec.origin).parent / "tasks"
    paths = [str(TASKS_FOLDER), *(str(official / name) for name in FOLDERS)]
    return TaskManager(include_path=paths, include_defaults=False, model_name=MODEL_ID)


def known_answers(mistaken: bool) -> Known:
    """Question and answer by the colours of the pictures."""
    known: Known = {}
    for imitation in imitations().values():
        for part in imitation.parts:
            for item in part.items:
                if "question" not in item.row:
                    continue
                columns = part.pictures or ("picture",)
                codes = tuple(item.row[name] for name in columns if item.row[name] is not None)
                pair = (item.row["question"], item.mistaken if mistaken else item.right)
                if pair not in known.setdefault(codes, []):
                    known[codes].append(pair)
    return known


class Oracle(lmms):  # type: ignore[misc]
    """Answers the imitations' questions.

    Args:
        mistaken: answers with the planned mistakes.
        shifted: shows each question the pictures of the one before it, as a broken adapter does.
    """

    is_simple = True

    def __init__(self, mistaken: bool = False, shifted: bool = False) -> None:
        super().__init__()
        self.batch_size = 3
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.processor = SimpleNamespace(template="oracle")
        self.progress: Any = None
        self.on_answers: Any = None
        self.prompts: list[str] = []
        self.tasks: list[str] = []
        self._known, self._shifted = known_answers(mistaken), shifted

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        shown = []
        for request in requests:
            _, _, doc_to_visual, doc_id, task, split = request.args
            shown.append(tuple(code_of(image) for image in doc_to_visual(self.task_dict[task][split][doc_id])))
            self.tasks.append(task)
        if self._shifted:
            shown = [shown[-1], *shown[:-1]]
        answers = [self._answer(request.args[0], codes) for request, codes in zip(requests, shown, strict=True)]
        if self.on_answers is not None:
            self.on_answers(requests, answers)
        return answers

    def is_recorded(self, request: Any) -> bool:
        """As `LlavaMoe`: an answer of an earlier run may be taken."""
        return True

    def counters(self) -> dict[str, float]:
        """As `LlavaMoe`."""
        return {"requests": len(self.prompts)}

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        raise NotImplementedError("none of the imitations' tasks asks for it")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        raise NotImplementedError("none of the imitations' tasks asks for it")

    def clean(self) -> None:
        """There is nothing to give back."""

    def _answer(self, prompt: str, codes: tuple[Colour, ...]) -> GenerationResult:
        self.prompts.append(prompt)
        # TextVQA's prompt changes the capitals, MME's drops a sentence of the question
        said = prompt.lower()
        for question, answer in self._known.get(codes, []):
            if question.lower().removesuffix(" please answer yes or no.") in said:
                return GenerationResult(answer, TokenCounts(input_tokens=len(prompt), output_tokens=len(answer)))
        return GenerationResult(AT_A_LOSS, TokenCounts(input_tokens=len(prompt), output_tokens=len(AT_A_LOSS)))
