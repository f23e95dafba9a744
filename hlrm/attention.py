"""Why an item is near a user: attention over history items and memory rows, written and drawn."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gfml.base.errors import UserError
from gfml.base.files import atomic_open
from gfml.data.interactions import Interactions
from gfml.data.items import ItemInfo, by_title, info_beside, read_item_info
from gfml.program.cli import Options
from gfml.ranking.evaluation import Evaluation
from gfml.report.page import COLORS, TEXT, panels, png, styled
from hlrm.data import History
from hlrm.experiment import HLRM
from hlrm.model import RelationModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INFO_FILES = ("movies.dat", "ml-100k.item", "items.csv", "items.tsv", "*.item")
PLOTTED = 12
SHOWN_SLOTS = 15


def explain(given: Options, this: HLRM, model: RelationModel, evaluation: Evaluation, file: Path) -> list[str]:
    """Write attention.npz, attention.csv and a plot per pair into a folder; lines that say where.

    Pairs: those of --pair, then the first recommendations of --attention judged users (drawn with the seed).
    """
    options, data = this.settings, this.data
    if model.relation is None:
        raise UserError(f"{file} has no relations to explain (--model {options.model}): drop --attention and --pair")
    names = item_names(this, getattr(given, "item_info", None))
    pairs = [_numbered(data, names, *pair) for pair in getattr(given, "pair", [])]
    rows = np.random.default_rng(options.seed).permutation(len(evaluation.users))[: given.attention]
    pairs += [(int(evaluation.users[row]), int(evaluation.top[row, 0])) for row in rows if evaluation.top[row, 0] >= 0]
    folder = Path(getattr(given, "attention_dir", file.with_suffix(".attention")))
    for old in folder.glob("pair-*.png"):
        # Of other pairs than the table that follows.
        old.unlink()
    arrays = attention_of(this, model, pairs, given.eval_split)
    with atomic_open(folder / "attention.npz", "wb") as stream:
        np.savez_compressed(stream, **arrays)
    with atomic_open(folder / "attention.csv", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(
            ["user", "item", "slot", "reference", "user_attention", "item_attention", "memory_row", "memory_share"]
        )
        writer.writerows(table_rows(arrays, data, names))
    for number in range(min(len(pairs), PLOTTED)):
        plot_pair(folder / f"pair-{number + 1}.png", arrays, number, data, names)
    return [f"attention       {folder} ({len(pairs)} pairs)"]


@torch.no_grad()
def attention_of(this: HLRM, model: RelationModel, pairs: list[tuple[int, int]], split: str) -> dict[str, np.ndarray]:
    """Arrays of N pairs: users [N], items [N], references [N, S] (-1 the user, -2 no item), user_weights [N, S],
    item_weights [N, 1 + P] (target slot first) for kind plus, addresses [N, S, n] for the memory form."""
    device = this.device
    users, items = torch.tensor(pairs, dtype=torch.int64, device=device).view(-1, 2).T
    every = this.histories(split)
    history = History(every.ids[users], every.counts[users])
    found = model.attend(users, items[:, None], history)
    references = history.ids.masked_fill(~history.mask, -2)
    if found.user_weights.shape[1] > references.shape[1]:
        references = torch.cat([references.new_full((len(users), 1), -1), references], 1)
    arrays = {"users": users, "items": items, "references": references, "user_weights": found.user_weights[:, :, 0]}
    if found.item_weights is not None:
        arrays["item_weights"] = found.item_weights[:, :, 0]
    if found.addresses is not None:
        arrays["addresses"] = found.addresses[:, :, 0]
    return {name: value.cpu().numpy() for name, value in arrays.items()}


def item_info(this: HLRM, file: str | None) -> ItemInfo | None:
    """What the given file, or a known one beside the data, says of the items; None without any."""
    if file:
        return read_item_info(file, this.data)
    # Titles belong to source ids; data in numbers of its own has none that a file could name.
    if this.data.item_ids is None:
        return None
    return info_beside(this.settings.dataset, this.settings.data_root, INFO_FILES, this.data)


def item_names(this: HLRM, file: str | None) -> list[str]:
    """Titles where a file beside the data, or the given one, has them; else the ids of the source."""
    data, info = this.data, item_info(this, file)
    ids = [str(name) for name in (np.arange(data.num_items) if data.item_ids is None else data.item_ids).tolist()]
    titles = [""] * len(ids) if info is None else info.titles
    return [title or f"item {name}" for title, name in zip(titles, ids, strict=True)]


def table_rows(arrays: dict[str, np.ndarray], data: Interactions, names: list[str]) -> list[list[Any]]:
    """One row per pair and slot in use, the user's largest weights first."""
    rows = []
    for number, user in enumerate(arrays["users"]):
        shift = int((arrays["references"][number] == -1).sum())
        for slot in _order(arrays, number):
            by_item = arrays["item_weights"][number, slot + 1 - shift] if "item_weights" in arrays else ""
            row, share = "", ""
            if "addresses" in arrays:
                row = int(arrays["addresses"][number, slot].argmax())
                share = f"{arrays['addresses'][number, slot, row]:.6g}"
            rows.append([
                _user_name(data, user), names[arrays["items"][number]], slot, _reference(arrays, number, slot, names),
                f"{arrays['user_weights'][number, slot]:.6g}", f"{by_item:.6g}" if by_item != "" else "", row, share,
            ])  # fmt: skip
    return rows


