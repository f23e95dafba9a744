"""A generator of long-tailed implicit feedback drawn from a gravity model with known masses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from gfml.base.errors import UserError
from gfml.data.interactions import Interactions, csr_from_parts
from gfml.data.splits import _take, assemble, check_ratios, split_per_user

LARGE = 500_000  # interactions from which on they are drawn by machine code
_BLOCK = 256  # users per random stream: part of the definition of the data, not a tuning knob
_LARGE_BLOCK = 1024  # users that a thread draws at a time
_ROUNDS = 12  # rejection rounds before a user's remaining draws are made exactly over the whole catalogue
_CELLS = 256  # groups of neighbouring items that share one bound on the distance


@dataclass(frozen=True)
class _World:
    """Positions float32 [U, d] and [I, d] on the unit sphere, log masses float64 [U] and [I]."""

    user: np.ndarray
    item: np.ndarray
    user_mass: np.ndarray
    item_mass: np.ndarray
    lamb: float
    eps: float

    def log_pull(self, sq_distance: np.ndarray) -> np.ndarray:
        """-lambda log(Q + eps): the part of the log force that depends on the squared distance."""
        return -self.lamb * np.log(sq_distance + self.eps)


def generate(
    num_users: int = 1500,
    num_items: int = 1000,
    num_interactions: int = 45_000,
    *,
    tail_exponent: float = 1.0,
    activity_spread: float = 0.6,
    latent_dim: int = 6,
    clusters: int = 16,
    cluster_spread: float = 0.6,
    lamb: float = 1.5,
    eps: float = 0.05,
    noise: float = 0.02,
    test_ratio: float = 0.2,
    seed: int = 2020,
    name: str = "synthetic",
) -> Interactions:
    """Draw ``num_interactions`` distinct pairs from a gravity model and cut a random test part per user.

    log force       g(u, i) = log m_u + log m_i - lamb log(|x_u - y_i|^2 + eps)
    who acts        n_u, the pairs of user u, is proportional to m_u; log m_u ~ N(0, activity_spread^2)
    what is chosen  items without replacement, each with P(i | u) proportional to exp(g(u, i))
    mass            m_i = rank_i^-tail_exponent in random order: popularity follows this power law
    places          x, y on the unit sphere in ``latent_dim`` dimensions, in ``clusters`` clusters: a centre
                    plus a vector of length at most ``cluster_spread``, projected back to the sphere
    noise           this share of each user's pairs is drawn evenly from all items instead

    Every user gets at least three pairs and at most half of the catalogue. Popularity is not a
    function of mass alone: an item near many users is chosen more often than its mass says.

    From LARGE interactions on the draws are other ones of the same distribution, by machine code, with the smallest
    index types and no array of pairs beside the result.

    Sampling: proposals by mass and by a bound on the distance, accepted so that the distribution
    is exact; the few draws left after some rounds use Gumbel keys over the whole catalogue. Cost
    grows with the interactions, no users x items matrix is held. Equal arguments, equal data.

    Returns Interactions with ``true_user_mass`` and ``true_item_mass`` (log masses) and an empty
    valid part. Raises UserError for sizes and parameters outside their range.
    """
    _check(num_users, num_items, num_interactions)
    given = {"tail_exponent": tail_exponent, "activity_spread": activity_spread, "latent_dim": latent_dim, "clusters": clusters,
             "cluster_spread": cluster_spread, "lamb": lamb, "eps": eps, "noise": noise, "test_ratio": test_ratio}  # fmt: skip
    _require(", ".join(f"{name} {value}" for name, value in given.items()), {
        "tail_exponent >= 0": tail_exponent >= 0, "activity_spread >= 0": activity_spread >= 0, "latent_dim >= 2": latent_dim >= 2,
        "clusters >= 1": clusters >= 1, "0 < cluster_spread < 1": 0 < cluster_spread < 1, "lamb > 0": lamb > 0, "eps > 0": eps > 0,
        "0 <= noise <= 1": 0 <= noise <= 1, "0 <= test_ratio < 1": 0 <= test_ratio < 1,
    })  # fmt: skip
    rng = np.random.default_rng([seed, 0])
    world = _make_world(num_users, num_items, tail_exponent, activity_spread, latent_dim, clusters, cluster_spread,
                        lamb, eps, rng)  # fmt: skip
    activity = _activity(world.user_mass, num_interactions, num_items)
    if num_interactions >= LARGE:
        return _draw_large(name, world, activity, noise, test_ratio, seed)
    users = np.repeat(np.arange(num_users, dtype=np.int64), activity)
    items = _draw_items(world, activity, noise, seed)
    labels = split_per_user(users, (1 - test_ratio, 0.0, test_ratio), np.random.default_rng([seed, 1]))
    data = assemble(name, users, items, labels, (num_users, num_items))
    return replace(data, true_user_mass=world.user_mass, true_item_mass=world.item_mass)


def _check(num_users: int, num_items: int, num_interactions: int) -> None:
    low, high = 3 * num_users, num_users * (num_items // 2)
    _require(
        f"{num_users} users, {num_items} items, {num_interactions} interactions",
        {
            "num_users >= 1": num_users >= 1,
            "num_items >= 6": num_items >= 6,
            f"num_interactions from 3 per user ({low}) to half of all pairs ({high})": low <= num_interactions <= high,
        },
    )


def _require(given: str, limits: Mapping[str, bool]) -> None:
    for wanted, holds in limits.items():
        if not holds:
            raise UserError(f"the generator wants {wanted} and was given {given}: correct that")


# Places, masses, activity -----------------------------------------------------------------------


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _places(count: int, centres: np.ndarray, spread: float, rng: np.random.Generator) -> np.ndarray:
    """Points around random centres, even in a ball of radius ``spread``, put back on the sphere. float32 [count, d]."""
    dim = centres.shape[1]
    radius = spread * rng.random((count, 1)) ** (1 / dim)
    offset = _unit(rng.standard_normal((count, dim))) * radius
    return _unit(centres[rng.integers(len(centres), size=count)] + offset).astype(np.float32)


def _make_world(num_users: int, num_items: int, tail: float, activity: float, dim: int, clusters: int, spread: float,
                lamb: float, eps: float, rng: np.random.Generator) -> _World:  # fmt: skip
    centres = _unit(rng.standard_normal((clusters, dim)))
    user, item = _places(num_users, centres, spread, rng), _places(num_items, centres, spread, rng)
    item_mass = -tail * np.log(1.0 + rng.permutation(num_items))
    return _World(user, item, activity * rng.standard_normal(num_users), item_mass, lamb, eps)


def _activity(log_mass: np.ndarray, total: int, num_items: int) -> np.ndarray:
    """Pairs of each user: proportional to mass, from 3 to half of the catalogue, ``total`` in all. int64 [U]."""
    weight = np.exp(log_mass - log_mass.max())
    low, high = 3, num_items // 2
    scale_low, scale_high = 0.0, (total + high) / weight.min()
    for _ in range(200):  # bisection for the scale whose clipped activities sum to the total
        scale = (scale_low + scale_high) / 2
        if np.clip(scale * weight, low, high).sum() < total:
            scale_low = scale
        else:
            scale_high = scale
    exact = np.clip(scale_high * weight, low, high)
    counts = np.floor(exact).astype(np.int64)
    short = total - int(counts.sum())
    # The rounding error goes to the largest fractions, then, should any be left, to whoever has room.
    order = np.lexsort((np.arange(len(counts)), counts - exact))
    counts[order[counts[order] < high][:short]] += 1
    return counts


# Drawing items ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cells:
    """Items grouped by nearness: the items of cell c are ``items[start[c]:start[c + 1]]``."""

    centre: np.ndarray  # [C, d]
    radius: np.ndarray  # [C]
    items: np.ndarray  # [I]
    cumulative: np.ndarray  # mass of all items listed before, [I + 1]
    start: np.ndarray  # [C + 1]


def _group(world: _World, rng: np.random.Generator) -> _Cells:
    """Cells around randomly chosen items; each item joins the nearest."""
    num_items = len(world.item)
    centre = world.item[rng.choice(num_items, size=min(_CELLS, max(1, num_items // 8)), replace=False)]
    blocks = np.array_split(world.item, max(1, num_items // 8192))
    cell = np.concatenate([(block @ centre.T).argmax(axis=1) for block in blocks])
    distance = np.linalg.norm(world.item - centre[cell], axis=1)
    radius = np.zeros(len(centre))
    np.maximum.at(radius, cell, distance)
    items = np.argsort(cell, kind="stable")
    cumulative = np.r_[0.0, np.cumsum(np.exp(world.item_mass[items]))]
    start = np.r_[0, np.cumsum(np.bincount(cell, minlength=len(centre)))]
    # A hair wider, so that rounding in float32 never lets a true pull exceed its bound.
    return _Cells(centre, radius + 1e-3, items, cumulative, start)


def _draw_large(
    name: str, world: _World, activity: np.ndarray, noise: float, test_ratio: float, seed: int
) -> Interactions:
    """The same data by :mod:`gfml.data.draws`: users in blocks of bounded size, straight into the parts' matrices."""
    from gfml.base.compiled import in_threads
    from gfml.data.draws import cut_users, draw_users

    cells = _group(world, np.random.default_rng([seed, 2]))
    streams = np.random.default_rng([seed, 3]).integers(2**64, size=(2, len(activity)), dtype=np.uint64)
    take = _take(activity, check_ratios((1 - test_ratio, 0.0, test_ratio))[2], spare=1)
    starts = [np.concatenate([[0], np.cumsum(count)]) for count in (activity - take, take)]
    parts = [np.empty(start[-1], dtype=np.int32) for start in starts]
    # Twice as many as a user has: most of what repeats would otherwise be proposed again and again.
    heavy = np.argsort(-world.item_mass, kind="stable")[: int(2 * activity.mean())]
    mass = np.exp(world.item_mass)
    light = mass.copy()
    light[heavy] = 0
    cumulative = np.r_[0.0, np.cumsum(light[cells.items])]
    arrays = (cells.centre, cells.radius, cells.items, cumulative, cells.start)

    def draw(first: int) -> None:
        block = slice(first, min(first + _LARGE_BLOCK, len(activity)))
        items = np.empty(activity[block].sum(), dtype=np.int32)
        draw_users(streams[0, block], activity[block], (world.user[block], world.item), arrays, heavy, mass,
                   (world.lamb, world.eps, noise), items)  # fmt: skip
        ends = [part[start[block.start] : start[block.stop]] for part, start in zip(parts, starts, strict=True)]
        cut_users(streams[1, block], activity[block], activity[block], take[block], items, *ends)

    in_threads(draw, range(0, len(activity), _LARGE_BLOCK))
    shape = (len(world.user), len(world.item))
    train, test = (csr_from_parts(part, start, shape) for part, start in zip(parts, starts, strict=True))
    valid = csr_from_parts(np.empty(0, np.int32), np.zeros(len(activity) + 1, np.int64), shape)
    return Interactions(name, train, valid, test, true_user_mass=world.user_mass, true_item_mass=world.item_mass)


