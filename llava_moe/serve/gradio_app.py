"""Talk to a checkpoint in the browser."""

from __future__ import annotations

import argparse
import html
import os
import socket
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

# Before gradio is imported: it reads these at import, and the demo talks to nobody but the browser.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gradio as gr
from PIL import Image

from llava_moe.data.schema import DataError, Turn, load_records, parse_record
from llava_moe.serve.engine import (
    DEFAULT_MAX_NEW_TOKENS,
    ChatError,
    Engine,
    ModelFacts,
    add_engine_arguments,
    open_picture,
    user_turn,
)

HOST = "127.0.0.1"
EXAMPLES_FILE = "examples.json"
DEFAULT_QUESTION = "What is in this picture?"
MAX_EXAMPLES = 6
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_FONT = [gr.themes.Font(name) for name in ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")]
_MONO = [gr.themes.Font(name) for name in ("ui-monospace", "Menlo", "Consolas", "monospace")]
# A message with this title is no answer of the model, and is left out of what the model reads next.
NOT_AN_ANSWER = "Not answered"

_CAUTION = "<p>Answers are made by a model and may be wrong. Pictures and questions stay on this computer.</p>"

Message = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `llava-moe demo`."""
    add_engine_arguments(parser)
    parser.add_argument("--port", type=int, default=7860, help="on 127.0.0.1 (default: 7860)")
    parser.add_argument(
        "--examples",
        type=Path,
        metavar="DIR",
        help=f"folder with sample pictures; {EXAMPLES_FILE} in it (LLaVA records) may hold the questions",
    )


def main(args: argparse.Namespace) -> None:
    """Serves the demo until it is interrupted.

    Raises:
        ValueError: the port is taken, or the checkpoint or the examples cannot be used.
    """
    _check_port(args.port)  # before the model: it may take minutes to load
    examples = find_examples(args.examples) if args.examples else []
    app = build_app(Engine.load(args.checkpoint, args.device, args.dtype), examples)
    print(f"open http://{HOST}:{args.port} in a browser; Ctrl-C ends the demo", flush=True)
    app.launch(
        server_name=HOST,
        server_port=args.port,
        share=False,
        inbrowser=False,
        quiet=True,
        show_error=True,
        run_history=False,
        footer_links=["api", "settings"],
        allowed_paths=[str(args.examples.resolve())] if args.examples else None,
        **appearance(),
    )


def appearance() -> dict[str, Any]:
    """Arguments of `launch` for theme and style sheet; fonts are the system's, so that nothing is fetched."""
    theme = gr.themes.Soft(
        primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=_FONT, font_mono=_MONO, radius_size="lg"
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_border_width="1px",
        block_shadow="none",
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_padding="0",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_text_weight="500",
    )
    return {"theme": theme, "css": resources.files("llava_moe.serve").joinpath("demo.css").read_text("utf-8")}


def find_examples(folder: Path) -> list[tuple[Path, str]]:
    """Sample pictures with a question each.

    Args:
        folder: holds pictures and may hold examples.json, whose records say which are shown and what is asked.

    Raises:
        DataError: there is no such folder, it holds no picture, or a record is wrong.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of sample pictures")
    if (folder / EXAMPLES_FILE).is_file():
        path = folder / EXAMPLES_FILE
        samples = [parse_record(record, folder, str(path)) for record in load_records(path)[:MAX_EXAMPLES]]
        asked = [next(turn.text for turn in sample.turns if turn.role == "user") for sample in samples]
        pairs = [(s.images[0], text) for s, text in zip(samples, asked, strict=True) if len(s.images) == 1]
        found = [(picture, text.replace("<image>", "").strip()) for picture, text in pairs]
    else:
        pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICTURE_SUFFIXES)
        found = [(path, DEFAULT_QUESTION) for path in pictures[:MAX_EXAMPLES]]
    if not found:
        raise DataError(f"{folder}: holds no sample pictures ({', '.join(_PICTURE_SUFFIXES)})")
    for picture, _ in found:
        open_picture(picture)
    return found


def build_app(engine: Engine, examples: list[tuple[Path, str]]) -> gr.Blocks:
    """The page: a header with the model's facts and what it is not, the chat, and settings.

    The chat is an endpoint for `gradio_client` too, under the name /chat.
    """
    facts = engine.facts
    with gr.Blocks(title=f"{facts.name} · LLaVA-MoE", fill_height=True, delete_cache=(86400, 86400)) as app:
        with gr.Row(elem_id="head"):
            gr.HTML(_header(facts), elem_id="facts")
            clear = gr.Button("New chat", elem_id="new-chat", size="sm", scale=0)
        gr.HTML(_notes(facts), elem_id="notes", visible=bool(facts.notes()))
        # all of these are rendered inside ChatInterface
        chat = gr.ChatInterface(
            answerer(engine),
            multimodal=True,
            chatbot=_chatbot(has_examples=bool(examples)),
            textbox=_question_box(),
            additional_inputs=_settings(),
            additional_inputs_accordion=gr.Accordion("Settings", open=False, elem_id="settings", render=False),
            examples=[[{"text": question, "files": [str(path)]}] for path, question in examples] or None,
            cache_examples=False,
            concurrency_limit=1,
            api_name="chat",
            api_description="Answers a question about pictures; streams the answer so far.",
        )
        gr.HTML(_CAUTION, elem_id="honesty")
        clear.click(lambda: ([], []), None, [chat.chatbot, chat.chatbot_state], api_visibility="private", queue=False)
    return app


def _chatbot(has_examples: bool) -> gr.Chatbot:
    return gr.Chatbot(
        show_label=False,
        height="max(320px, calc(100dvh - 376px))",  # the rest of the page, so that the question is always in sight
        placeholder=_placeholder(has_examples),
        buttons=["copy"],
        allow_file_downloads=False,
        elem_id="chat",
        render=False,
    )


def _question_box() -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(
        file_types=["image"],
        file_count="multiple",
        sources=["upload"],
        placeholder="Add a picture and ask about it",
        show_label=False,
        autofocus=True,
        stop_btn=True,
        elem_id="question",
        render=False,
    )


def _settings() -> list[Any]:
    return [
        gr.Slider(1, 512, value=DEFAULT_MAX_NEW_TOKENS, step=1, label="Longest answer", info="In tokens", render=False),
        gr.Slider(
            0, 1.5, value=0, step=0.05, label="Temperature", info="0 always takes the likeliest word", render=False
        ),
        gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p", info="Matters only with a temperature", render=False),
    ]


def answerer(engine: Engine) -> Any:
    """The chat function: (message, history, settings) -> the answer so far, again and again."""

    def answer(
        message: Message, history: list[Message], max_new_tokens: int, temperature: float, top_p: float
    ) -> Iterator[str | Message]:
        spoken = False
        try:
            turns, images = read_history(history)
            pictures = [open_picture(Path(name)) for name in message.get("files") or []]
            turns.append(user_turn(message.get("text") or "", len(pictures)))
            for text in engine.stream(turns, [*images, *pictures], int(max_new_tokens), temperature, top_p):
                spoken = True
                yield text
        except ValueError as error:
            yield _refusal(str(error))
            return
        if not spoken:
            yield _refusal("the model ended its answer without a word")

    return answer


def read_history(history: list[Message]) -> tuple[list[Turn], list[Image.Image]]:
    """Turns and pictures of the exchanges that were answered; a refused or stopped question is left out.

    Args:
        history: messages as gradio keeps them, whose content is a text or a list of texts and files.

    Raises:
        ChatError: a picture of the chat is no longer there.
    """
    turns: list[Turn] = []
    images: list[Image.Image] = []
    asked: list[Message] = []
    for message in history:
        if message["role"] == "user":
            asked.append(message)
            continue
        texts, _ = _parts([message])
        if asked and texts and (message.get("metadata") or {}).get("title") != NOT_AN_ANSWER:
            questions, files = _parts(asked)
            images += [open_picture(path) for path in files]
            turns += [user_turn("\n".join(questions), len(files)), Turn("assistant", "\n".join(texts))]
        asked = []
    return turns, images


def _parts(messages: list[Message]) -> tuple[list[str], list[Path]]:
    texts: list[str] = []
    files: list[Path] = []
    for message in messages:
        content = message["content"]
        for part in content if isinstance(content, list) else [content]:
            if isinstance(part, str):
                texts.append(part)
            elif part.get("type") == "text":
                texts.append(part["text"])
            else:
                files.append(Path((part.get("file") or part)["path"]))
    return [text for text in texts if text.strip()], files


def _refusal(reason: str) -> Message:
    return {"role": "assistant", "content": reason[:1].upper() + reason[1:], "metadata": {"title": NOT_AN_ANSWER}}


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a demo that just ended blocks its port
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise ChatError(f"port {port} cannot be used ({error}); choose another one with --port") from error


def _header(facts: ModelFacts) -> str:
    chips = "".join(f"<li>{html.escape(line)}</li>" for line in facts.lines())
    return f"<header><h1>{html.escape(facts.name)}</h1><ul class='chips'>{chips}</ul></header>"


def _notes(facts: ModelFacts) -> str:
    return "".join(f"<p class='note'>{html.escape(note)}</p>" for note in facts.notes())


def _placeholder(has_examples: bool) -> str:
    hint = "or start with one of these" if has_examples else "then ask as many questions as you like"
    return f"<div class='empty'><h2>Show me a picture</h2><p>Drop, paste or upload one below, {hint}.</p></div>"