def plot_pair(path: Path, arrays: dict[str, np.ndarray], number: int, data: Interactions, names: list[str]) -> None:
    """The user's attention per reference and, for the memory form, which memory rows each is made of."""
    title = f"user {_user_name(data, arrays['users'][number])}, {names[arrays['items'][number]]}"
    picture = png(_draw_pair(arrays, number, names, title), dpi=110)
    with atomic_open(path, "wb") as stream:
        stream.write(picture)


@styled
def _draw_pair(arrays: dict[str, np.ndarray], number: int, names: list[str], title: str) -> Figure:
    """Dots around the attention that all references alike would get: bars from zero would all look alike."""
    every = _order(arrays, number)
    slots, with_memory = every[:SHOWN_SLOTS], "addresses" in arrays
    few = f", the {len(slots)} largest of {len(every)}" if len(every) > len(slots) else ""
    figure, axes = panels(
        1, 2 if with_memory else 1, width=11 if with_memory else 7, height=1.6 + 0.32 * max(len(slots), 3)
    )
    axis, place, weights = axes[0, 0], np.arange(len(slots)), arrays["user_weights"][number, slots]
    level = 1 / max(len(every), 1)
    axis.hlines(place, level, weights, color=COLORS[0], linewidth=2.2)
    axis.plot(weights, place, "o", color=COLORS[0])
    axis.axvline(level, color=TEXT, linewidth=1, linestyle=":")
    axis.set_yticks(place, [_reference(arrays, number, slot, names)[:40] for slot in slots])
    axis.set_ylim(len(slots) - 0.5, -0.5)
    axis.locator_params(axis="x", nbins=4)
    axis.set(xlabel=f"attention of the user (dotted: 1 / {len(every)})", title=f"References{few}")
    if with_memory and len(slots):
        image = axes[0, 1].imshow(arrays["addresses"][number, slots], aspect="auto", cmap="viridis")
        axes[0, 1].set(xlabel="memory row (latent relation)", yticks=[], title="What the relations are made of")
        axes[0, 1].grid(False)
        axes[0, 1].xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axes[0, 1], label="share of the relation")
    figure.suptitle(title, fontsize=11)
    return figure


def _order(arrays: dict[str, np.ndarray], number: int) -> np.ndarray:
    """Slots in use, the largest weight first."""
    used = np.flatnonzero(arrays["references"][number] != -2)
    return used[np.argsort(-arrays["user_weights"][number, used], kind="stable")]


def _reference(arrays: dict[str, np.ndarray], number: int, slot: int, names: list[str]) -> str:
    item = int(arrays["references"][number, slot])
    return "the user" if item == -1 else names[item]


def _user_name(data: Interactions, user: int) -> str:
    return str(user if data.user_ids is None else data.user_ids[user])


def _numbered(data: Interactions, names: list[str], user: str, item: str) -> tuple[int, int]:
    """The rows of a user's id and of an item's id or title."""
    row = _row(item, data.item_ids, data.num_items)
    found = {"user": _row(user, data.user_ids, data.num_users), "item": by_title(item, names) if row is None else row}
    if found["user"] is None:
        raise UserError(f"{data.name} has no user {user}: give an id of the data with --pair USER ITEM")
    return found["user"], found["item"]


def _row(name: str, ids: np.ndarray | None, count: int) -> int | None:
    """The row of an id as the source writes it."""
    if ids is not None:
        found = np.flatnonzero(ids.astype(str) == name)
    else:
        found = np.array([int(name)]) if re.fullmatch("[0-9]+", name) and int(name) < count else np.array([])
    return int(found[0]) if len(found) else None
