"""Losses as pure functions of tensors: nothing here knows a model, a flag or a device.

Notation: B pairs (user u, positive p) in a batch, each with one negative [B] or W negatives [B, W].
A pair loss averages over B and over W. ``softplus(z) = log(1 + e^z)``. weight [B]: of each pair in the mean, summing to 1,
0 for rows that only fill a batch up; None: all alike.

Sources: Rendle et al., BPR, UAI 2009; Hsieh et al., Collaborative Metric Learning, WWW 2017;
Byun et al., GFML, Engineering Applications of Artificial Intelligence 139, 2025.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from gfml.distances import common_floats, softplus

LOSS_MODES = ("dot", "bpr", "gravity", "mix", "bpr_gra", "mix_bpr", "cml")


def row_mean(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """The mean of all values; with weight [B], summing to 1, that of B rows by their weights.

    Shape: values [B, ...], or [r B, ...] for r rows of each pair, one block of B after another.
    """
    if weight is None:
        return values.mean()
    return weight.to(values.dtype) @ values.reshape(len(values) // len(weight), len(weight), -1).mean((0, 2))


def bpr(pos: Tensor, neg: Tensor, weight: Tensor | None = None) -> Tensor:
    """Pairwise ranking loss: mean softplus(neg - pos).

    Shape: pos [B]; neg [B] or [B, W]; returns a scalar. On gravity scores this is log(1 + F_neg / F_pos)
    with the forces F = exp(score).

    Examples:
        >>> bpr(torch.tensor([2.0, 0.0]), torch.tensor([2.0, 0.0]))     # log 2: no better than a coin
        tensor(0.6931)
        >>> bpr(torch.tensor([50.0]), torch.tensor([[0.0, 0.0]]))
        tensor(1.9287e-22)
    """
    pos, neg = common_floats(pos, neg)
    return row_mean(softplus(neg - _like(pos, neg)), weight)


def bce(pos: Tensor, neg: Tensor, weight: Tensor | None = None) -> Tensor:
    """Pointwise cross-entropy of logits: (mean softplus(-pos) + mean softplus(neg)) / 2.

    Shape: pos [B]; neg [B] or [B, W]; returns a scalar. On gravity scores the probability of a positive is
    sigmoid(score) = F / (1 + F). Finite for any finite logit.

    Examples:
        >>> bce(torch.tensor([0.0]), torch.tensor([[0.0, 0.0]]))
        tensor(0.6931)
    """
    pos, neg = common_floats(pos, neg)
    _like(pos, neg)
    return 0.5 * (row_mean(softplus(-pos), weight) + row_mean(softplus(neg), weight))


def half_mean_square(*rows: Tensor, weight: Tensor | None = None) -> Tensor:
    """Regulariser of the rows a batch touches: sum over the arguments of |rows|^2 / (2 B).

    Shape: each argument [B, ...], or [B, W, ...] for W negatives, which are averaged over W; embedding rows
    end in D, masses do not. Pass embeddings with :func:`embedding_reg` and masses with :func:`mass_reg`.
    """
    if not rows:
        raise ValueError("no rows to regularise")
    rows = common_floats(*rows)
    if weight is not None:
        return 0.5 * sum_terms(row_mean(part.square().reshape(len(part), -1).sum(1), weight) for part in rows)
    return 0.5 * sum_terms(part.square().sum() / part.shape[0] for part in rows)


def sum_terms(terms: Iterable[Tensor]) -> Tensor:
    """The sum of the terms of a loss; ValueError without any."""
    first, *rest = terms
    return sum(rest, first)


def embedding_reg(user: Tensor, pos: Tensor, neg: Tensor, weight: Tensor | None = None) -> Tensor:
    """(|u|^2 + |p|^2 + |n|^2 summed over the batch) / (2 B), W negatives averaged.

    Shape: user, pos [B, D]; neg [B, D] or [B, W, D]. A row that occurs twice counts twice: each occurrence
    is one stochastic gradient sample. Duplicating the batch leaves the value unchanged.
    """
    width = neg.shape[1] if neg.dim() == 3 else 1
    return half_mean_square(user, pos, weight=weight) + half_mean_square(neg, weight=weight) / width


def mass_reg(user: Tensor | None, pos: Tensor | None, neg: Tensor | None, weight: Tensor | None = None) -> Tensor:
    """(sum of squared raw masses of the batch) / (2 B) over the masses that exist; 0-d zero if none does.

    Shape: user, pos [B] or None; neg [B], [B, W] (averaged over W) or None.
    Difference from the published code: there only the last term is divided by B, which makes the rest B times
    stronger and presses the masses to zero (see :func:`mass_reg_compat`).
    """
    parts = [half_mean_square(part, weight=weight) for part in (user, pos) if part is not None]
    if neg is not None:
        parts.append(half_mean_square(neg, weight=weight) / (neg.shape[1] if neg.dim() == 2 else 1))
    return sum_terms(parts) if parts else torch.zeros(())


def mass_reg_compat(user: Tensor | None, pos: Tensor | None, neg: Tensor | None) -> Tensor:
    """The published mass regulariser: the division by B binds to the last term only.

    item: (sum p^2 + sum n^2 / B) / 2; user: sum u^2 / (2 B); both: (sum u^2 + sum p^2 + sum n^2 / B) / 2.
    """
    if pos is None or neg is None:
        return torch.zeros(()) if user is None else half_mean_square(user)
    whole = sum_terms(part.square().sum() for part in common_floats(*(pos,) if user is None else (user, pos)))
    return 0.5 * whole + half_mean_square(neg)


def pair_loss(
    mode: str,
    *,
    dot: tuple[Tensor, Tensor] | None = None,
    gravity: tuple[Tensor, Tensor] | None = None,
    emb_reg: Tensor | float = 0.0,
    mass: Tensor | float = 0.0,
    decay: float = 0.0,
    mass_decay: float = 0.0,
    mix_ratio: float = 0.5,
    compat: bool = False,
    weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """The total of one loss mode and its named parts.

        dot      BCE(dot)                         + decay R + mass_decay R_m
        bpr      BPR(dot)                         + decay R
        gravity  BCE(g)                           + decay R + mass_decay R_m
        bpr_gra  BPR(g)                           + decay R + mass_decay R_m
        mix      (1 - rho) BCE(dot) + rho BCE(g)  + decay R + mass_decay R_m
        mix_bpr  (1 - rho) BPR(dot) + rho BCE(g)  + decay R + mass_decay R_m

    dot, gravity: (positive scores [B], negative scores [B] or [B, W]); only what the mode uses is needed.
    emb_reg = R (:func:`embedding_reg`), mass = R_m (:func:`mass_reg`), mix_ratio = rho. R_m is left out of
    dot and bpr, which have no masses. Returns {"loss": total, parts...}, scalars.

    compat: the published formulas: gravity passes through a sigmoid before the loss in mix, mix_bpr and
    bpr_gra (so it does twice under BCE), gravity and mix have no R, dot has none, bpr_gra halves both
    regularisers, mix_bpr scales R by (1 - rho) and R_m by rho.

    Examples:
        >>> scores = torch.tensor([1.0]), torch.tensor([0.0])
        >>> pair_loss("mix", dot=scores, gravity=scores, mix_ratio=0.2, emb_reg=torch.tensor(2.0), decay=0.1)
        {'loss': tensor(0.7032), 'dot': tensor(0.5032), 'gravity': tensor(0.5032), 'emb_reg': tensor(0.2000)}
    """
    if mode not in LOSS_MODES or mode == "cml":
        raise ValueError(f"unknown pair loss {mode!r}: choose one of {', '.join(LOSS_MODES[:-1])}")
    uses_dot, uses_gravity = mode in ("dot", "bpr", "mix", "mix_bpr"), mode in ("gravity", "bpr_gra", "mix", "mix_bpr")
    parts: dict[str, Tensor] = {}
    if uses_dot:
        parts["dot"] = (bpr if "bpr" in mode else bce)(*_given(dot, mode, "dot"), weight)
    if uses_gravity:
        pos, neg = _given(gravity, mode, "gravity")
        if compat and mode != "gravity":
            pos, neg = pos.sigmoid(), neg.sigmoid()
        parts["gravity"] = (bpr if mode == "bpr_gra" else bce)(pos, neg, weight)
    data_weight = {"dot": 1 - mix_ratio if uses_gravity else 1.0, "gravity": mix_ratio if uses_dot else 1.0}
    emb_weight, mass_weight = _regulariser_weights(mode, mix_ratio, compat)
    if decay and emb_weight:
        parts["emb_reg"] = _weighted(decay * emb_weight, emb_reg, next(iter(parts.values())))
    if mass_decay and mass_weight and uses_gravity:
        parts["mass_reg"] = _weighted(mass_decay * mass_weight, mass, next(iter(parts.values())))
    total = sum_terms(data_weight.get(name, 1.0) * value for name, value in parts.items())
    return {"loss": total, **parts}


def _weighted(weight: float, term: Tensor | float, like: Tensor) -> Tensor:
    return weight * term if isinstance(term, Tensor) else like.new_tensor(weight * term)


def _given(scores: tuple[Tensor, Tensor] | None, mode: str, name: str) -> tuple[Tensor, Tensor]:
    if scores is None:
        raise ValueError(f"loss mode {mode!r} needs {name} scores")
    return scores


def _regulariser_weights(mode: str, mix_ratio: float, compat: bool) -> tuple[float, float]:
    if not compat:
        return 1.0, 1.0
    published = {"bpr": (1.0, 0.0), "bpr_gra": (0.5, 0.5), "mix_bpr": (1 - mix_ratio, mix_ratio)}
    return published.get(mode, (0.0, 1.0))


def rank_weight(imposters: Tensor, num_negatives: int, num_items: int, *, floor: bool = True) -> Tensor:
    """WARP-style weight log(1 + rank), rank ~ floor(num_items * imposters / num_negatives); no gradient.

    Shape: imposters [B] counts in 0..num_negatives -> [B] float. Zero exactly when there is no imposter.
    Counts stay exact: the product is taken in float64. Source: Weston et al., WSABIE, IJCAI 2011.
    """
    rank = imposters.to(torch.float64) * num_items / num_negatives
    return torch.log1p(rank.floor() if floor else rank)


class Hinge(NamedTuple):
    """Results of :func:`warp_hinge`: the reduced loss and, per pair [B], its share, imposters and hardest index."""

    loss: Tensor
    pair_loss: Tensor
    imposters: Tensor
    hardest: Tensor


def warp_hinge(
    sq_pos: Tensor,
    sq_neg: Tensor,
    *,
    margin: float,
    num_items: int,
    use_rank_weight: bool = True,
    rank_floor: bool = True,
    reduction: str = "sum",
    sq_hardest: Tensor | None = None,
    weight: Tensor | None = None,
) -> Hinge:
    """Collaborative Metric Learning hinge on squared distances, hardest of W negatives.

        pair b: w_b * max(0, margin + Q(u, p) - min_k Q(u, n_k)),  w_b = log(1 + rank_b) without gradient

    An imposter is a negative with margin + Q_pos - Q_neg > 0 (strictly).
    Shape: sq_pos [B]; sq_neg [B, W]; sq_hardest [B]: the distance to differentiate through when sq_neg was
    taken without gradient (then only the hardest negative's rows need a graph), else sq_neg serves.
    Units: margin is in squared-distance units. reduction: sum (as published) or mean over the B pairs.
    Ties: the first of equal negatives. Reference: Hsieh et al., Collaborative Metric Learning, WWW 2017.

    Examples:
        One of two negatives is nearer than the positive plus the margin: rank 100 * 1 / 2, weight log 51.

        >>> found = warp_hinge(torch.tensor([0.5]), torch.tensor([[0.6, 2.0]]), margin=0.5, num_items=100)
        >>> found.loss, found.imposters, found.hardest
        (tensor(1.5727), tensor([1]), tensor([0]))
    """
    if sq_neg.dim() != 2 or sq_neg.shape[:1] != sq_pos.shape:
        raise ValueError(f"found distances {tuple(sq_pos.shape)} and {tuple(sq_neg.shape)}, wanted [B] and [B, W]")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"unknown reduction {reduction!r}: choose sum or mean")
    sq_pos, sq_neg = common_floats(sq_pos, sq_neg)
    hardest = sq_neg.detach().argmin(1)
    imposters = (margin + sq_pos.detach()[:, None] - sq_neg.detach() > 0).sum(1)
    if sq_hardest is None:
        sq_hardest = sq_neg.gather(1, hardest[:, None]).squeeze(1)
    hinge = (margin + sq_pos - sq_hardest).clamp_min(0)
    if use_rank_weight:
        hinge = hinge * rank_weight(imposters, sq_neg.shape[1], num_items, floor=rank_floor).to(hinge.dtype)
    return Hinge(reduced(hinge, reduction, weight), hinge, imposters, hardest)


def reduced(values: Tensor, reduction: str, weight: Tensor | None = None) -> Tensor:
    """The sum or the mean of values [B]; rows whose weight is 0 are left out of both."""
    if reduction == "mean":
        return row_mean(values, weight)
    return values.sum() if weight is None else values @ (weight > 0).to(values.dtype)


def covariance(rows: Tensor, form: str = "squared", weight: Tensor | None = None) -> Tensor:
    """Penalty on correlated dimensions of a stack of vectors.

    With the centred covariance C = (1/n) sum (y - mean)(y - mean)^T, a D x D matrix:
        squared  sum over a != b of C_ab^2                     (default; = |C|_F^2 - |diag C|^2)
        paper    (|C|_F - |diag C|_2^2) / n                    as printed, dimensionally inconsistent
        signed   sum over a != b of C_ab                       can be negative; kept for comparison
    Shape: rows [n, D] -> scalar. Cost O(n D^2); no n x n matrix. weight [n]: 1 for rows that count, 0 for others, so
    that their number need not be known on the host.
    Reference: Hsieh et al., WWW 2017 (after Cogswell et al., DeCov, ICLR 2016).
    """
    (rows,) = common_floats(rows)
    number: int | Tensor = rows.shape[0]
    if weight is None:
        centred = rows - rows.mean(0)
    else:
        weight = weight.to(rows.dtype)
        number = weight.sum()
        centred = (rows - weight @ rows / number) * weight[:, None]
    matrix = centred.T @ centred / number
    diagonal = matrix.diagonal()
    if form == "squared":
        return matrix.square().sum() - diagonal.square().sum()
    if form == "paper":
        # The norm's gradient at 0, where all rows are equal, is 0; that of a root is infinite.
        return (matrix.norm() - diagonal.square().sum()) / number
    if form == "signed":
        return matrix.sum() - diagonal.sum()
    raise ValueError(f"unknown covariance form {form!r}: choose squared, paper or signed")


@torch.no_grad()
def project_to_ball_(table: Tensor, rows: Tensor | None = None, radius: float = 1.0) -> None:
    """In place y <- y * min(1, radius / |y|) on the given rows (all when None); inner rows stay bit-identical.

    Shape: table [N, D]; rows int64 [n], may repeat.
    """
    chosen = table if rows is None else table[rows]
    norm = chosen.norm(dim=1, keepdim=True)
    scale = torch.where(norm > radius, radius / norm, torch.ones_like(norm))
    if rows is None:
        table.mul_(scale)
    else:
        table[rows] = chosen * scale


def _like(pos: Tensor, neg: Tensor) -> Tensor:
    """pos shaped to broadcast against neg; silent [B] against [B, 1] mistakes are refused."""
    if pos.shape == neg.shape:
        return pos
    if neg.dim() == 2 and pos.dim() == 1 and neg.shape[0] == pos.shape[0]:
        return pos[:, None]
    raise ValueError(f"found scores {tuple(pos.shape)} and {tuple(neg.shape)}, wanted [B] with [B] or [B, W]")
