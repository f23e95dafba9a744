"""Data sets known by name: where they are published, how they are read, and what must come out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from gfml.base.errors import UserError
from gfml.data.download import download, file_hash, unpack
from gfml.data.interactions import Interactions
from gfml.data.readers import (
    Records,
    read_adjacency_parts,
    read_counted_lists,
    read_lastfm,
    read_mcl_parts,
    read_movielens,
    read_pairs_npz,
    read_table,
)
from gfml.data.tables import PACKED, TABLE_SUFFIXES, suffix

logger = logging.getLogger("gfml.data")

Paths = Mapping[str, Path]


@dataclass(frozen=True)
class Layout:
    """One way in which a data set lies on disk: file names by part, and their reader.

    A file may also carry ``.gz``. ``threshold``: keep ratings above it unless the user sets one.
    """

    files: Mapping[str, str]
    read: Callable[[Paths], Records]
    threshold: float | None = None


@dataclass(frozen=True)
class Counts:
    """What the published data holds, read with default options; None where nothing is published."""

    users: int
    items: int
    train: int | None = None
    valid: int | None = None
    test: int | None = None
    total: int | None = None


@dataclass(frozen=True)
class Download:
    """Files at their original public place: ``files`` one by one, or members of a zip ``archive``."""

    files: Mapping[str, str]  # name in the folder -> address, or member of the archive
    archive: str | None = None
    checksums: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class KnownDataset:
    """A data set of the literature.

    folders: names under a data root, the first is where a download goes.
    ratios, split: the default cut of a data set that ships none.
    sha256: of files as they are known to be, by path ``folder/name``.
    """

    name: str
    title: str
    source: str
    terms: str
    folders: tuple[str, ...]
    layouts: tuple[Layout, ...]
    expected: Counts
    split: str | None = None
    ratios: tuple[float, float, float] = (0.8, 0.1, 0.1)
    download: Download | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)


PART_FILES = {"train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
              "test": "test"}  # fmt: skip


def _one(read: Callable[[Path], Records]) -> Callable[[Paths], Records]:
    return lambda paths: read(paths["all"])


_LISTS = Layout({"train": "train.txt", "test": "test.txt"}, read_adjacency_parts)
_LISTS_3 = Layout({"train": "train.txt", "valid": "valid.txt", "test": "test.txt"}, read_adjacency_parts)
_PICKLES = Layout({"train": "train.pkl", "test": "test.pkl"}, read_mcl_parts)
_RATED_PICKLES = replace(_PICKLES, threshold=3.0)
_LIGHTGCN = "https://raw.githubusercontent.com/gusye1234/LightGCN-PyTorch/master/data"
_GROUPLENS = "https://files.grouplens.org/datasets/movielens"
_AMAZON = "Amazon reviews (McAuley): research use, cite; no stated licence"
_MOVIELENS = "GroupLens: research use; no redistribution, no commercial use without permission"


def _inter(name: str) -> Layout:
    return Layout({"all": f"{name}.inter"}, _one(read_table))


def _lightgcn(folder: str, *names: str, **checksums: str) -> Download:
    return Download({name: f"{_LIGHTGCN}/{folder}/{name}" for name in names}, checksums=checksums)


_SETS = (
    KnownDataset(
        "gowalla", "check-ins, LightGCN split", "github.com/gusye1234/LightGCN-PyTorch, data/gowalla",
        "SNAP loc-gowalla: research use, cite; no stated licence", ("gowalla",), (_LISTS,),
        Counts(29_858, 40_981, 810_128, 0, 217_242),
        download=Download(
            {name: f"{_LIGHTGCN}/gowalla/{name}" for name in ("train.txt", "test.txt")},
            checksums={"test.txt": "sha256:099a2a73924e4b754dc6efd730d764f492321b53c38eb93298850c83acf57be3"},
        ),
        sha256={
            "gowalla/train.txt.gz": "71a2faabd7e5eed1c9df325798a213695c293739970a47bed0a983355f6687e3",
            "gowalla/test.txt.gz": "9db4414306dbc518d3b81b0239515497908ecd6de09df99c6a92ba171e75b902",
            "gowalla/test.txt": "099a2a73924e4b754dc6efd730d764f492321b53c38eb93298850c83acf57be3",
        },
    ),
    KnownDataset(
        "yelp2018", "businesses, LightGCN split", "github.com/gusye1234/LightGCN-PyTorch, data/yelp2018",
        "Yelp data set terms: academic use", ("yelp2018",), (_LISTS,), Counts(31_668, 38_048, 1_237_259, 0, 324_147),
        download=_lightgcn("yelp2018", "train.txt", "test.txt"),
    ),
    KnownDataset(
        "amazon-book", "books, LightGCN split", "github.com/gusye1234/LightGCN-PyTorch, data/amazon-book",
        _AMAZON, ("amazon-book",), (_LISTS,), Counts(52_643, 91_599, 2_380_730, 0, 603_378),
        download=_lightgcn("amazon-book", "train.txt", "test.txt"),
    ),
    KnownDataset(
        "lastfm", "artists, HetRec 2011, LightGCN split", "github.com/gusye1234/LightGCN-PyTorch, data/lastfm",
        "HetRec 2011: non-commercial research", ("lastfm",),
        (Layout({"train": "data1.txt", "test": "test1.txt"}, read_lastfm),), Counts(1_892, 4_489, 42_135, 0, 10_533),
        download=_lightgcn("lastfm", "data1.txt", "test1.txt"),
        sha256={
            "lastfm/data1.txt.gz": "ceed6e9fcd0af5bc6a91606e493f219106e96c69ae66a06e98930a7ed6f9b34e",
            "lastfm/test1.txt.gz": "61b77134af300ea6caca6f11906dac86e9fa339dca6d7f81babee3c637fc5293",
        },
    ),
    KnownDataset(
        "ml1m", "MovieLens-1M, every rating a positive", "grouplens.org/datasets/movielens/1m", _MOVIELENS,
        ("ml-1m", "ml1m"),
        (
            Layout({"all": "interactions.npz"}, _one(read_pairs_npz)),
            Layout({"all": "ratings.dat"}, _one(read_movielens)),
        ),
        Counts(6_040, 3_706, total=1_000_209), split="global", ratios=(0.8, 0.0, 0.2),
        download=Download({"ratings.dat": "ml-1m/ratings.dat"}, f"{_GROUPLENS}/ml-1m.zip",
                          {"archive": "md5:c4d9eecfca2ab87c1945afe126590906"}),
        sha256={"ml-1m/interactions.npz": "f510b8173b332c2b03f8f9b73b35388a8633dfaca8bd899f20b48b3488181955"},
    ),
    KnownDataset(
        "ml1m-ge3", "MovieLens-1M ratings >= 3, LightGCN++ split", "github.com/geon0325/LightGCNpp, data/ml-1m",
        _MOVIELENS, ("ml-1m", "ml1m-ge3"),
        (Layout({part: f"ge3_{part}.txt" for part in ("train", "valid", "test")}, read_adjacency_parts), _LISTS_3),
        Counts(6_039, 3_628, 590_733, 80_897, 164_848),
        sha256={
            "ml-1m/ge3_train.txt.gz": "8154f62a4a8e70e475d6d909aee10a60224d42acd380e7e6d29c5fdb11084fa8",
            "ml-1m/ge3_valid.txt.gz": "d2a2883a1719351e91aa8166dff8f5b00a961845314221ade535160911b68fe9",
            "ml-1m/ge3_test.txt.gz": "e5feb92659c5f57979580a208e351195d167bd6e97b6993fc6577ba3baeea852",
        },
    ),
    KnownDataset(
        "ml100k", "MovieLens-100K, every rating a positive", "grouplens.org/datasets/movielens/100k", _MOVIELENS,
        ("ml-100k", "ml100k"), (Layout({"all": "u.data"}, _one(read_movielens)),),
        Counts(943, 1_682, total=100_000), split="global", ratios=(0.8, 0.0, 0.2),
        download=Download({"u.data": "ml-100k/u.data"}, f"{_GROUPLENS}/ml-100k.zip",
                          {"archive": "md5:0e33842e24a9c977be4e0107933c0723"}),
        sha256={
            "ml-100k/u.data": "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
            "ml-100k/u.data.gz": "c3fe59d9f784f19e1715f710845ac12970203e783301a9404cd615780b838694",
        },
    ),
    KnownDataset(
        "amazon-music", "Amazon digital music, MCL split, ratings > 3",
        "github.com/layer6ai-labs/MCL, data/amazon-digital-music", _AMAZON,
        ("mcl-amazon-digital-music", "amazon-digital-music", "amazon-music"), (_LISTS, _RATED_PICKLES),
        Counts(5_541, 3_568, 41_689, 0, 5_157),
        sha256={
            "mcl-amazon-digital-music/train.txt.gz": "1e3bfe8ccce8388d40f954135c91e48a4ab0e87bdea23dd109b5c901b6303e6e",
            "mcl-amazon-digital-music/test.txt.gz": "7bf1981990ed9ed91a6f87c0a7574b8292610b8d3163213b6275c9700a63214a",
        },
    ),
    KnownDataset(
        "amazon-grocery", "Amazon grocery, MCL split, ratings > 3", "github.com/layer6ai-labs/MCL, data/amazon-grocery",
        _AMAZON, ("mcl-amazon-grocery", "amazon-grocery"), (_LISTS, _RATED_PICKLES),
        Counts(14_681, 8_713, 96_061, 0, 11_956),
        sha256={
            "mcl-amazon-grocery/train.txt.gz": "937f07ece7d267bad51c4e204cd749ad2d5fdb0cb40ac06730c85eec524982e2",
            "mcl-amazon-grocery/test.txt.gz": "44a00d51f636b40391f36638cb962118da9944a1231048dff396ca0eaf375f65",
        },
    ),
    KnownDataset(
        "amazon-book-mcl", "Amazon books, MCL split", "github.com/layer6ai-labs/MCL, data/amazon-book",
        _AMAZON, ("mcl-amazon-book", "amazon-book-mcl"), (_LISTS, _PICKLES),
        Counts(52_406, 41_264, test=392_293, total=1_856_747),
    ),
    KnownDataset(
        "yelp-mcl", "Yelp 2021, MCL split", "github.com/layer6ai-labs/MCL, data/yelp",
        "Yelp data set terms: academic use", ("mcl-yelp", "yelp-mcl"), (_LISTS, _PICKLES),
        Counts(97_462, 48_294, test=486_260, total=2_209_755),
    ),
    KnownDataset(
        "amazon-baby", "Amazon baby 5-core, MMRec split", "github.com/enoche/MMRec, data (baby)", _AMAZON,
        ("mmrec-baby", "baby", "amazon-baby"), (_inter("baby"), _LISTS), Counts(19_445, 7_050, 118_551, 20_559, 21_682),
        sha256={"mmrec-baby/baby.inter.gz": "28de8a9de71496140ba092c8ce6fd82dddef857670f797624f92662a77338d4c"},
    ),
    KnownDataset(
        "amazon-sports", "Amazon sports 5-core, MMRec split", "github.com/enoche/MMRec, data (sports)", _AMAZON,
        ("mmrec-sports", "sports", "amazon-sports"), (_inter("sports"), _LISTS),
        Counts(35_598, 18_357, 218_409, 37_899, 40_029),
        sha256={"mmrec-sports/sports.inter.gz": "a8ce8e2b8e715e42be9399352cad1547e7beb19dae07f2d5cf7d31ded06f293b"},
    ),
    KnownDataset(
        "amazon-clothing", "Amazon clothing 5-core, MMRec split", "github.com/enoche/MMRec, data (clothing)", _AMAZON,
        ("mmrec-clothing", "clothing", "amazon-clothing"), (_inter("clothing"), _LISTS),
        Counts(39_387, 23_033, 197_338, 40_150, 41_189),
        sha256={"mmrec-clothing/clothing.inter.gz": "6c6cab56db54469b3651a6c43abe8884d1fa13e4be1bdf30d1af1c468364f833"},
    ),
    KnownDataset(
        "citeulike-a", "scientific papers, LightGCN++ split",
        "github.com/geon0325/LightGCNpp, SELFRec/dataset/citeulike", "research use, cite; no stated licence",
        ("citeulike-a", "citeulike"), (_LISTS_3,),
        Counts(5_551, 16_980, 151_895, 18_727, 39_882),
        sha256={
            "citeulike-a/train.txt.gz": "91b03b9b2a1d6130521493daaed9e50ea13a227344836305d0b6c769e70cf5ad",
            "citeulike-a/valid.txt.gz": "f2cd4c08d2c5c837527847cb21dafec4ebb86fa254933ce2c249b0b528404036",
            "citeulike-a/test.txt.gz": "579d4996cf951b569f0dfa0e078294d989270483e0c772996bff437514250373",
        },
    ),
    KnownDataset(
        "citeulike-t", "scientific papers with tags", "github.com/js05212/citeulike-t", "research use, cite; no stated licence",
        ("citeulike-t", "ctrsr_datasets/citeulike-t"), (Layout({"all": "users.dat"}, _one(read_counted_lists)),),
        Counts(7_947, 25_584, total=134_860), split="per-user", ratios=(0.6, 0.2, 0.2),
    ),
    KnownDataset(
        "citeulike-t-counts", "the same with list lengths as items, as in the CML paper's experiments",
        "github.com/js05212/citeulike-t", "research use, cite; no stated licence",
        ("citeulike-t", "ctrsr_datasets/citeulike-t"),
        (Layout({"all": "users.dat"}, _one(partial(read_counted_lists, counts_as_items=True))),),
        Counts(7_947, 25_586, total=142_794), split="per-user", ratios=(0.6, 0.2, 0.2),
    ),
    KnownDataset(
        "dist_test", "a copy of gowalla", "github.com/gusye1234/LightGCN-PyTorch, data/gowalla, copied to dist_test",
        "as gowalla", ("dist_test",), (_LISTS,), Counts(29_858, 40_981, 810_128, 0, 217_242),
    ),
)  # fmt: skip

KNOWN: dict[str, KnownDataset] = {known.name: known for known in _SETS}
ALIASES = {"amazon-digital-music": "amazon-music", "ml-1m": "ml1m", "ml-100k": "ml100k"}
# The name of each one's own folder; a folder that two share is the earlier one's.
FOLDERS = {known.folders[0]: known.name for known in reversed(_SETS)}
GENERATED = ("demo", "synthetic")


def known_names() -> list[str]:
    """Every name that ``--dataset`` takes, without aliases."""
    return [*GENERATED, *KNOWN]


def known_by(dataset: str) -> KnownDataset | None:
    """The data set of a name, of an alias, or of its own folder's name, unless a path of that name exists here."""
    name = ALIASES.get(dataset, dataset)
    if name not in KNOWN and not Path(dataset).expanduser().exists():
        name = FOLDERS.get(dataset, name)
    return KNOWN.get(name)


