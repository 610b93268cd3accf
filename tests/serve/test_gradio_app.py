"""The browser demo: its chat function, and the running page through gradio's own client."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

gr = pytest.importorskip("gradio", reason="the demo extra is not installed")
pytest.importorskip("gradio_client")

from llava_moe.cli import main as llava_moe  # noqa: E402
from llava_moe.data.schema import DataError, Turn  # noqa: E402
from llava_moe.serve.engine import Engine, user_turn  # noqa: E402
from llava_moe.serve.gradio_app import (  # noqa: E402
    DEFAULT_QUESTION,
    NOT_AN_ANSWER,
    answerer,
    appearance,
    build_app,
    find_examples,
    read_history,
)
from tests.tiny import tiny_image, write_llava_json  # noqa: E402

QUESTION = "What colour is the shape?"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    tiny_image(0).save(path)
    return path


def _user(text: str, *files: Path) -> dict[str, Any]:
    parts: list[Any] = [{"type": "file", "file": {"path": str(path)}} for path in files]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}], "metadata": None}


def _model(text: str, title: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}], "metadata": {"title": title}}


def test_history_becomes_turns_and_pictures(picture: Path) -> None:
    turns, images = read_history([_user("one", picture), _model("red"), _user("two"), _model("blue")])
    assert turns == [user_turn("one", 1), Turn("assistant", "red"), user_turn("two"), Turn("assistant", "blue")]
    assert len(images) == 1


def test_raw_messages_of_the_api_are_read_too(picture: Path) -> None:
    history = [{"role": "user", "content": [{"path": str(picture)}, "one"]}, {"role": "assistant", "content": "red"}]
    assert read_history(history)[0] == [user_turn("one", 1), Turn("assistant", "red")]


def test_refused_and_stopped_questions_are_left_out(picture: Path) -> None:
    history = [
        _user("refused", picture), _model("Too long.", NOT_AN_ANSWER), _user("stopped at once"), _model(""),
        _user("one"), _model("red"), _user("stopped before a word"),
    ]  # fmt: skip
    turns, images = read_history(history)
    assert [turn.text for turn in turns] == ["one", "red"]
    assert images == []


def test_chat_function_streams_what_the_engine_says(engine: Engine, picture: Path) -> None:
    message = {"text": QUESTION, "files": [str(picture)]}
    steps = list(answerer(engine)(message, [], 8, 0, 1))
    assert steps == list(engine.stream([user_turn(QUESTION, 1)], [tiny_image(0)], 8))
    follow_up = list(answerer(engine)({"text": "And?"}, [_user(QUESTION, picture), _model("red")], 8, 0, 1))
    turns = [user_turn(QUESTION, 1), Turn("assistant", "red"), user_turn("And?")]
    assert follow_up == list(engine.stream(turns, [tiny_image(0)], 8))


@pytest.mark.parametrize(
    ("message", "tokens", "says"),
    [
        ({"text": "", "files": []}, 8, "There is no question"),
        ({"text": "what?", "files": ["gone.png"]}, 8, "Gone.png: no such file"),
        ({"text": "a" * 400, "files": []}, 8, "too long"),
        ({"text": "what?", "files": []}, 0, "at least 1"),
    ],
)
def test_errors_are_messages_in_the_chat(engine: Engine, message: dict[str, Any], tokens: int, says: str) -> None:
    (refusal,) = answerer(engine)(message, [], tokens, 0, 1)
    assert says in refusal["content"]
    assert refusal["metadata"]["title"] == NOT_AN_ANSWER


def test_faults_of_the_program_are_not_hidden(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> Iterator[str]:
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine, "stream", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        list(answerer(engine)({"text": "Hi"}, [], 8, 0, 1))


def test_examples_from_pictures_or_records(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        find_examples(tmp_path / "gone")
    with pytest.raises(DataError, match="no sample pictures"):
        find_examples(tmp_path)
    tiny_image(0).save(tmp_path / "b.png")
    tiny_image(1).save(tmp_path / "a.jpg")
    assert find_examples(tmp_path) == [(tmp_path / name, DEFAULT_QUESTION) for name in ("a.jpg", "b.png")]
    data, images = write_llava_json(tmp_path / "records", 8)
    (images / "examples.json").write_bytes(data.read_bytes())
    assert find_examples(images) == [(images / f"{index}.png", QUESTION) for index in range(6)]


def test_a_broken_sample_picture_is_found_before_the_page_opens(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(ValueError, match=r"a\.png cannot be read"):
        find_examples(tmp_path)


def test_taken_port_is_one_line(moe_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit):
            llava_moe(["demo", str(moe_checkpoint), "--port", str(port)])
    assert f"port {port} cannot be used" in capsys.readouterr().err


def test_fonts_and_styles_are_not_fetched() -> None:
    theme = appearance()["theme"]
    assert theme._stylesheets == []
    assert "http" not in appearance()["css"] + theme._get_theme_css().replace("http://www.w3.org", "")


def test_running_page_answers_a_client_over_several_turns(engine: Engine, picture: Path) -> None:
    from gradio_client import Client, handle_file

    app = build_app(engine, [(picture, QUESTION)])
    _, url, _ = app.launch(
        server_name="127.0.0.1",
        prevent_thread_lock=True,
        quiet=True,
        allowed_paths=[str(picture.parent)],
        **appearance(),
    )
    try:
        client = Client(url, verbose=False)
        settings = [8, 0, 1]
        message = {"text": QUESTION, "files": [handle_file(str(picture))]}
        job = client.submit(message, *settings, api_name="/chat")
        first = [user_turn(QUESTION, 1)]
        expected = list(engine.stream(first, [tiny_image(0)], 8))
        assert job.result() == expected[-1]
        assert job.outputs() == expected
        turns = [*first, Turn("assistant", expected[-1]), user_turn("And?")]
        answer = client.predict({"text": "And?", "files": []}, *settings, api_name="/chat")
        assert answer == list(engine.stream(turns, [tiny_image(0)], 8))[-1]
    finally:
        app.close()
