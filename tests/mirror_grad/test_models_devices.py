"""The branches that other devices take: without the CPU's shortcuts the numbers are the same, and on CUDA they are too."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import gfml.ranking.graph
from gfml.ranking.sampling import Triples
from mirror_grad.models import MODELS, bm3, damrs, freedom, vbpr
from mirror_grad.parts import features
from mirror_grad.parts.graphs import LightPropagation

kit = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("toy.py"))))
TRAINED = [name for name, entry in MODELS.items() if entry.trains]
# Nothing is drawn at random in the loss.
QUIET = {"dropout": 0.0, "mess_dropout": 0.0, "keep_rate": 1.0}
RANDOM = {"SELFCFED_LGN", "MVGAE", "LGMRec"}


@pytest.fixture
def data(stored):
    return kit.toy_data(stored("mm_toy"))


def model_and_batch(name, data, toy):
    torch.manual_seed(0)
    known = set(MODELS[name].settings.__dataclass_fields__)
    model = kit.build(name, data, **{key: value for key, value in QUIET.items() if key in known}).train()
    batch = kit.toy_batch(toy)
    return model, batch if MODELS[name].needs_negatives else Triples(batch.users, batch.pos, batch.neg[:, None][:, :0])


def csr_product(indptr, indices, values, dense):
    """The product of devices that have no embedding bag with weights for it."""
    shape = (indptr.shape[0] - 1, dense.shape[0])
    return torch.sparse_csr_tensor(indptr, indices, values.to(dense.dtype), size=shape, check_invariants=False) @ dense


@pytest.mark.parametrize("name", [name for name in TRAINED if name not in RANDOM])
def test_the_general_branches_give_the_numbers_of_the_cpus_own(name, data, stored, monkeypatch):
    model, batch = model_and_batch(name, data, stored("mm_toy"))
    wanted = model.loss(batch)["loss"]
    grads = kit.gradients(wanted, model)
    for module in (vbpr, bm3, freedom, damrs):
        monkeypatch.setattr(module, "distinct", lambda ids: (ids, torch.arange(len(ids))))
    monkeypatch.setattr(features, "project_rows", lambda table, weight, rows: F.embedding(rows, table) @ weight.T)
    monkeypatch.setattr(
        LightPropagation, "at", lambda light, ids, nodes, layers: F.embedding(ids, light(nodes, layers))
    )
    monkeypatch.setattr(gfml.ranking.graph, "csr_times_dense", csr_product)
    monkeypatch.setattr("gfml.ranking.sparse.csr_times_dense", csr_product)
    found = model.loss(batch)["loss"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for key, grad in kit.gradients(found, model).items():
        torch.testing.assert_close(grad, grads[key], rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", TRAINED)
def test_cuda_gives_the_numbers_of_the_cpu(name, data, stored):
    model, batch = model_and_batch(name, data, stored("mm_toy"))
    wanted, scores = model.loss(batch)["loss"], kit.scores(model)
    model = model.cuda().train()
    there = Triples(batch.users.cuda(), batch.pos.cuda(), batch.neg.cuda())
    model.new_epoch(1) if hasattr(model, "new_epoch") else None
    found = model.loss(there)["loss"]
    found.backward()
    assert found.device.type == "cuda" and found.isfinite()
    if name not in RANDOM:
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-5)
    scorer = model.eval().scorer()
    torch.testing.assert_close(scorer.score(torch.arange(30, device="cuda")).cpu(), scores, rtol=1e-3, atol=1e-4)
