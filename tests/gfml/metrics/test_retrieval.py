"""Retrieval metrics against stored vectors, plain loops and another library."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gfml.metrics.retrieval import by_class, nmi, retrieve


def plain(
    query: Tensor, labels: Tensor, reference: Tensor, reference_labels: Tensor, alone: bool
) -> dict[str, list[float]]:
    """Every metric of every query by loops."""
    rows: dict[str, list[float]] = {"recall@1": [], "recall@3": [], "map@r": [], "r_precision": [], "map": []}
    similarity = F.normalize(query.double(), dim=1) @ F.normalize(reference.double(), dim=1).T
    for q in range(len(query)):
        order = [i for i in similarity[q].argsort(descending=True).tolist() if not (alone and i == q)]
        hits = [bool(reference_labels[i] == labels[q]) for i in order]
        total = sum(hits)
        precisions = [sum(hits[: i + 1]) / (i + 1) * hits[i] for i in range(len(hits))]
        rows["recall@1"].append(float(any(hits[:1])))
        rows["recall@3"].append(float(any(hits[:3])))
        rows["r_precision"].append(sum(hits[:total]) / total if total else float("nan"))
        rows["map@r"].append(sum(precisions[:total]) / total if total else float("nan"))
        rows["map"].append(sum(precisions) / total if total else float("nan"))
    return rows


@pytest.fixture(scope="module")
def points() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 7, (60,), generator=generator)
    labels[-1] = 99  # a class of its own
    return torch.randn(60, 6, generator=generator) + F.one_hot(labels % 6, 6), labels


@pytest.mark.parametrize("name", ["set", "single"])
def test_a_set_by_itself_equals_the_stored_vectors(name: str, stored: Callable[[str], dict[str, Tensor]]) -> None:
    file = stored("contextual_metrics")
    ks = file[f"{name}_ks"].tolist()
    found = retrieve(file[f"{name}_emb"], file[f"{name}_labels"], ks=ks, whole=True)
    for position, k in enumerate(ks):
        assert found.means[f"recall@{k}"] == pytest.approx(float(file[f"{name}_recall_256"][position]), rel=1e-12)
    for metric, key in (("map@r", "mapr"), ("r_precision", "rprec"), ("map", "ap")):
        np.testing.assert_allclose(
            found.per_query[metric], file[f"{name}_{key}_perquery"].numpy(), rtol=1e-9, atol=1e-11
        )
    for metric, key in (("map@r", "mapr"), ("r_precision", "rprec"), ("map", "map")):
        assert found.means[metric] == pytest.approx(float(file[f"{name}_fixed_{key}"]), rel=1e-9)
    assert found.unmatched == (2 if name == "single" else 0)


def test_query_and_gallery_equal_the_stored_vectors(stored: Callable[[str], dict[str, Tensor]]) -> None:
    file = stored("contextual_metrics")
    ks = file["qg_ks"].tolist()
    parts = [file[f"qg_{name}"] for name in ("query_emb", "query_labels", "gallery_emb", "gallery_labels")]
    found = retrieve(*parts, ks=ks, whole=True)
    assert [found.means[f"recall@{k}"] for k in ks] == pytest.approx(file["qg_recall_256"].tolist())
    for metric, key in (("map@r", "mapr"), ("r_precision", "rprec"), ("map", "ap")):
        np.testing.assert_allclose(
            found.per_query[metric], file[f"qg_fixed_{key}_perquery"].numpy(), rtol=1e-9, atol=1e-11
        )


def test_loops_agree_for_unequal_classes(points: tuple[Tensor, Tensor]) -> None:
    vectors, labels = points
    found = retrieve(vectors, labels, ks=(1, 3), whole=True)
    for name, values in plain(vectors, labels, vectors, labels, True).items():
        np.testing.assert_allclose(found.per_query[name], values, rtol=1e-6, err_msg=name)
    found = retrieve(vectors[:20], labels[:20], vectors[20:], labels[20:], ks=(1, 3), whole=True)
    for name, values in plain(vectors[:20], labels[:20], vectors[20:], labels[20:], False).items():
        np.testing.assert_allclose(found.per_query[name], values, rtol=1e-6, err_msg=name)


def test_the_library_agrees(points: tuple[Tensor, Tensor]) -> None:
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    vectors, labels = points[0][:-1], points[1][:-1]
    names = ("precision_at_1", "mean_average_precision_at_r", "r_precision")
    judge = AccuracyCalculator(
        include=names, k="max_bin_count", knn_func=CustomKNN(CosineSimilarity()), device=torch.device("cpu")
    )
    theirs, ours = judge.get_accuracy(vectors, labels), retrieve(vectors, labels).means
    assert [ours[name] for name in ("recall@1", "map@r", "r_precision")] == pytest.approx(
        [theirs[name] for name in names]
    )


def test_blocks_do_not_matter(points: tuple[Tensor, Tensor]) -> None:
    vectors, labels = points[0].repeat(40, 1) + torch.linspace(0, 1, 2400)[:, None].sin(), points[1].repeat(40)
    small, large = (retrieve(vectors, labels, whole=True, memory_mib=mib) for mib in (1, 512))
    # A product in other blocks rounds otherwise in the last digit.
    assert small.means == pytest.approx(large.means, abs=1e-6)
    assert np.array_equal(small.neighbours, large.neighbours)


def test_duplicates_of_the_query_stay() -> None:
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    found = retrieve(vectors, torch.tensor([0, 1, 2, 2]), ks=(1,), keep=1)
    assert found.neighbours[:, 0].tolist() == [1, 0, 3, 2]
    assert found.per_query["recall@1"].tolist() == [0, 0, 1, 1]


def test_recall_never_falls_with_k_and_lists_may_be_longer_than_the_set(points: tuple[Tensor, Tensor]) -> None:
    means = retrieve(*points, ks=(1, 2, 4, 1000)).means
    values = [means[f"recall@{k}"] for k in (1, 2, 4, 1000)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(59 / 60)  # all but the class with one member


def test_length_of_vectors_does_not_matter(points: tuple[Tensor, Tensor]) -> None:
    vectors, labels = points
    lengths = torch.rand(60, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    assert retrieve(vectors * lengths, labels).means == pytest.approx(retrieve(vectors, labels).means)


def test_classes_hardest_first(points: tuple[Tensor, Tensor]) -> None:
    found = retrieve(*points, ks=(1,))
    rows = by_class(found, points[1])
    assert [row["recall@1"] for row in rows] == sorted(row["recall@1"] for row in rows)
    assert sum(row["queries"] for row in rows) == 60
    assert sum(row["recall@1"] * row["queries"] for row in rows) / 60 == pytest.approx(found.means["recall@1"])
    alone = next(row for row in rows if row["class"] == 99)
    assert alone["recall@1"] == 0 and np.isnan(alone["map@r"])


def test_nmi_of_clear_groups_is_one_and_of_noise_low() -> None:
    labels = torch.arange(5).repeat_interleave(20)
    noise = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    assert nmi(F.one_hot(labels, 5) + 0.01 * noise, labels) == pytest.approx(1.0)
    assert nmi(noise, labels) < 0.3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query_labels": torch.zeros(3, dtype=torch.long)}, "labels"),
        ({"query": torch.full((4, 2), torch.nan)}, "finite"),
        ({"ks": ()}, "lengths"),
        ({"ks": (0,)}, "lengths"),
        ({"query": torch.zeros(1, 2), "query_labels": torch.zeros(1, dtype=torch.long)}, "something to rank"),
        ({"reference": torch.zeros(2, 3), "reference_labels": torch.zeros(2, dtype=torch.long)}, "shapes"),
    ],
)
def test_wrong_input_is_named(change: dict[str, object], words: str) -> None:
    given: dict[str, object] = {"query": torch.rand(4, 2), "query_labels": torch.tensor([0, 0, 1, 1])}
    with pytest.raises(ValueError, match=words):
        retrieve(**(given | change))


@pytest.mark.slow
def test_sixty_thousand_fit_in_two_gib() -> None:
    code = """
