"""The contract of an analysis: arguments in, files out."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar


class AnalysisError(ValueError):
    """What was asked for cannot be analysed; the message names the culprit and the remedy."""


class Analysis(ABC):
    """One kind of analysis, `llava-moe analyze NAME`.

    Attributes:
        summary: one line for the help.
    """

    summary: ClassVar[str]

    @staticmethod
    @abstractmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declares its arguments."""

    @staticmethod
    @abstractmethod
    def run(arguments: argparse.Namespace) -> Path:
        """Writes what it finds and returns the file to look at first.

        Raises:
            AnalysisError: the input cannot be analysed.
        """


def need_matplotlib() -> None:
    """Called before anything is read.

    Raises:
        AnalysisError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise AnalysisError(
            "plots need matplotlib, which is not installed: pip install 'llava-moe[analysis]'"
        ) from error
