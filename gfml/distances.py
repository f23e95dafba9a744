"""Squared distances Q between vectors: l1, l2, Bernoulli / softmax KL and one-dimensional EMD.

Every kind comes in three shapes with one definition behind them:

    paired       x [..., D], y [..., D]     -> Q [...]
    one-to-many  x [B, D],   y [B, W, D]    -> Q [B, W]
    all pairs    x [B, D],   y [I, D]       -> Q [B, I]   closed form, no [B, I, D] tensor

Definitions (sums run over the D coordinates, s is the logistic sigmoid):

    l2   sum (x - y)^2
    l1   (sum |x - y|)^2
    emd  mean (cumsum(x) - cumsum(y))^2            Cramer distance; ``emd_input="softmax"`` turns rows
                                                   into distributions first; ``emd_power=2`` squares it
    kl   sum KL(Bernoulli(s(x)) || Bernoulli(s(y)))   asymmetric, the query comes first;
         ``kl_kind="softmax"`` is the categorical KL of softmax rows

emd of raw rows is d^T C d / D, d = x - y, and the eigenvalues of C fall like 1 / k^2: whatever D is, four fifths of their sum
is one direction, a participation ratio of 1.5. A table of 64 columns ranks like one of one or two, so emd is for rows that
are histograms along an axis (``emd_input="softmax"``), not for learnt vectors.

All are >= 0, zero at x = y, with finite gradients everywhere. Vectors may be of any floating-point types; they are
computed in the widest of these and in float32 at least.

Differences from the published recommender code (Byun et al., Engineering Applications of Artificial
Intelligence 139, 2025), which the compatibility options reproduce: there emd is squared once more
(``emd_power=2``), and kl is ``(mean_d s(y) (log s(y) - s(x)))^2`` (``kl_kind="compat"``), which is no
divergence: it has no minimum at x = y.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DISTANCES = ("l2", "l1", "emd", "kl")


class BilinearForm(NamedTuple):
    """Q(b, i) = query_bias[b] + key_bias[i] + query[b] . key[i], before any clamp or power."""

    query: Tensor  # [B, D]
    key: Tensor  # [I, D]
    query_bias: Tensor  # [B]
    key_bias: Tensor  # [I]


@dataclass(frozen=True)
class SquaredDistance:
    """One kind of squared distance with its options; see the module text for the formulas.

    kind: l2, l1, emd or kl. emd_input: raw or softmax. emd_power: 1, or 2 as in the published code.
    kl_kind: bernoulli, softmax or compat.

    Examples:
        >>> x, y = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> SquaredDistance("l2").all_pairs(x, y)
        tensor([[25.,  1.]])
        >>> SquaredDistance("l1").paired(x, y)
        tensor([49.,  1.])
    """

    kind: str = "l2"
    emd_input: str = "raw"
    emd_power: int = 1
    kl_kind: str = "bernoulli"

    def __post_init__(self) -> None:
        for name, value, wanted in (
            ("distance", self.kind, DISTANCES),
            ("emd_input", self.emd_input, ("raw", "softmax")),
            ("emd_power", self.emd_power, (1, 2)),
            ("kl_kind", self.kl_kind, ("bernoulli", "softmax", "compat")),
        ):
            if value not in wanted:
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(map(str, wanted))}")

    @property
    def is_squared_form(self) -> bool:
        """True when Q is the square of a bilinear form rather than the form itself."""
        return (self.kind == "emd" and self.emd_power == 2) or (self.kind == "kl" and self.kl_kind == "compat")

    def paired(self, x: Tensor, y: Tensor) -> Tensor:
        """Q of matching vectors, from coordinate differences (exact also for near points).

        Shape: x [..., D], y [..., D] -> [...]; x [B, D], y [B, W, D] -> [B, W].
        """
        x, y = common_floats(x, y)
        if y.dim() == x.dim() + 1:
            x = x.unsqueeze(-2)
        if x.shape[-1] != y.shape[-1]:
            raise ValueError(f"found widths {x.shape[-1]} and {y.shape[-1]}, wanted vectors of one width")
        if self.kind == "l2":
            return (x - y).square().sum(-1)
        if self.kind == "l1":
            return (x - y).abs().sum(-1).square()
        if self.kind == "emd":
            return self._paired_emd(x, y)
        return self._paired_kl(x, y)

    def _paired_emd(self, x: Tensor, y: Tensor) -> Tensor:
        if self.emd_input == "softmax":
            x, y = x.softmax(-1), y.softmax(-1)
        sq_distance = (x - y).cumsum(-1).square().mean(-1)
        return sq_distance.square() if self.emd_power == 2 else sq_distance

    def _paired_kl(self, x: Tensor, y: Tensor) -> Tensor:
        if self.kl_kind == "softmax":
            log_p, log_q = x.log_softmax(-1), y.log_softmax(-1)
            return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)
        if self.kl_kind == "compat":
            return (y.sigmoid() * (F.logsigmoid(y) - x.sigmoid())).mean(-1).square()
        # The Bernoulli KL is the Bregman divergence of softplus: fewer cancellations than p log(p/q) sums.
        divergence = softplus(y) - softplus(x) - x.sigmoid() * (y - x)
        return divergence.sum(-1).clamp_min(0)

    def bilinear(self, x: Tensor, y: Tensor) -> BilinearForm | None:
        """The closed form of all pairs, or None for l1, which has none. Squared forms: see above."""
        return None if self.kind == "l1" else self.closed_form(x, y)

    def closed_form(self, x: Tensor, y: Tensor) -> BilinearForm:
        """:meth:`bilinear` of a kind that has one: all but l1."""
        x, y = common_floats(x, y)
        if self.kind == "emd":
            if self.emd_input == "softmax":
                x, y = x.softmax(-1), y.softmax(-1)
            scale = x.shape[-1] ** -0.5
            x, y = x.cumsum(-1) * scale, y.cumsum(-1) * scale
        if self.kind in ("l2", "emd"):
            return BilinearForm(-2 * x, y, x.square().sum(-1), y.square().sum(-1))
        if self.kl_kind == "softmax":
            log_p = x.log_softmax(-1)
            p = log_p.exp()
            return BilinearForm(-p, y, (p * log_p).sum(-1), y.logsumexp(-1))
        p = x.sigmoid()
        if self.kl_kind == "compat":
            q = y.sigmoid()
            width = x.shape[-1]
            return BilinearForm(-p / width, q, x.new_zeros(x.shape[0]), (q * F.logsigmoid(y)).sum(-1) / width)
        return BilinearForm(-p, y, (p * x - softplus(x)).sum(-1), softplus(y).sum(-1))

    def all_pairs(self, x: Tensor, y: Tensor) -> Tensor:
        """Q of every query with every key. Shape: x [B, D], y [I, D] -> [B, I]; extra memory O(B I).

        One matrix product for l2, emd and kl; ``torch.cdist`` for l1. In float32 the closed forms lose
        digits for near points far from the origin (|x|^2 * 1e-7 absolute); l2 and emd are translation
        invariant, so both sets are centred on the keys' mean first.
        """
        x, y = common_floats(x, y)
        if self.kind == "l1":
            return torch.cdist(x, y, p=1).square_()
        if self.kind in ("l2", "emd") and self.emd_input == "raw":
            centre = y.mean(0)
            x, y = x - centre, y - centre
        form = self.closed_form(x, y)
        sq_distance = torch.addmm(form.key_bias, form.query, form.key.T).add_(form.query_bias[:, None])
        return sq_distance.square_() if self.is_squared_form else sq_distance.clamp_(min=0)


def at_least_float32(x: Tensor) -> Tensor:
    """float32 for the half precisions, otherwise as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def common_floats(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All in the widest of their types, float32 at least: half precision overflows at squares of 256 already.

    ValueError for what is not floating point.
    """
    wrong = next((x.dtype for x in tensors if not x.is_floating_point()), None)
    if wrong is not None:
        raise ValueError(f"found numbers of type {wrong}, wanted floating point")
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return tuple(x.to(dtype) for x in tensors)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact to double precision (the library's default switches to x at 20)."""
    return F.softplus(x, threshold=40.0)