# Finding ----------------------------------------------------------------------------------------


def data_roots(data_root: str | os.PathLike[str] | None) -> list[Path]:
    """Where to look: the given root only; else ``$GFML_DATA``, ``./data`` and ``~/.cache/gfml/data``."""
    if data_root is not None:
        return [Path(data_root).expanduser()]
    given = os.environ.get("GFML_DATA")
    try:
        own = [Path.home() / ".cache" / "gfml" / "data"]
    except RuntimeError:  # a user without HOME and without a line in passwd, as in some containers
        own = []
    return [*([Path(given).expanduser()] if given else []), Path("data"), *own]


def folders_of(known: KnownDataset, roots: Iterable[Path]) -> list[Path]:
    """The folders where ``known`` may lie: under each root, under its ``data``, or the root itself."""
    found: list[Path] = []
    for root in roots:
        found += [root / folder for folder in known.folders]
        found += [root / "data" / folder for folder in known.folders]
        found += [root] if root.name in known.folders else []
    return found


def present(folder: Path, layout: Layout) -> Paths | None:
    """The files of ``layout`` in ``folder``, plain or packed, or None when one is missing."""
    found = {}
    for part, name in layout.files.items():
        ends = ("", *(f".{packer}" for packer in PACKED))
        paths = [path for end in ends if (path := folder / f"{name}{end}").is_file()]
        if not paths:
            return None
        found[part] = paths[0]
    return found


