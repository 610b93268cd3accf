"""Renews a checkpoint's model card (README.md): scores that `llava-moe eval` wrote, and a licence.

The card itself is written with the checkpoint. Scores are taken only if they are those of this very checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llava_moe.evaluation import EvaluationError, records
from llava_moe.model_card import CARD, add_scores, set_license


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `llava-moe card`."""
    parser.add_argument("checkpoint", type=Path, help="a checkpoint directory with a card")
    parser.add_argument(
        "--scores",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIRECTORY",
        help="what `llava-moe eval --out` was given; several are put together, and later ones win",
    )
    parser.add_argument("--license", metavar="ID", help="as on the hub, e.g. apache-2.0")


def main(arguments: argparse.Namespace) -> None:
    """`llava-moe card CHECKPOINT [--scores DIRECTORY ...] [--license ID]`."""
    if not arguments.scores and arguments.license is None:
        raise EvaluationError("nothing to do: give --scores, --license, or both")
    if arguments.license is not None:
        set_license(arguments.checkpoint, arguments.license)
    for folder in arguments.scores:
        put_scores(arguments.checkpoint, folder)
    print(f"card: {arguments.checkpoint / CARD}")


def put_scores(checkpoint: Path, folder: Path) -> None:
    """Takes the scores of one evaluation into the card.

    Raises:
        EvaluationError: there are none, or they are those of another checkpoint or of another state of this one.
        CheckpointError: the checkpoint has no card of ours.
    """
    file = folder / records.RESULTS_FILE
    if not file.is_file():
        raise EvaluationError(f"--scores {folder}: no {records.RESULTS_FILE} there; name what --out was given")
    results = records.read_json(file)
    if results["checkpoint_sha256"] != records.sha256_of(records.checkpoint_files(checkpoint)):
        raise EvaluationError(f"{file}: are scores of {results['checkpoint']}, and not of {checkpoint} as it is now")
    add_scores(checkpoint, results)
