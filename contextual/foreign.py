"""Weights of the published contextual-similarity programs under this program's names.

Source: Chris210634/metric-learning-using-contextual-similarity, commit 8433dcb6: the 256 pipeline's files are whole pickled
modules (names ``backbone.``, ``remap.``), the 224 pipeline's hold ``model_state_dict`` (``model.``, ``model.embedding.``).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gfml.program.foreign import Source, matching, renamed, require

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
    pipeline, head = ("256", "remap") if "remap.weight" in state else ("224", "model.embedding")
    ours = renamed(state, PIPELINES[pipeline])
    require(state, f"{head}.weight", f"{head}.bias")
    return ours


def flags(state: Mapping[str, Tensor], _: str) -> list[str]:
    """The width, and the pooling of the 224 pipeline's files; that of the 256 pipeline is the data set's."""
    of_256 = "remap.weight" in state
    width = len(state["remap.bias" if of_256 else "model.embedding.bias"])
    known = [
        "--backbone=resnet50",
        "--pretrained=0",
        f"--embedding-size={width}",
        "--select-on=test",
        "--baselines=none",
    ]
    return known if of_256 else [*known, "--pooling=maxavg"]


def program(state: Mapping[str, Tensor]) -> str:
    """The pipeline that the file is of."""
    return "contextual.main" if "remap.weight" in state else "contextual.train"


SOURCES = {
    "contextual": Source(
        contextual, program=program, flags=flags, assumed=("pooling", "layer_norm"), unread=matching(r"model\.fc\..+")
    )
}
