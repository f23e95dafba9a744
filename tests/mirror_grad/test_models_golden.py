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
