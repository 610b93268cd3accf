"""What can go wrong in a way that the user can mend."""

from __future__ import annotations

import errno
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)


class PrepareError(RuntimeError):
    """One line for the user: what failed, and what to do."""


class InterruptError(RuntimeError):
    """The user (or a signal) asked to stop; nothing is wrong and everything fetched is kept."""


def explain_os_error(error: OSError, path: Path, doing: str) -> PrepareError:
    """A full disk is common enough to be told from the rest."""
    if error.errno in _FULL:
        return PrepareError(
            f"the disk is full while {doing} {path}: free some space and run again, it goes on where it stood"
        )
    return PrepareError(f"{doing} {path}: {error.strerror or error}")


def readable(size: float) -> str:
    """Bytes for people, in decimal units as the publishers state them."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
