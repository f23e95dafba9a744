"""Roles in docstrings, such as :func:`fit`, as references that the site checks."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(func|class|meth|mod|attr|data):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Every role becomes a reference to the object's full name; a name that nothing has stays as it is and fails the build."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return

        def reference(found: re.Match[str]) -> str:
            kind, name = found[1], found[2]
            if kind == "data" or name.rpartition(".")[2].startswith("_"):  # these have no entry of their own
                return f"`{name}`"
            return f"[`{name.rpartition('.')[2]}`][{name if name.startswith('gfml.') else _full_name(name, obj)}]"

        obj.docstring.value = ROLE.sub(reference, obj.docstring.value)


def _full_name(name: str, obj: griffe.Object) -> str:
    """Where a name stands: in the object, its class or its module, or where the module imports it from."""
    scope: griffe.Object | None = obj
    while scope is not None:
        first, _, rest = name.partition(".")
        if first in scope.members:
            member = scope.members[first]
            path = member.target_path if member.is_alias else member.path
            return f"{path}.{rest}" if rest else path
        scope = scope.parent
    return name
