"""Every model against the stored vectors of the published programs: losses, their parts, gradients, scores."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

kit = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("toy.py"))))
# The published degrees carry a guard of 1e-7, ours do not.
GUARD = {"rtol": 1e-7, "atol": 1e-7}


@pytest.fixture(autouse=True)
def double():
    """Golden vectors are float64; models take torch's default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def toy(stored):
    return stored("mm_toy")


@pytest.fixture
def data(toy):
    return kit.toy_data(toy)


@pytest.fixture
def check(close):
    """check(model, batch, golden, prefix, parts, grads): loss, parts (ours -> stored), gradients and scores of a variant."""

    def compare(actual, wanted, guard, grad=False):
        if guard:
            torch.testing.assert_close(actual, wanted, **GUARD)
        else:
            close(actual, wanted, grad=grad)

    def run(model, batch, golden, prefix, parts, grads, *, guard=True):
        terms = model.train().loss(batch)
        assert terms["loss"].shape == ()
        compare(terms["loss"], golden[f"{prefix}loss"], guard)
        for ours, theirs in parts.items():
            compare(terms[ours], golden[f"{prefix}part_{theirs}"], guard)
        found = kit.gradients(terms["loss"], model)
        for name, wanted in grads.items():
            compare(found[name], wanted, guard, grad=True)
        if f"{prefix}score" in golden:
            compare(kit.scores(model), golden[f"{prefix}score"], guard)

    return run


@pytest.mark.parametrize("behaviour, prefix", [("published", "orig_"), ("fixed", "fixed_sq_")])
@pytest.mark.parametrize("name", ["BPR", "LightGCN"])
def test_id_models(stored, toy, data, check, name, behaviour, prefix):
    golden = stored(f"mm_{name.lower()}")
    layers = {"n_layers": 3} if name == "LightGCN" else {}
    model = kit.build(name, data, behaviour=behaviour, reg_weight=0.1, **layers)
    kit.fill(model, {"encoder.nodes": kit.nodes(golden)})
    grads = {"encoder.nodes": kit.nodes(golden, f"{prefix}grad_")}
    check(model, kit.toy_batch(toy), golden, prefix, {"bpr": "bpr", "reg": "reg"}, grads, guard=name != "BPR")


def tables(golden, modalities=("image", "text")):
    """Stored names of feature tables and projectors by our names."""
    found = {}
    for name in modalities:
        found[f"features.{name}.table"] = f"{name}_table"
        found[f"features.{name}.linear.weight"] = f"{name}_proj_w"
        found[f"features.{name}.linear.bias"] = f"{name}_proj_b"
    return found


def load(model, golden, names):
    """Fill ``tables.nodes`` and the parameters ``names`` (ours -> stored)."""
    return kit.fill(
        model, {"tables.nodes": kit.nodes(golden)} | {ours: golden[f"p_{name}"] for ours, name in names.items()}
    )


def grads_of(golden, prefix, names):
    """Stored gradients by our names, of those that are stored."""
    found = {"tables.nodes": kit.nodes(golden, f"{prefix}grad_")}
    return found | {o: golden[f"{prefix}grad_{n}"] for o, n in names.items() if f"{prefix}grad_{n}" in golden}


@pytest.mark.parametrize("behaviour, prefix", [("published", "orig_"), ("fixed", "fixed_sq_")])
def test_vbpr(stored, toy, data, check, behaviour, prefix):
    golden = stored("mm_vbpr")
    names = {"user": "user", "item": "item", "features.linear.weight": "proj_w", "features.linear.bias": "proj_b"}
    model = kit.build("VBPR", data, behaviour=behaviour, reg_weight=0.1)
    kit.fill(model, {ours: golden[f"p_{name}"] for ours, name in names.items()})
    grads = {o: golden[f"{prefix}grad_{n}"] for o, n in names.items() if f"{prefix}grad_{n}" in golden}
    check(model, kit.toy_batch(toy), golden, prefix, {"bpr": "bpr", "reg": "reg"}, grads, guard=False)


BM3_PARTS = {"ui": "ui", "iu": "iu", "reg": "reg"} | {
    f"{m}_{t}": f"{m}_{t}" for m in ("image", "text") for t in ("item", m)
}
BM3_NAMES = tables(None) | {"predictor.weight": "Q_w", "predictor.bias": "Q_b"}


@pytest.mark.parametrize("behaviour, prefix", [("published", "orig_"), ("fixed", "fixed_sq_")])
def test_bm3(stored, toy, data, check, behaviour, prefix):
    golden = stored("mm_bm3")
    model = kit.build("BM3", data, behaviour=behaviour, n_layers=1, dropout=0.0, reg_weight=0.1, cl_weight=2.0)
    load(model, golden, BM3_NAMES)
    check(model, kit.toy_batch(toy), golden, prefix, BM3_PARTS, grads_of(golden, prefix, BM3_NAMES))


