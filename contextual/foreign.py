"""Weights of the published contextual-similarity programs under this program's names.

Source: Chris210634/metric-learning-using-contextual-similarity, commit 8433dcb6: the 256 pipeline's files are whole pickled
modules (names ``backbone.``, ``remap.``), the 224 pipeline's hold ``model_state_dict`` (``model.``, ``model.embedding.``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from gfml.program.foreign import renamed

State = dict[str, Tensor]
PIPELINES = {
    "256": {r"backbone\.(?!fc\.)(.+)": r"backbone.\1", r"remap\.(weight|bias)": r"head.\1"},
    "224": {
        r"model\.(?!fc\.|embedding\.)(.+)": r"backbone.\1",
        r"model\.embedding\.(weight|bias)": r"head.\1",
        r"model\.fc\.(weight|bias)": "",  # ImageNet's classifier, which nothing reads
    },
}


def contextual(state: Mapping[str, Tensor]) -> State:
    """Backbone and head of either pipeline; the training-only bottleneck is in no file."""
    return renamed(state, PIPELINES["256" if "remap.weight" in state else "224"])


SOURCES: Mapping[str, tuple[Callable[[Mapping[str, Tensor]], State], str]] = {"contextual": (contextual, "")}
