"""Weights of LightGCN-PyTorch and of the published gravity programs under this program's names.

Sources: gusye1234/LightGCN-PyTorch, commit 947ca2b3b1d2; MLAI-Yonsei/GFML, gfml-rs 918c2359 and 47e83520 (names and shapes).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gfml.program.foreign import Source, masses_of, matching, tables_of

State = dict[str, Tensor]
FEATURES = r"feat_extract_model\..+"


def lightgcn(state: Mapping[str, Tensor]) -> State:
    """``embedding_user``, ``embedding_item`` of either of its models; the graph and the layers are not in the file."""
    return tables_of(state, "embedding_user.weight", "embedding_item.weight", rest=())


def gravity(state: Mapping[str, Tensor]) -> State:
    """The tables of mf, lgn and cml, with raw masses of users, items or both where there are any."""
    if "user_embeddings.weight" in state:
        return tables_of(state, "user_embeddings.weight", "item_embeddings.weight", rest=(FEATURES,))
    tables = tables_of(state, "embedding_user.weight", "embedding_item.weight", rest=(r"mass(_[ui])?\.weight",))
    return tables | masses_of(state, len(state["embedding_user.weight"]), len(state["embedding_item.weight"]))


# What a file is from, and by which score its program ranks where it has no masses.
SOURCES = {"lightgcn": Source(lightgcn, "dot"), "gfml": Source(gravity, "dot", unread=matching(FEATURES))}
