"""Curvature against closed forms, changed features against what they must and must not move, and the program."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from gfml.program.cli import run_main
from mirror_grad import diagnostics, experiment
from mirror_grad.data import load
from mirror_grad.main import PROGRAM, main
from mirror_grad.models import MODELS
from mirror_grad.robustness import main as robustness

parse = PROGRAM.parse

SHORT = "--epochs 2 --batch-size 100 --lr 0.02 --embedding-dim 8 --topks 5 20 --device cpu --no-progress --baselines none --no-cache".split()
FEATURED = [name for name, entry in MODELS.items() if entry.needs_features]


def quadratic(eigenvalues):
    """L = x' H x / 2 + x' b with H of these eigenvalues, its parameters in two tensors."""
    generator = torch.Generator().manual_seed(3)
    n = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    hessian = basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T
    b = torch.randn(n, generator=generator, dtype=torch.float64)
    parts = [
        nn.Parameter(torch.randn(2, generator=generator, dtype=torch.float64)),
        nn.Parameter(torch.randn(n - 2, generator=generator, dtype=torch.float64)),
    ]

    def loss():
        x = torch.cat(parts)
        return x @ hessian @ x / 2 + x @ b

    return hessian, b, parts, loss


def test_hessian_product_is_exact_on_a_quadratic():
    hessian, _, parts, loss = quadratic([5.0, 2.0, 1.0, -3.0, 0.5])
    before = [p.detach().clone() for p in parts]
    vector = [torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 0.0, 3.0]).double()]
    image = diagnostics.hessian_product(loss, parts, vector)
    torch.testing.assert_close(torch.cat(image), hessian @ torch.cat(vector), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(a, p.detach()) for a, p in zip(before, parts, strict=True))


@pytest.mark.parametrize(("eigenvalues", "top"), [([5.0, 2.0, 1.0, 0.3, 0.5], 5.0), ([1.0, 2.0, -7.0, 0.1, 0.0], -7.0)])
def test_top_eigenvalue(eigenvalues, top):
    *_, parts, loss = quadratic(eigenvalues)
    value, count = diagnostics.top_eigenvalue(loss, parts, iterations=200, tolerance=1e-10)
    assert value == pytest.approx(top, rel=1e-6) and 1 < count <= 200


def test_flat_loss_has_no_curvature():
    parts = [nn.Parameter(torch.ones(3))]
    assert diagnostics.top_eigenvalue(lambda: (parts[0] * 2).sum(), parts)[0] == pytest.approx(0.0, abs=1e-3)
    assert diagnostics.half_steps(lambda: (parts[0] * 2).sum(), parts, 0.1)["cosine"] == pytest.approx(1.0)


def test_half_steps_on_a_quadratic():
    hessian, b, parts, loss = quadratic([5.0, 2.0, 1.0, 0.3, 0.5])
    x = torch.cat([p.detach() for p in parts])
    first = hessian @ x + b
    second = hessian @ (x - 1.5 * 0.1 * first) + b
    found = diagnostics.half_steps(loss, parts, 0.1, 1.5)
    assert found["grad_norm"] == pytest.approx(float(first.norm())) and found["mirror_grad_norm"] == pytest.approx(
        float(second.norm())
    )
    assert found["cosine"] == pytest.approx(float(first @ second / first.norm() / second.norm()))


def test_random_draws_are_equal_and_leave_no_trace():
    parts = [nn.Parameter(torch.ones(50))]
    before = torch.get_rng_state()
    one, other = (
        diagnostics.gradients(lambda: nn.functional.dropout(parts[0], 0.5).sum(), parts, seed) for seed in (1, 1)
    )
    assert torch.equal(one[0], other[0]) and torch.equal(before, torch.get_rng_state())
    assert not torch.equal(
        one[0], diagnostics.gradients(lambda: nn.functional.dropout(parts[0], 0.5).sum(), parts, 2)[0]
    )


# -- changed features


def test_noise_has_the_size_it_says():
    features = {"image": 5 * torch.randn(400, 30), "text": torch.randn(400, 20)}
    noisy = diagnostics.with_noise(features, 0.3, 7)
    for name, table in features.items():
        share = float((noisy[name] - table).square().mean().sqrt() / table.square().mean().sqrt())
        assert share == pytest.approx(0.3, rel=0.03)
    assert torch.equal(noisy["text"], diagnostics.with_noise(features, 0.3, 7)["text"])
    assert torch.equal(diagnostics.with_noise(features, 0.0, 7)["text"], features["text"])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_swap_moves_exactly_its_share(share):
    rows = diagnostics.swapped_rows(50, share, 3)
    count = round(share * 50) if round(share * 50) > 1 else 0
    assert sorted(rows.tolist()) == list(range(50)) and int((rows != torch.arange(50)).sum()) == count
    features = {"image": torch.arange(100.0).view(50, 2), "text": torch.arange(50.0)[:, None]}
    swapped = diagnostics.with_swap(features, share, 3)
    assert torch.equal(swapped["image"][:, 0] / 2, swapped["text"][:, 0])


@pytest.fixture(scope="module")
def trained(planted):
    """trained(model) -> (options, data, model, build): two epochs on the planted data."""
    from gfml.engine.runs import seed_everything

    kept = {}

    def make(name):
        if name not in kept:
            options = parse([*SHORT, "-d", str(planted), "-m", name, "--not_mg"])
            data = load(options, needs_features=True)
            seed_everything(1)

            def build(changed, options=options):
                return experiment.MirrorGrad(options, changed).build()

            model = build(data)
            if MODELS[name].trains:
                training = experiment.MirrorGrad(options, data).training(model)
                optimizer, step = training.optimizer, training.step
                batches = experiment.MirrorGrad(options, data).batches(model)
                for epoch in (1, 2):
                    for batch in batches(epoch):
                        step(lambda batch=batch: model.loss(batch), optimizer)
            kept[name] = options, data, model.eval(), build
        return kept[name]

    return make


def scores(model):
    return model.scorer().score(torch.arange(80))


@pytest.mark.parametrize("name", FEATURED)
def test_unchanged_features_give_the_same_scores(name, trained):
    _, data, model, build = trained(name)
    same = diagnostics.changed_model(model, data, data.features, build)
    torch.testing.assert_close(scores(same), scores(model), rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in FEATURED if name != "BM3"])
def test_noise_reaches_the_ranking(name, trained):
    """BM3 scores with ids alone: its features only shaped the training."""
    _, data, model, build = trained(name)
    for changed in (diagnostics.with_noise(data.features, 3.0, 0), diagnostics.with_swap(data.features, 1.0, 0)):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        noisy = diagnostics.changed_model(model, data, changed, build)
        assert (scores(noisy) - scores(model)).abs().max() > 1e-4
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_trained_tables_get_the_change_of_the_data(trained):
    _, data, model, build = trained("FREEDOM")
    changed = diagnostics.with_noise(data.features, 0.5, 0)
    noisy = diagnostics.changed_model(model, data, changed, build)
    for name in data.features:
        delta = noisy.features[name].table - model.features[name].table
        torch.testing.assert_close(delta, changed[name] - data.features[name], rtol=1e-4, atol=1e-5)


# -- the program


def test_robustness_of_two_runs(planted, tmp_path, capsys):
    out = str(tmp_path / "runs")
    for words in ([], ["--not_mg"]):
        assert run_main(main, [*SHORT, "-d", str(planted), "-m", "VBPR", "--out", out, *words]) == 0
    paths = sorted(map(str, (tmp_path / "runs").glob("mirror-*")))
    words = [
        "--noise",
        "0",
        "2",
        "--swap",
        "1",
        "--draws",
        "2",
        "--metric",
        "recall@5",
        "--curvature-batches",
        "2",
        "--iterations",
        "3",
        "--csv",
        str(tmp_path / "t.csv"),
    ]
    assert run_main(robustness, [*paths, *words]) == 0
    shown = capsys.readouterr().out
    for path in paths:
        found = json.loads((tmp_path / "runs" / path / "robustness.json").read_text())
        stored = json.loads((tmp_path / "runs" / path / "result.json").read_text())
        assert found["clean"]["recall@5"] == stored["test"]["recall@5"] == found["noise"]["0"]["recall@5"]
        assert (
            found["noise"]["2"]["recall@20"] < found["clean"]["recall@20"]
            and found["swap"]["1"]["recall@20"] < found["clean"]["recall@20"]
        )
        assert (
            found["curvature"]["grad_norm"] > 0
            and -1 <= found["curvature"]["cosine"] <= 1
            and found["curvature"]["batches"] == 2
        )
        assert f"VBPR, {found['arm']}" in shown
    head, *lines = (tmp_path / "t.csv").read_text().splitlines()
    assert head.startswith("method,protocol,n,epoch,train_seconds,clean,noise 0") and len(lines) == 2
    assert "top_eigenvalue" in shown and "noise 2 rel" in shown


def test_robustness_refuses_what_it_cannot_measure(planted, tmp_path, capsys):
    run_main(main, [*SHORT, "-d", str(planted), "-m", "BPR", "--out", str(tmp_path / "runs")])
    [path] = (tmp_path / "runs").glob("mirror-*")
    capsys.readouterr()
    assert run_main(robustness, [str(path)]) == 2
    assert "reads no item features" in capsys.readouterr().err
    assert run_main(robustness, [str(tmp_path)]) == 2
