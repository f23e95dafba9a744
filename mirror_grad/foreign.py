"""Weights of Mirror-Gradient's and MMRec's own programs: their names become ours, and what such a file lacks is said.

Such a file holds named tensors alone. Widths are read from the shapes; settings that no shape tells (layer counts, sizes of
neighbour lists) are the flags', by default the first value of the published search, and are printed. Tables and filled-up
neighbour lists that the originals draw after their seed and never train are drawn again, in their order.
Checked with files that the original programs wrote: equal scores for all thirteen models.
Source: Qrange-group/Mirror-Gradient, commit a28908d95ef9 (names, shapes, draws); enoche/MMRec has the same names.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from gfml.base.errors import UserError
from gfml.program.foreign import Source

if TYPE_CHECKING:
    from mirror_grad.data import MultimodalData

State = dict[str, Tensor]
USERS, ITEMS = "tables.nodes/users", "tables.nodes/items"
DROP = ""  # read by nothing that scores
_FEATURES = {
    r"(image|text)_embedding\.weight": r"features.\1.table",
    r"(image|text)_trs\.(weight|bias)": r"features.\1.linear.\2",
}
_NODES = {r"user_embedding\.weight": USERS, r"item_id_embedding\.weight": ITEMS, **_FEATURES}
_BRANCHES = {
    r"weight_u": "user_weight",
    r"[vt]_preference|MLP_v\.weight|MLP_t\.weight|MLP_user\.(weight|bias)": DROP,
    r"([vt])_gcn\.preference": r"branches.\1.preference",
    r"([vt])_gcn\.MLP\.(weight|bias)": r"branches.\1.mlp.0.\2",
    r"([vt])_gcn\.MLP_1\.(weight|bias)": r"branches.\1.mlp.2.\2",
}
# Per model: what a name of theirs is here. "v" and "t" become image and text, "c" collab, "#n" the number n less one;
# a weight behind "^" is transposed.
NAMES: Mapping[str, Mapping[str, str]] = {
    "VBPR": {r"u_embedding": "user", r"i_embedding": "item", r"item_linear\.(weight|bias)": r"features.linear.\1"},
    "BM3": {**_NODES, r"predictor\.(weight|bias)": r"predictor.\1"},
    "FREEDOM": _NODES,
    "LATTICE": {**_NODES, r"modal_weight": "modal_weight"},
    "LayerGCN": {r"user_embeddings": USERS, r"item_embeddings": ITEMS},
    "SELFCFED_LGN": {
        r"online_encoder\.embedding_dict\.user_emb": USERS,
        r"online_encoder\.embedding_dict\.item_emb": ITEMS,
        r"predictor\.(weight|bias)": r"predictor.\1",
    },
    "MGCN": {
        **_NODES,
        r"query_common\.(0|2)\.(weight)": r"fusion.query.\1.\2",
        r"query_common\.(0)\.(bias)": r"fusion.query.\1.\2",
        r"gate_([vt])\.0\.(weight|bias)": r"gate.\1.\2",
        r"gate_(image|text)_prefer\.0\.(weight|bias)": r"prefer.\1.\2",
    },
    "SLMRec": {
        r"embedding_user\.weight": USERS,
        r"embedding_item\.weight": ITEMS,
        r"([vt])_dense\.(weight|bias)": r"features.\1.linear.\2",
        r"embedding_(user|item)_after_GCN\.(weight|bias)": r"fuse.\1.\2",
        r"g_i_iv\.(weight|bias)": r"heads.g1.\1",
        r"g_v_iv\.(weight|bias)": r"heads.g2.\1",
        r"g_iv_iva\.(weight|bias)": r"heads.g3.\1",
        r"g_iva_ivat\.(weight|bias)": r"heads.g4.\1",
        r"g_t_ivat\.(weight|bias)": r"heads.g5.\1",
        r"g_a_iva\.(weight|bias)": DROP,
    },
    "DualGNN": {**_BRANCHES, r"weight_i": "item_weight"},
    "DRAGON": {**_BRANCHES, r"weight_i": DROP, r"(image|text)_(embedding|trs)\.(weight|bias)": DROP},
    "GRCN": {
        r"model_specific_conf": "confidence",
        r"id_gcn\.id_embedding": "id",
        r"([vt])_gcn\.preference": r"preference.\1",
        r"([vt])_gcn\.MLP\.(weight|bias)": r"features.\1.linear.\2",
    },
    "MMGCN": {
        r"(v)_gcn\.MLP\.(weight|bias)": r"branches.\1.project.\2",
        r"([vt])_gcn\.conv_embed_([123])\.weight": r"^branches.\1.message.#\2.weight",
        r"([vt])_gcn\.linear_layer([123])\.(weight|bias)": r"branches.\1.own.#\2.\3",
        r"([vt])_gcn\.g_layer([123])\.(weight|bias)": r"branches.\1.join.#\2.\3",
    },
    "MVGAE": {
        r"([vtc])_gcn\.MLP\.(weight|bias)": r"experts.\1.project.\2",
        r"([vtc])_gcn\.conv_embed_([145])\.weight": r"^experts.\1.conv.\2.weight",
        r"([vtc])_gcn\.conv_embed_([145])\.bias": r"experts.\1.bias.\2",
        r"([vtc])_gcn\.linear_layer([45])\.(weight|bias)": r"experts.\1.own.\2.\3",
        r"([vtc])_gcn\.g_layer([145])\.(weight|bias)": r"experts.\1.g.\2.\3",
        r"([vtc])_gcn\.(linear_layer1|(conv_embed|linear_layer|g_layer)_?2)\.(weight|bias)": DROP,
    },
}
# Which setting a shape tells: name of theirs, axis, our setting ("dim": the width of the vectors).
WIDTHS: Mapping[str, tuple[tuple[str, int, str], ...]] = {
    "VBPR": (("i_embedding", 1, "dim"),),
    **dict.fromkeys(("BM3", "FREEDOM", "MGCN"), (("user_embedding.weight", 1, "dim"),)),
    "LATTICE": (("user_embedding.weight", 1, "dim"), ("image_trs.weight", 0, "feat_embed_dim")),
    "LayerGCN": (("user_embeddings", 1, "dim"),),
    "SELFCFED_LGN": (("online_encoder.embedding_dict.user_emb", 1, "dim"),),
    "SLMRec": (("embedding_user.weight", 1, "dim"),),
    **dict.fromkeys(("DualGNN", "DRAGON"), (("v_gcn.preference", 1, "dim"),)),
    "GRCN": (("id_gcn.id_embedding", 1, "dim"), ("v_gcn.preference", 1, "latent_embedding")),
    "MMGCN": (("v_gcn.linear_layer1.weight", 0, "dim"), ("v_gcn.MLP.weight", 0, "image_latent")),
    "MVGAE": (("v_gcn.g_layer1.weight", 0, "dim"), ("v_gcn.MLP.weight", 0, "latent")),
}
# Settings that change scores and that no shape tells.
ASSUMED: Mapping[str, tuple[str, ...]] = {
    "BM3": ("n_layers",),
    "FREEDOM": ("n_ui_layers", "n_mm_layers", "knn_k", "mm_image_weight"),
    "LATTICE": ("n_layers", "n_ui_layers", "knn_k", "lambda_coeff", "cf_model"),
    "LayerGCN": ("n_layers",),
    "MGCN": ("n_ui_layers", "n_layers", "knn_k"),
    "SELFCFED_LGN": ("n_layers",),
    "SLMRec": ("layer_num", "adj_type"),
    "DualGNN": ("user_k",),
    "DRAGON": ("user_k", "knn_k", "mm_image_weight", "n_mm_layers"),
}
_STALE = "ranks by a table that only a training step writes, so that the figures it prints are not the model's"
RESUME_NOTES = {
    **dict.fromkeys(("DualGNN", "GRCN", "MMGCN", "MVGAE"), f"the published --resume of {{}} {_STALE}"),
    "SLMRec": "the published --resume of {} stops with a TypeError",
}
_SIDES = {"v": "image", "t": "text", "c": "collab"}


def recognise(state: Mapping[str, Tensor]) -> list[str]:
    """The models whose original program writes exactly such names; [] for any other file."""
    return [model for model, names in NAMES.items() if _renamed_all(state, names) is not None]


def _renamed_all(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, str] | None:
    """{theirs: ours}, or None where a name is unknown or a kind of name is absent that is not dropped."""
    found, used = {}, set()
    for theirs in state:
        pattern = next((pattern for pattern in names if re.fullmatch(pattern, theirs)), None)
        if pattern is None:
            return None
        used.add(pattern)
        found[theirs] = re.sub(pattern, names[pattern], theirs)
    return found if used >= {pattern for pattern, ours in names.items() if ours != DROP} else None


def rename(model: str, state: Mapping[str, Tensor]) -> State:
    """The same tensors under our names; tables of users and items joined, convolutions transposed, dead ones left out."""
    ours: State = {}
    for theirs, name in (_renamed_all(state, NAMES[model]) or {}).items():
        if name == DROP:
            continue
        value = state[theirs].float()
        value = value.T.contiguous() if name.startswith("^") else value
        name = _spelled(name)
        ours[name] = value.squeeze(-1) if name in ("user_weight", "item_weight") else value
    if USERS in ours:
        ours["tables.nodes"] = torch.cat([ours.pop(USERS), ours.pop(ITEMS)])
    return ours


def _spelled(name: str) -> str:
    """A name of ours with its marks resolved."""
    name = re.sub(r"\.([vtc])\.", lambda found: f".{_SIDES[found[1]]}.", name + ".")[:-1]
    return re.sub(r"#(\d)", lambda found: str(int(found[1]) - 1), name).lstrip("^")


def _every_name(names: Mapping[str, str]) -> dict[str, str]:
    """{ours: theirs} of all names that are not dropped: the patterns' alternatives, written out."""
    found = {}
    for pattern, ours in names.items():
        parts = re.findall(r"\(\[(\w+)\]\)|\(([\w|]+)\)|([^()]+)", pattern.replace("\\", ""))
        choices = [[*letters] or words.split("|") if letters or words else [text] for letters, words, text in parts]
        for theirs in map("".join, product(*choices)) if ours != DROP else ():
            found[_spelled(re.sub(pattern, ours, theirs))] = theirs
    return found


