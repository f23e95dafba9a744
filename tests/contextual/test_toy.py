"""The toy experiment: its data, that its losses train, and the figure."""

from __future__ import annotations

import pytest
import torch

from contextual import toy


def test_circles_have_their_radii() -> None:
    points, labels = toy.circles(2000, 0.05, torch.Generator().manual_seed(0))
    radius = points.norm(dim=1)
    for label, wanted in enumerate(toy.RADII):
        own = radius[labels == label]
        assert len(own) == 2000
        assert own.mean().item() == pytest.approx(wanted, abs=0.01)
        assert own.std().item() == pytest.approx(0.05, abs=0.005)
    assert points.mean(0).abs().max() < 0.03


def test_recall_counts_nearest_angles() -> None:
    angle = torch.tensor([0.0, 0.1, 1.0, 1.1, 3.0])
    points = torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor([1.0, 9.0, 0.1, 2.0, 5.0])[:, None]
    assert toy.recall_at_1(points, torch.tensor([0, 0, 1, 1, 1])) == 1.0
    assert toy.recall_at_1(points, torch.tensor([0, 1, 1, 1, 1])) == pytest.approx(0.6)


def test_losses_share_start_and_batches_and_move_the_network() -> None:
    found = [toy.train(*objective, steps=15, seed=3) for objective in toy.objectives().values()]
    assert len({trained.start for trained in found}) == 1
    for trained in found:
        assert trained.outputs.isfinite().all()
        assert trained.losses.isfinite().all()
    assert not torch.equal(found[0].outputs, found[1].outputs)
    again = toy.train(*toy.objectives()["contextual"], steps=15, seed=3)
    assert torch.equal(again.outputs, found[2].outputs)


def test_the_program_draws_its_figure(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "toy.png"
    assert toy.main(["--steps", "5", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "neighbourhoods (step 1)" in printed
    assert str(out) in printed