def _draw_items(world: _World, activity: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Items of all users, one after the other, without repetition within a user. int64 [sum activity]."""
    cells = _group(world, np.random.default_rng([seed, 2]))
    drawn = []
    for block, first in enumerate(range(0, len(activity), _BLOCK)):
        rng = np.random.default_rng([seed, 3, block])
        wanted = activity[first : first + _BLOCK]
        drawn.append(_draw_block(world, cells, np.arange(first, first + len(wanted)), wanted, noise, rng))
    return np.concatenate(drawn)


def _draw_block(
    world: _World, cells: _Cells, users: np.ndarray, wanted: np.ndarray, noise: float, rng: np.random.Generator
) -> np.ndarray:
    """Items of some users, ordered by user: pulled ones first, then the even noise."""
    num_items = len(world.item)
    pulled = wanted - rng.binomial(wanted, noise)
    owned = np.empty(0, dtype=np.int64)  # sorted keys: position of the user in the block * I + item
    # A user who wants much of the catalogue would reject for ever: the exact draw is cheaper.
    sparse = np.where(pulled * 16 <= num_items, pulled, 0)
    bound, table = _cell_table(world, cells, users)
    for _ in range(_ROUNDS):
        missing = sparse - np.bincount(owned // num_items, minlength=len(users))
        if not missing.any():
            break
        owned = _add(owned, _propose(world, cells, users, bound, table, missing, rng), missing, num_items)
    owned = _add_exactly(world, users, owned, pulled, rng)
    owned = _add_noise(num_items, owned, wanted, rng)
    return owned % num_items


def _cell_table(world: _World, cells: _Cells, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Upper bound [B, C] of the log pull of user b on the items of cell c, and the cells' cumulative shares [B * C].

    A share is mass times bound; row b of the table runs through (b, b + 1], so that one search serves all users.
    """
    cosine = world.user[users] @ cells.centre.T
    to_centre = np.sqrt(np.maximum(2 - 2 * cosine, 0))
    bound = world.log_pull(np.maximum(to_centre - cells.radius, 0) ** 2)
    weight = np.cumsum(np.diff(cells.cumulative[cells.start]) * np.exp(bound), axis=1)
    return bound, (weight / weight[:, -1:] + np.arange(len(users))[:, None]).ravel()


def _propose(
    world: _World,
    cells: _Cells,
    users: np.ndarray,
    bound: np.ndarray,
    table: np.ndarray,
    missing: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Accepted keys in order of proposal: a cell by mass and bound, an item in it by mass, then accept or not."""
    who = np.repeat(np.arange(len(users)), np.where(missing > 0, 8 * missing + 8, 0))
    cell = np.searchsorted(table, who + rng.random(len(who)), side="right") - who * len(cells.centre)
    cell = np.clip(cell, 0, len(cells.centre) - 1)
    low, high = cells.cumulative[cells.start[cell]], cells.cumulative[cells.start[cell + 1]]
    slot = np.searchsorted(cells.cumulative, low + (high - low) * rng.random(len(who)), side="right") - 1
    item = cells.items[np.clip(slot, cells.start[cell], cells.start[cell + 1] - 1)]
    difference = world.user[users[who]] - world.item[item]
    pull = world.log_pull(np.einsum("nd,nd->n", difference, difference))
    accepted = np.log(1 - rng.random(len(who))) < pull - bound[who, cell]
    return who[accepted] * len(world.item) + item[accepted]


def _add(owned: np.ndarray, keys: np.ndarray, room: np.ndarray, num_items: int) -> np.ndarray:
    """``owned`` and, for each user, the first ``room`` of ``keys`` that are new; sorted."""
    distinct, first = np.unique(keys, return_index=True)
    at = np.searchsorted(owned, distinct)
    known = np.zeros(len(distinct), dtype=bool) if not len(owned) else owned[np.minimum(at, len(owned) - 1)] == distinct
    fresh = keys[np.sort(first[~known])]  # users ascend, and within a user the order of drawing is kept
    who = fresh // num_items
    begin = np.searchsorted(who, who)
    return np.sort(np.concatenate([owned, fresh[np.arange(len(fresh)) - begin < room[who]]]))


def _add_exactly(
    world: _World, users: np.ndarray, owned: np.ndarray, pulled: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Fill every user up to ``pulled``: the largest log mass + log pull + Gumbel noise among items not owned."""
    num_items = len(world.item)
    missing = pulled - np.bincount(owned // num_items, minlength=len(users))
    added = [owned]
    for row in np.flatnonzero(missing):
        key = world.item_mass + world.log_pull(((world.item - world.user[users[row]]) ** 2).sum(axis=1))
        key = key + rng.gumbel(size=num_items)
        begin, end = np.searchsorted(owned, (row * num_items, (row + 1) * num_items))
        key[owned[begin:end] - row * num_items] = -np.inf
        added.append(row * num_items + np.argpartition(-key, missing[row] - 1)[: missing[row]])
    return np.sort(np.concatenate(added))


def _add_noise(num_items: int, owned: np.ndarray, wanted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fill every user up to ``wanted`` with items drawn evenly from those not owned."""
    while True:
        missing = wanted - np.bincount(owned // num_items, minlength=len(wanted))
        if not missing.any():
            return owned
        who = np.repeat(np.arange(len(wanted)), 2 * missing)
        owned = _add(owned, who * num_items + rng.integers(num_items, size=len(who)), missing, num_items)