def test_bm3_with_stored_masks(stored, toy, data, check, monkeypatch):
    golden, batch = stored("mm_bm3"), kit.toy_batch(toy)
    rows = {"user": batch.users.unique(), **dict.fromkeys(("item", "image", "text"), batch.pos.unique())}
    masks = iter([golden[f"in_drop_mask_{name}"][ids] for name, ids in rows.items()])
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p: x * next(masks) / (1 - p))
    model = kit.build("BM3", data, behaviour="published", n_layers=1, dropout=0.3, reg_weight=0.1, cl_weight=2.0)
    load(model, golden, BM3_NAMES)
    check(model, batch, golden, "orig_drop_", BM3_PARTS, grads_of(golden, "orig_drop_", BM3_NAMES))


def test_freedom(stored, toy, data, check):
    golden, names = stored("mm_freedom"), tables(None)
    parts = {name: name for name in ("bpr", "bpr_text", "bpr_image")}
    options = {"knn_k": 5, "mm_image_weight": 0.1, "reg_weight": 0.1, "n_mm_layers": 1, "n_ui_layers": 2}
    model = load(kit.build("FREEDOM", data, dropout=0.0, **options), golden, names)
    torch.testing.assert_close(model.item_graph(torch.eye(24)), golden["graph_item"], **GUARD)
    check(model, kit.toy_batch(toy), golden, "orig_", parts, grads_of(golden, "orig_", names))
    for epoch in ("epoch1", "epoch2"):
        model.graph.set_part(kit.pairs_to_csr(golden[f"in_{epoch}_kept_user"], golden[f"in_{epoch}_kept_item"]))
        torch.testing.assert_close(
            model.graph.part(torch.eye(54), 1, combine="final"), golden[f"graph_{epoch}_ui"], **GUARD
        )
        check(model, kit.toy_batch(toy), golden, f"orig_{epoch}_", parts, grads_of(golden, f"orig_{epoch}_", names))


@pytest.mark.parametrize(
    "behaviour, prefix, parts",
    [
        ("published", "orig_", {"bpr": "bpr_sum", "reg": "l2_sum"}),
        ("fixed", "fixed_mean_", {"bpr": "bpr_mean", "reg": "l2_mean"}),
    ],
)
def test_layergcn(stored, toy, data, check, behaviour, prefix, parts):
    golden = stored("mm_layergcn")
    model = load(kit.build("LayerGCN", data, behaviour=behaviour, n_layers=4, dropout=0.0, reg_weight=0.1), golden, {})
    check(model, kit.toy_batch(toy), golden, prefix, parts, grads_of(golden, prefix, {}))
    for epoch in ("epoch1", "epoch2") if behaviour == "published" else ():
        model.graph.set_part(kit.pairs_to_csr(golden[f"in_{epoch}_kept_user"], golden[f"in_{epoch}_kept_item"]))
        check(model, kit.toy_batch(toy), golden, f"orig_{epoch}_", parts, grads_of(golden, f"orig_{epoch}_", {}))


SELFCF = {"n_layers": 2, "reg_weight": 0.01}
SELFCF_NAMES = {"predictor.weight": "Q_w", "predictor.bias": "Q_b"}


@pytest.mark.parametrize(
    "behaviour, prefix, reg", [("published", "orig_", "l2_sum"), ("fixed", "fixed_mean_", "l2_mean")]
)
def test_selfcf(stored, toy, data, check, monkeypatch, behaviour, prefix, reg):
    golden = stored("mm_selfcfed_lgn")
    model = load(kit.build("SELFCFED_LGN", data, behaviour=behaviour, dropout=0.0, **SELFCF), golden, SELFCF_NAMES)
    monkeypatch.setattr(model, "edge_values", lambda: None)
    parts = {"cos_ui": "cos_ui", "cos_iu": "cos_iu", "reg": reg}
    check(model, kit.toy_batch(toy), golden, prefix, parts, grads_of(golden, prefix, SELFCF_NAMES))


def test_selfcf_with_stored_masks(stored, toy, data, check, monkeypatch):
    golden = stored("mm_selfcfed_lgn")
    model = load(kit.build("SELFCFED_LGN", data, behaviour="published", dropout=0.2, **SELFCF), golden, SELFCF_NAMES)
    graph = model.light.graph
    sources = torch.repeat_interleave(graph.indptr.diff().long())
    kept = golden["in_drop_edge_keep"][sources, graph.indices.long()]
    monkeypatch.setattr(model, "edge_values", lambda: graph.values * kept / (1 - golden["in_drop_edge_rate"]))
    masks = iter([golden["in_drop_mask_user"], golden["in_drop_mask_item"]])
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p: x * next(masks) / (1 - p))
    parts = {"cos_ui": "cos_ui", "cos_iu": "cos_iu", "reg": "l2_sum"}
    check(model, kit.toy_batch(toy), golden, "orig_drop_", parts, grads_of(golden, "orig_drop_", SELFCF_NAMES))