def check_whole(model: str, state: Mapping[str, Tensor], path: object, wanted: Collection[str] | None = None) -> None:
    """UserError for a file that has most names of a model's original program, but not all, or others beside them.

    wanted: our names that the file must have; None: what every file of the model has.
    """
    names = NAMES.get(model, {})
    every = _every_name(names)
    other = [name for name in state if not any(re.fullmatch(pattern, name) for pattern in names)]
    if 2 * len(other) > len(state) or not (every.values() & state.keys()) - every.keys():
        return  # another program's, or ours
    needed = {theirs for ours, theirs in every.items() if wanted is None or ours.partition("/")[0] in wanted}
    if (lacks := sorted(needed - state.keys())) or other:
        found = f"lacks {', '.join(lacks[:3]) or 'nothing'} and has {', '.join(other[:3]) or 'nothing'} beyond them"
        raise UserError(f"{path} has names of Mirror-Gradient's {model}, but {found}: give a whole file of that model")


def adapt(options: Any, state: Mapping[str, Tensor]) -> list[str]:
    """Set what the file decides (widths, behaviour, the first published value of what it does not tell); notes for the user."""
    model, notes = options.model, [f"the names are those of Mirror-Gradient's and MMRec's {options.model}: renamed"]
    if "behaviour" not in options.explicit:
        options.behaviour = "published"
        notes.append("--behaviour published, as the program that wrote it; --behaviour fixed may score otherwise")
    changed: dict[str, Any] = {}
    for name, axis, setting in WIDTHS[model]:
        changed[setting] = state[name].shape[axis]
    fields = {field.name: field for field in dataclasses.fields(options.settings)}
    said = []
    for name in ASSUMED.get(model, ()):
        grid = fields[name].metadata["setting"].grid
        if name not in options.explicit and grid:
            changed[name] = grid[0]
        if name not in options.explicit:
            said.append(f"--{name.replace('_', '-')} {changed.get(name, getattr(options.settings, name))}")
    if said:
        notes.append(f"not in the file, so assumed (give the flag for another value): {', '.join(said)}")
    options.embedding_dim = changed.pop("dim")
    options.settings = dataclasses.replace(options.settings, **changed)
    if model in RESUME_NOTES:
        notes.append(RESUME_NOTES[model].format(model))
    return notes


