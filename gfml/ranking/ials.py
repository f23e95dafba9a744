"""iALS: matrix factorisation of implicit feedback by alternating least squares. Deterministic, without learning rates.

    minimise   sum_{(u, i) in train} (1 - w_u . h_i)^2  +  alpha0 sum_{u, i} (w_u . h_i)^2
               + lambda ( sum_u f_u^nu |w_u|^2 + sum_i f_i^nu |h_i|^2 )
    f_u = |train of u| + alpha0 I,   f_i = |train of i| + alpha0 U

The sum over all pairs needs the items' Gram matrix only, so an epoch (all users, then all items) costs what the stored
pairs and the rows cost. Rows of a side are solved by a few conjugate gradient steps from where they are.

With nu = 0 this is Hu, Koren and Volinsky's model; libraries that weigh observed pairs by alpha and regularise by r
have alpha0 = 1 / alpha and lambda = r / alpha.

References: Hu, Koren and Volinsky, Collaborative Filtering for Implicit Feedback Datasets, ICDM 2008; Takacs, Pilaszy and
Tikk, Applications of the Conjugate Gradient Method for Implicit Feedback Collaborative Filtering, RecSys 2011; Rendle,
Krichene, Zhang and Koren, Revisiting the Performance of iALS on Item Recommendation Benchmarks, RecSys 2022 (weights,
frequency scaling nu = 1).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from gfml.base.errors import UserError
from gfml.data.interactions import Interactions
from gfml.ranking.topk import FactorScorer

# Conjugate gradient steps in training, from a row's last place, and for new rows, from zero.
STEPS, FOLD_IN_STEPS = 3, 100
# Rows that a thread solves at a time, and rows of one part of a Gram matrix.
ROWS, GRAM_ROWS = 256, 8192


class IALS:
    """The model of one train matrix: tables ``user`` [U, D] and ``item`` [I, D], float32, moved by :meth:`epoch`.

    l2: lambda; alpha0: weight of the pairs that are not observed; nu: exponent of the frequency in the regulariser.
    Items start normal with deviation ``init_std`` / sqrt(D), users at zero. Rows without a train pair are zero.
    The same seed gives the same tables, whatever the number of threads.
    Errors: UserError if l2 or alpha0 is not above 0, or if nu is not finite.
    """

    def __init__(
        self,
        train: sp.csr_array,
        dim: int = 64,
        *,
        l2: float,
        alpha0: float,
        nu: float = 1.0,
        init_std: float = 0.1,
        seed: int = 2020,
    ) -> None:
        for name, value, holds in (("l2", l2, 0 < l2 < np.inf), ("alpha0", alpha0, 0 < alpha0 < np.inf),
                                   ("nu", nu, np.isfinite(nu))):  # fmt: skip
            if not holds:
                raise UserError(f"found {name}={value}, wanted a finite number{'' if name == 'nu' else ' above 0'}")
        self.train, self.alpha0, self.l2, self.nu = train, alpha0, l2, nu
        self.by_item = train.T.tocsr()
        num_users, num_items = train.shape
        start = np.random.default_rng(seed).standard_normal((num_items, dim), dtype=np.float32)
        self.user = torch.zeros(num_users, dim)
        self.item = torch.from_numpy(start).mul_(init_std / dim**0.5)

    def epoch(self) -> None:
        """All users given the items, then all items given the users."""
        self._solve(self.train, self.user, self.item, STEPS)
        self._solve(self.by_item, self.item, self.user, STEPS)

    def scorer(self) -> FactorScorer:
        """score(u, i) = w_u . h_i, on tables that later epochs move."""
        return FactorScorer(self.user, self.item)

    def fold_in(self, histories: sp.csr_array) -> Tensor:
        """Vectors of users who were not trained, given what they have: CSR [n, I] to float32 [n, D].

        Each is the minimum of its own terms of the objective, the items fixed.
        """
        if histories.shape[1] != len(self.item):
            raise ValueError(f"histories of {histories.shape[1]} items for a model of {len(self.item)}")
        found = torch.zeros(histories.shape[0], self.item.shape[1], dtype=torch.float64)
        self._solve(histories, found, self.item.double(), FOLD_IN_STEPS)
        return found.float()

    def objective(self) -> float:
        """The value that is minimised."""
        from gfml.ranking.loops import squared_gaps

        user, item = self.user.double(), self.item.double()
        observed = squared_gaps((self.train.indptr, self.train.indices), self.user.numpy(), self.item.numpy())
        everywhere = float((_gram(self.user).double() * _gram(self.item).double()).sum())
        sides = ((self.train, user, len(item)), (self.by_item, item, len(user)))
        ridge = sum(float(self._ridge(by_row, other) @ side.square().sum(1).numpy()) for by_row, side, other in sides)
        return observed + self.alpha0 * everywhere + ridge

    def _ridge(self, by_row: sp.csr_array, num_others: int) -> np.ndarray:
        """lambda f^nu of each row, float64."""
        return self.l2 * (np.diff(by_row.indptr) + self.alpha0 * num_others) ** self.nu

    def _solve(self, by_row: sp.csr_array, own: Tensor, other: Tensor, steps: int) -> None:
        """Move the rows of ``own``, which have the rows of ``other`` that ``by_row`` [n, m] stores."""
        from gfml.base.compiled import in_threads
        from gfml.ranking.loops import solve_rows

        table, fixed = own.numpy(), other.numpy()
        kind = table.dtype.type
        gram, ridge = _gram(other).numpy(), self._ridge(by_row, len(fixed)).astype(kind)

        def solve(start: int) -> None:
            rows = slice(start, start + ROWS)
            room = np.empty((3, table.shape[1]), dtype=kind)
            pattern = by_row.indptr, by_row.indices
            solve_rows(start, pattern, table[rows], fixed, gram, kind(self.alpha0), ridge[rows], steps, room)

        in_threads(solve, range(0, len(table), ROWS))


def _gram(table: Tensor) -> Tensor:
    """table' table [D, D], summed over parts of fixed size, so that it does not depend on the number of threads."""
    from gfml.base.compiled import in_threads

    parts = in_threads(lambda part: (part.T @ part).double(), table.split(GRAM_ROWS))
    return torch.stack(parts).sum(0).to(table.dtype)


def ials(data: Interactions, l2: float, alpha0: float, *, epochs: int = 16, **settings: Any) -> FactorScorer:
    """The scores of a model after ``epochs`` epochs on ``data.train``; settings as for :class:`IALS`."""
    model = IALS(data.train, l2=l2, alpha0=alpha0, **settings)
    for _ in range(epochs):
        model.epoch()
    return model.scorer()
