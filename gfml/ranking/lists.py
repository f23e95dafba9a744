"""Lists that leave the program: only some items, the scores of what is listed, and cells that a spreadsheet may open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from gfml.base.errors import UserError
from gfml.data.interactions import Interactions
from gfml.data.items import ID_NAMES
from gfml.data.names import places
from gfml.data.tables import is_number, normal, read_bytes, utf8_bytes
from gfml.ranking.topk import ROW_STEP, Scorer, full_precision, topk_items

# One block of scores; a scorer holds two or three of that size at a time.
BLOCK_BYTES = 64 << 20
# Rows whose listed items are gathered at a time.
ROWS = 1024
# Two ways to compute a score agree up to this share of the largest score of a list, with room to spare.
ROUNDING, SPARE = 1e-4, 5


class Among:
    """A scorer whose other items are no candidates. allowed: bool [I]."""

    def __init__(self, inner: Scorer, allowed: np.ndarray) -> None:
        self.inner, self.num_users, self.num_items = inner, inner.num_users, inner.num_items
        self.banned = torch.from_numpy(~allowed)

    def score(self, users: Tensor) -> Tensor:
        """Scores of users [B], -inf for items that are not allowed: [B, I]."""
        scores = self.inner.score(users)
        return scores.masked_fill_(self.banned.to(scores.device), -torch.inf)

    def factors(self) -> None:
        return None


def read_ids(file: str | Path, flag: str) -> list[str]:
    """Ids of a text file, one a line; a first line that only names the column is none."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"there is no file {path}: check {flag}")
    lines = [line for line in utf8_bytes(read_bytes(path), path, {}).decode().replace("\r\n", "\n").split("\n") if line]
    return lines[1:] if lines and normal(lines[0]) in {normal(name) for name in ID_NAMES} else lines


def item_rows(data: Interactions, ids: list[str]) -> tuple[np.ndarray, int]:
    """The data's items of these ids, each once, and how many ids it does not have."""
    rows = places(ids, np.arange(data.num_items) if data.item_ids is None else data.item_ids)
    return np.unique(rows[rows >= 0]), int((rows < 0).sum())


def best_items(
    scorer: Scorer, users: Tensor, k: int, *, seen: sp.csr_array | None, allowed: np.ndarray | None = None
) -> tuple[Tensor, np.ndarray]:
    """The k best items of each user as :func:`topk_items` gives them, int64 [n, k], and their scores, float64 [n, k].

    Equal to the last digit for a user alone and among others. Scores of whole rows that are no dot product may be
    rounded as the company of a row has it: then more candidates than asked for are scored pair by pair (``at``), and
    more still where the next ones are too near to be told apart, and these scores order the list.
    allowed: bool [I], which items may be listed.
    """
    ranked = scorer if allowed is None else Among(scorer, allowed)
    if ranked.factors() is not None or not hasattr(scorer, "at"):
        items = topk_items(ranked, users, k, seen=seen)
        return items, scores_at(scorer, users, items)
    best, scores = torch.full((len(users), k), -1), torch.full((len(users), k), -torch.inf, dtype=torch.float64)
    left, wide = torch.arange(len(users)), k
    while len(left):
        wide = min(wide + max(SPARE, wide // 4), scorer.num_items)
        some = users[left.to(users.device)]
        items = topk_items(ranked, some, wide, seen=seen).cpu().sort(1).values  # equal scores: the lower item first
        exact, order = (
            torch.from_numpy(scores_at(scorer, some, items))
            .nan_to_num(nan=-torch.inf)
            .sort(dim=1, descending=True, stable=True)
        )
        size = exact.masked_fill(exact == -torch.inf, 0).abs().amax(1)
        sure = (exact[:, k - 1] - exact[:, -1] > ROUNDING * size) | (exact[:, -1] == -torch.inf)
        sure |= wide == scorer.num_items
        best[left[sure]], scores[left[sure]] = items.gather(1, order)[sure, :k], exact[sure, :k]
        left = left[~sure]
    return best, scores.masked_fill(best < 0, torch.nan).numpy()


def scores_at(scorer: Scorer, users: Tensor, items: Tensor) -> np.ndarray:
    """Scores [n, k] of the given items (int64 [n, k], -1 for none: NaN), float64.

    From the pairs alone where the scorer can (``at``), else from whole rows; in whole steps of rows, so that those of one
    user alone are rounded as those that he has in a batch.
    """
    at, found = getattr(scorer, "at", None), []
    size = ROWS if at else max(1, BLOCK_BYTES // (4 * ROW_STEP * scorer.num_items)) * ROW_STEP
    whole = torch.arange(-(-len(users) // ROW_STEP) * ROW_STEP, device=users.device) % max(len(users), 1)
    with torch.no_grad(), full_precision():
        for some in whole.split(size):
            rows, columns = users[some], items.clamp_min(0)[some.to(items.device)]
            found.append(at(rows, columns) if at else scorer.score(rows).gather(1, columns.to(users.device)))
    scores = torch.cat(found)[: len(users)].double()
    return scores.masked_fill_((items < 0).to(scores.device), torch.nan).cpu().numpy()


def safe_cell(value: Any) -> Any:
    """Text that a spreadsheet would run as a formula, with an apostrophe before it; numbers stay as they are."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") and value and not is_number(value):
        return f"'{value}"
    return value