def complete(model: nn.Module, name: str, state: State, data: MultimodalData, settings: Any, dim: int) -> Iterator[str]:
    """Put what the original draws after its seed, and the file lacks, into ``state`` and ``model``; say what was drawn.

    dim: the published ``embedding_size``, which decides how much DRAGON and DualGNN draw before their neighbours. With
    ``--behaviour fixed`` these have neighbours of their own and no weights of items.
    """
    seed = settings.seed
    if name in DRAWS:
        drawn = DRAWS[name](data, state, seed)
        yield f"drawn again after seed {seed}, as the original does: {', '.join(sorted(drawn))}"
        state |= drawn
    if name == "LATTICE":  # the original keeps two weights where it has one kind of features, and reads none
        state["modal_weight"] = state["modal_weight"][: len(data.features)]
    if settings.behaviour == "fixed":
        state.pop("item_weight", None)
    elif name in ("DRAGON", "DualGNN"):
        short = int(((model.user_graph.degree > 0) & (model.user_graph.degree < model.user_graph.k)).sum())
        model.user_graph.fill(_numpy_positions(model.user_graph, data, seed, dim))
        if short:
            yield f"neighbour lists of {short:,} users filled up as the original draws them after seed {seed}"
        yield "which of equally frequent neighbours the authors' own user graph holds is not known; here the lower number"