def table_parts(folder: Path) -> dict[str, Path]:
    """Tables of a split that a folder ships: ``train.csv``, ``NAME.valid.inter``, ``test.parquet.gz`` and the like."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        words = path.name.lower().split(".")
        while len(words) > 1 and words[-1] in PACKED:
            words.pop()
        part = PART_FILES.get(words[-2]) if len(words) in (2, 3) and words[-1] in TABLE_SUFFIXES else None
        if part is None or not path.is_file() or words[-1] in ("item", "user", "kg", "link", "net"):
            continue
        if part in found:
            raise UserError(
                f"{folder} holds {found[part].name} and {path.name}, wanted one table for {part}: give one file"
            )
        found[part] = path
    return found


def only_table(folder: Path) -> Path | None:
    """The interactions of a folder: ``FOLDER.inter``, else its only ``.inter``, else its only table."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    atomic = [path for path in files if suffix(path) == "inter"]
    named = [path for path in atomic if path.name.split(".")[0] == folder.resolve().name]
    others = [path for path in files if suffix(path) in ("csv", "tsv", "parquet", "jsonl")]
    return next((some[0] for some in (named, atomic, others) if len(some) == 1), None)


def locate(known: KnownDataset, roots: Iterable[Path]) -> tuple[Layout, Paths] | None:
    """The first layout of ``known`` whose files all lie under one of the roots."""
    for folder in folders_of(known, roots):
        for layout in known.layouts:
            paths = present(folder, layout)
            if paths is not None:
                return layout, paths
    return None


