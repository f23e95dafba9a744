"""Weights of the published port of HLR and HLR++ under this program's names.

Source: nlee-208/HLRM, commit de6df3b3 (names and shapes).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from gfml.program.foreign import Source, renamed, require, tables_of

State = dict[str, Tensor]
NAMES = {
    "userattn.key_.weight": "relation.key",
    "userattn.val_.weight": "relation.value",
    "itemattn.key_.weight": "relation.item_key",
    "itemattn.val_.weight": "relation.item_value",
}


def hlrm(state: Mapping[str, Tensor]) -> State:
    """Points of users and items, and keys and values of the port's relation (``--form port``); HLR++ has the item's too."""
    tables = tables_of(state, "user_emb.weight", "item_emb.weight", rest=[re.escape(name) for name in NAMES])
    both = any(name.startswith("itemattn.") for name in state)
    require(state, *(name for name in NAMES if both or name.startswith("userattn.")))
    return tables | renamed({name: value for name, value in state.items() if name in NAMES}, NAMES)


def flags(state: Mapping[str, Tensor], _: str) -> list[str]:
    """The port's form and the sizes of the tables."""
    slots, width = state["userattn.key_.weight"].shape
    kind = "plus" if "itemattn.key_.weight" in state else "base"
    return ["--relation-form=diagonal", f"--hlrm-type={kind}", f"--emb_size={width}", f"--num-relations={slots}"]


SOURCES = {"hlrm": Source(hlrm, program=lambda _: "hlrm.train", flags=flags)}
