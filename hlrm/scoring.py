"""Scores of whole catalogues, where every pair of user and item has a relation of its own.

The naive cost is users x items x slots x D x n. Two facts lower it:

- LRAM(v_i, v_j) depends on the two items alone. For a block of items i its addresses are computed once for every item
  j that stands in any history, and users look them up: items^2 x D x n products for all users together, and n numbers
  per (user, item, slot) after that.
- With q the averaged address, r = q M and |u + r - v|^2 = |u|^2 + |v|^2 - 2 u.v + q . (2 M u - 2 M v + M M^T q): only
  n-vectors per pair of user and item, never D-vectors.

Other relations have no such tables; their D-vectors exist for one block of users and items at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Self

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from gfml.ranking.sampling import seeded_generator
from gfml.ranking.topk import Factors
from hlrm.data import Histories, History
from hlrm.relations import DISTANCE_EPS, MemoryRelation, Relation, slot_weights

# Floats of the largest temporary: what fits a core's cache beats larger blocks two to one, a GPU wants them large.
CPU_FLOATS = 1 << 18
ITEMS_ON_CPU = 16


class _RelationScorer:
    """What both kinds share: vectors, fixed histories, blocks of items. A :class:`gfml.ranking.topk.Scorer`."""

    pool = 128  # other items that a new user's are compared with: every one has a relation of its own

    def __init__(
        self,
        user: Tensor,
        item: Tensor,
        relation: Relation,
        history: History,
        *,
        squared: bool = True,
        block: int = 0,
        memory_mb: float = 256,
    ) -> None:
        if len(history.counts) != len(user):
            raise ValueError(f"found histories of {len(history.counts)} users, wanted one for each of {len(user)}")
        self.user, self.item, self.relation, self.history = user, item, relation, history
        self.squared, self.block = squared, block
        self.floats = int(memory_mb * 2**20) // 4
        self.num_users, self.num_items = len(user), len(item)

    def factors(self) -> None:
        """None: the order is no dot product."""
        return None

    def of_histories(self, histories: sp.csr_array, vectors: Tensor | None = None) -> Self:
        """This scorer for users with these histories (binary CSR [n, I]) and vectors [n, D], None while these are sought.

        Of more items than a judged history has, those with the highest numbers count.
        """
        known = Histories(histories, self.history.ids.shape[1], kind="last", device=self.user.device)
        other, rows = copy(self), torch.arange(histories.shape[0], device=self.user.device)
        other.history = known.of_rows(rows, seeded_generator(self.user.device, 0), known.items)
        if vectors is not None:
            other.user, other.num_users = vectors, len(vectors)
        return other

    def against(self, items: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """Scores of user vectors [B, D], whose histories are this scorer's, with all items, [W], or each his own, [B, W]."""
        item = self.item if items is None else self.item[items]
        item = item if item.dim() == 3 else item.expand(len(self.history.ids), *item.shape)
        return lambda vectors: self._related_scores(vectors, item, self.history)

    def at(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores of users [B] with their own items int64 [B, K]: [B, K]."""
        return self._related_scores(
            self.user[users], self.item[items], History(*(part[users] for part in self.history))
        )

    def _related_scores(self, user: Tensor, items: Tensor, history: History) -> Tensor:
        moved = user[:, None] + self.relation(user, items, self.item[history.ids], history.mask).vector - items
        return -(moved.square().sum(2) if self.squared else (moved + DISTANCE_EPS).norm(dim=2))

    def _item_block(self, floats_per_item: int) -> int:
        """Items at a time: within the budget and ``block``."""
        fit = max(1, self.floats // max(1, 4 * floats_per_item))
        fit = min(fit, ITEMS_ON_CPU) if self.user.device.type == "cpu" else fit
        return min(fit, self.block or fit, self.num_items)

    def _user_block(self, floats_per_user: int) -> int:
        """Users at a time: the largest temporary stays in the cache, on a GPU within the budget."""
        budget = CPU_FLOATS if self.user.device.type == "cpu" else self.floats // 4
        return max(1, min(budget, self.floats // 4) // max(1, floats_per_user))


class MemoryScorer(_RelationScorer):
    """-|u + r - v|^2 (or its negative root) with the paper's relations; see the module text."""

    relation: MemoryRelation

    @torch.no_grad()
    def score(self, users: Tensor) -> Tensor:
        """Scores of users [B] with every item: [B, I]."""
        # Users with histories of one length share a block: little is spent on padding.
        order = self.history.counts[users].argsort(stable=True)
        users = users[order]
        user, history = self.user[users], History(*(part[users] for part in self.history))
        known, place = self._known(history)
        result = user.new_empty(len(users), self.num_items)
        slots = self.relation.memory.shape[0]
        step = self._item_block(slots * max(len(known), len(users)))
        blocks = self._user_blocks(history.counts, step * slots)
        taste = self._taste(user, history)
        for start in range(0, self.num_items, step):
            item = self.item[start : start + step]
            table, own = self._addresses(known, user, item)
            for part, width in blocks:
                mask = history.mask[part, :width]
                mixed = self._mix(user[part], item, table[place[part, :width]], own[part], mask)
                if taste is not None:
                    mixed = mixed + self._prefer(item, taste[part, :width], own[part], mask)
                result[part, start : start + step] = self._negative_distance(user[part], item, mixed)
        return result[order.argsort()]

    def _user_blocks(self, counts: Tensor, floats_per_slot: int) -> list[tuple[slice, int]]:
        """Slices of users, whose counts ascend, and the longest history in each."""
        lengths, blocks, start = counts.tolist(), [], 0
        while start < len(lengths):
            end = min(start + self._user_block(floats_per_slot * (lengths[start] + 1)), len(lengths))
            end = min(end, start + self._user_block(floats_per_slot * (lengths[end - 1] + 1)))
            blocks.append((slice(start, end), lengths[end - 1]))
            start = end
        return blocks

    def _known(self, history: History) -> tuple[Tensor, Tensor]:
        """Vectors of the distinct items in the histories [R, D], and the row of each history place [B, P]."""
        ids, place = history.ids.unique(return_inverse=True)
        return self.item[ids], place.view(history.ids.shape)

    def _addresses(self, known: Tensor, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        """Addresses of item pairs [R, c, n] and of the pairs of user and item [B, c, n]."""
        relation = self.relation
        shape = (len(item), relation.memory.shape[0])
        table = (known @ _keyed(item, relation.key)).unflatten(1, shape).softmax(2)
        key = relation.key if relation.user_key is None else relation.user_key
        return table, (user @ _keyed(item, key)).unflatten(1, shape).softmax(2)

    def _mix(self, user: Tensor, item: Tensor, table: Tensor, own: Tensor, mask: Tensor) -> Tensor:
        """Averaged addresses by the user's attention: [b, c, n], or [b, c, 2n] with a second memory."""
        relation = self.relation
        logits = torch.bmm(table.flatten(1, 2), (user @ relation.memory.T).unsqueeze(2)).view(table.shape[:3])
        if relation.user_slot:
            memory = relation.memory if relation.user_memory is None else relation.user_memory
            logits = torch.cat([torch.bmm(own, (user @ memory.T).unsqueeze(2)).transpose(1, 2), logits], 1)
        weights = slot_weights(logits, relation.slot_mask(mask), relation.beta)
        mixed = table.mul_(weights[:, int(relation.user_slot) :].unsqueeze(3)).sum(1)
        if not relation.user_slot:
            return mixed
        own = weights[:, 0].unsqueeze(2) * own
        return mixed + own if relation.user_memory is None else torch.cat([mixed, own], 2)

    def _taste(self, user: Tensor, history: History) -> Tensor | None:
        """Kind plus: addresses of each user with its history [B, P, n]; they do not depend on the item scored."""
        if self.relation.kind == "base":
            return None
        rows = max(1, self.floats // (4 * max(1, history.ids.shape[1] * user.shape[1])))
        parts = [
            torch.bmm(self.item[ids], some.unsqueeze(2) * self.relation.key).softmax(2)
            for ids, some in zip(history.ids.split(rows), user.split(rows), strict=True)
        ]
        return torch.cat(parts)

    def _prefer(self, item: Tensor, taste: Tensor, own: Tensor, mask: Tensor) -> Tensor:
        """Averaged addresses by the item's attention [b, c, n]."""
        seen = item @ self.relation.memory.T
        logits = torch.cat([(own * seen).sum(2).unsqueeze(1), taste @ seen.T], 1)
        weights = slot_weights(logits, torch.cat([mask.new_ones(len(mask), 1), mask], 1))
        return torch.baddbmm(weights[:, 0].unsqueeze(2) * own, weights[:, 1:].transpose(1, 2), taste)

    def _negative_distance(self, user: Tensor, item: Tensor, mixed: Tensor) -> Tensor:
        """From n-vectors alone: [b, c]."""
        relation = self.relation
        memory = relation.memory if relation.user_memory is None else torch.cat([relation.memory, relation.user_memory])
        inner = mixed @ (memory @ memory.T)
        inner.add_((user @ memory.T)[:, None], alpha=2).sub_(item @ memory.T, alpha=2)
        sq_distance = inner.mul_(mixed).sum(2).addmm_(user, item.T, alpha=-2)
        sq_distance.add_(user.square().sum(1, keepdim=True)).add_(item.square().sum(1))
        if self.squared:
            return sq_distance.neg_()
        # |x + e|^2 = |x|^2 + 2 e sum(x) + D e^2, for the e that plain distances add to every coordinate.
        total = mixed @ memory.sum(1) + user.sum(1, keepdim=True) - item.sum(1)
        sq_distance.add_(total, alpha=2 * DISTANCE_EPS).add_(user.shape[1] * DISTANCE_EPS**2)
        return sq_distance.clamp_min_(0).sqrt_().neg_()


class BlockScorer(_RelationScorer):
    """Minus the distance with any relation; D-vectors exist for one block of users and items."""

    @torch.no_grad()
    def score(self, users: Tensor) -> Tensor:
        """Scores of users [B] with every item: [B, I]."""
        result = self.user.new_empty(len(users), self.num_items)
        dim, slots = self.user.shape[1], self.history.ids.shape[1] + 1
        step = self._item_block(dim + slots)
        if self.user.device.type == "cpu":
            step = min(self.block or self.num_items, self.num_items, 512)
        rows = self._user_block(step * (dim + slots) + slots * dim)
        for first in range(0, len(users), rows):
            part = users[first : first + rows]
            user, history = self.user[part], History(*(own[part] for own in self.history))
            for start in range(0, self.num_items, step):
                item = self.item[start : start + step]
                every = item.expand(len(part), *item.shape)
                result[first : first + rows, start : start + step] = self._related_scores(user, every, history)
        return result


class TranslatedScorer:
    """-|u + a_u * b_v - v|^2 with neighbourhood means a [U, D] and b [I, D]: a dot product in 4 D + 1 dimensions."""

    def __init__(self, user: Tensor, item: Tensor, taste: Tensor, crowd: Tensor) -> None:
        self.user, self.item, self.taste, self.crowd = user, item, taste, crowd
        self.num_users, self.num_items = len(user), len(item)

    def of_histories(self, histories: sp.csr_array, vectors: Tensor | None = None) -> Self:
        """This scorer for users with these histories (binary CSR [n, I]) and vectors [n, D], None while these are sought."""
        other = copy(self)
        other.taste = neighbour_means(histories, self.item)
        if vectors is not None:
            other.user, other.num_users = vectors, len(vectors)
        return other

    def at(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores of users [B] with their own items int64 [B, K]: [B, K]."""
        query = self.user[users][:, None] + self.taste[users][:, None] * self.crowd[items]
        return -(query - self.item[items]).square().sum(2)

    def against(self, items: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """Scores of user vectors [B, D], whose means are this scorer's, with all items, [W], or each his own, [B, W]."""
        item, crowd = (table if items is None else table[items] for table in (self.item, self.crowd))
        moved = self.taste[:, None] * crowd - item
        return lambda vectors: -(vectors[:, None] + moved).square().sum(2)

    @torch.no_grad()
    def factors(self) -> Factors:
        """The score without |u|^2."""
        user, item, taste, crowd = self.user, self.item, self.taste, self.crowd
        left = [2 * user, -2 * user * taste, 2 * taste, -taste.square(), torch.ones_like(user[:, :1])]
        right = [item, crowd, item * crowd, crowd.square(), -item.square().sum(1, keepdim=True)]
        return Factors(torch.cat(left, 1), torch.cat(right, 1))

    @torch.no_grad()
    def score(self, users: Tensor) -> Tensor:
        """Minus squared distances of users [B]: [B, I]."""
        left, right = self.factors()
        return left[users] @ right.T - self.user[users].square().sum(1, keepdim=True)


def neighbour_means(matrix: sp.csr_array, vectors: Tensor) -> Tensor:
    """Mean of ``vectors`` [M, D] over the entries of each row of a binary [N, M] matrix; 0 for empty rows. [N, D]."""
    counts = np.maximum(np.diff(matrix.indptr), 1).astype(np.float32)
    means = (matrix @ vectors.cpu().numpy()) / counts[:, None]
    return torch.from_numpy(means).to(vectors)


def _keyed(item: Tensor, key: Tensor) -> Tensor:
    """Columns v_i * K for every item: [D, c n]."""
    return (item.T.unsqueeze(2) * key.unsqueeze(1)).flatten(1)
