"""What the experts did for each question, written beside the answers as `routing.jsonl.gz`.

One line for a question (for each option of a log-likelihood question):

    {"task": "local_gqa", "doc_id": 7, "option": null, "tokens": {"text": 21, "image": 16, "answer": 2},
     "layers": {"2": {"text": [9, 12, 14, 7], "image": [...], "answer": [...],
                      "entropy": [0.91, 1.2, 0.8], "top_weight": [0.7, 0.5, 0.8], "dropped": 0}, "projector.0": {...}}}

    tokens        that the decoder read, of the prompt's text, of its pictures and of the answer; no padding, no end
                  token (but that of an option). One ended by its length limit or a stop string has one more, unread.
    layers        by place: "2" is a decoder layer, "vision.3" and "projector.0" are elsewhere and see pictures only
    text, image, answer   slots that each expert received. Where every token fills a slot of every expert (dense
                  routers), the sums of the router's probabilities instead, to two digits.
    entropy       of the router's probabilities in nats, the mean over tokens of text, image and answer
    top_weight    combine weight of a token's best slot, by size, the mean likewise; null where there are no such tokens
    dropped       slots that a router or a capacity emptied; nothing drops in evaluation unless the method itself does

Until `merge` makes this file, the lines lie in `routing.rankN.jsonl`, one for each rank, which a kill leaves whole. A
line has at most 150 + L (130 + 3 E c) bytes before gzip, for L layers of E experts, with c the width of a count and its
comma: about 200 bytes for each layer of 8 experts, a quarter of it after gzip. Counts do not depend on the batch, means
only by the rounding of the arithmetic.

Shapes: B rows, S positions, T = B x S tokens, E experts, K slots, W numbers of a row and kind.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from llava_moe.evaluation import EvaluationError
from llava_moe.moe import Routing, SiteKey
from llava_moe.moe.capacity import DROPPED

FILE = "routing.jsonl.gz"
KINDS = ("text", "image", "answer")
TEXT, IMAGE, ANSWER, PADDING = range(4)
_SCALARS = 4  # tokens, entropy, top weight, dropped slots
_TINY = 1e-20  # of a sum of scores; less is no preference at all
Sums = dict[SiteKey, Tensor]
Name = tuple[str, int, int]  # task, document, option or -1


def site_name(site: SiteKey) -> str:
    """As in the telemetry of training: the index alone for a decoder layer."""
    part, layer = site
    return str(layer) if part == "decoder" else f"{part}.{layer}"


def measure(routing: Routing, kind_T: Tensor, num_rows: int) -> Tensor:
    """Sums by row and kind, float32 (B, 3, W) with W = 2 E + 4: slots, probabilities, then the scalars.

    Args:
        routing: of T tokens, row by row.
        kind_T: TEXT, IMAGE, ANSWER or PADDING of each.
    """
    num_experts, device = routing.num_experts, routing.index_TK.device
    row_T = torch.arange(num_rows, device=device).repeat_interleave(kind_T.shape[0] // num_rows)
    group_T = row_T * 4 + kind_T
    slots = torch.zeros(num_rows * 4, num_experts + 1, dtype=torch.float32, device=device)
    place_TK = group_T.unsqueeze(-1) * (num_experts + 1) + routing.index_TK
    slots.view(-1).scatter_add_(0, place_TK.reshape(-1), torch.ones_like(place_TK, dtype=torch.float32).reshape(-1))
    probs_TE = routing.probs_TE.float()
    probs_TE = probs_TE / probs_TE.sum(-1, keepdim=True).clamp(min=_TINY)
    scalars_T4 = torch.stack(
        [
            torch.ones_like(probs_TE[:, 0]),
            torch.special.entr(probs_TE).sum(-1),
            routing.weight_TK.float().abs().amax(-1),
            routing.extras[DROPPED].float() if DROPPED in routing.extras else torch.zeros_like(probs_TE[:, 0]),
        ],
        dim=1,
    )
    rest = torch.zeros(num_rows * 4, num_experts + _SCALARS, dtype=torch.float32, device=device)
    rest.index_add_(0, group_T, torch.cat([probs_TE, scalars_T4], dim=1))
    return torch.cat([slots[:, :num_experts], rest], dim=1).view(num_rows, 4, -1)[:, :PADDING]


def measure_pictures(routings: Mapping[SiteKey, Routing]) -> Sums:
    """The sums of what tower and projector did for one entry of `vision_reuse`: (3, W) by site, on the host."""
    found = {}
    for site, routing in routings.items():
        kinds = torch.full((routing.num_tokens,), IMAGE, device=routing.index_TK.device)
        found[site] = measure(routing, kinds, 1)[0].cpu()
    return found


class Watch:
    """Sums the routing of one batch; made by `RoutingRecorder.watch`.

    Args:
        scope: of the model.
        answer_BS: for a single forward, which tokens are the answer; None for a generation, where the first forward
            reads the prompt and the others one token of the answer each.
        stop_ids: a row whose last token is one of them has ended.
        ended: of a generation: which rows have ended otherwise, (B,) or None.
    """

    def __init__(
        self,
        scope: Any,
        answer_BS: Tensor | None = None,
        stop_ids: Sequence[int] = (),
        ended: Callable[[], Tensor | None] = lambda: None,
    ) -> None:
        self.scope = scope
        self.answer_BS = answer_BS
        self.stop_ids = list(stop_ids)
        self.ended = ended
        self.sums: Sums = {}
        self.num_rows = 0
        self._over: Tensor | None = None

    def see(self, input_ids: Tensor, routings: Mapping[SiteKey, Routing]) -> None:
        """Takes one forward of the decoder."""
        is_prompt = self._over is None
        if is_prompt:
            self.num_rows = input_ids.shape[0]
            self._over = torch.zeros(self.num_rows, dtype=torch.bool, device=input_ids.device)
        else:
            self._mark_ended(input_ids)
        for site, routing in routings.items():
            kind_T = self._kinds(site, input_ids, is_prompt)
            found = measure(routing, kind_T, input_ids.shape[0])
            self.sums[site] = self.sums[site] + found if site in self.sums else found

    def _mark_ended(self, input_ids: Tensor) -> None:
        assert self._over is not None
        stops = torch.tensor(self.stop_ids, device=input_ids.device, dtype=input_ids.dtype)
        self._over = self._over | torch.isin(input_ids[:, -1], stops)
        others = self.ended()
        if others is not None:
            self._over = self._over | others.to(self._over.device)

    def _kinds(self, site: SiteKey, input_ids: Tensor, is_prompt: bool) -> Tensor:
        context = self.scope.context_of(site)
        mask_T = context.token_mask_T
        if is_prompt:
            kind_T = torch.where(context.modality_T.bool(), IMAGE, TEXT)
            if self.answer_BS is not None:
                kind_T = torch.where(self.answer_BS.reshape(-1).to(kind_T.device), ANSWER, kind_T)
        else:
            assert self._over is not None
            kind_T = torch.full_like(context.sequence_T, ANSWER)
            mask_T = mask_T & ~self._over.repeat_interleave(input_ids.shape[1])
        return torch.where(mask_T, kind_T, PADDING)

    def rows(self) -> list[Sums]:
        """The sums of each row of the batch, (3, W) by site, on the host."""
        host = {site: sums.cpu() for site, sums in self.sums.items()}
        return [{site: sums[row] for site, sums in host.items()} for row in range(self.num_rows)]


class RoutingRecorder:
    """Writes the lines of one process to a file beside the one that `merge` makes.

    Args:
        model: of a LLaVA family of this package.
        folder: where the answers go.
        rank, world_size: of this process.
        run: what decides the answers (weights, tasks, settings); the lines of an interrupted run with the same text are
            kept. "" keeps nothing.

    Attributes:
        recorded: what has a line already, of any rank.

    Raises:
        ValueError: the model has no layer with experts.
    """

    def __init__(self, model: Any, folder: Path, rank: int = 0, world_size: int = 1, run: str = "") -> None:
        if model.config.moe is None and not model.model.native_layers:
            raise ValueError("this checkpoint has no layers with experts, so there is no routing to record")
        self.model = model
        self.path = folder / f"routing.rank{rank}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.recorded: set[Name] = set()
        for part in _parts(folder):
            before, lines = _read_part(part)
            if run and before == run:
                self.recorded |= set(lines)
            elif part == self.path or (rank == 0 and _rank(part) >= world_size):  # others are left to their process
                part.unlink()
        self._run = run
        self._file: TextIO | None = self._open()

    def _open(self) -> TextIO:
        """The file of this rank, behind its last whole line."""
        if self.path.is_file():
            content = self.path.read_bytes()
            os.truncate(self.path, content.rfind(b"\n") + 1)
        else:
            self.path.write_text(json.dumps({"run": self._run}) + "\n", encoding="utf-8")
        return self.path.open("a", encoding="utf-8")

    @contextmanager
    def watch(self, **options: Any) -> Iterator[Watch]:
        """Watches the forwards of one batch; options as in `Watch`."""
        watch = Watch(self.model.model.scope, **options)

        def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            watch.see(kwargs["input_ids"], output.routings or {})

        handle = self.model.register_forward_hook(hook, with_kwargs=True)
        try:
            yield watch
        finally:
            handle.remove()

    def write(self, task: str, doc_id: int, option: int | None, sums: Sums, of_pictures: Sequence[Sums]) -> None:
        """One line; `of_pictures` are the sums of the entries that the question shows."""
        every = dict(sums)
        for picture in of_pictures:
            for site, found in picture.items():
                every[site] = every[site] + found if site in every else found
        record = {"task": task, "doc_id": doc_id, "option": option, **_line(every)}
        self._file = self._file or self._open()  # asked again after a close
        self._file.write(json.dumps(record, separators=(",", ":")) + "\n")

    def flush(self) -> None:
        """Leaves nothing in a buffer: what is answered survives a kill."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Closes the file; a later `write` adds to it."""
        if self._file is not None:
            self._file.close()
            self._file = None


