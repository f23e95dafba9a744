"""Other programs' names of weights become ours: the parts that the papers' ``foreign.py`` share.

Each declares ``SOURCES``, a :class:`Source` for every program whose files it reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gfml.base.errors import UserError

State = dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """How files of one program are taken over.

    convert: from its names to ours. score: how it ranks tables of users and items, "" where a file is no such tables.
    program: the module that judges other files, "" for tables. flags: what the file says of its flags, from its own tensors
    and its path; flags of the user follow and win. assumed: settings that change figures and that no file
    tells. unread: the names of the file that nothing here reads.
    """

    convert: Callable[[Mapping[str, Tensor]], State]
    score: str = ""
    program: Callable[[Mapping[str, Tensor]], str] = lambda _: ""
    flags: Callable[[Mapping[str, Tensor], str], Sequence[str]] = lambda *_: ()
    assumed: Sequence[str] = ()
    unread: Callable[[Mapping[str, Tensor]], Sequence[str]] = lambda _: ()


def load_named(model: nn.Module, state: Mapping[str, Tensor], origin: object, name: str = "the model") -> nn.Module:
    """Put named tensors into the model, in eval mode. UserError where names or shapes are another model's."""
    wanted = model.state_dict()
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unknown:
        found = f"{origin} lacks {', '.join(missing[:3]) or 'nothing'} and has {', '.join(unknown[:3]) or 'nothing'} beyond {name}'s"
        raise UserError(f"{found}: give the --model and the hyper-parameters it was trained with")
    other = next((key for key, value in wanted.items() if state[key].shape != value.shape), None)
    if other is not None:
        shapes = f"{other} {tuple(state[other].shape)}, wanted {tuple(wanted[other].shape)}"
        raise UserError(f"{origin} has {shapes}: give the --dataset and the hyper-parameters it was trained with")
    model.load_state_dict(state)
    return model.eval()


def matching(pattern: str) -> Callable[[Mapping[str, Tensor]], list[str]]:
    """Which names of a file the pattern matches as a whole."""
    return lambda state: [name for name in state if re.fullmatch(pattern, name)]


def require(state: Mapping[str, Tensor], *names: str) -> None:
    """UserError for a file that lacks one of the names."""
    if (missing := next((name for name in names if name not in state), None)) is not None:
        listed = ", ".join(list(state)[:4])
        raise UserError(f"the file lacks {missing} (it has {listed}): give a whole file, or choose another --from")


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> State:
    """The tensors under new names: pattern of the whole old name -> new name, "" for what is left out.

    UserError for a name that no pattern knows, and for a pattern with a new name that nothing matches only where nothing
    at all does.
    """
    found: State = {}
    for old, value in state.items():
        pattern = next((pattern for pattern in names if re.fullmatch(pattern, old)), None)
        if pattern is None:
            raise UserError(f"the file has {old}, which is no name of that program: give one of its files")
        new = re.sub(pattern, names[pattern], old)
        if new:
            found[new] = value
    return found


def tables_of(state: Mapping[str, Tensor], user: str, item: str, *, rest: Sequence[str]) -> State:
    """{"encoder.nodes": [U + I, D]} from two tables. rest: patterns of further names the file may have."""
    require(state, user, item)
    if state[user].ndim != 2 or state[user].shape[1:] != state[item].shape[1:]:
        shapes = f"{tuple(state[user].shape)} and {tuple(state[item].shape)}"
        raise UserError(
            f"the tables {user} and {item} have shapes {shapes}, wanted [U, D] and [I, D]: give another file"
        )
    known = "|".join([re.escape(user), re.escape(item), *rest])
    other = next((name for name in state if not re.fullmatch(known, name)), None)
    if other is not None:
        raise UserError(f"the file has {other}, which is no name of that program: give one of its files")
    return {"encoder.nodes": torch.cat([state[user], state[item]]).float()}


def masses_of(state: Mapping[str, Tensor], num_users: int, num_items: int) -> State:
    """Raw masses [U, 1], [I, 1] as ``gravity.mass.user`` [U] and ``gravity.mass.item`` [I].

    A lone ``mass.weight`` is the users' or the items' by its length. UserError where it could be either or neither.
    """
    sides = {"mass_u.weight": "user", "mass_i.weight": "item"}
    if "mass.weight" in state:
        length = len(state["mass.weight"])
        if num_users == num_items or length not in (num_users, num_items):
            raise UserError(
                f"mass.weight has {length} rows beside {num_users} users and {num_items} items: whose they are is unclear"
            )
        sides["mass.weight"] = "user" if length == num_users else "item"
    found = {f"gravity.mass.{side}": state[name].reshape(-1).float() for name, side in sides.items() if name in state}
    for name, value in found.items():
        wanted = num_users if name.endswith("user") else num_items
        if len(value) != wanted:
            raise UserError(f"{name} has {len(value)} entries, wanted {wanted}: give another file")
    return found