# -- draws


def _table(*shape: int) -> Tensor:
    """Uniform numbers, then Xavier-normal ones over them: both are drawn."""
    torch.rand(*shape)
    return nn.init.xavier_normal_(torch.empty(*shape))


def _linear(width: int, out: int, *, again: bool) -> None:
    """A linear layer as torch starts it; again: then Xavier-normal weights."""
    layer = nn.Linear(width, out)
    if again:
        nn.init.xavier_normal_(layer.weight)


def _conv(width: int, out: int, *, bias: bool) -> None:
    torch.rand(width, out)
    if bias:
        torch.rand(out)
    nn.init.xavier_normal_(torch.empty(width, out))


def _mmgcn_tables(data: MultimodalData, state: State, seed: int) -> State:
    dim = state["branches.image.own.0.weight"].shape[0]
    drawn = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for side, features in data.features.items():
            projected = side == "image"
            width = state["branches.image.project.weight"].shape[0] if projected else features.shape[1]
            drawn[f"branches.{side}.preference"] = _table(data.num_users, width)
            if projected:
                _linear(features.shape[1], width, again=False)
            _conv(width, width, bias=False)
            _linear(width, dim, again=True)
            _linear(width + dim, dim, again=True)
            for _ in range(2):
                _conv(dim, dim, bias=False)
                _linear(dim, dim, again=True)
                _linear(2 * dim, dim, again=False)
        drawn["id"] = _table(data.num_users + data.num_items, dim)
    return drawn


def _mvgae_tables(data: MultimodalData, state: State, seed: int) -> State:
    dim, latent = state["experts.image.g.1.weight"].shape[0], state["experts.image.project.weight"].shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = {"collab": _table(data.num_items, dim)}
        widths = {side: features.shape[1] for side, features in data.features.items()} | {"collab": dim}
        for side, width in widths.items():
            drawn[f"experts.{side}.preference"] = _table(data.num_users, latent)
            _linear(width, latent, again=True)
            _conv(latent, dim, bias=True)
            _linear(latent, dim, again=True)
            _linear(dim, dim, again=True)
            _conv(dim, dim, bias=True)
            _linear(dim, dim, again=True)
            _linear(dim, dim, again=False)
            for _ in range(2):
                _conv(dim, dim, bias=True)
                _linear(dim, dim, again=True)
                _linear(dim, dim, again=True)
    return drawn


DRAWS: Mapping[str, Callable[[MultimodalData, State, int], State]] = {"MMGCN": _mmgcn_tables, "MVGAE": _mvgae_tables}


def _numpy_positions(graph: Any, data: MultimodalData, seed: int, dim: int) -> Tensor:
    """Positions int64 [U, k] into the users' neighbour lists, short ones filled up by numpy's draws after ``seed``.

    What DRAGON and DualGNN draw before: normal numbers [U, 2], [I, 2], a tenth of the items, [U, 64] twice, [U + I, dim].
    """
    users, items = data.num_users, data.num_items
    rng = np.random.RandomState(seed)
    rng.randn(users, 2), rng.randn(items, 2)
    rng.choice(items, int(items / 10), replace=False)
    rng.randn(users, 64), rng.randn(users, 64), rng.randn(users + items, dim)
    positions = np.tile(np.arange(graph.k), (users, 1))
    degree = graph.degree.numpy()
    for user in np.flatnonzero((degree > 0) & (degree < graph.k)):
        for slot in range(degree[user], graph.k):
            positions[user, slot] = positions[user, rng.randint(0, slot)]
    return torch.from_numpy(positions)


def other_model(asked: str, found: list[str], path: object) -> UserError:
    """The error for weights of another of the published models."""
    return UserError(f"{path} has the names of {' or '.join(found)}, not of {asked}: give --model {found[0]}")


def published(state: Mapping[str, Tensor]) -> State:
    """A file of any of the thirteen models under our names; what the file lacks is not drawn here."""
    found = recognise(state)
    if not found:
        raise UserError(f"these are names of none of {', '.join(NAMES)}: choose another --from")
    return rename(found[0], state)


def flags(state: Mapping[str, Tensor], path: str) -> list[str]:
    """The file goes to the program as it is: what it lacks is drawn again there."""
    return [f"--model={recognise(state)[0]}", f"--resume={path}", "--published-protocol"]


def unread(state: Mapping[str, Tensor]) -> list[str]:
    """What no score of ours reads."""
    return [name for name, ours in (_renamed_all(state, NAMES[recognise(state)[0]]) or {}).items() if ours == DROP]


SOURCES = {"mirror-gradient": Source(published, program=lambda _: "mirror_grad.main", flags=flags, unread=unread)}