def merge(folder: Path, wanted: Iterable[tuple[str, int]] | None = None) -> Path:
    """All ranks' lines in one file, sorted by task, document and option, without the repetitions of padded ranks.

    Args:
        folder: of the recorders, which are closed.
        wanted: task and document of every question of the run; lines of others are left out. None takes all.

    Raises:
        EvaluationError: a question has no line.
    """
    parts = _parts(folder)
    found: dict[Name, str] = {}
    run = _read_part(parts[0])[0] if parts else None
    for part in parts:
        of, lines = _read_part(part)
        found |= lines if of == run else {}
    if wanted is not None:
        asked = set(wanted)
        missing = sorted(asked - {name[:2] for name in found})
        if missing:
            task, doc_id = missing[0]
            raise EvaluationError(
                f"{folder}: {len(missing)} questions have no routing record, the first is document {doc_id} of task "
                f"{task!r}; delete the recorded answers and score again"
            )
        found = {name: line for name, line in found.items() if name[:2] in asked}
    path = folder / FILE
    with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:  # the same bytes every time
        packed.write("".join(found[name] + "\n" for name in sorted(found)).encode())
    for part in parts:
        part.unlink()
    return path


def name_of(task: str, doc_id: int, option: int | None) -> Name:
    """What a line is known by."""
    return task, doc_id, -1 if option is None else option


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("routing.rank*.jsonl"), key=_rank)


