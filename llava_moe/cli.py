"""The `llava-moe` command. Each sub-command imports what it needs, so `--help` and `doctor` work without the rest."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turns an error about input into one line and exit code 2; LLAVA_MOE_TRACEBACK=1 shows where it arose."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        leave_broken_pipe()
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, FileNotFoundError, PermissionError) as error:
        if os.environ.get("LLAVA_MOE_TRACEBACK") == "1":
            raise
        print(f"error: {error}\n(LLAVA_MOE_TRACEBACK=1 shows the traceback)", file=sys.stderr)
        sys.exit(2)


def leave_broken_pipe() -> None:
    """Ends the process without a word if nobody reads its standard output any more (`... | head`); else does nothing.

    To be called where a BrokenPipeError was caught: that of another pipe or socket is a failure and stays one.
    """
    readers = select.poll()
    readers.register(sys.stdout, select.POLLOUT)
    if any(event & (select.POLLERR | select.POLLHUP) for _, event in readers.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        sys.exit(141)  # 128 + SIGPIPE, what a shell reports of any other program


# These commands declare their arguments in their own modules (or a class in one), imported only when asked for.
_OWN_PARSER = {
    "eval": ("score checkpoints with lmms-eval", "llava_moe.evaluation.run"),
    "chat": ("talk to a checkpoint in the terminal", "llava_moe.serve.cli"),
    "demo": ("talk to a checkpoint in the browser", "llava_moe.serve.gradio_app"),
    "check-data": ("check records and images of a mixture, and write a clean index", "llava_moe.check_data"),
    "import": ("turn a checkpoint of another program into one of ours", "llava_moe.convert:Import"),
    "analyze": ("plots, numbers and alarms of recorded runs", "llava_moe.analysis.cli"),
    "compare": ("train and score methods on several seeds, and say what the differences show", "llava_moe.compare.run"),
    "card": ("put scores or a licence into a checkpoint's model card", "llava_moe.card"),
    "export": ("turn a checkpoint into one that transformers, vLLM and SGLang load", "llava_moe.convert:Export"),
    "merge": ("put the LoRA adapters of a run into their base", "llava_moe.merge"),
}


# Checkpoint in, checkpoint out: (summary, section of the recipe, an override as example, where the result goes).
_MAKERS = {
    "upcycle": (
        "make an MoE checkpoint from a dense one, as a recipe's `upcycle` section says",
        "upcycle",
        "upcycle.decoder.num_experts=8",
        "<output_dir>/upcycled",
    ),
    "grow": (
        "make a larger dense checkpoint from a small one, as a recipe's `grow` section says",
        "grow",
        "grow.target.hidden_size=4096",
        "<output_dir>/grown",
    ),
}
_MAKERS_TEXT = """\
%(prog)s reads a checkpoint and writes another, tensor by tensor: it needs the memory of about one layer, and no GPU.
The result is compared with its parent on real text before it appears; where the method promises to keep the function,
it must. What was done and measured is written beside the weights, as {name}.json.
"""


def making_parser(name: str) -> argparse.ArgumentParser:
    """The arguments of `llava-moe upcycle` or `llava-moe grow`; to be used with `parse_intermixed_args`."""
    summary, section, example, result = _MAKERS[name]
    parser = argparse.ArgumentParser(
        prog=f"llava-moe {name}",
        usage="%(prog)s [--from CHECKPOINT] [--to DIRECTORY] recipe [key=value ...]",
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=_MAKERS_TEXT.replace("{name}", name),
    )
    parser.add_argument("recipe", help="a YAML file; other sections than its own are read and not used")
    parser.add_argument("overrides", nargs="*", help=f"dotted overrides, e.g. {example}")
    parser.add_argument("--from", dest="parent", metavar="CHECKPOINT", help=f"in the place of {section}.parent")
    parser.add_argument("--to", metavar="DIRECTORY", help=f"where the result goes, in the place of {result}")
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llava-moe", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    summary = "run one stage from a recipe (one process; scripts/train/*.sh start several)"
    train = commands.add_parser("train", help=summary)
    train.add_argument("recipe", help="a YAML file under scripts/recipes/")
    train.add_argument("overrides", nargs="*", help="dotted overrides, e.g. train.max_steps=10")
    for name, (summary, *_) in (_MAKERS | _OWN_PARSER).items():
        commands.add_parser(name, help=summary)
    commands.add_parser("doctor", help="what is installed, and what is missing for which feature")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with exit_on_user_error():
        if argv and argv[0] in _OWN_PARSER:
            name, _, inner = _OWN_PARSER[argv[0]][1].partition(":")
            module: Any = importlib.import_module(name)
            module = getattr(module, inner) if inner else module
            parser = argparse.ArgumentParser(prog=f"llava-moe {argv[0]}", description=module.__doc__)
            module.add_arguments(parser)
            module.main(parser.parse_args(argv[1:]))
            return
        if argv and argv[0] in _MAKERS:
            found = making_parser(argv[0]).parse_intermixed_args(argv[1:])
            program = importlib.import_module(f"llava_moe.{argv[0]}")
            program.run(found.recipe, found.overrides, found.parent, found.to)
            return
        arguments = _parser().parse_args(argv)
        if arguments.command == "train":
            from llava_moe.train import main as train

            train(arguments.recipe, arguments.overrides)
        elif arguments.command == "doctor":
            from llava_moe.doctor import main as doctor

            doctor()


if __name__ == "__main__":
    main()
    if "RANK" in os.environ:  # one rank of several, as torchrun starts them
        from llava_moe.training.distributed import leave

        leave(0)
