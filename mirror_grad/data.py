"""Interactions with item features: what every model of this folder is built from."""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from gfml.base.errors import UserError, suggest
from gfml.data import registry
from gfml.data.cache import default_cache_dir
from gfml.data.interactions import Interactions, csr_from_pairs
from gfml.data.items import read_item_features, read_item_info
from gfml.data.options import load_from_args
from mirror_grad import features as encoders
from mirror_grad.layout import (
    MODALITIES,
    checked_features,
    find_inter,
    read_feature_file,
    read_item_map,
    read_user_graph,
    require_labels,
    rows_in_map,
    shared_items,
    write_user_graph,
)
from mirror_grad.settings import DATASETS, FEATURES, MirrorGradSettings

logger = logging.getLogger("gfml.data")
TEXT_FILES = ("item_text.csv", "movies.dat", "ml-100k.item")
ID_MODELS = ("BPR", "LightGCN", "LayerGCN", "SELFCFED_LGN")


@dataclass(frozen=True)
class MultimodalData:
    """What a model is built from.

    features: float32 [I, F] by modality ("image", "text"), finite. known: bool [I] by modality, where the row is the
    item's own and not filled in. feature_source: files, npz, tfidf-svd, hashing, random or none.
    cache_dir: where graphs made from the data are kept; None keeps none. folder: where the data lies.
    """

    interactions: Interactions
    features: Mapping[str, Tensor] = field(default_factory=dict)
    known: Mapping[str, Tensor] = field(default_factory=dict)
    feature_source: str = "none"
    cache_dir: Path | None = None
    folder: Path | None = None

    @property
    def num_users(self) -> int:
        return self.interactions.num_users

    @property
    def num_items(self) -> int:
        return self.interactions.num_items

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over interactions and features."""
        digest = hashlib.sha256(self.interactions.fingerprint.encode())
        for name, table in self.features.items():
            digest.update(f"{name}{tuple(table.shape)}".encode())
            digest.update(table.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def user_graph(self) -> sp.csr_array:
        """Users who share train items, see :func:`mirror_grad.layout.shared_items`; stored, kept or computed."""
        stored = None if self.folder is None else self.folder / "user_graph.npz"
        if stored is not None and stored.is_file():
            return read_user_graph(stored, self.num_users)
        kept = (
            None
            if self.cache_dir is None
            else self.cache_dir / f"users-{self.interactions.part_fingerprint('train')[:16]}.npz"
        )
        if kept is not None and kept.is_file():
            return read_user_graph(kept, self.num_users)
        graph = shared_items(self.interactions.train)
        if kept is not None:
            write_user_graph(kept, graph)
        return graph

    def with_features(self, features: Mapping[str, Tensor], source: str | None = None) -> MultimodalData:
        """The same interactions with other features (for noise, swaps and missing modalities)."""
        return replace(self, features=dict(features), feature_source=source or self.feature_source)


def load(options: MirrorGradSettings, *, needs_features: bool) -> MultimodalData:
    """The data of the flags. Features are read or made when the model needs them or ``--features`` names them."""
    inter = _own_inter(options)
    if inter is not None and options.split is None:
        require_labels(inter)
    source = argparse.Namespace(**{**vars(options), "dataset": str(inter or options.dataset)})
    interactions = load_from_args(source)
    folder = inter.parent if inter is not None else _registry_folder(options)
    if inter is not None:
        interactions = replace(interactions, name=inter.name.split(".")[0])
    if not options.keep_cold_users:
        interactions = without_cold_users(interactions)
    # A folder may hold several data sets; a map is for the one whose items have numbers alone.
    numbered = folder is not None and interactions.item_ids is None
    ids = read_item_map(folder, interactions.num_items) if numbered else None
    if ids is not None:
        more = (rows_in_map(folder) or 0) - interactions.num_items
        notes = {"items of the map that no interaction names, ignored": more} if more > 0 else {}
        interactions = replace(interactions, item_ids=ids, notes=interactions.notes | notes)
    cache_dir = (
        (Path(options.cache_dir) if options.cache_dir else default_cache_dir()).parent / "graphs"
        if options.cache
        else None
    )
    data = MultimodalData(interactions, folder=folder, cache_dir=cache_dir)
    if not needs_features and options.features == "auto":
        return data
    return _with_modalities(options, data, needs_features=needs_features)


def without_cold_users(data: Interactions) -> Interactions:
    """Validation and test without users who have no train pair; how many pairs that drops is noted."""
    warm, dropped = data.user_activity > 0, 0
    parts: dict[str, Any] = {}
    for name in ("valid", "test"):
        part = data.split(name).tocoo()
        keep = warm[part.row]
        dropped += int((~keep).sum())
        parts[name] = csr_from_pairs(part.row[keep], part.col[keep], data.num_users, data.num_items)
        if name == "test" and data.test_ratings is not None:
            parts["test_ratings"] = data.test_ratings[keep]
    notes = data.notes | {"pairs of users without train pairs, dropped": dropped}
    return replace(data, **parts, notes=notes) if dropped else data


def _own_inter(options: MirrorGradSettings) -> Path | None:
    """The .inter file of a data set that is not known by name."""
    if options.dataset in registry.GENERATED or registry.known_by(options.dataset) is not None:
        return None
    found = find_inter(options.dataset, registry.data_roots(options.data_root))
    if found is None and not Path(options.dataset).expanduser().exists():
        known = sorted({*DATASETS, *registry.known_names(), *registry.ALIASES})
        roots = ", ".join(str(root / options.dataset) for root in registry.data_roots(options.data_root))
        raise UserError(
            f"no data set {options.dataset!r}: no {options.dataset}.inter in {roots}; known names are {', '.join(known)}"
            f"{suggest(options.dataset, known)}"
        )
    return found


def _registry_folder(options: MirrorGradSettings) -> Path | None:
    known = registry.known_by(options.dataset)
    if known is None:
        path = Path(options.dataset).expanduser()
        return (path if path.is_dir() else path.parent) if path.exists() else None
    found = registry.locate(known, registry.data_roots(options.data_root))
    return None if found is None else next(iter(found[1].values())).parent


# -- features


def _with_modalities(options: MirrorGradSettings, data: MultimodalData, *, needs_features: bool) -> MultimodalData:
    """The data with the features of ``--features``, limited to ``--modalities``."""
    tables, source = _tables(options, data)
    tables = {name: tables[name] for name in MODALITIES if name in tables and name in options.modalities}
    if not tables and needs_features:
        raise _no_features(options, data)
    values, known = {}, {}
    for name, table in tables.items():
        table = checked_features(table, data.num_items, f"{name} features of {data.interactions.name}")
        has = (table != 0).any(1)
        if not has.any():
            raise UserError(
                f"every {name} feature of {data.interactions.name} is zero: give other features or leave out {name} with --modalities"
            )
        values[name] = torch.from_numpy(encoders.fill_missing(table, has, options.fill_missing))
        known[name] = torch.from_numpy(has)
    return replace(data, features=values, known=known, feature_source=source if values else "none")


def _tables(options: MirrorGradSettings, data: MultimodalData) -> tuple[dict[str, np.ndarray], str]:
    """Raw tables by modality and where they are from; empty where there are none."""
    what = options.features
    if what == "none":
        return {}, "none"
    if what == "random":
        widths = zip(MODALITIES, options.random_widths, strict=True)
        found = {
            name: encoders.random_features(data.num_items, width, options.split_seed, k)
            for k, (name, width) in enumerate(widths)
        }
        return found, "random"
    if what in encoders.LOCAL_ENCODERS:
        return {
            "text": encoders.encode_texts(item_texts(options, data), what, options.text_width, options.split_seed)
        }, what
    place = data.folder if what == "auto" else Path(what).expanduser()
    if place is None or (what == "auto" and not place.exists()):
        return {}, "none"
    if not place.exists():
        near = suggest(what, FEATURES)
        raise UserError(f"found --features {what!r}, wanted {', '.join(FEATURES)} or an existing file or folder{near}")
    return _stored_tables(place, data)


def _stored_tables(place: Path, data: MultimodalData) -> tuple[dict[str, np.ndarray], str]:
    if place.is_dir():
        files = {name: place / f"{name}_feat.npy" for name in MODALITIES}
        found = {name: read_feature_file(file, data.num_items) for name, file in files.items() if file.is_file()}
        if found or not (place / "features.npz").is_file():
            return found, "files"
        place = place / "features.npz"
    if place.suffix == ".npy":
        name = next((name for name in MODALITIES if name in place.name), "text")
        return {name: read_feature_file(place, data.num_items)}, "files"
    table = read_item_features(place, data.interactions)
    named = {name: table.values[:, columns] for name, columns in table.blocks.items() if name in MODALITIES}
    if not named:
        raise UserError(f"{place} has no table called image or text, found {', '.join(table.blocks)}: rename one")
    return named, "npz"


def item_texts(options: MirrorGradSettings, data: MultimodalData) -> list[str]:
    """One text an item, from ``--item-text`` or the folder's own file; empty where the file says nothing."""
    names = [data.folder / f"{name}{end}" for name in TEXT_FILES for end in ("", ".gz")] if data.folder else []
    file = (
        Path(options.item_text).expanduser()
        if options.item_text
        else next((path for path in names if path.is_file()), None)
    )
    if file is None:
        raise UserError(
            f"{data.interactions.name} has no item titles ({', '.join(TEXT_FILES)} in {data.folder}): give --item-text FILE"
        )
    return read_texts(file, data)


