"""Analyses of recorded runs and routings; each writes a page, numbers and a short text."""

from __future__ import annotations

import argparse

from llava_moe.analysis import ANALYSES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command for each analysis."""
    commands = parser.add_subparsers(dest="analysis", required=True, metavar="ANALYSIS")
    for name in ANALYSES:
        analysis = ANALYSES.get(name)
        inner = commands.add_parser(name, help=analysis.summary, description=analysis.__doc__)
        analysis.add_arguments(inner)


def main(arguments: argparse.Namespace) -> None:
    """Runs the one that was asked for."""
    first = ANALYSES.get(arguments.analysis).run(arguments)
    print(f"analyze: {first}")
