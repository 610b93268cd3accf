"""How the programs of this folder end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a program and leaves with its exit code; silently where its reader has left (`... | head`)."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        from llava_moe.cli import leave_broken_pipe  # here only: importing it takes seconds

        leave_broken_pipe()
        raise
    sys.exit(code)
