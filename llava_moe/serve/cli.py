"""Talk to a checkpoint in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from llava_moe.data.schema import Turn
from llava_moe.serve.engine import (
    DEFAULT_MAX_NEW_TOKENS,
    ChatError,
    Engine,
    ModelFacts,
    add_engine_arguments,
    open_picture,
    user_turn,
)

HELP = """\
/image FILE   attach a picture to the next question
/clear        forget the chat and its pictures
/help         this list
/quit         leave (or Ctrl-D); Ctrl-C stops an answer"""
_COMMANDS = ("/image", "/clear", "/help", "/quit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `llava-moe chat`."""
    add_engine_arguments(parser)
    parser.add_argument("--image", action="append", default=[], type=Path, metavar="FILE", help="may be repeated")
    parser.add_argument("--question", metavar="TEXT", help="answer this on standard output and leave")
    parser.add_argument("--max-new-tokens", type=int, default=DEFAULT_MAX_NEW_TOKENS, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) always takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="with a temperature: nucleus sampling")


def main(args: argparse.Namespace) -> None:
    """Answers one question, or talks until the user leaves.

    Raises:
        ValueError: the checkpoint, a picture or a setting cannot be used.
    """
    pictures = [open_picture(path) for path in args.image]  # before the model: a wrong name should not cost a minute
    console, notices = Console(highlight=False), Console(stderr=True, highlight=False)
    disable_progress_bar()  # the status line says it already, and --question is read by programs
    with notices.status("loading the model"):
        engine = Engine.load(args.checkpoint, args.device, args.dtype)
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p}
    chat = Chat(engine, console, options, pictures)
    if args.question is not None:
        for note in engine.facts.notes():
            notices.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
        chat.ask(args.question)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  history and line editing for input()
    console.print(_welcome(engine.facts))
    chat.loop()


class Chat:
    """A conversation in the terminal. Only answered questions become part of it.

    Args:
        options: keyword arguments of `Engine.stream`.
        pictures: attached to the first question.
    """

    def __init__(
        self, engine: Engine, console: Console, options: dict[str, Any], pictures: list[Image.Image] | None = None
    ) -> None:
        self.engine = engine
        self.console = console
        self.options = options
        self.turns: list[Turn] = []
        self.images: list[Image.Image] = []
        self.pending = list(pictures or [])

    def loop(self) -> None:
        """Reads lines until /quit or the end of the input."""
        while True:
            try:
                line = input(self._prompt()).strip()
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            if line == "/quit":
                return
            try:
                self._obey(line)
            except ValueError as error:
                self.console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)

    def ask(self, question: str) -> None:
        """Prints the answer as it grows and, if there is one, keeps the exchange.

        Raises:
            ValueError: the question cannot be answered as it was put.
        """
        turns = [*self.turns, user_turn(question, len(self.pending))]
        images = [*self.images, *self.pending]
        answer = self._print_growing(self.engine.stream(turns, images, **self.options))
        if not answer:
            self.console.print("(the model ended its answer without a word)", style="dim")
            return
        self.turns, self.images, self.pending = [*turns, Turn("assistant", answer)], images, []

    def _obey(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if command == "/image":
            self.pending.append(open_picture(_typed_path(argument)))
        elif command == "/clear":
            self.turns, self.images, self.pending = [], [], []
            self.console.print("a new chat", style="dim")
        elif command == "/help":
            self.console.print(HELP, markup=False)
        elif line.startswith("/"):
            raise ChatError(f"unknown command {command}; there are {', '.join(_COMMANDS)}")
        elif line:
            self.ask(line)

    def _print_growing(self, stream: Iterator[str]) -> str:
        answer = ""
        try:
            for text in stream:
                self.console.print(text[len(answer) :], end="", markup=False, soft_wrap=True)
                answer = text
        except KeyboardInterrupt:
            stream.close()  # type: ignore[attr-defined]  # the engine's iterator is a generator
            self.console.print(" (stopped)", end="", style="dim")
        if answer:
            self.console.print()
        return answer

    def _prompt(self) -> str:
        attached = f"[{len(self.pending)} picture{'s' * (len(self.pending) != 1)}] " if self.pending else ""
        if not self.console.is_terminal:
            return f"{attached}you> "
        # built-in input and not rich's, with the colours marked as having no width: readline redraws the line rightly
        return f"{attached}\001\033[1;36m\002you> \001\033[0m\002"


def _typed_path(argument: str) -> Path:
    """A path as people type it or drop it into a terminal: with ~, quotes or escaped spaces."""
    argument = argument.strip()
    if not argument:
        raise ChatError("which picture? /image FILE")
    if Path(argument).expanduser().is_file():
        return Path(argument).expanduser()
    try:
        return Path(" ".join(shlex.split(argument))).expanduser()
    except ValueError:  # a lone quote
        return Path(argument)


def _welcome(facts: ModelFacts) -> Panel:
    body = Text("\n".join(facts.lines()))
    for note in facts.notes():
        body.append(f"\n{note}", style="yellow")
    body.append("\n\n/image FILE attaches a picture, /help lists the commands", style="dim")
    return Panel(body, title=Text(facts.name, style="bold"), title_align="left", border_style="cyan", expand=False)