def test_itemknncbf(stored, data):
    golden = stored("mm_itemknncbf")
    model = kit.build("ItemKNNCBF", data, knn_k=5, shrink=10.0)
    found = model.neighbours.weights.todense()
    torch.testing.assert_close(torch.from_numpy(found), golden["graph_item"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(kit.scores(model).double(), golden["orig_score"], rtol=2e-5, atol=2e-6)


# The published L2 term is divided by the configured batch size, ours by the rows: 20 of 32 here.
L2_SHARE = 20 / 32
MGCN_NAMES = tables(None) | {
    f"{kind}.{m}.{p}": f"{kind}_{m}_{p[0]}"
    for kind in ("gate", "prefer")
    for m in ("image", "text")
    for p in ("weight", "bias")
}
MGCN_NAMES |= {
    "fusion.query.0.weight": "query1_w",
    "fusion.query.0.bias": "query1_b",
    "fusion.query.2.weight": "query2_w",
}


def test_mgcn(stored, toy, data, check):
    golden = stored("mm_mgcn")
    options = {"n_ui_layers": 2, "n_layers": 1, "knn_k": 5, "reg_weight": 0.1 * L2_SHARE, "cl_loss": 0.1}
    model = load(kit.build("MGCN", data, **options), golden, MGCN_NAMES)
    parts = {"bpr": "bpr", "nce_item": "nce_item", "nce_user": "nce_user"}
    check(model, kit.toy_batch(toy), golden, "orig_", parts, grads_of(golden, "orig_", MGCN_NAMES))
    torch.testing.assert_close(model.loss(kit.toy_batch(toy))["reg"] * L2_SHARE, golden["orig_part_batchl2"], **GUARD)
    side, content = model.sides()
    torch.testing.assert_close(side, golden["orig_mid_side"], **GUARD)
    torch.testing.assert_close(content, golden["orig_mid_content"], **GUARD)
    torch.testing.assert_close(model.fusion(*model.views().values())[1], golden["orig_mid_attention"], **GUARD)
    for name in ("image", "text"):
        torch.testing.assert_close(model.item_graphs[name](torch.eye(24)), golden[f"graph_{name}"], **GUARD)


LATTICE = {
    "n_layers": 1,
    "n_ui_layers": 2,
    "feat_embed_dim": 6,
    "knn_k": 5,
    "reg_weight": 0.1 * L2_SHARE,
    "mess_dropout": 0.0,
}
LATTICE_NAMES = tables(None) | {"modal_weight": "modal_weight"}
NGCF_NAMES = {
    f"{ours}.{d}.{p}": f"{name}{d}_{p[0]}"
    for ours, name in (("sums", "gc"), ("products", "bi"))
    for d in (0, 1)
    for p in ("weight", "bias")
}


def test_lattice(stored, toy, data, check):
    golden = stored("mm_lattice")
    model = load(kit.build("LATTICE", data, behaviour="published", **LATTICE), golden, LATTICE_NAMES)
    batch = kit.toy_batch(toy)
    check(model, batch, golden, "orig_", {"bpr": "bpr"}, grads_of(golden, "orig_", LATTICE_NAMES))
    graph = sum(matrix(torch.eye(24), values) for matrix, values in model.item_graph())
    torch.testing.assert_close(graph.detach(), golden["graph_item"], **GUARD)
    torch.testing.assert_close(model.adjacency(torch.eye(54)), golden["graph_ui"], **GUARD)
    for name in ("image", "text"):
        torch.testing.assert_close(model.frozen[name](torch.eye(24)), golden[f"graph_{name}_frozen"], **GUARD)
    # The next batch, and the same once more, take the graph as a constant; so does the second half of the first.
    for later in (batch, kit.toy_batch(toy)):
        check(model, later, golden, "orig_later_batch_", {"bpr": "bpr"}, grads_of(golden, "orig_later_batch_", {}))
        found = kit.gradients(model.loss(later)["loss"], model)
        assert all(not grad.any() for name, grad in found.items() if name != "tables.nodes")


def test_lattice_fixed_learns_the_graph_in_every_batch(stored, toy, data, check):
    golden = stored("mm_lattice")
    model = load(kit.build("LATTICE", data, **LATTICE), golden, LATTICE_NAMES)
    for _ in range(3):
        check(model, kit.toy_batch(toy), golden, "orig_", {"bpr": "bpr"}, grads_of(golden, "orig_", LATTICE_NAMES))


@pytest.mark.parametrize(
    "prefix, options",
    [
        ("orig_lambda0_", {"lambda_coeff": 0.0}),
        ("orig_lambda1_", {"lambda_coeff": 1.0}),
        ("orig_mf_", {"cf_model": "mf"}),
        ("orig_ngcf_", {"cf_model": "ngcf"}),
    ],
)
def test_lattice_variants(stored, toy, data, check, prefix, options):
    golden, names = stored("mm_lattice"), LATTICE_NAMES | (NGCF_NAMES if "ngcf" in prefix else {})
    model = load(kit.build("LATTICE", data, **LATTICE | options), golden, names)
    check(model, kit.toy_batch(toy), golden, prefix, {}, grads_of(golden, prefix, names))
    if "lambda1" in prefix:
        found = kit.gradients(model.loss(kit.toy_batch(toy))["loss"], model)
        assert not found["features.image.linear.weight"].any() and found["modal_weight"].any()
