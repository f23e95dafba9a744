"""The gravity score: relevance as the logarithm of a force between two bodies.

    g(u, i) = mu(u, i) - lambda * log(Q(x_u, y_i) + eps)

mu is the log-mass term, Q a squared distance (:mod:`gfml.distances`), eps a softening that keeps the
logarithm finite at Q = 0. With the sum of log-masses, exp(g) = m_u m_i / (Q + eps)^lambda is the force.

    gravity = Gravity(num_users, num_items, mass="item", lamb=3.0)
    score = gravity(user_vectors, item_vectors, user_ids, item_ids)      # higher is more relevant

The same object scores training pairs, all items of the catalogue, and builds the dot-product form in which
the ranking costs one matrix product (:meth:`Gravity.factors`).

Source: Byun, Lim, Song, "GFML: Gravity function for metric learning", Engineering Applications of Artificial
Intelligence 139, 109463, 2025. Where the published code differs, the docstrings say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gfml.distances import SquaredDistance, at_least_float32, common_floats, softplus
from gfml.ranking.topk import Factors

MASS_MODES = ("user", "item", "both", "none")
MASS_COMBINES = ("sum", "product")
MASS_PARAMS = ("softplus", "relu", "exp")

# exp(-60) is near the smallest normal float32; beyond it ratios of item factors would be lost.
MAX_LOG_RANGE = 60.0


def log_mass(raw: Tensor, param: str = "softplus") -> Tensor:
    """Log-mass M(a) of a raw mass parameter a, elementwise.

    softplus  log(1 + e^a)       mass 1 + e^a, gradient never zero (default)
    relu      log(1 + max(a, 0)) the published map: no gradient for a < 0, so such a mass stays dead
    exp       a                  the log-mass itself; an item mass is then exactly an item bias
    """
    if param == "softplus":
        return softplus(raw)
    if param == "relu":
        return torch.log1p(raw.clamp_min(0))
    if param == "exp":
        return raw
    raise ValueError(f"unknown mass parametrisation {param!r}: choose one of {', '.join(MASS_PARAMS)}")


class Mass(nn.Module):
    """Learnable masses of users and items and their log-mass term mu(u, i).

        user  mu = M(a_u)        item  mu = M(a_i)        none  mu = 0
        both  mu = M(a_u) + M(a_i)   (combine="sum": the log of the product of masses)
              mu = M(a_u) * M(a_i)   (combine="product", as in the published recommender: a user's own weight
                                      on item popularity, not the log of a product)

    Raw parameters ``user`` [U] and ``item`` [I] exist only where the mode has them. init: "default" starts
    softplus and exp at 0 and relu at |N(0, 0.1)| + 0.1 (all alive); "xavier" is the published
    N(0, 2 / (N + 1)), under which half of the relu masses are dead from the start.

    User mass shifts all scores of one user by a constant (unless combine is product), so it cannot change a
    ranking and has no gradient under pairwise losses; it calibrates probabilities.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        mode: str = "both",
        *,
        combine: str = "sum",
        param: str = "softplus",
        init: str = "default",
    ) -> None:
        super().__init__()
        for name, value, known in (("mass mode", mode, MASS_MODES), ("mass combination", combine, MASS_COMBINES)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")
        log_mass(torch.zeros(()), param)
        self.mode, self.combine, self.param = mode, combine, param
        self.user = nn.Parameter(_initial_mass(num_users, param, init)) if mode in ("user", "both") else None
        self.item = nn.Parameter(_initial_mass(num_items, param, init)) if mode in ("item", "both") else None

    def extra_repr(self) -> str:
        sizes = [
            f"{len(table)} {side}s" for side, table in (("user", self.user), ("item", self.item)) if table is not None
        ]
        how = [self.param] if sizes else []
        how += [self.combine] if self.mode == "both" else []
        return f"{', '.join([self.mode, *how])}{': ' if sizes else ''}{', '.join(sizes)}"

    def forward(self, users: Tensor | None = None, items: Tensor | None = None) -> Tensor | float:
        """mu of matching ids. Shape: users [B], items [B] or [B, W] -> like items ([B] for user mode), 0 for none.

        ValueError without the ids that the mode needs.
        """
        for side, table, ids in (("user", self.user, users), ("item", self.item, items)):
            if table is not None and ids is None:
                raise ValueError(f"mass mode {self.mode!r} needs {side} ids, found none: give {side}s")
        user = self.log_user(users) if self.user is not None else None
        item = self.log_item(items) if self.item is not None else None
        if users is not None and user is not None and items is not None and items.dim() == users.dim() + 1:
            user = user.unsqueeze(-1)
        return self._combine(user, item)

    def all_items(self, users: Tensor | None = None) -> Tensor | float:
        """mu of users [B] with every item: [B, I], or a shape that broadcasts to it. ValueError without needed ids."""
        if self.user is not None and users is None:
            raise ValueError(f"mass mode {self.mode!r} needs user ids, found none: give users")
        user = self.log_user(users)[:, None] if self.user is not None else None
        return self._combine(user, self.log_item() if self.item is not None else None)

    def log_user(self, users: Tensor | None = None) -> Tensor:
        """Log-masses of users (all when None); a wrong or missing table raises ValueError."""
        return self._log(self.user, users, "user")

    def log_item(self, items: Tensor | None = None) -> Tensor:
        """Log-masses of items (all when None)."""
        return self._log(self.item, items, "item")

    def raw(self, users: Tensor, items: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Raw parameters at the given ids, None where a side has no mass: what the regulariser takes."""
        return (
            self.user[users] if self.user is not None else None,
            self.item[items] if self.item is not None else None,
        )

    def _combine(self, user: Tensor | None, item: Tensor | None) -> Tensor | float:
        if user is None or item is None:
            mu = item if user is None else user
            return 0.0 if mu is None else mu
        return user + item if self.combine == "sum" else user * item

    def _log(self, table: Tensor | None, ids: Tensor | None, side: str) -> Tensor:
        if table is None:
            raise ValueError(f"mass mode {self.mode!r} has no {side} mass")
        return log_mass(table if ids is None else table[ids], self.param)


class Gravity(nn.Module):
    """g(u, i) = mu(u, i) - lambda * log(Q(x_u, y_i) + eps); see the module text.

    distance: a kind (l2, l1, emd, kl) or a :class:`~gfml.distances.SquaredDistance` with its options.
    lamb: lambda > 0, learnable (through its logarithm) with ``learn_lamb``. eps > 0: in units of Q; the
    gradient norm for l2 peaks at |x - y| = sqrt(eps) with lambda / sqrt(eps) and vanishes at x = y.
    emb_norm: rows are L2-normalised first, in training and in ranking (the published code forgets it when
    ranking). Ranking takes a ``mass_scale``, a factor on mu: below 1 it damps popularity without retraining.
    Distances are computed in float32 at least, also under autocast.

    Examples:
        Two items at squared distances 0 and 1 from a user; a new item mass is log 2.

        >>> gravity = Gravity(num_users=1, num_items=2, mass="item", lamb=3.0, eps=1.0, emb_norm=False)
        >>> user, items = torch.zeros(1, 2), torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
        >>> gravity(user, items, torch.tensor([0]), torch.tensor([[0, 1]])).detach()
        tensor([[ 0.6931, -1.3863]])
        >>> gravity
        Gravity(
          lambda 3, eps 1, SquaredDistance(kind='l2', emd_input='raw', emd_power=1, kl_kind='bernoulli')
          (mass): Mass(item, softplus: 2 items)
        )
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        *,
        distance: str | SquaredDistance = "l2",
        mass: str = "both",
        combine: str = "sum",
        mass_param: str = "softplus",
        mass_init: str = "default",
        lamb: float = 1.0,
        learn_lamb: bool = False,
        eps: float = 0.01,
        emb_norm: bool = True,
    ) -> None:
        super().__init__()
        if not (lamb > 0 and math.isfinite(lamb)):
            raise ValueError(f"found lambda {lamb}, wanted a finite lambda > 0")
        if not (eps > 0 and math.isfinite(eps)):
            raise ValueError(f"found eps {eps}, wanted a finite eps > 0")
        self.distance = SquaredDistance(distance) if isinstance(distance, str) else distance
        self.mass = Mass(num_users, num_items, mass, combine=combine, param=mass_param, init=mass_init)
        self.eps, self.emb_norm = eps, emb_norm
        log_lamb = torch.tensor(math.log(lamb), dtype=torch.float64).to(torch.get_default_dtype())
        if learn_lamb:
            self.log_lamb = nn.Parameter(log_lamb)
        self._fixed_lamb = None if learn_lamb else lamb

    def extra_repr(self) -> str:
        lamb = (
            f"{float(self.log_lamb.detach().exp()):.4g} learned"
            if self._fixed_lamb is None
            else f"{self._fixed_lamb:.4g}"
        )
        norm = ", unit vectors" if self.emb_norm else ""
        return f"lambda {lamb}, eps {self.eps:.4g}, {self.distance}{norm}"

    @property
    def lamb(self) -> Tensor | float:
        """lambda: a Python number when fixed, a tensor with gradient when learnable."""
        return self.log_lamb.exp() if self._fixed_lamb is None else self._fixed_lamb

    def forward(self, x: Tensor, y: Tensor, users: Tensor | None = None, items: Tensor | None = None) -> Tensor:
        """Scores of matching pairs.

        Shape: x [B, D]; y [B, D] or [B, W, D]; users int64 [B]; items int64 [B] or [B, W] -> [B] or [B, W].
        Ids are only read where the mass mode needs them. ValueError for ids of another shape.
        """
        with torch.autocast(x.device.type, enabled=False):
            sq_distance = self.distance.paired(self._prepare(x), self._prepare(y))
            mu = self.mass(users, items)
            # Masses of another shape may broadcast where the batch has as many rows as there are candidates.
            for side, table, ids, shape in (
                ("user", self.mass.user, users, sq_distance.shape[:1]),
                ("item", self.mass.item, items, sq_distance.shape),
            ):
                if table is not None and ids is not None and ids.shape != shape:
                    raise ValueError(f"found {side} ids of shape {tuple(ids.shape)}, wanted {tuple(shape)}")
            if isinstance(mu, Tensor) and mu.dim() < sq_distance.dim():
                mu = mu.unsqueeze(-1)
            return self.from_sq_distance(sq_distance, mu)

    def from_sq_distance(self, sq_distance: Tensor, mu: Tensor | float = 0.0) -> Tensor:
        """The score of given squared distances and log-mass terms (shapes broadcast)."""
        return mu - self.lamb * torch.log(sq_distance + self.eps)

    def all_items(
        self,
        x: Tensor,
        y: Tensor,
        users: Tensor | None = None,
        *,
        emb_norm: bool | None = None,
        mass_scale: float = 1.0,
    ) -> Tensor:
        """Scores of queries x [B, D] with all items y [I, D]: [B, I]. For ranking: no gradient is meant to flow."""
        with torch.autocast(x.device.type, enabled=False):
            sq_distance = self.distance.all_pairs(self._prepare(x, emb_norm), self._prepare(y, emb_norm))
            score = sq_distance.add_(self.eps).log_().mul_(-self.lamb)
            return score.add_(mass_scale * self.mass.all_items(users))

    @torch.no_grad()
    def factors(self, x: Tensor, y: Tensor, *, emb_norm: bool | None = None, mass_scale: float = 1.0) -> Factors | None:
        """Vectors whose dot product ranks like g, in D + 2 dimensions; None where no such form exists.

        Ranking by g descending equals ranking by (Q + eps) * c_i ascending with c_i = exp(-M(a_i) / lambda),
        and Q = a_u + b_i + p_u . q_i (:meth:`SquaredDistance.bilinear`), so

            -(Q + eps) c_i = [p_u, a_u + eps, 1] . [-c_i q_i, -c_i, -c_i b_i].

        User mass is a constant per user and drops out. None for l1, for squared forms, for products of user and
        item mass, and when the c_i span more than float32 holds. Shape: x [U, D], y [I, D] of all users and items.
        """
        if self.mass.mode == "both" and self.mass.combine == "product":
            return None
        x, y = common_floats(self._prepare(x, emb_norm), self._prepare(y, emb_norm))
        if self.distance.kind in ("l2", "emd") and self.distance.emd_input == "raw":
            centre = y.mean(0)
            x, y = x - centre, y - centre
        form = self.distance.bilinear(x, y)
        if form is None or self.distance.is_squared_form:
            return None
        query = torch.cat([form.query, form.query_bias[:, None] + self.eps, torch.ones_like(x[:, :1])], 1)
        key = torch.cat([form.key, torch.ones_like(y[:, :1]), form.key_bias[:, None]], 1)
        if self.mass.item is not None and mass_scale:
            # Only ratios of c matter: the smallest mass gets c = 1, so that no factor overflows.
            scaled = mass_scale * self.mass.log_item() / self.lamb
            if scaled.max() - scaled.min() > MAX_LOG_RANGE:
                return None
            key = key * torch.exp(scaled.min() - scaled)[:, None]
        return Factors(query, key.neg_())

    def _prepare(self, rows: Tensor, emb_norm: bool | None = None) -> Tensor:
        rows = at_least_float32(rows)
        return unit_rows(rows) if (self.emb_norm if emb_norm is None else emb_norm) else rows


class GravityScorer:
    """All-item gravity scores of fixed user and item vectors, for ranking (a :class:`gfml.ranking.topk.Scorer`).

    emb_norm None follows the gravity module; False ranks raw vectors whatever training did (as published).
    mass_scale: factor on the log-mass term; 0 ranks by distance alone.
    """

    def __init__(
        self, gravity: Gravity, user: Tensor, item: Tensor, *, emb_norm: bool | None = None, mass_scale: float = 1.0
    ) -> None:
        self.gravity, self.user, self.item = gravity, user, item
        self.num_users, self.num_items = user.shape[0], item.shape[0]
        self.emb_norm, self.mass_scale = emb_norm, mass_scale

    @torch.no_grad()
    def score(self, users: Tensor) -> Tensor:
        """g of users [B] with every item, [B, I], masses included."""
        return self.gravity.all_items(
            self.user[users], self.item, users, emb_norm=self.emb_norm, mass_scale=self.mass_scale
        )

    def at(self, users: Tensor, items: Tensor) -> Tensor:
        """g of users [B] with their own items int64 [B, K]: [B, K]."""
        gravity, (users, items) = self.gravity, (part.to(self.item.device) for part in (users, items))
        x, y = (gravity._prepare(rows, self.emb_norm) for rows in (self.user[users], self.item[items]))
        return gravity.from_sq_distance(gravity.distance.paired(x, y), self.mass_scale * gravity.mass(users, items))

    def against(self, items: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """g of user vectors [B, D] with all items, with items int64 [W], or each with his own, [B, W].

        The user's own mass is the mean of all.
        """
        gravity, mass = self.gravity, self.gravity.mass
        y = gravity._prepare(self.item if items is None else self.item[items], self.emb_norm)
        log_user = None if mass.user is None else mass.log_user().mean()
        mu = self.mass_scale * mass._combine(log_user, None if mass.item is None else mass.log_item(items))
        between = gravity.distance.all_pairs if y.dim() == 2 else gravity.distance.paired
        return lambda vectors: gravity.from_sq_distance(between(gravity._prepare(vectors, self.emb_norm), y), mu)

    def factors(self) -> Factors | None:
        """See :meth:`Gravity.factors`."""
        return self.gravity.factors(self.user, self.item, emb_norm=self.emb_norm, mass_scale=self.mass_scale)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows divided by max(|row|, 1e-12), as in the library's ``normalize`` with a cheaper backward pass.

    In float32 at least: in half precision 1e-24 is 0.
    """
    rows = at_least_float32(rows)
    return rows * rows.square().sum(-1, keepdim=True).clamp_min(1e-24).rsqrt()


def _initial_mass(count: int, param: str, init: str) -> Tensor:
    if init == "xavier":
        return torch.randn(count) * math.sqrt(2 / (count + 1))
    if init != "default":
        raise ValueError(f"unknown mass initialisation {init!r}: choose default or xavier")
    return torch.randn(count).mul_(0.1).abs_().add_(0.1) if param == "relu" else torch.zeros(count)
