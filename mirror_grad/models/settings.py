"""Hyper-parameters of every model: plain values, so that flags are known before torch is imported.

A setting keeps the meaning and the values that the published grid searched; where the grid is all that was published,
the default is a value of it. Names are those of the published configuration files.
"""

from __future__ import annotations

from dataclasses import dataclass

from gfml.base.settings import setting


@dataclass(frozen=True)
class BPR:
    """Matrix factorisation with BPR."""

    reg_weight: float = setting(
        1e-2, "weight of the L2 term of the batch's vectors", grid=(2.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    )


@dataclass(frozen=True)
class LightGCN:
    """LightGCN with BPR."""

    n_layers: int = setting(2, "propagation layers", grid=(1, 2, 3, 4))
    reg_weight: float = setting(
        1e-4, "weight of the L2 term of the batch's free vectors", grid=(1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    )


@dataclass(frozen=True)
class VBPR:
    """BPR with projected features beside the free item vectors."""

    reg_weight: float = setting(
        1e-2, "weight of the L2 term of the batch's vectors", grid=(2.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    )


@dataclass(frozen=True)
class BM3:
    """Bootstrapped multimodal model without negatives."""

    n_layers: int = setting(1, "propagation layers", grid=(1, 2))
    dropout: float = setting(0.5, "share of zeroed target entries", grid=(0.3, 0.5))
    reg_weight: float = setting(
        1e-3, "weight of the L2 term of all propagated vectors; published for norms: 0.1", grid=(0.1, 0.01)
    )
    cl_weight: float = setting(2.0, "weight of the alignment of features and items", grid=(2.0,))
    train_features: bool = setting(True, "train the item features themselves, as published")


@dataclass(frozen=True)
class FREEDOM:
    """Frozen item graph and user-item graph that is thinned out every epoch."""

    n_ui_layers: int = setting(2, "propagation layers on the user-item graph")
    n_mm_layers: int = setting(1, "propagation layers on the item graph")
    knn_k: int = setting(10, "neighbours of an item in the item graph, itself included")
    mm_image_weight: float = setting(0.1, "share of the image graph in the item graph; the text graph has the rest")
    dropout: float = setting(0.8, "share of user-item edges left out in an epoch", grid=(0.8, 0.9))
    reg_weight: float = setting(
        1e-3, "weight of the BPR losses of the projected features", grid=(0.0, 1e-5, 1e-4, 1e-3)
    )
    train_features: bool = setting(True, "train the item features themselves, as published")


@dataclass(frozen=True)
class LayerGCN:
    """Propagation whose layers are weighted by their likeness to the free vectors."""

    n_layers: int = setting(4, "propagation layers", grid=(4,))
    dropout: float = setting(0.1, "share of edges left out in an epoch", grid=(0.0, 0.1, 0.2))
    reg_weight: float = setting(
        1e-3, "weight of the L2 term of the batch's free vectors", grid=(1e-2, 1e-3, 1e-4, 1e-5)
    )


@dataclass(frozen=True)
class SELFCFED_LGN:
    """Self-supervised LightGCN with dropped edges, without negatives."""

    n_layers: int = setting(2, "propagation layers", grid=(1, 2))
    dropout: float = setting(0.1, "share of zeroed target entries", grid=(0.1, 0.2, 0.5))
    reg_weight: float = setting(
        1e-3, "weight of the L2 term of the batch's vectors", grid=(0.1, 1e-2, 1e-3, 1e-4, 1e-5, 0.0)
    )


@dataclass(frozen=True)
class ItemKNNCBF:
    """Item neighbours by their features; no training."""

    knn_k: int = setting(10, "neighbours of an item, itself included", grid=(10,))
    shrink: float = setting(10.0, "added to the product of feature norms, in squared feature units", grid=(10.0,))


@dataclass(frozen=True)
class LATTICE:
    """Item graph learned from projected features, mixed with a frozen one."""

    n_layers: int = setting(1, "propagation layers on the item graph")
    n_ui_layers: int = setting(2, "propagation layers on the user-item graph (lightgcn, ngcf)")
    feat_embed_dim: int = setting(64, "width of the projected features")
    knn_k: int = setting(10, "neighbours of an item in each graph, itself included")
    lambda_coeff: float = setting(0.9, "share of the frozen graph; the learned one has the rest")
    cf_model: str = setting("lightgcn", "backbone on the user-item graph", choices=("lightgcn", "ngcf", "mf"))
    mess_dropout: float = setting(0.1, "share of zeroed message entries of ngcf")
    rebuild_every: int = setting(
        1, "batches between rebuildings of the learned graph; published: the first of an epoch"
    )
    reg_weight: float = setting(0.0, "weight of the L2 term of the batch's vectors", grid=(0.0, 1e-5, 1e-4, 1e-3))
    train_features: bool = setting(True, "train the item features themselves, as published")


@dataclass(frozen=True)
class MGCN:
    """Purified item views beside the user-item view, fused by attention."""

    n_ui_layers: int = setting(2, "propagation layers on the user-item graph")
    n_layers: int = setting(1, "propagation layers on the item graphs")
    knn_k: int = setting(10, "neighbours of an item in each graph, itself included")
    cl_loss: float = setting(0.01, "weight of the contrastive term", grid=(0.001, 0.01, 0.1))
    reg_weight: float = setting(1e-4, "weight of the L2 term of the batch's vectors")
    train_features: bool = setting(True, "train the item features themselves, as published")


@dataclass(frozen=True)
class DualGNN:
    """A graph network per modality, mixed by each user's weights and smoothed over similar users."""

    user_k: int = setting(40, "neighbours of a user in the user graph")
    reg_weight: float = setting(
        1e-3, "weight of the L2 terms of preferences and mixing weights", grid=(0.1, 1e-2, 1e-3, 1e-4, 1e-5)
    )


@dataclass(frozen=True)
class DRAGON:
    """Modalities side by side, with an item graph and a user graph on top."""

    user_k: int = setting(40, "neighbours of a user in the user graph")
    knn_k: int = setting(10, "neighbours of an item in the item graph, itself included")
    mm_image_weight: float = setting(0.1, "share of the image graph in the item graph; the text graph has the rest")
    n_mm_layers: int = setting(1, "propagation layers on the item graph")
    reg_weight: float = setting(
        1e-3, "weight of the L2 terms of preferences and mixing weights", grid=(0.1, 1e-2, 1e-3, 1e-4, 1e-5)
    )


@dataclass(frozen=True)
class SLMRec:
    """Contrastive recommendation with a contrast between ids and modalities (task FAC)."""

    layer_num: int = setting(3, "propagation layers")
    temp: float = setting(0.2, "temperature of the user-item contrast")
    ssl_temp: float = setting(0.5, "temperature of the contrast between modalities", grid=(0.1, 0.2, 0.5, 1.0))
    ssl_alpha: float = setting(0.1, "weight of the contrast between modalities", grid=(0.01, 0.05, 0.1, 0.5, 1.0))
    adj_type: str = setting(
        "pre",
        "normalisation of the graph: pre symmetric, norm mean with itself, gcmc mean, mean mean plus itself",
        choices=("pre", "norm", "gcmc", "mean", "plain"),
    )


@dataclass(frozen=True)
class GRCN:
    """A user-item graph whose edges are weighted by the modalities."""

    latent_embedding: int = setting(64, "width of the preferences and projected features of a modality")
    n_layers: int = setting(3, "routing iterations that refine the preferences")
    reg_weight: float = setting(1e-3, "weight of the L2 terms", grid=(0.1, 1e-2, 1e-3, 1e-4, 1e-5))


@dataclass(frozen=True)
class MMGCN:
    """A graph network per modality with a shared id table."""

    n_layers: int = setting(3, "layers of each network; published: always 3")
    concat: bool = setting(True, "put a node's own vector beside its neighbours', else add them; published: always")
    image_latent: int = setting(256, "width to which images are projected")
    reg_weight: float = setting(1e-3, "weight of the L2 terms", grid=(0.0, 1e-5, 1e-4, 1e-3, 0.01, 0.1))


@dataclass(frozen=True)
class MVGAE:
    """Variational graph auto-encoders per modality, joined by a product of experts."""

    beta: float = setting(
        1e-3,
        "weight of the KL divergences; the published grid is for a loss summed over the batch",
        grid=(0.01, 0.1, 1.0),
    )
    batch_negatives: bool = setting(False, "compare with the best of all negatives of the batch; published: always")
    latent: int = setting(128, "width of the projected features and preferences")
    dropout: float = setting(0.1, "share of zeroed entries after each convolution")


@dataclass(frozen=True)
class SMORE:
    """MGCN's skeleton with filters on the spectra of the projected features."""

    n_ui_layers: int = setting(4, "propagation layers on the user-item graph", grid=(3, 4))
    n_layers: int = setting(1, "propagation layers on the item graphs")
    image_knn_k: int = setting(10, "neighbours of an item in the image graph, itself included", grid=(10, 15, 20, 40))
    text_knn_k: int = setting(10, "neighbours of an item in the text graph, itself included", grid=(10, 15, 20, 40))
    cl_loss: float = setting(0.01, "weight of the contrastive term")
    reg_weight: float = setting(1e-4, "weight of the L2 term of the batch's vectors", grid=(1e-5, 1e-4))
    dropout: float = setting(0.0, "share of zeroed preference entries", grid=(0.0, 0.1))
    train_features: bool = setting(True, "train the item features themselves, as published")


@dataclass(frozen=True)
class MMGCF:
    """LightGCN on a thinned graph whose item inputs join ids and projected features."""

    n_layers: int = setting(2, "propagation layers", grid=(1, 2, 3))
    dropout: float = setting(0.2, "share of edges left out in an epoch", grid=(0.2, 0.5, 0.8))
    fusion: str = setting(
        "mean", "how ids and features are joined", grid=("mean", "sum", "concat"), choices=("mean", "sum", "concat")
    )
    weighting: str = setting(
        "equal",
        "what they weigh: alike, by a learned share, or as rows of equal length",
        grid=("equal", "alpha", "normalized"),
        choices=("equal", "alpha", "normalized"),
    )
    reg_weight: float = setting(1e-3, "weight of the L2 term of the batch's vectors", grid=(1e-1, 1e-2, 1e-3, 1e-4))


@dataclass(frozen=True)
class PGL:
    """Feature-only item vectors on a sub-graph of the user-item graph."""

    mode: str = setting("local", "sub-graph: edges drawn by degree, or a low-rank part", choices=("local", "global"))
    n_ui_layers: int = setting(2, "propagation layers on the user-item graph")
    n_mm_layers: int = setting(1, "propagation layers on the item graph")
    knn_k: int = setting(10, "neighbours of an item in the item graph, itself included")
    mm_image_weight: float = setting(0.1, "share of the image graph in the item graph; the text graph has the rest")
    dropout: float = setting(0.7, "share of edges left out in an epoch by mode local")
    rank: int = setting(16, "singular vectors of mode global")
    reg_weight: float = setting(0.0, "weight of the contrast between two dropped-out copies; published: 0")
    feature_dropout: float = setting(0.2, "share of zeroed entries in those copies")
    train_features: bool = setting(True, "train the item features themselves, as published")


@dataclass(frozen=True)
class LGMRec:
    """Local graphs for ids and modalities beside hyperedges learned from features."""

    n_ui_layers: int = setting(2, "propagation layers of the ids")
    n_mm_layers: int = setting(2, "propagation layers of the modalities")
    n_hyper_layer: int = setting(1, "layers over the hyperedges")
    hyper_num: int = setting(4, "hyperedges of a modality")
    keep_rate: float = setting(0.5, "share of hyperedge memberships kept in training")
    alpha: float = setting(0.3, "weight of the hyperedge branch")
    cl_weight: float = setting(1e-4, "weight of the contrast between modalities")
    reg_weight: float = setting(1e-6, "weight of the L2 term of the batch's vectors")


@dataclass(frozen=True)
class DAMRS:
    """Item graphs that both modalities agree on, a BPR that doubts its labels, aligned views."""

    n_ui_layers: int = setting(2, "propagation layers on the user-item graph")
    knn_k: int = setting(10, "neighbours of an item in each item graph")
    session_min: int = setting(2, "users two items must share to be neighbours in the graph of shared users")
    nd_weight: float = setting(1e-3, "weight of the discrimination of graded neighbours")
    kl_weight: float = setting(1.0, "weight of the divergence between the preferences of both item vectors")
    num_positives: int = setting(10, "neighbours of each grade in the discrimination")
    temperature: float = setting(0.2, "temperature of the discrimination")