def fetch(known: KnownDataset, root: Path, *, progress: bool = True) -> None:
    """Download ``known`` from its original place into ``root``; UserError where there is none or it fails."""
    if known.download is None:
        raise UserError(f"{known.name} cannot be downloaded: fetch it from {known.source} and give `data_root`")
    folder = root / known.folders[0]
    logger.warning("downloading %s to %s (%s)", known.name, folder, known.terms)
    plan = known.download
    if plan.archive is None:
        for name, url in plan.files.items():
            if not (folder / name).exists():
                download(url, folder / name, plan.checksums.get(name), progress=progress)
        return
    archive = folder / plan.archive.rsplit("/", 1)[-1]
    download(plan.archive, archive, plan.checksums.get("archive"), progress=progress)
    unpack(archive, {member: folder / name for name, member in plan.files.items()})
    archive.unlink()


def find(
    known: KnownDataset, data_root: str | os.PathLike[str] | None, *, allow_download: bool = True
) -> tuple[Layout, Paths]:
    """Local files of ``known``, downloaded first if they are missing and the terms allow it.

    Raises UserError: one line with the name, the roots searched, the folder names wanted and what to do.
    """
    roots = data_roots(data_root)
    found = locate(known, roots)
    if found is None and known.download is not None and allow_download:
        try:
            fetch(known, roots[0] if data_root is not None or os.environ.get("GFML_DATA") else roots[-1])
        except UserError as error:
            if error.__cause__ is None:  # it came through, but is not what was published
                raise
            raise _not_found(known, roots, f"the download failed: {error.__cause__}") from error
        found = locate(known, roots)
    if found is None:
        raise _not_found(known, roots, "no download is offered" if known.download is None else "downloading is off")
    return found


