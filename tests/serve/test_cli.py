"""The terminal chat, driven as a user types."""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llava_moe.cli import main as llava_moe
from llava_moe.data.schema import Turn
from llava_moe.serve import cli
from llava_moe.serve.engine import Engine, user_turn
from tests.tiny import tiny_image

Talk = Callable[..., tuple[str, cli.Chat]]


class EchoEngine:
    """Answers with what it was asked: the number of turns and pictures, and the last question."""

    def stream(self, turns: list[Turn], images: list[Any], **options: Any) -> Iterator[str]:
        question = turns[-1].text.replace("<image>\n", "")
        if question == "interrupt":
            yield "half of an"
            raise KeyboardInterrupt
        if question == "silence":
            return
        yield f"[{len(turns)}t"
        yield f"[{len(turns)}t {len(images)}p] {question}"


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> Talk:
    def run(*lines: str) -> tuple[str, cli.Chat]:
        given = iter(lines)

        def typed(prompt: str) -> str:
            try:
                return next(given)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", typed)
        out = io.StringIO()
        chat = cli.Chat(EchoEngine(), Console(file=out, width=200), {})  # type: ignore[arg-type]
        chat.loop()
        return out.getvalue(), chat

    return run


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "my picture.png"
    tiny_image(0).save(path)
    return path


def test_turns_and_pictures_add_up(talk: Talk, picture: Path) -> None:
    out, chat = talk(f"/image {picture}", "one", "two", f"/image '{picture}'", "three", "/quit", "never")
    assert "[1t 1p] one\n" in out
    assert "[3t 1p] two\n" in out
    assert "[5t 2p] three\n" in out
    assert "never" not in out
    assert [turn.text.count("<image>") for turn in chat.turns] == [1, 0, 0, 0, 1, 0]


def test_clear_forgets_everything(talk: Talk, picture: Path) -> None:
    out, _ = talk(f"/image {picture}", "one", f"/image {picture}", "/clear", "two")
    assert "[1t 0p] two" in out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/image gone.png", "error: gone.png: no such file"),
        ("/image", "which picture"),
        ("/imagine x", "unknown command /imagine"),
        ('/image "half', "no such file"),
        ("draw <image>", "attach a picture"),
    ],
)
def test_mistakes_cost_one_line_and_the_chat_goes_on(talk: Talk, line: str, says: str) -> None:
    out, chat = talk(line, "one")
    mistake, answer = out.splitlines()[:2]
    assert says in mistake
    assert answer == "[1t 0p] one"
    assert len(chat.turns) == 2


def test_an_unreadable_picture_is_not_kept(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("text")
    out, chat = talk(f"/image {tmp_path / 'x.png'}", "one")
    assert "cannot be read as a picture" in out
    assert chat.images == []


def test_interrupt_keeps_what_was_said_and_silence_is_no_turn(talk: Talk) -> None:
    out, chat = talk("interrupt", "silence", "one")
    assert "half of an (stopped)" in out
    assert "without a word" in out
    assert [turn.text for turn in chat.turns] == ["interrupt", "half of an", "one", "[3t 0p] one"]


def test_markup_in_answers_is_shown_as_it_is(talk: Talk) -> None:
    out, _ = talk("[bold]x[/bold]", "/help")
    assert "[bold]x[/bold]" in out
    assert "/image FILE" in out


def test_question_prints_the_answer_alone(
    lively_checkpoint: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = "What colour is the shape?"
    argv = [str(lively_checkpoint), "--image", str(picture), "--question", question, "--max-new-tokens", "8"]
    llava_moe(["chat", *argv, "--device", "cpu"])
    engine = Engine.load(lively_checkpoint, device="cpu")
    expected = list(engine.stream([user_turn(question, 1)], [tiny_image(0)], 8))[-1]
    assert expected != list(engine.stream([user_turn(question)], (), 8))[-1], "the picture makes no difference"
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nowhere", "--question", "Hi"], "nowhere is not a directory"),
        (["{checkpoint}", "--question", "Hi", "--image", "gone.png"], "gone.png: no such file"),
        (["{checkpoint}", "--question", "Hi", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["{checkpoint}", "--question", " "], "no question"),
    ],
)
def test_wrong_arguments_end_with_one_line(
    moe_checkpoint: Path, argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        llava_moe(["chat", *[argument.format(checkpoint=moe_checkpoint) for argument in argv]])
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""


def test_welcome_names_the_model_and_what_it_is_not(
    dense_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut(*args: Any) -> Engine:
        engine = Engine.load(dense_checkpoint, device="cpu")
        engine.model.config.text_config.source_blocks = [0, 1]
        return Engine(engine.model, engine.processor, "some/name")

    monkeypatch.setattr(cli, "Engine", argparse.Namespace(load=cut))
    monkeypatch.setattr("builtins.input", lambda prompt: "/quit")
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    cli.main(parser.parse_args([str(dense_checkpoint)]))
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "some/name" in out
    assert "not a general chat model" in out
