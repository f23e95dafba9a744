"""Errors that a user can mend. Programs print them as one line and exit with code 2."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave is wrong.

    The message is one line and names what was found, what was wanted and what to do. A setting stands in it by its name
    and, where there is one, a value, between backquotes; a program prints it as its flag (:func:`as_flags`).
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems send it before they kill: treated as Ctrl-C is."""


def as_flags(message: str) -> str:
    """A message with its settings as flags of a command line.

    Examples:
        >>> as_flags("mend `val_ratio`, or give `split time` and `header False`")
        'mend --val-ratio, or give --split time and --no-header'
    """

    def flag(found: re.Match[str]) -> str:
        name, value = found[1].replace("_", "-"), found[2] or ""
        return f"--no-{name}" if value == "False" else f"--{name} {value}".rstrip()

    return re.sub(r"`([a-z][a-z0-9_]*)(?: ([^`]*))?`", flag, message)


def suggest(found: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the nearest known name, else an empty string."""
    near = difflib.get_close_matches(found, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def choice_error(what: str, found: object, known: Iterable[str]) -> UserError:
    """The error for a value outside a fixed list of names."""
    names = sorted(known)
    return UserError(f"unknown {what} {found!r}: choose one of {', '.join(names)}{suggest(str(found), names)}")