def read_texts(file: Path, data: MultimodalData) -> list[str]:
    """One text an item from a table (title, genres, description) or from metadata as JSON; empty where the file says nothing."""
    if {".json", ".jsonl"} & set(file.suffixes):
        from mirror_grad.preprocess import read_metadata

        return read_metadata(file, item_names(data))
    info = read_item_info(file, data.interactions)
    bare = sum(bool(title) and not text for title, text in zip(info.titles, info.about, strict=True))
    if bare and any(info.about):
        logger.warning("note: %s has no description of %s items, only title and genres", file.name, f"{bare:,}")
    return encoders.words_of(*info)


def item_names(data: MultimodalData) -> list[str]:
    """The source's id of every item; its number where the data have numbers alone."""
    ids = data.interactions.item_ids
    return [str(name) for name in (np.arange(data.num_items) if ids is None else ids).tolist()]


def _no_features(options: MirrorGradSettings, data: MultimodalData) -> UserError:
    """What is missing and every way out."""
    name, where = data.interactions.name, "" if data.folder is None else f" in {data.folder}"
    wanted = " or ".join(f"{kind}_feat.npy" for kind in options.modalities)
    return UserError(
        f"{options.model} needs item features and {name} has none (no {wanted}, no features.npz{where}): put them there, give "
        f"--features tfidf-svd or hashing for features from titles (--item-text FILE), choose a model of ids alone "
        f"({', '.join(ID_MODELS)}), or ask for noise with --features random"
    )
