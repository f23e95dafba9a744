"""Weights of MCL's program, and of its gravity version, under this program's names.

Sources: layer6ai-labs/MCL, commit c60e3076; MLAI-Yonsei/GFML, MCL 77b3e940 (names and shapes).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gfml.program.foreign import Source, masses_of, tables_of

State = dict[str, Tensor]


def mcl(state: Mapping[str, Tensor]) -> State:
    """``embedding_user``, ``embedding_item`` and, of the gravity version, the raw masses ``mass_u``, ``mass_i``."""
    tables = tables_of(state, "embedding_user.weight", "embedding_item.weight", rest=(r"mass_[ui]\.weight",))
    return tables | masses_of(state, len(state["embedding_user.weight"]), len(state["embedding_item.weight"]))


SOURCES = {"mcl": Source(mcl, "distance")}
