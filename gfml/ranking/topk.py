"""Full-catalogue ranking: the k best items of every user, exactly and with deterministic ties."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from gfml.base.errors import UserError
from gfml.distances import common_floats

# Items per group in the two-stage selection: large enough that few groups are left to rank, small
# enough that the k + 1 groups gathered again are a few percent of the catalogue.
GROUP = 64
LAST_COLUMN = (1 << 32) - 1
# Products are padded to whole steps of rows: for a few rows, or a few left over, BLAS libraries switch
# to kernels that round differently.
ROW_STEP = 32
# Scores that are computed and ranked at a time on a CPU: half a MiB, which a second cache holds.
TILE_ROWS, TILE_ITEMS = 256, 512
# Three float32 temporaries of a scorer, or the scores and what the selection needs, and room for the allocator.
BYTES_PER_SCORE = 16


class Factors(NamedTuple):
    """Ranking keys as a dot product: key(u, i) = user[u] . item[i], higher is better.

    user [U, D'], item [I, D'], one dtype and device. Any strictly increasing image of the score
    (per user) gives the same lists, so a user term and the final logarithm may be left out.
    """

    user: Tensor
    item: Tensor


@runtime_checkable
class Scorer(Protocol):
    """What can be ranked and evaluated."""

    num_users: int
    num_items: int

    def score(self, users: Tensor) -> Tensor:
        """Users int64 [B], on any device, to fresh floating scores [B, I] that the caller may overwrite."""

    def factors(self) -> Factors | None:
        """The ranking as a dot product, or None when it is none."""


@dataclass(frozen=True)
class DenseScorer:
    """Scores that exist as a table [U, I]."""

    scores: Tensor

    @property
    def num_users(self) -> int:
        return self.scores.shape[0]

    @property
    def num_items(self) -> int:
        return self.scores.shape[1]

    def score(self, users: Tensor) -> Tensor:
        return self.scores[users.to(self.scores.device)]

    def factors(self) -> None:
        return None


@dataclass(frozen=True)
class FactorScorer:
    """score(u, i) = user[u] . item[i]; user [U, D], item [I, D]."""

    user: Tensor
    item: Tensor

    @property
    def num_users(self) -> int:
        return self.user.shape[0]

    @property
    def num_items(self) -> int:
        return self.item.shape[0]

    def score(self, users: Tensor) -> Tensor:
        return self.user[users.to(self.user.device)] @ self.item.T

    def at(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores of users [B] with their own items int64 [B, K]: [B, K]."""
        return self.against(items.to(self.item.device))(self.user[users.to(self.user.device)])

    def against(self, items: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """Scores of user vectors [B, D] with all items, with items int64 [W], or each with his own, [B, W]."""
        item = self.item if items is None else self.item[items]
        if item.dim() == 3:
            return lambda vectors: (vectors[:, None] * item).sum(-1)
        return lambda vectors: vectors @ item.T

    def factors(self) -> Factors:
        return Factors(self.user, self.item)


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products in float32 (no TF32, no bfloat16), whatever training has set; restored on exit."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def rows_per_block(num_users: int, num_items: int, memory_mb: float) -> int:
    """Users scored at a time: whole steps within the budget (fewer rows if not even one fits, at least 1).

    As many as fit: blocks that stay in the cache save a tenth on an idle CPU, but each brings a dozen thread
    barriers, which cost several times that as soon as another program wants a core.
    """
    rows = int(memory_mb * 2**20) // (BYTES_PER_SCORE * int(num_items))
    if rows < ROW_STEP:
        return max(1, rows)
    return min(rows // ROW_STEP, -(-num_users // ROW_STEP)) * ROW_STEP


@torch.no_grad()
def topk_items(scorer: Scorer, users: Tensor, k: int, *, seen: sp.csr_array | None, memory_mb: float = 256) -> Tensor:
    """The k best items of each user among those not ``seen``, best first.

    Order: score descending, then lower item id; it depends neither on which users share a block nor on the number of
    threads. Items scored -inf count as no candidates.
    Shape: users int64 [n], any order, repeats allowed; seen CSR [U, I]; returns int64 [n, k] on the
        device of the scores, -1 where no candidate is left.
    Memory: about ``memory_mb`` MiB beside the tables and the result, however many users.
    Errors: UserError if k exceeds the catalogue; ValueError for a NaN score, naming the first user.

    Examples:
        >>> scorer = DenseScorer(torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]]))
        >>> seen = sp.csr_array(np.array([[0, 1, 0], [0, 0, 0]]))
        >>> topk_items(scorer, torch.tensor([0, 1]), 2, seen=seen).tolist()
        [[2, 0], [0, 1]]
    """
    check_request(scorer, users, k, seen)
    if len(users) == 0:
        return torch.empty((0, k), dtype=torch.int64, device=users.device)
    with full_precision():
        factors = scorer.factors()
        if factors is not None and factors.user.device.type == "cpu":
            top, broken = _by_tiles(factors, users, k, seen)
        else:
            top, broken = _by_blocks(scorer, users, k, seen, memory_mb)
    if broken.any():
        raise ValueError(
            f"the scores of user {int(users[int(broken.nonzero()[0])])} contain NaN: the model has diverged"
        )
    return top


class _Lists:
    """The best items so far of rows of a request: heaps in machine code's order, and what each row may not have."""

    def __init__(self, users: Tensor, k: int, seen: sp.csr_array | None, dtype: torch.dtype) -> None:
        known = np.zeros(len(users), dtype=np.int64)
        self.seen, self.place, self.end = np.empty(0, dtype=np.int32), known, known
        if seen is not None:
            seen, rows = seen if seen.has_sorted_indices else seen.sorted_indices(), users.cpu().numpy()
            self.seen = seen.indices
            self.place, self.end = (seen.indptr[rows + side].astype(np.int64) for side in (0, 1))
        self.values = np.full((len(users), k), -np.inf, dtype=np.float64 if dtype == torch.float64 else np.float32)
        self.ids = np.full((len(users), k), -1, dtype=np.int64)
        self.broken = np.zeros(len(users), dtype=bool)

    def merge(self, tile: Tensor, rows: slice, first: int) -> None:
        """Scores of ``rows`` for items first, first + 1, ...; the tile is written to."""
        from gfml.ranking.loops import keep_best

        keep_best(
            tile.numpy(), first, self.seen, self.place[rows], self.end[rows], self.values[rows], self.ids[rows],
            self.broken[rows],
        )  # fmt: skip

    def sort(self, rows: slice) -> None:
        from gfml.ranking.loops import sort_lists

        sort_lists(self.values[rows], self.ids[rows])

    def found(self) -> tuple[Tensor, Tensor]:
        """Ids int64 [n, k], bool [n] where a score was NaN."""
        return torch.from_numpy(self.ids), torch.from_numpy(self.broken)


def _by_tiles(factors: Factors, users: Tensor, k: int, seen: sp.csr_array | None) -> tuple[Tensor, Tensor]:
    """Products of some users with some items, small enough to stay in the cache until the best are taken from them.

    Rows are padded to whole steps, so that a user's scores are rounded alike whoever else is asked for.
    """
    from gfml.base.compiled import in_threads

    user, item = common_floats(*factors)
    lists = _Lists(users, k, seen, user.dtype)

    def rank(start: int) -> None:
        chosen = users[start : start + TILE_ROWS].to(user.device)
        rows = slice(start, start + len(chosen))
        query = user.new_zeros((-(-len(chosen) // ROW_STEP) * ROW_STEP, user.shape[1]))
        query[: len(chosen)] = user[chosen]
        room = user.new_empty(len(query) * min(TILE_ITEMS, len(item)))
        for first in range(0, len(item), TILE_ITEMS):
            part = item[first : first + TILE_ITEMS]
            tile = torch.mm(query, part.T, out=room[: len(query) * len(part)].view(len(query), len(part)))
            lists.merge(tile[: len(chosen)], rows, first)
        lists.sort(rows)

    in_threads(torch.no_grad()(rank), range(0, len(users), TILE_ROWS))
    return lists.found()


def _by_blocks(
    scorer: Scorer, users: Tensor, k: int, seen: sp.csr_array | None, memory_mb: float
) -> tuple[Tensor, Tensor]:
    """Scores of as many users as fit the memory for the whole catalogue at a time."""
    tops, broken, start = [], [], 0
    for block in score_blocks(scorer, users, memory_mb):
        chosen = users[start : start + len(block)]
        found = (_select_on_cpu if block.device.type == "cpu" else _select_on_device)(block, chosen, k, seen)
        tops.append(found[0])
        broken.append(found[1])
        start += len(block)
        del block  # else two blocks are alive while the next one is computed
    return torch.cat(tops), torch.cat(broken)


def _select_on_cpu(block: Tensor, users: Tensor, k: int, seen: sp.csr_array | None) -> tuple[Tensor, Tensor]:
    """Ids int64 [b, k] and bool [b] where a row contains NaN; the block is written to."""
    from gfml.base.compiled import in_threads

    block = block if block.dtype == torch.float64 else block.float()
    lists = _Lists(users, k, seen, block.dtype)

    def rank(start: int) -> None:
        rows = slice(start, min(start + TILE_ROWS, len(block)))
        lists.merge(block[rows], rows, 0)
        lists.sort(rows)

    in_threads(torch.no_grad()(rank), range(0, len(block), TILE_ROWS))
    return lists.found()


def _select_on_device(block: Tensor, users: Tensor, k: int, seen: sp.csr_array | None) -> tuple[Tensor, Tensor]:
    if seen is not None:
        mask_seen(block, seen[users.cpu().numpy()])
    return select(block, k)


def check_request(scorer: Scorer, users: Tensor, k: int, seen: sp.csr_array | None) -> None:
    """Errors for arguments that cannot be served."""
    if k > scorer.num_items:
        raise UserError(
            f"found a top-k list length of {k}, wanted at most the {scorer.num_items} items of the catalogue: lower k"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if users.dtype != torch.int64 or users.dim() != 1:
        raise ValueError(f"users must be int64 of one dimension, not {users.dtype} of shape {tuple(users.shape)}")
    if seen is not None and seen.shape != (scorer.num_users, scorer.num_items):
        raise ValueError(f"seen is {seen.shape}, the scorer {(scorer.num_users, scorer.num_items)}")


def score_blocks(scorer: Scorer, users: Tensor, memory_mb: float) -> Iterator[Tensor]:
    """Scores of consecutive blocks of ``users``, [b, I]; a block is valid until the next one is asked for."""
    factors = scorer.factors()
    if factors is not None:
        yield from factor_blocks(factors, users, memory_mb)
        return
    for chunk in users.split(rows_per_block(len(users), scorer.num_items, memory_mb)):
        yield checked_scores(scorer.score(chunk), (len(chunk), scorer.num_items))  # no name: it would outlive its use


def checked_scores(scores: Tensor, shape: tuple[int, int]) -> Tensor:
    """The scores, row after row in memory, or ValueError if they are not floats of this shape."""
    if scores.shape != shape or not scores.is_floating_point():
        raise ValueError(f"score() gave {scores.dtype} of shape {tuple(scores.shape)}, wanted floats of shape {shape}")
    return scores.contiguous()


def factor_blocks(factors: Factors, users: Tensor, memory_mb: float) -> Iterator[Tensor]:
    """Blocks of user @ item.T in one reused buffer.

    The last block is multiplied at full height too, so that a user's scores are rounded alike whoever
    else is asked for.
    """
    user, item = common_floats(*factors)
    users = users.to(user.device)
    rows = rows_per_block(len(users), len(item), memory_mb)
    query, block = user.new_zeros((rows, user.shape[1])), user.new_empty((rows, len(item)))
    for chunk in users.split(rows):
        query[: len(chunk)] = user[chunk]
        torch.mm(query, item.T, out=block)
        yield block[: len(chunk)]


def mask_seen(block: Tensor, seen: sp.csr_array) -> None:
    """Write -inf at the seen items of a contiguous block; rows of both are the same users."""
    place = np.repeat(np.arange(len(block)) * block.shape[1], np.diff(seen.indptr)) + seen.indices
    # One index a place: half the cost of a row and a column.
    block.view(-1).index_fill_(0, torch.from_numpy(place).to(block.device), -torch.inf)


def select(block: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids int64 [b, k] of the k best columns of each row, and bool [b] where a row contains NaN.

    One more column than asked for is ranked: if the k + 1 best values are distinct, set and order are
    determined; only the other rows need the tie rule.
    """
    if block.device.type != "cpu" and block.dtype == torch.float32:
        return select_by_key(block, k)
    wide = min(k + 1, block.shape[1])
    candidates, columns = shortlist(block, wide)
    values, where = candidates.topk(wide, dim=1)
    ids = (where if columns is None else columns.gather(1, where))[:, :k]
    tied = ((values[:, 1:] == values[:, :-1]) & (values[:, 1:] > -torch.inf)).any(dim=1).nonzero()[:, 0]
    for rows in tied.split(max(1, len(block) // 16)):
        ids[rows] = break_ties(block[rows], values[rows, k - 1 : k], k)
    return ids.masked_fill(values[:, :k] == -torch.inf, -1), values[:, 0].isnan()


def select_by_key(block: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As :func:`select` for float32 scores, without learning how many rows have ties: that would stall a device.

    Value and column make one integer, so that no two are equal. A group that is not among the k first by its largest
    value has k columns of other groups before all its own.
    """
    groups, ids = block.shape[1] // GROUP, torch.arange(block.shape[1], device=block.device).expand_as(block)
    values = block
    if groups >= 2 * k:
        whole = groups * GROUP
        largest = block[:, :whole].unflatten(1, (groups, GROUP)).amax(2)
        chosen = _sort_key(largest, ids[:, :groups]).topk(k, dim=1, sorted=False).indices
        near = (chosen[:, :, None] * GROUP + ids[0, :GROUP]).flatten(1)
        ids = torch.cat([near, ids[:, whole:]], 1)
        values = block.gather(1, ids)
        broken = largest.isnan().any(1) | block[:, whole:].isnan().any(1)
    else:
        broken = block.isnan().any(1)
    best = _sort_key(values, ids).topk(k, dim=1).values
    found = LAST_COLUMN - (best & LAST_COLUMN)
    return found.masked_fill(block.gather(1, found) == -torch.inf, -1), broken


def _sort_key(values: Tensor, columns: Tensor) -> Tensor:
    """int64 that order as float32 values do, and equal values by falling column."""
    bits = (values + 0.0).view(torch.int32)  # -0 becomes 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.long() << 32) | (LAST_COLUMN - columns)


def shortlist(block: Tensor, wide: int) -> tuple[Tensor, Tensor | None]:
    """Columns that contain the ``wide`` best values of each row: values [b, c] and ids [b, c] (None: all columns).

    The ``wide`` groups of consecutive columns with the largest maxima hold ``wide`` values no smaller
    than anything outside them; columns after the last whole group are always kept.
    """
    groups = block.shape[1] // GROUP
    if groups < 2 * wide:
        return block, None
    grouped = block[:, : groups * GROUP].unflatten(1, (groups, GROUP))
    best = grouped.amax(dim=2).topk(wide, dim=1, sorted=False).indices
    rows = torch.arange(len(block), device=block.device)[:, None]
    ids = (best[:, :, None] * GROUP + torch.arange(GROUP, device=block.device)).flatten(1)
    rest = torch.arange(groups * GROUP, block.shape[1], device=block.device).expand(len(block), -1)
    values = torch.cat([grouped[rows, best].flatten(1), block[:, groups * GROUP :]], dim=1)
    return values, torch.cat([ids, rest], dim=1)


def break_ties(block: Tensor, kth: Tensor, k: int) -> Tensor:
    """Ids [b, k], value descending then column ascending; kth [b, 1] is the k-th largest value of each row."""
    above, equal = block > kth, block == kth
    room = k - above.sum(dim=1, keepdim=True)
    keep = above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room))
    ids = keep.nonzero()[:, 1].view(len(block), k)
    order = block.gather(1, ids).sort(dim=1, descending=True, stable=True).indices
    return ids.gather(1, order)
