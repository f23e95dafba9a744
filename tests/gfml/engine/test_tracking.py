"""TensorBoard files."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from gfml.base.errors import UserError
from gfml.engine.tracking import Tracker


def read(path):
    """tag -> [(step, value)] as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path)).Reload()
    return {tag: [(e.step, round(e.value, 4)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_off_means_off(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Tracker(None) as tracker:
        tracker.start(1)
        tracker.scalars(1, {"a": 1.0})
        tracker.histogram("h", torch.randn(3), 1)
        tracker.projector("p", torch.randn(2, 3), ["a", "b"])
        tracker.figure("f", None, 1)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_is_imported_late(tmp_path):
    code = "import sys; from gfml.engine.tracking import Tracker; Tracker(None).scalars(1, {'a': 1.0}); "
    code += "Tracker('x'); sys.exit(bool({'tensorboard', 'matplotlib', 'tensorflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_scalars(tmp_path):
    with Tracker(tmp_path) as tracker:
        for epoch in (1, 2):
            tracker.scalars(epoch, {"epoch": epoch, "train/loss": 1 / epoch, "val/x": float("nan"), "none": None})
    assert read(tmp_path) == {"train/loss": [(1, 1.0), (2, 0.5)]}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_continued_run_shows_each_epoch_once(tmp_path):
    for first, value in ((0, 1.0), (3, 2.0)):
        with Tracker(tmp_path) as tracker:
            tracker.start(first)
            for epoch in range(max(first, 1), 6):
                tracker.scalars(epoch, {"loss": value})
    assert read(tmp_path) == {"loss": [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]}


def test_start_comes_first(tmp_path):
    with Tracker(tmp_path) as tracker:
        tracker.scalars(1, {"a": 1.0})
        with pytest.raises(ValueError, match="before"):
            tracker.start(2)


def test_histogram_projector_figure(tmp_path):
    import matplotlib.figure
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    figure = matplotlib.figure.Figure()
    figure.subplots().plot([1, 2])
    with Tracker(tmp_path) as tracker:
        tracker.histogram("mass", torch.tensor([[1.0, 2.0], [float("inf"), float("nan")]], requires_grad=True), 3)
        tracker.histogram("nothing", torch.tensor([float("nan")]), 3)
        tracker.figure("plot", figure, 3)
        tracker.projector("items", torch.randn(3, 4, requires_grad=True), ["a\tb", "", "c\nd"], step=2)
        tracker.projector("more", torch.randn(2, 4), [("x y", 1), ("z", 2)], ["title", "count"])
        with pytest.raises(ValueError, match="found 1 labels for 3"):
            tracker.projector("bad", torch.randn(3, 4), ["a"])
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["histograms"] == ["mass"] and events.Histograms("mass")[0].histogram_value.num == 2
    assert events.Tags()["images"] == ["plot"]
    assert {p.read_text() for p in tmp_path.rglob("metadata.tsv")} == {"a b\n-\nc d\n", "title\tcount\nx y\t1\nz\t2\n"}
    assert (tmp_path / "projector_config.pbtxt").exists()


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), Tracker(tmp_path / "file" / "tb") as tracker:
        tracker.scalars(1, {"a": 1.0})
