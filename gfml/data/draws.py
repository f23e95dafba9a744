"""The generator's draws for large data as machine code: the distribution of :mod:`gfml.data.synthetic` at a fraction of
its cost. Importing this module imports numba.

Drawing without replacement in proportion to weights w is taking the items whose clocks ring first, where the clock of
item i rings after an exponential time of rate w_i. Heavy items, which every user is likely to meet, have their clocks
evaluated one by one. The many light ones ring together: events of a faster process, whose rates are bounds by cells,
come one after the other and are accepted in proportion; an item's first accepted event is its ring.

Every user has a stream of random numbers of its own, so the result is the same however users are shared out.
Numbers: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014 (SplitMix64).
"""

from __future__ import annotations

import numpy as np

from gfml.base.compiled import compiled

Array = np.ndarray
STEP, FIRST, SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
# Events per wanted item after which the rest is drawn over the whole catalogue: all clocks start again, as they may at
# any time. Who wants more than one item of so many is drawn so at once.
EVENTS, DENSE = 64, 16


@compiled
def uniform(state: Array) -> float:
    """The next number in [0, 1); state uint64 [1]."""
    state[0] += STEP
    mixed = (state[0] ^ (state[0] >> SHIFTS[0])) * FIRST
    mixed = (mixed ^ (mixed >> SHIFTS[1])) * SECOND
    return ((mixed ^ (mixed >> SHIFTS[2])) >> SHIFTS[3]) * (1.0 / 9007199254740992.0)


@compiled
def find(cumulative: Array, low: int, high: int, value: float) -> int:
    """The last place p in low..high - 1 with cumulative[p] <= value; low where there is none."""
    while high - low > 1:
        middle = (low + high) // 2
        if cumulative[middle] <= value:
            low = middle
        else:
            high = middle
    return low


@compiled
def squared(left: Array, right: Array) -> float:
    """|left - right|^2."""
    total = 0.0
    for c in range(len(left)):
        total += (left[c] - right[c]) ** 2
    return total


@compiled
def cell_bounds(place: Array, centre: Array, radius: Array, mass: Array, lamb: float, eps: float, bound: Array,
                share: Array) -> None:  # fmt: skip
    """bound[c]: at least exp(log pull) on any item of cell c; share [C + 1]: mass times bound of the cells before."""
    share[0] = 0.0
    for c in range(len(centre)):
        near = max(np.sqrt(squared(place, centre[c])) - radius[c], 0.0)
        bound[c] = (near * near + eps) ** -lamb
        share[c + 1] = share[c] + mass[c] * bound[c]


@compiled
def draw_users(streams: Array, wanted: Array, places: tuple[Array, Array], cells: tuple[Array, ...], heavy: Array,
               item_mass: Array, settings: tuple[float, float, float], items: Array) -> None:  # fmt: skip
    """Items of some users, one after the other, ascending within a user, without repetition.

    streams uint64 [n]: where each user's numbers start; wanted [n]; places: of the users [n, d] and items [I, d]; cells:
    centre, radius, items, cumulative, start of :class:`gfml.data.synthetic._Cells`, heavy items without mass; heavy:
    those items; item_mass [I]; settings: lambda, eps, noise. items [sum of wanted]: written.
    """
    user_place, item_place = places
    lamb, eps, noise = settings
    owner, state, first = np.full(len(item_place), -1), streams[:1].copy(), 0
    for u in range(len(wanted)):
        state[0] = streams[u]
        place, own, found, pulled = user_place[u], items[first : first + wanted[u]], 0, 0
        for _ in range(wanted[u]):
            pulled += uniform(state) >= noise
        if pulled * DENSE <= len(item_place):
            found = draw_by_clocks(state, place, item_place, cells, heavy, item_mass, lamb, eps, own[:pulled], owner, u)
        if found < pulled:
            draw_exactly(state, place, item_place, item_mass, lamb, eps, own[found:pulled], owner, u)
        found = pulled
        while found < wanted[u]:
            item = int(uniform(state) * len(item_place))
            if owner[item] != u:
                owner[item], own[found] = u, item
                found += 1
        own.sort()
        first += wanted[u]


