"""Errors that a user can mend. Programs print them as one line and exit with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave is wrong.

    The message is one line and names what was found, what was wanted and what to do.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems send it before they kill: treated as Ctrl-C is."""


def suggest(found: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the nearest known name, else an empty string."""
    near = difflib.get_close_matches(found, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def choice_error(what: str, found: object, known: Iterable[str]) -> UserError:
    """The error for a value outside a fixed list of names."""
    names = sorted(known)
    return UserError(f"unknown {what} {found!r}: choose one of {', '.join(names)}{suggest(str(found), names)}")
