"""GFML core: metric learning with a gravity function.

Importing this package does no work; import the part you need, for example
``from gfml.gravity import Gravity``. A finished run is ready to use in one line, ``gfml.load(RUN)``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gfml.program.loading import Loaded

__version__ = "0.1.0"


def load(path: str | os.PathLike[str], **where: Any) -> Loaded:
    """A finished run with its settings, data and trained model; see :func:`gfml.program.loading.load`."""
    from gfml.program.loading import load as found

    return found(path, **where)
