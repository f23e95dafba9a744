"""Do relations carry meaning? Pairs whose relation vectors are near each other should be alike in their genres.

A pair (u, i) stands for the genres that the item i and the items of the user's history have in common. For pairs of
the judged part, drawn at random, the nearest other pair by the cosine of the relation vector is sought; two pairs agree
when they share a genre. Beside that share stand the same by the item's own vector, which tells what the relation adds,
and the share of all couples of pairs, which is what chance gives. Couples of one item or one user never count: they
agree by themselves.

Source: the analysis of Tran, Salha-Galvan, Hennequin, Moussallam, RecSys 2021, there with tags of users and items and
one random match a pair; here all couples stand for chance.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from gfml.base.errors import UserError
from gfml.data.interactions import pairs_from_csr
from hlrm.attention import item_info
from hlrm.data import History
from hlrm.experiment import HLRM
from hlrm.model import RelationModel

ROWS = 1024


def meaning(this: HLRM, model: RelationModel, split: str, number: int, file: str | None) -> dict[str, Any]:
    """{"pairs", "relation", "item", "chance": shares of couples that agree, "error": one standard error of the first two}.

    number: pairs drawn with the seed, fewer where the part has fewer. Pairs without a genre or without a relation (an
    empty history) are left out and counted. file: genres of the items; None for a known file beside the data.
    UserError for a model without relations, no genres, and fewer than two pairs.
    """
    s, data = this.settings, this.data
    if model.relation is None:
        raise UserError(f"--model {s.model} has no relation vectors to analyse: drop --analyse")
    info = item_info(this, file)
    if info is None or not any(info.genres):
        raise UserError(f"found no genres of the items of {data.name}, wanted a column of them: give --item-info FILE")
    genres = _binary(info.genres)
    taste = (data.seen(split).astype(np.float32) @ genres > 0).astype(np.float32)
    users, items = pairs_from_csr(data.split(split))
    chosen = np.random.default_rng(s.seed).permutation(len(users))[:number]
    users, items = users[chosen].astype(np.int64), items[chosen].astype(np.int64)
    common = torch.from_numpy((genres[items].multiply(taste[users])).toarray()).to(this.device)
    pairs = torch.from_numpy(np.stack([users, items], 1)).to(this.device)
    relation = _relations(this, model, pairs, split)
    kept = common.any(1) & relation.any(1)
    pairs, common, relation = pairs[kept], common[kept], relation[kept]
    if len(pairs) < 2:
        raise UserError(f"{data.name} has {len(pairs)} pairs with a genre and a relation, wanted two: give other data")
    item = model.encoder.vectors()[1].detach()[pairs[:, 1]]
    shares = _shares(pairs, common, {"relation": relation, "item": item})
    error = {name: math.sqrt(shares[name] * (1 - shares[name]) / len(pairs)) for name in ("relation", "item")}
    return {"pairs": len(pairs), "left_out": len(chosen) - len(pairs), **shares, "error": error}


def lines(found: dict[str, Any]) -> list[str]:
    """What :func:`meaning` found, to be printed."""
    return [
        f"relations       {found['pairs']} pairs ({found['left_out']} without genres or relation left out)",
        "  nearest pair shares a genre: "
        f"by relation {found['relation']:.4f} (+-{found['error']['relation']:.4f}), by the item's vector "
        f"{found['item']:.4f} (+-{found['error']['item']:.4f}); any two pairs {found['chance']:.4f}",
    ]


def _binary(words: list[tuple[str, ...]]) -> sp.csr_array:
    """0/1 [number of items, number of words]."""
    number = {word: place for place, word in enumerate(sorted({word for some in words for word in some}))}
    rows = np.repeat(np.arange(len(words)), [len(set(some)) for some in words])
    columns = [number[word] for some in words for word in sorted(set(some))]
    return sp.csr_array((np.ones(len(rows), np.float32), (rows, columns)), shape=(len(words), len(number)))


@torch.no_grad()
def _relations(this: HLRM, model: RelationModel, pairs: Tensor, split: str) -> Tensor:
    """The relation vector of every pair int64 [N, 2]: [N, D]."""
    every = this.histories(split)
    parts = []
    for users, items in (rows.T for rows in pairs.split(ROWS)):
        history = History(every.ids[users], every.counts[users])
        parts.append(model.attend(users, items[:, None], history).vector[:, 0])
    return torch.cat(parts)


@torch.no_grad()
def _shares(pairs: Tensor, common: Tensor, vectors: dict[str, Tensor]) -> dict[str, float]:
    """Share of pairs whose nearest neighbour agrees, for every kind of vector, and of all couples; see the module text."""
    unit = {name: F.normalize(table, dim=1) for name, table in vectors.items()}
    hits, couples, agreeing = dict.fromkeys(vectors, 0.0), 0.0, 0.0
    for start in range(0, len(pairs), ROWS):
        rows = slice(start, start + ROWS)
        other = (pairs[rows, None] != pairs).all(2)
        agree = (common[rows] @ common.T > 0) & other
        couples, agreeing = couples + float(other.sum()), agreeing + float(agree.sum())
        for name, table in unit.items():
            nearest = (table[rows] @ table.T).masked_fill(~other, -torch.inf).argmax(1)
            hits[name] += float(agree.gather(1, nearest[:, None]).sum())
    return {name: hit / len(pairs) for name, hit in hits.items()} | {"chance": agreeing / max(couples, 1.0)}
