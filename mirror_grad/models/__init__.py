"""The models by name. Light: a model's module is imported when the model is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from gfml.base.errors import choice_error
from mirror_grad.models import settings


@dataclass(frozen=True)
class Entry:
    """Where a model is and what it needs.

    module: a file of this folder, or with a dot the full name of any importable module.
    needs_features: item features of at least one modality. needs_negatives: False for models of (user, item) pairs.
    trains: False for models without parameters. has_published: ``--behaviour published`` differs from fixed.
    rowwise: the loss (fixed) is a mean over the rows of a batch and draws no random numbers, so that several processes
    can share one. Those of this folder take ``batch.weight``, by which a batch can be filled up.
    maps_features: it has linear maps of the features as they are, or as ``train_features`` leaves them.
    """

    module: str
    cls: str
    settings: type
    needs_features: bool = True
    needs_negatives: bool = True
    trains: bool = True
    has_published: bool = True
    rowwise: bool = False
    maps_features: bool = False


MODELS: dict[str, Entry] = {
    "BPR": Entry("bpr", "BPR", settings.BPR, needs_features=False, rowwise=True),
    "LightGCN": Entry("lightgcn", "LightGCN", settings.LightGCN, needs_features=False, rowwise=True),
    "VBPR": Entry("vbpr", "VBPR", settings.VBPR, rowwise=True, maps_features=True),
    "BM3": Entry("bm3", "BM3", settings.BM3, needs_negatives=False, maps_features=True),
    "FREEDOM": Entry("freedom", "FREEDOM", settings.FREEDOM, rowwise=True, maps_features=True),
    "LayerGCN": Entry("layergcn", "LayerGCN", settings.LayerGCN, needs_features=False, rowwise=True),
    "SELFCFED_LGN": Entry(
        "selfcfed_lgn", "SELFCFED_LGN", settings.SELFCFED_LGN, needs_features=False, needs_negatives=False
    ),
    "ItemKNNCBF": Entry("itemknncbf", "ItemKNNCBF", settings.ItemKNNCBF, trains=False, has_published=False),
    "LATTICE": Entry("lattice", "LATTICE", settings.LATTICE, maps_features=True),
    "MGCN": Entry("mgcn", "MGCN", settings.MGCN, has_published=False, maps_features=True),
    "DualGNN": Entry("dualgnn", "DualGNN", settings.DualGNN, rowwise=True),
    "DRAGON": Entry("dragon", "DRAGON", settings.DRAGON, rowwise=True),
    "SLMRec": Entry(
        "slmrec", "SLMRec", settings.SLMRec, needs_negatives=False, has_published=False, maps_features=True
    ),
    "GRCN": Entry("grcn", "GRCN", settings.GRCN, rowwise=True, maps_features=True),
    "MMGCN": Entry("mmgcn", "MMGCN", settings.MMGCN, rowwise=True),
    "MVGAE": Entry("mvgae", "MVGAE", settings.MVGAE),
    "SMORE": Entry("smore", "SMORE", settings.SMORE, has_published=False, maps_features=True),
    "MMGCF": Entry("mmgcf", "MMGCF", settings.MMGCF, has_published=False, rowwise=True, maps_features=True),
    "PGL": Entry("pgl", "PGL", settings.PGL, has_published=False, maps_features=True),
    "LGMRec": Entry("lgmrec", "LGMRec", settings.LGMRec),
    "DAMRS": Entry("damrs", "DAMRS", settings.DAMRS, has_published=False),
}


def load_model(name: str) -> type:
    """The class of a model; :class:`gfml.base.errors.UserError` with a suggestion for an unknown name."""
    if name not in MODELS:
        raise choice_error("model", name, MODELS)
    entry = MODELS[name]
    module = entry.module if "." in entry.module else f"mirror_grad.models.{entry.module}"
    return getattr(import_module(module), entry.cls)
