"""samples.html: questions with their pictures, answers and references, wrong ones first; one page without network.

What a page shows is chosen when a task was scored, as its pictures are at hand then, and kept beside the answers
(`pictures/TASK.json`). Pictures are small: at most `SIDE` pixels, `PICTURES` for each question. The page holds at most
`PER_TASK` questions of a task and `MOST` of all, about 15 MB, and says how many it shows.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_moe.evaluation import records

PAGE = "samples.html"
FOLDER = "pictures"
TEMPLATE = "samples.html.j2"
SIDE, QUALITY = 224, 80
PICTURES = 4
PER_TASK, WRONG, MOST = 36, 24, 600
LONGEST = 1200  # letters of a text
MARK = "…"


def choose(samples: Sequence[Mapping[str, Any]], count: int = PER_TASK, wrong: int = WRONG) -> list[int]:
    """Places among the samples, the worst answers first; spread over the task, not its first ones.

    Without enough wrong answers there are more right ones, and the other way round. Answers that nobody judged one by
    one are neither, and stand behind the wrong ones.
    """
    groups: tuple[list[int], list[int], list[int]] = ([], [], [])
    for place, sample in enumerate(samples):
        credit = sample["credit"]
        groups[1 if credit is None else 2 if credit == 1 else 0].append(place)
    bad = _spread(groups[0], min(len(groups[0]), max(wrong, count - len(groups[1]) - len(groups[2]))))
    bad.sort(key=lambda place: (samples[place]["credit"], place))
    unjudged = _spread(groups[1], min(len(groups[1]), count - len(bad)))
    return bad + unjudged + _spread(groups[2], min(len(groups[2]), count - len(bad) - len(unjudged)))


def _spread(places: Sequence[int], count: int) -> list[int]:
    return [places[number * len(places) // count] for number in range(count)]


def keep(out: Path, name: str, samples: Sequence[Mapping[str, Any]], task: Any) -> None:
    """Writes what the page will show of a task.

    Args:
        out: folder of the run.
        name: of the task.
        samples: its answers.
        task: lmms-eval's object, which finds the pictures of a document.
    """
    shown = []
    for place in choose(samples):
        sample = samples[place]
        visuals = [one for one in task.doc_to_visual(task.eval_docs[sample["doc_id"]]) or [] if hasattr(one, "convert")]
        shown.append(
            {
                "id": str(sample["id"]),
                "question": _shortened(sample["prompt"]),
                "target": _shortened(sample["target"]),
                "answer": _shortened(sample["answer"]),
                "credit": sample["credit"],
                "pictures": [_small(visual) for visual in visuals[:PICTURES]],
                "more_pictures": max(0, len(visuals) - PICTURES),
            }
        )
    right = sum(sample["credit"] == 1 for sample in samples)
    judged = sum(sample["credit"] is not None for sample in samples)
    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    content = {"n": len(samples), "judged": judged, "right": right, "samples": shown}
    records.write_json(folder / f"{name}.json", content)


def _small(picture: Any) -> str:
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _shortened(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST else text[:LONGEST] + MARK


def write(out: Path, results: Mapping[str, Any]) -> None:
    """Writes the page of a run from what `keep` wrote."""
    import jinja2

    tasks: list[dict[str, Any]] = []
    share = max(1, min(PER_TASK, MOST // max(1, len(results["tasks"]))))
    for name in results["tasks"]:
        kept = records.read_json(out / FOLDER / f"{name}.json")
        kept["samples"] = _first(kept["samples"], share)
        tasks.append({"name": name, "place": len(tasks), **kept})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(results=results, tasks=tasks)
    temporary = out / f"{PAGE}.tmp"
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, out / PAGE)


def _first(samples: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Fewer of them, in the same proportion of right and wrong."""
    return list(samples) if len(samples) <= count else [samples[place] for place in _spread(range(len(samples)), count)]