import resource, torch
from gfml.metrics.retrieval import retrieve
labels = torch.randint(0, 11316, (60502,))
found = retrieve(torch.randn(60502, 512), labels, ks=(1, 10, 100, 1000))
assert 0 < found.means["recall@1000"] < 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2.0, f"{done.stdout} GiB"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_type_gives_the_metrics_of_its_values(points, dtype: torch.dtype, other: torch.dtype) -> None:
    """Also mixed ones, and rows of zeros, which are as far from everything; computed in float32 at least."""
    query, labels = points[0].to(dtype), points[1]
    query[3], query[8] = 0, 0
    reference = points[0].flip(0).to(other)
    found = retrieve(query, labels, reference, labels.flip(0), ks=(1, 3), whole=True)
    wanted = plain(query, labels, reference, labels.flip(0), alone=False)
    assert found.cosines.dtype == (np.float64 if torch.float64 in (dtype, other) else np.float32)
    rows = [q for q in range(len(query)) if q not in (3, 8)]  # all cosines of a zero row are equal: no order
    for name, values in wanted.items():
        np.testing.assert_allclose(found.per_query[name][rows], np.array(values)[rows], rtol=1e-9)
    assert (found.cosines[[3, 8]] == 0).all()


def test_numbers_that_are_no_floats_are_refused_on_entry() -> None:
    labels = torch.tensor([0, 0, 1])
    for wrong in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match="found numbers of type .*, wanted floating point"):
            retrieve(torch.ones(3, 2).to(wrong), labels)
