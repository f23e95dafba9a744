"""GFML core: metric learning with a gravity function.

Importing this package does no work. ``gfml.Gravity`` and the other parts listed by ``dir(gfml)`` are imported when they are
first asked for; everything else by its module, for example ``from gfml.losses import bpr``. A finished run is ready to use
in one line: ``gfml.load(RUN)``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gfml.attention import AttentionSettings, replace_attention
    from gfml.data.options import load_dataset
    from gfml.distances import SquaredDistance
    from gfml.engine.train import fit
    from gfml.gravity import Gravity, GravityScorer, Mass
    from gfml.mirror import MirrorGradient
    from gfml.program.loading import load
    from gfml.ranking.evaluation import evaluate
    from gfml.ranking.topk import topk_items

__version__ = "0.1.0"
__all__ = [
    "AttentionSettings", "Gravity", "GravityScorer", "Mass", "MirrorGradient", "SquaredDistance", "evaluate", "fit",
    "load", "load_dataset", "replace_attention", "topk_items",
]  # fmt: skip
_PLACES = {
    "gfml.attention": ("AttentionSettings", "replace_attention"),
    "gfml.data.options": ("load_dataset",),
    "gfml.distances": ("SquaredDistance",),
    "gfml.engine.train": ("fit",),
    "gfml.gravity": ("Gravity", "GravityScorer", "Mass"),
    "gfml.mirror": ("MirrorGradient",),
    "gfml.program.loading": ("load",),
    "gfml.ranking.evaluation": ("evaluate",),
    "gfml.ranking.topk": ("topk_items",),
}
_MODULES = ("attention", "cml", "distances", "gravity", "longtail", "losses", "metrics", "mirror", "ranking")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"gfml.{name}")
    for module, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'gfml' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
