"""Every loss by name: what it is made of, its regulariser, its proxies, and that it trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning import miners

from contextual import main as pipeline_256
from contextual import train as pipeline_224
from contextual.baselines import LossOptions, RetrievalLoss, build_loss, parameter_groups
from contextual.losses import ContextualHybridLoss, cosine_similarities, similarity_regulariser
from contextual.names import ABLATIONS, ALIASES, HAS_PROXIES, LOSSES, PIPELINES, canonical, describe_lam, known_names
from gfml.base.errors import UserError


def parse(pipeline, argv):
    return {"256": pipeline_256, "224": pipeline_224}[pipeline].PROGRAM.parse(argv)


CONFIGS = Path(__file__).parents[2] / "configs" / "contextual"


def build(name: str, pipeline: str = "256", classes: int = 6, **options) -> RetrievalLoss:
    torch.manual_seed(0)
    return build_loss(name, num_classes=classes, embedding_dim=8, pipeline=pipeline, options=LossOptions(**options))


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_a_layer(clustered, name: str, pipeline: str) -> None:
    emb, labels = clustered(6, 4, noise=1.0)
    emb, loss, layer = emb.float(), build(name, pipeline), torch.nn.Linear(8, 8)
    groups = parameter_groups(loss, pipeline=pipeline, lr=1e-2, loss_lr=1e-2)
    optimizer = torch.optim.Adam([{"params": list(layer.parameters()), "lr": 1e-2}, *groups])
    values = []
    for _ in range(40):
        terms = loss(layer(emb), labels)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        values.append(terms["loss"].item())
        assert all(not value.requires_grad and value.dim() == 0 for key, value in terms.items() if key != "loss")
    assert sum(values[-5:]) < sum(values[:5])


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_and_length_do_not_matter(clustered, name: str) -> None:
    emb, labels = clustered(6, 4)
    emb, loss = emb.bfloat16(), build(name, "224")
    torch.manual_seed(1)
    wanted = loss(emb.float(), labels)["loss"]
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(4 * emb, labels)["loss"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted)


def test_what_the_library_is_asked_for() -> None:
    kinds = {
        "contrastive": (pml.ContrastiveLoss, None, {"pos_margin": 0.9, "neg_margin": 0.6}),
        "triplet": (pml.TripletMarginLoss, miners.DistanceWeightedMiner, {"margin": 0.05}),
        "ms": (pml.MultiSimilarityLoss, None, {"alpha": 2, "beta": 50, "base": 0.5}),
        "ms+miner": (pml.MultiSimilarityLoss, miners.MultiSimilarityMiner, {"alpha": 2, "beta": 50, "base": 0.5}),
        "proxy-anchor": (pml.ProxyAnchorLoss, None, {"alpha": 32, "margin": 0.1, "num_classes": 6}),
        "proxy-nca": (pml.ProxyNCALoss, None, {"softmax_scale": 9}),
        "normalized-softmax": (pml.NormalizedSoftmaxLoss, None, {"temperature": 0.05}),
        "cosface": (pml.CosFaceLoss, None, {"margin": 0.35, "scale": 64}),
        "nt-xent": (pml.NTXentLoss, None, {"temperature": 0.07}),
        "fast-ap": (pml.FastAPLoss, None, {"num_bins": 10}),
    }
    for name, (kind, miner, settings) in kinds.items():
        module = build(name, "224")
        assert type(module.loss) is kind, name
        assert type(module.miner) is (miner or type(None)), name
        assert {key: getattr(module.loss, key) for key in settings} == settings, name
    assert build("triplet").miner.cutoff == 0.5
    assert build("triplet").miner.nonzero_loss_cutoff == 1.4
    assert build("ms+miner").miner.epsilon == 0.1
    assert build("proxy-nca", "256").loss.softmax_scale == 10
    assert build("contrastive", pos_margin=0.8, neg_margin=0.5).loss.pos_margin == 0.8
    assert build("Proxy_Anchor", alpha=16.0, mrg=0.3).loss.alpha == 16


def test_regulariser_on_baselines(clustered) -> None:
    """224: gamma times it is added. 256: not at all, unless asked: convex."""
    emb, labels = clustered(6, 4)
    plain = build("contrastive")(emb, labels)
    assert plain.keys() == {"loss", "contrastive"}
    reg = similarity_regulariser(cosine_similarities(emb), 0.30)
    added = build("contrastive", "224", gamma=0.2)(emb, labels)
    torch.testing.assert_close(added["loss"], plain["loss"] + 0.2 * reg)
    torch.testing.assert_close(added["reg"], reg)
    convex = build("contrastive", regularise="convex", gamma=0.2)(emb, labels)
    other = similarity_regulariser(cosine_similarities(emb), 0.25)
    torch.testing.assert_close(convex["loss"], 0.8 * plain["loss"] + 0.2 * other)
    assert build("contrastive", "224", gamma=0.0)(emb, labels).keys() == {"loss", "contrastive"}


def test_proxies_are_one_per_class_with_their_own_learning_rate() -> None:
    for name in LOSSES:
        module = build(name, classes=11)
        sizes = [parameter.numel() for parameter in module.parameters()]
        assert sizes == ([11 * 8] if name in HAS_PROXIES else [])
        for pipeline, rate in (("256", 1e-3), ("224", 100 * 2e-4)):
            groups = parameter_groups(module, pipeline=pipeline, lr=2e-4)
            assert [group["lr"] for group in groups] == ([rate] if sizes else [])
        assert [group["lr"] for group in parameter_groups(module, pipeline="256", lr=1.0, loss_lr=0.5)] == (
            [0.5] if sizes else []
        )


def test_hybrid_says_what_lam_means() -> None:
    first, second = build("hybrid"), build("Hybrid", "224", lam=0.05)
    assert first.loss.weights == pytest.approx((0.4, 0.5, 0.1))
    assert second.loss.weights == pytest.approx((0.95, 0.05, 0.1))
    assert first.describe().startswith(
        "hybrid: 0.4 contextual + 0.5 contrastive + 0.1 regulariser (lam weighs the contextual term"
    )
    assert second.describe().startswith(
        "hybrid: 0.95 contextual + 0.05 contrastive + 0.1 regulariser (lam weighs the contrastive term"
    )
    assert build("hybrid", lam=0.05, lam_convention="contrast").loss.weights == second.loss.weights
    assert describe_lam("context") != describe_lam("contrast")
    assert first.loss.settings["reg_sim"] == 0.25
    assert second.loss.settings["reg_sim"] == 0.30
    assert build("contextual").loss.weights == (1, 0, 0)


@pytest.mark.parametrize("ablation", [name for name in ABLATIONS if name != "none"])
def test_ablations_are_variants_of_the_hybrid(clustered, ablation: str) -> None:
    emb, labels = clustered(6, 4, noise=1.5)
    emb.requires_grad_()
    module = build("hybrid", ablation=ablation)
    assert f"ablation {ablation}" in module.describe()
    assert isinstance(module.loss, ContextualHybridLoss)
    terms = module(emb, labels)
    assert torch.autograd.grad(terms["loss"], emb)[0].isfinite().all()


def test_wrong_settings_are_named() -> None:
    for wrong, message in (
        (lambda: build("contextal"), r"unknown loss 'contextal': choose one of .*; did you mean 'contextual'\?"),
        (lambda: build("hybrid", ablation="sigmod"), r"unknown ablation 'sigmod'.*did you mean 'sigmoid'"),
        (
            lambda: build("ms", ablation="sigmoid"),
            "found ablation 'sigmoid' with loss 'ms', wanted hybrid or contextual",
        ),
        (lambda: build("hybrid", lam=1.0), "found lam 1 and gamma 0.1, which leave a term a weight below 0"),
        (lambda: build("ms", gamma=-1.0), "found gamma -1, wanted at least 0"),
        (lambda: build("ms", regularise="convex", gamma=2.0), "found gamma 2, wanted at least 0, and at most 1"),
        (lambda: build("ms", regularise="often"), "unknown rule of the regulariser 'often'"),
    ):
        with pytest.raises(UserError, match=message):
            wrong()
    with pytest.raises(ValueError, match="found 1 classes for cosface, wanted at least 2"):
        build("cosface", classes=1)
    with pytest.raises(ValueError, match="unknown pipeline '300'"):
        build("ms", "300")


def test_names_of_the_published_programs() -> None:
    published_256 = "hybrid roadmap triplet multisimilarity smoothap fastap contrastive ntxent proxynca normsoftmax"
    published_224 = "Hybrid Contrastive Roadmap Triplet MS MS+miner Proxy_Anchor Proxy_NCA NormalizedSoftmax CosFace"
    for name in f"{published_256} {published_224}".split():
        assert canonical(name) in LOSSES
    assert set(ALIASES.values()) <= set(LOSSES)
    assert len(set(known_names())) == len(known_names())


# The published table, by data set: learning rate, bottleneck, gamma, pictures per class, warm-up epochs.
TUNED = {
    "cub": {
        "contrastive": (2e-5, "linear", 0.0, 4, 0),
        "roadmap": (2e-5, "linear", 0.1, 4, 0), "triplet": (8e-5, "identity", 0.1, 4, 0),
        "ms+miner": (1.6e-4, "linear", 0.0, 4, 0), "proxy-anchor": (1.6e-4, "linear", 0.0, 0, 10),
        "proxy-nca": (1.6e-4, "linear", 0.0, 0, 10), "hybrid": (1.4e-4, "linear", 0.1, 4, 0),
    },
    "cars": {
        "contrastive": (8e-5, "linear", 0.1, 4, 0),
        "roadmap": (2e-5, "linear", 0.0, 4, 0), "triplet": (8e-5, "identity", 0.1, 4, 0),
        "ms+miner": (8e-5, "linear", 0.0, 4, 0), "proxy-anchor": (8e-5, "linear", 0.0, 0, 10),
        "proxy-nca": (1.6e-4, "linear", 0.0, 0, 10), "hybrid": (8e-5, "linear", 0.1, 4, 0),
    },
    "sop": {
        "contrastive": (4e-5, "identity", 0.0, 4, 0),
        "roadmap": (4e-5, "identity", 0.1, 4, 0), "triplet": (4e-5, "identity", 0.1, 4, 0),
        "ms+miner": (8e-5, "identity", 0.0, 4, 0), "proxy-anchor": (1.6e-4, "identity", 0.0, 0, 1),
        "proxy-nca": (1.6e-4, "identity", 0.0, 0, 1), "hybrid": (6e-5, "identity", 0.1, 4, 0),
    },
}  # fmt: skip
# Data set: batch size, epochs, decay step and factor, smallest crop of all its runs; lam and eps of its hybrid.
COMMANDS = {
    "cub": (128, 60, 10, 0.3, 0.16, 0.05, 0.04),
    "cars": (64, 160, 20, 0.5, 0.12, 0.2, 0.05),
    "sop": (128, 80, 15, 0.3, 0.08, 0.2, 0.05),
}


@pytest.mark.parametrize("dataset", TUNED)
def test_configs_hold_the_published_table(dataset: str) -> None:
    batch, epochs, step, factor, crop, lam, eps = COMMANDS[dataset]
    for loss, row in TUNED[dataset].items():
        options = parse("224", ["--config", str(CONFIGS / f"224-{dataset}-{loss.replace('+', '-')}.toml")])
        assert (options.dataset, options.loss) == (dataset, loss)
        assert (options.lr, options.bottleneck, options.gamma, options.ipc, options.warm) == row
        long = dataset == "sop" and loss in HAS_PROXIES
        assert (options.epochs, options.lr_decay_step) == ((115, 21) if long else (epochs, step))
        assert options.hierarchical == (dataset == "sop" and not long)
        assert (options.batch_size, options.lr_decay_gamma, options.xform_scale) == (batch, factor, crop)
        assert options.batch_norm == "frozen"
        if loss == "hybrid":
            assert (options.lam, options.eps, options.lam_convention) == (lam, eps, "contrast")


def test_configs_of_the_256_pipeline() -> None:
    for dataset, rate in {"cub": 8e-5, "cars": 1.6e-4, "sop": 4e-5, "inat": 8e-5, "inshop": 4e-5}.items():
        options = parse("256", ["--config", str(CONFIGS / f"256-{dataset}.toml")])
        found = (options.dataset, options.loss, options.lr, options.batch_size, options.epochs)
        assert found == (dataset, "hybrid", rate, 256 if dataset == "inat" else 128, 80)
        assert (options.lam, options.gamma, options.eps, options.lam_convention) == (0.4, 0.1, 0.05, "context")


def test_names_import_nothing_heavy() -> None:
    import subprocess
    import sys

    heavy = {"torch", "torchvision", "pytorch_metric_learning"}
    code = f"import sys, contextual.names; print(*sorted(sys.modules.keys() & {heavy}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CONFIGS.parents[1]
    )
    assert done.stdout.strip() == ""