@compiled
def draw_by_clocks(state: Array, place: Array, item_place: Array, cells: tuple[Array, ...], heavy: Array,
                   item_mass: Array, lamb: float, eps: float, own: Array, owner: Array, user: int) -> int:  # fmt: skip
    """Fill ``own`` with the items whose clocks ring first; how many were found before the events ran out."""
    centre, radius, grouped, cumulative, start = cells
    mass, bound, share = np.empty(len(centre)), np.empty(len(centre)), np.empty(len(centre) + 1)
    for c in range(len(centre)):
        mass[c] = cumulative[start[c + 1]] - cumulative[start[c]]
    cell_bounds(place, centre, radius, mass, lamb, eps, bound, share)
    # Where the search for a cell begins: of as many equal steps of the shares as there are cells.
    guide, cell = np.empty(len(centre), np.int64), 0
    for step in range(len(guide)):
        while share[cell + 1] <= share[-1] * step / len(guide) and cell + 1 < len(centre):
            cell += 1
        guide[step] = cell
    rings = np.empty(len(heavy))
    for h in range(len(heavy)):
        pull = item_mass[heavy[h]] * (squared(place, item_place[heavy[h]]) + eps) ** -lamb
        rings[h] = -np.log(1.0 - uniform(state)) / pull
    order, rung, found, time = np.argsort(rings), 0, 0, 0.0
    for _ in range(EVENTS * (len(own) + DENSE)):
        time -= np.log(1.0 - uniform(state)) / share[-1]
        while found < len(own) and rung < len(order) and rings[order[rung]] <= time:
            own[found] = heavy[order[rung]]
            owner[own[found]] = user
            found, rung = found + 1, rung + 1
        if found == len(own):
            break
        value = uniform(state)
        cell = guide[int(value * len(guide))]
        while share[cell + 1] <= value * share[-1] and cell + 1 < len(centre):
            cell += 1
        low, high = cumulative[start[cell]], cumulative[start[cell + 1]]
        item = grouped[find(cumulative, start[cell], start[cell + 1], low + (high - low) * uniform(state))]
        if owner[item] == user:
            continue
        if uniform(state) * bound[cell] < (squared(place, item_place[item]) + eps) ** -lamb:
            owner[item], own[found] = user, item
            found += 1
    return found


@compiled
def draw_exactly(state: Array, place: Array, item_place: Array, item_mass: Array, lamb: float, eps: float, own: Array,
                 owner: Array, user: int) -> None:  # fmt: skip
    """Fill ``own`` with the items that ring first among those that the user has not, all clocks one by one."""
    rings = np.full(len(item_place), np.inf)
    for i in range(len(rings)):
        if owner[i] != user:
            pull = item_mass[i] * (squared(place, item_place[i]) + eps) ** -lamb
            rings[i] = -np.log(1.0 - uniform(state)) / pull
    order = np.argsort(rings)
    for number in range(len(own)):
        own[number] = order[number]
        owner[order[number]] = user


@compiled
def cut_users(streams: Array, length: Array, wanted: Array, take: Array, items: Array, train: Array,
              test: Array) -> None:  # fmt: skip
    """Give take[u] of each user's items, at random, to test and the others to train; both in order.

    items: user after user, each with length[u] places, of which the first wanted[u] hold items.
    """
    state, first, at_train, at_test = streams[:1].copy(), 0, 0, 0
    for u in range(len(wanted)):
        state[0] = streams[u]
        left = take[u]
        for number in range(wanted[u]):
            # Selection sampling: an item is taken with the share of those still to be taken.
            if uniform(state) * (wanted[u] - number) < left:
                test[at_test] = items[first + number]
                left, at_test = left - 1, at_test + 1
            else:
                train[at_train] = items[first + number]
                at_train += 1
        first += length[u]


@compiled
def place_rows(users: Array, found: Array, place: Array, items: Array) -> None:
    """items[place[u]] = the item of each row of user u, moving place[u] on."""
    for row in range(len(users)):
        items[place[users[row]]] = found[row]
        place[users[row]] += 1


@compiled
def sort_rows(length: Array, items: Array, kept: Array) -> None:
    """Sort each user's items and move the distinct ones to the front: kept[u] of them. items: length[u] a user."""
    first = 0
    for u in range(len(length)):
        own = items[first : first + length[u]]
        own.sort()
        number = 0
        for p in range(len(own)):
            if number == 0 or own[p] != own[number - 1]:
                own[number] = own[p]
                number += 1
        kept[u] = number
        first += length[u]