def _not_found(known: KnownDataset, roots: list[Path], reason: str) -> UserError:
    files = " or ".join(" + ".join(layout.files.values()) for layout in known.layouts)
    searched = ", ".join(str(root / known.folders[0]) for root in roots)
    todo = f"put {files} there, from {known.source}, or give `data_root DIR`"
    return UserError(f"data set {known.name} not found in {searched} ({reason}): {todo}")


# Checking ---------------------------------------------------------------------------------------


def checksum_notes(known: KnownDataset, paths: Paths) -> dict[str, object]:
    """Names the files whose sha256 is known and differs."""
    differing = []
    for path in paths.values():
        wanted = known.sha256.get(f"{path.parent.name}/{path.name}")
        if wanted is not None and file_hash(path) != wanted:
            differing.append(path.name)
    return {"files that differ from the published ones": differing} if differing else {}


def count_notes(known: KnownDataset, data: Interactions) -> dict[str, object]:
    """Compares sizes with the published ones; a difference is one line in the log and in the notes."""
    found = {
        "users": data.num_users,
        "items": data.num_items,
        "train": data.train.nnz,
        "valid": data.valid.nnz,
        "test": data.test.nnz,
        "total": data.train.nnz + data.valid.nnz + data.test.nnz,
    }
    wanted = {what: getattr(known.expected, what) for what in found}
    differing = {what: number for what, number in wanted.items() if number not in (None, found[what])}
    wrong = [f"{what} {found[what]} (published {number})" for what, number in differing.items()]
    if not wrong:
        return {}
    logger.warning("%s differs from the published data: %s", known.name, ", ".join(wrong))
    return {"counts that differ from the published ones": wrong}
