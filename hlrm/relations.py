"""Relation vectors: what is added to a user before the distance to an item is taken.

Notation: B users u [B, D], C items each [B, C, D], histories of P item vectors [B, P, D] with a mask [B, P], n memory
slots. LRAM(a, b) = softmax((a * b) K) M, a convex combination of the rows of M.

Source: Tran, Salha-Galvan, Hennequin, Moussallam, Hierarchical Latent Relation Modeling for Collaborative Metric
Learning, RecSys 2021. :class:`DiagonalRelation` is the arithmetic of a published port, which is not the paper's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

KINDS = ("base", "plus")
# Added to every coordinate difference of a plain (not squared) distance, as in the port: the root has a gradient at 0.
DISTANCE_EPS = 1e-6


class Attended(NamedTuple):
    """A relation and what explains it.

    vector [B, C, D]: the relation. user_weights [B, S, C]: how much each slot counts by the user's attention.
    item_weights [B, S', C] or None: the same by the item's attention (kind plus).
    addresses [B, S, C, n] or None: which memory rows each slot of ``user_weights`` is made of.
    Slots are the history, after a user slot where there is one; ``item_weights`` has the target slot in its place.
    """

    vector: Tensor
    user_weights: Tensor
    item_weights: Tensor | None = None
    addresses: Tensor | None = None


def slot_weights(logits: Tensor, mask: Tensor, beta: float = 1.0) -> Tensor:
    """w_k = exp(e_k) / (sum over valid slots of exp(e_k))^beta over dim 1; exactly 0 where masked.

    Shape: logits [B, S, C], mask bool [B, S] -> [B, S, C]. A row without valid slots gives zeros, without NaN in
    either direction. Taken through log-sum-exp: the published code overflows for long relations.
    """
    if logits.shape[1] == 0:
        return logits
    valid = mask.unsqueeze(2)
    filled = logits.masked_fill(~valid & mask.any(1)[:, None, None], -torch.inf)
    if beta == 1.0:
        return filled.softmax(1) * valid
    return (filled - beta * filled.logsumexp(1, keepdim=True)).exp() * valid


def lram(first: Tensor, second: Tensor, key: Tensor, memory: Tensor) -> Tensor:
    """LRAM(a, b) = softmax((a * b) K) M. Shape: [..., D] twice, K [D, n], M [n, D] -> [..., D]."""
    return address(first * second, key) @ memory


def address(product: Tensor, key: Tensor) -> Tensor:
    """softmax(product K) over the n slots. Shape: [..., D] -> [..., n]."""
    return (product @ key).softmax(-1)


class MemoryRelation(nn.Module):
    """The paper's relation: HLR (kind base) and HLR++ (plus).

        base  slots r_0 = LRAM(v, u), r_k = LRAM(v, v_k); weights from u . r_k; relation = sum w_k r_k
        plus  base without r_0, added to a preference: slots LRAM(u, v), LRAM(u, v_k), weights softmax(v . p_k)

    user_slot: whether r_0 is among the slots (default: base yes, plus no). beta: smoothing exponent of base's weights
    (1 is a softmax). diff_memory: a second key and memory for r_0 (base with user slot only).
    Relation vectors of slots are never formed: addresses are averaged first and meet the memory once.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_relations: int,
        kind: str = "base",
        *,
        user_slot: bool | None = None,
        beta: float = 1.0,
        diff_memory: bool = False,
    ) -> None:
        super().__init__()
        _check_kind(kind)
        self.kind, self.beta = kind, beta
        self.user_slot = kind == "base" if user_slot is None else user_slot
        if diff_memory and not (self.user_slot and kind == "base"):
            raise ValueError("a second memory serves the user slot of kind base, which there is none of")
        self.key, self.memory = _memory(embedding_dim, num_relations)
        self.user_key, self.user_memory = _memory(embedding_dim, num_relations) if diff_memory else (None, None)

    def forward(self, user: Tensor, items: Tensor, history: Tensor, mask: Tensor) -> Attended:
        """The relation of each user with each of its items. Shapes: module text; items [B, C, D]."""
        num_items, slots = items.shape[1], self.memory.shape[0]
        keyed = (items.transpose(1, 2).unsqueeze(3) * self.key[:, None]).flatten(2)
        addresses = torch.bmm(history, keyed).unflatten(2, (num_items, slots)).softmax(3)
        own = address(user[:, None] * items, self.key if self.user_key is None else self.user_key)
        logits = _dot_slots(addresses, user @ self.memory.T)
        memory = self.memory if self.user_memory is None else self.user_memory
        if self.user_slot:
            logits = torch.cat([(own * (user @ memory.T)[:, None]).sum(2).unsqueeze(1), logits], 1)
        weights = slot_weights(logits, self.slot_mask(mask), self.beta)
        first = int(self.user_slot)
        mixed = (weights[:, first:].unsqueeze(3) * addresses).sum(1)
        vector = mixed @ self.memory
        if self.user_slot:
            vector = vector + (weights[:, 0].unsqueeze(2) * own) @ memory
            addresses = torch.cat([own.unsqueeze(1), addresses], 1)
        if self.kind == "base":
            return Attended(vector, weights, None, addresses)
        mixed, by_item = self._preference(user, items, history, mask, own)
        return Attended(vector + mixed @ self.memory, weights, by_item, addresses)

    def slot_mask(self, mask: Tensor) -> Tensor:
        """The history's mask [B, P], after the user slot, which is always valid, if there is one."""
        return _with_first(mask) if self.user_slot else mask

    def _preference(
        self, user: Tensor, items: Tensor, history: Tensor, mask: Tensor, own: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean address [B, C, n] of the preference and its weights [B, 1 + P, C], the target's slot first."""
        taste = torch.bmm(history, user.unsqueeze(2) * self.key).softmax(2)
        seen = items @ self.memory.T
        logits = torch.cat([(own * seen).sum(2).unsqueeze(1), torch.bmm(taste, seen.transpose(1, 2))], 1)
        weights = slot_weights(logits, _with_first(mask))
        return weights[:, 0].unsqueeze(2) * own + torch.bmm(weights[:, 1:].transpose(1, 2), taste), weights


class DiagonalRelation(nn.Module):
    """The relation of the published port: its memory collapses to one vector c = sum over slots of key * value.

        base  r_k = v * v_k * c, weights softmax(u . r_k), relation = sum w_k r_k
        plus  base, added to slots u * v_k * c' with weights softmax(v . slot), c' from tables of its own

    There is no softmax over memory slots, so any number of them expresses the same relations.
    user_slot: u among the references of base, which the port has not. Padding is masked and an empty history gives
    the zero relation; the port pads with item 0 and attends to it.
    """

    def __init__(self, embedding_dim: int, num_relations: int, kind: str = "base", *, user_slot: bool = False) -> None:
        super().__init__()
        _check_kind(kind)
        self.kind, self.user_slot = kind, user_slot
        shape = (num_relations, embedding_dim)
        self.key, self.value = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))
        plus = kind == "plus"
        self.item_key = nn.Parameter(torch.randn(shape)) if plus else None
        self.item_value = nn.Parameter(torch.randn(shape)) if plus else None

    def diagonals(self) -> tuple[Tensor, Tensor | None]:
        """c [D], and c' [D] of kind plus."""
        second = None if self.item_key is None else (self.item_key * self.item_value).sum(0)
        return (self.key * self.value).sum(0), second

    def references(self, user: Tensor, history: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [B, S, D] and mask [B, S] of the slots of base."""
        if not self.user_slot:
            return history, mask
        return torch.cat([user[:, None], history], 1), _with_first(mask)

    def forward(self, user: Tensor, items: Tensor, history: Tensor, mask: Tensor) -> Attended:
        """The relation of each user with each of its items. Shapes: module text; items [B, C, D]."""
        diagonal, second = self.diagonals()
        slots, valid = self.references(user, history, mask)
        weights = slot_weights(diagonal_logits(user * diagonal, slots, items), valid)
        vector = items * diagonal * torch.bmm(weights.transpose(1, 2), slots)
        if second is None:
            return Attended(vector, weights)
        by_item = slot_weights(diagonal_logits(user * second, history, items), mask)
        taste = (user * second)[:, None] * torch.bmm(by_item.transpose(1, 2), history)
        return Attended(vector + taste, weights, by_item)


class HistoryAttention(nn.Module):
    """Attention without a memory: weights softmax(v . v_k) over the history, relation = sum w_k v_k. No parameters.

    The mean of the history's items that the target chooses, as in attentive item models; a user without a history has
    the zero relation, which is CML. The HLR paper compares with an "AttCML" of this idea and gives no formula.
    """

    def forward(self, user: Tensor, items: Tensor, history: Tensor, mask: Tensor) -> Attended:
        """The relation of each user with each of its items. Shapes: module text; items [B, C, D]."""
        weights = slot_weights(torch.bmm(history, items.transpose(1, 2)), mask)
        return Attended(torch.bmm(weights.transpose(1, 2), history), weights)


def diagonal_logits(scaled: Tensor, slots: Tensor, items: Tensor) -> Tensor:
    """sum over d of scaled_d slot_kd item_d. Shape: [B, D], [B, S, D], [B, C, D] -> [B, S, C]."""
    return torch.bmm(slots * scaled[:, None], items.transpose(1, 2))


def neighbour_attention(target: Tensor, other: Tensor, neighbours: Tensor, diagonal: Tensor) -> Attended:
    """The port's third module, which none of its models uses: users of the item as references.

    Slots other * neighbour_k * diagonal, weights softmax(target . slot). Shape: [B, D] twice, [B, P, D], [D].
    """
    mask = torch.ones(neighbours.shape[:2], dtype=torch.bool, device=neighbours.device)
    weights = slot_weights(diagonal_logits(target * diagonal, neighbours, other[:, None]), mask)
    vector = (other * diagonal)[:, None] * torch.bmm(weights.transpose(1, 2), neighbours)
    return Attended(vector, weights)


Relation = MemoryRelation | DiagonalRelation | HistoryAttention


def _memory(embedding_dim: int, num_relations: int) -> tuple[nn.Parameter, nn.Parameter]:
    scale = 1 / math.sqrt(embedding_dim)
    key, memory = torch.randn(embedding_dim, num_relations), torch.randn(num_relations, embedding_dim)
    return nn.Parameter(key * scale), nn.Parameter(memory * scale)


def _with_first(mask: Tensor) -> Tensor:
    """[B, P] -> [B, 1 + P] with a valid slot in front."""
    return torch.cat([mask.new_ones(len(mask), 1), mask], 1)


def _dot_slots(addresses: Tensor, seen: Tensor) -> Tensor:
    """sum over n of addresses [B, P, C, n] and seen [B, n]: [B, P, C]."""
    return torch.bmm(addresses.flatten(1, 2), seen.unsqueeze(2)).view(addresses.shape[:3])


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of relation {kind!r}: choose one of {', '.join(KINDS)}")