def _rank(part: Path) -> int:
    return int(part.name.split(".")[1].removeprefix("rank"))


def _read_part(part: Path) -> tuple[str | None, dict[Name, str]]:
    """The run of a rank's file, None if even that was cut, and its whole lines; a kill may have cut the last one."""
    try:
        *lines, _cut = part.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:  # its process is beginning it anew
        lines = []
    if not lines:
        return None, {}
    try:
        run, records = str(json.loads(lines[0])["run"]), [json.loads(line) for line in lines[1:]]
        names = [name_of(record["task"], record["doc_id"], record["option"]) for record in records]
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{part}: no routing records of this program ({error}); delete the file") from error
    return run, dict(zip(names, lines[1:], strict=True))


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder."""
    with gzip.open(folder / FILE, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _line(sums: Sums) -> dict[str, Any]:
    decoder = [found for (part, _), found in sorted(sums.items()) if part == "decoder"]
    tokens = [int(row[-_SCALARS]) for row in decoder[0]] if decoder else None
    line: dict[str, Any] = {} if tokens is None else {"tokens": dict(zip(KINDS, tokens, strict=True))}
    return line | {"layers": {site_name(site): _layer(found) for site, found in sorted(sums.items())}}


def _layer(sums_3W: Tensor) -> dict[str, Any]:
    num_experts = (sums_3W.shape[1] - _SCALARS) // 2
    slots, probs, scalars = sums_3W.split([num_experts, num_experts, _SCALARS], dim=1)
    tokens = scalars[:, 0]
    is_dense = bool(slots.sum() >= tokens.sum() * num_experts) and num_experts > 1
    loads = [[round(v, 2) for v in row] for row in probs.tolist()] if is_dense else slots.int().tolist()
    layer: dict[str, Any] = {kind: load for kind, load, n in zip(KINDS, loads, tokens.tolist(), strict=True) if n}
    for name, column in (("entropy", 1), ("top_weight", 2)):
        pairs = zip(scalars[:, column].tolist(), tokens.tolist(), strict=True)
        layer[name] = [round(total / n, 4) if n else None for total, n in pairs]
    return layer | {"dropped": int(scalars[:, 3].sum())}
