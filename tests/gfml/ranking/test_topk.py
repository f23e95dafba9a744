from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfml.base.errors import UserError
from gfml.ranking import topk
from gfml.ranking.topk import DenseScorer, FactorScorer, Scorer, rows_per_block, select_by_key, topk_items

HERE = Path(__file__).resolve().parent
reference = SimpleNamespace(**runpy.run_path(str(HERE / "reference_eval.py")))


class OnlyScores:
    """A scorer whose order is not known as a dot product; remembers the block sizes it was asked for."""

    def __init__(self, scores):
        self.scores, self.sizes = scores, []
        self.num_users, self.num_items = scores.shape

    def score(self, users):
        self.sizes.append(len(users))
        return self.scores[users]

    def factors(self):
        return None


@pytest.fixture(scope="module")
def golden():
    return np.load(HERE.parents[1] / "golden" / "ranking_metrics.npz", allow_pickle=False)


@pytest.fixture(params=["_select_on_cpu", "_select_on_device"])
def selection(request, monkeypatch):
    """Blocks of scores are ranked by machine code, then as on an accelerator."""
    monkeypatch.setattr(topk, "_select_on_cpu", getattr(topk, request.param))


def random_seen(rng, shape, density):
    return sp.csr_array((rng.random(shape) < density).astype(np.float32))


def whole_numbers(*shape, seed):
    """Factors whose products are exact in float32, with many ties."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def expected(scores, seen, k):
    hidden = reference.rows_as_sets(seen, range(len(scores)))
    return np.array([reference.reference_topk(row, skip, k) for row, skip in zip(scores, hidden, strict=True)])


def test_lists_equal_the_stored_lists(golden, selection):
    scorer = DenseScorer(torch.from_numpy(golden["scores"]))
    seen = sp.csr_array(golden["train_mask"].astype(np.float32))
    top = topk_items(scorer, torch.arange(scorer.num_users), int(golden["topks"].max()), seen=seen)
    np.testing.assert_array_equal(top.numpy(), golden["natural_topk_items"])
    judged = golden["eval_users"]
    rows = (golden["natural_topk_items"][judged] >= 0).all(axis=1)
    np.testing.assert_array_equal(top.numpy()[judged][rows], golden["orig_topk_items"][rows])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ties_equal_the_stored_order(golden, selection, dtype):
    scorer = DenseScorer(torch.from_numpy(golden["tie_scores"]).to(dtype))
    seen = sp.csr_array(golden["tie_train_mask"].astype(np.float32))
    top = topk_items(scorer, torch.arange(4), 12, seen=seen)
    np.testing.assert_array_equal(top.numpy(), golden["natural_tie_order"])


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 12),
    st.integers(1, 90),
    st.integers(1, 12),
    st.integers(0, 6),
    st.floats(0, 1),
    st.sampled_from([0.0001, 0.01, 256]),
    st.sampled_from(["_select_on_cpu", "_select_on_device"]),
)
def test_lists_equal_the_loops(seed, num_users, num_items, k, levels, density, memory_mb, selection):
    """Few score levels make ties inside the list, at its end and between groups; levels = 0 makes all equal."""
    rng, k = np.random.default_rng(seed), min(k, num_items)
    scores = rng.integers(-levels, levels + 1, (num_users, num_items)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.05] = -np.inf
    seen = random_seen(rng, scores.shape, density)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "GROUP", 4)
        patch.setattr(topk, "_select_on_cpu", getattr(topk, selection))
        scorer = OnlyScores(torch.from_numpy(scores))
        top = topk_items(scorer, torch.arange(num_users), k, seen=seen, memory_mb=memory_mb)
    np.testing.assert_array_equal(top.numpy(), expected(scores, seen, k))


@pytest.mark.parametrize("num_items", [383, 384, 385, 700])
def test_distinct_scores_with_the_group_stage(num_items, selection):
    rng = np.random.default_rng(num_items)
    scores = rng.permuted(np.tile(np.arange(num_items), (40, 1)), axis=1).astype(np.float64)
    seen = random_seen(rng, scores.shape, 0.3)
    assert topk.shortlist(torch.from_numpy(scores), 3)[1] is not None or num_items < 384
    top = topk_items(DenseScorer(torch.from_numpy(scores)), torch.arange(40), 2, seen=seen)
    np.testing.assert_array_equal(top.numpy(), expected(scores, seen, 2))


def test_factors_and_scores_give_the_same_lists():
    user, item = whole_numbers(75, 6, seed=1), whole_numbers(900, 6, seed=2)
    seen = random_seen(np.random.default_rng(2), (75, 900), 0.05)
    scores, users = user @ item.T, torch.arange(75)
    by_factors = topk_items(FactorScorer(user, item), users, 7, seen=seen)
    assert torch.equal(by_factors, topk_items(OnlyScores(scores), users, 7, seen=seen))
    np.testing.assert_array_equal(by_factors.numpy(), expected(scores.numpy(), seen, 7))


def test_lists_do_not_depend_on_the_block_or_on_the_company():
    rng = torch.Generator().manual_seed(3)
    scorer = FactorScorer(torch.randn(64, 20, generator=rng), torch.randn(700, 20, generator=rng))
    users = torch.arange(64)
    whole = topk_items(scorer, users, 50, seen=None)
    for memory_mb in (0.4, 0.8):  # 32 and 64 users at a time: both divide the number of users
        assert torch.equal(topk_items(scorer, users, 50, seen=None, memory_mb=memory_mb), whole)
    single = torch.cat([topk_items(scorer, users[u : u + 1], 50, seen=None) for u in range(64)])
    assert torch.equal(single, whole)
    assert torch.equal(topk_items(scorer, users[:33], 50, seen=None), whole[:33])


def test_a_score_is_rounded_alike_alone_and_in_company():
    rng = torch.Generator().manual_seed(9)
    factors = topk.Factors(torch.randn(40, 64, generator=rng), torch.randn(500, 64, generator=rng))
    whole = torch.cat([block.clone() for block in topk.factor_blocks(factors, torch.arange(40), 0.3)])
    for users in torch.arange(40).split([1, 2, 5, 32]):
        alone = torch.cat([block.clone() for block in topk.factor_blocks(factors, users, 256)])
        assert torch.equal(alone, whole[users])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 90), st.integers(1, 40), st.integers(1, 3), st.floats(0, 1))
def test_lists_of_tiles_equal_the_loops(seed, num_items, k, levels, density):
    """Products of small whole numbers, exact and with many ties, in tiles of 32 users and 7 items."""
    rng, k = np.random.default_rng(seed), min(k, num_items)
    user, item = (
        torch.from_numpy(rng.integers(-levels, levels + 1, (n, 3)).astype(np.float32)) for n in (70, num_items)
    )
    seen, users = random_seen(rng, (70, num_items), density), torch.from_numpy(rng.integers(0, 70, 67))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "TILE_ROWS", 32)
        patch.setattr(topk, "TILE_ITEMS", 7)
        top = topk_items(FactorScorer(user, item), users, k, seen=seen)
    np.testing.assert_array_equal(top.numpy(), expected((user @ item.T).numpy(), seen, k)[users])


def test_lists_do_not_depend_on_the_number_of_threads(threads):
    rng = torch.Generator().manual_seed(11)
    scorer = FactorScorer(torch.randn(1500, 64, generator=rng), torch.randn(1200, 64, generator=rng))
    seen = random_seen(np.random.default_rng(11), (1500, 1200), 0.02)
    found = []
    for number in (1, 2, 4):
        threads(number)
        found.append(topk_items(scorer, torch.arange(1500), 20, seen=seen))
        found.append(topk_items(OnlyScores(scorer.user @ scorer.item.T), torch.arange(1500), 20, seen=seen))
    for other in found[1:]:
        assert torch.equal(found[0], other)


def test_seen_items_in_any_order():
    seen = sp.csr_array((np.ones(3), np.array([7, 2, 5]), np.array([0, 3])), shape=(1, 9))
    scorer = FactorScorer(torch.ones(1, 1), torch.arange(9.0)[:, None])
    assert topk_items(scorer, torch.tensor([0]), 4, seen=seen).tolist() == [[8, 6, 4, 3]]
    assert seen.indices.tolist() == [7, 2, 5]


@pytest.mark.parametrize("lay", [lambda x: x.T.contiguous().T, lambda x: x[:, :1].expand(-1, x.shape[1])])
def test_scores_may_lie_in_memory_as_they_like(lay):
    scores, seen = lay(whole_numbers(9, 40, seed=3)), random_seen(np.random.default_rng(3), (9, 40), 0.3)
    scorer = OnlyScores(scores)
    scorer.score = lambda users: scores if len(users) == len(scores) else scores[users]
    before = scores.clone()
    found = topk_items(scorer, torch.arange(9), 5, seen=seen)
    assert np.array_equal(found.numpy(), expected(before.numpy(), seen, 5))
    assert torch.equal(scores, before)


def test_users_may_come_in_any_order_and_repeat():
    rng = np.random.default_rng(4)
    scores, users = rng.normal(size=(6, 30)), torch.tensor([4, 0, 4, 2])
    seen = random_seen(rng, scores.shape, 0.5)
    top = topk_items(DenseScorer(torch.from_numpy(scores)), users, 5, seen=seen)
    np.testing.assert_array_equal(top.numpy(), expected(scores, seen, 5)[users])


def test_seen_items_stay_out_however_low_the_scores():
    scores = torch.full((3, 8), -5000.0)
    seen = sp.csr_array(np.eye(3, 8, dtype=np.float32))
    assert topk_items(DenseScorer(scores), torch.arange(3), 8, seen=seen).tolist() == [
        [1, 2, 3, 4, 5, 6, 7, -1],
        [0, 2, 3, 4, 5, 6, 7, -1],
        [0, 1, 3, 4, 5, 6, 7, -1],
    ]


def test_everything_seen_or_nobody_asked():
    scorer = DenseScorer(torch.zeros(2, 5))
    everything = sp.csr_array(np.ones((2, 5), np.float32))
    assert topk_items(scorer, torch.arange(2), 3, seen=everything).tolist() == [[-1] * 3] * 2
    assert topk_items(scorer, torch.arange(0), 3, seen=None).shape == (0, 3)


@pytest.mark.parametrize("num_items", [30, 500])
def test_equal_scores_are_listed_by_id_and_the_dense_table_survives(num_items):
    scores = torch.zeros(4, num_items)
    seen = sp.csr_array(([1.0], ([1], [0])), shape=(4, num_items))
    top = topk_items(DenseScorer(scores), torch.arange(4), 3, seen=seen)
    assert top.tolist() == [[0, 1, 2], [1, 2, 3], [0, 1, 2], [0, 1, 2]]
    assert not scores.any()


def test_infinite_scores_lead():
    scores = torch.zeros(1, 500)
    scores[0, [3, 400]] = torch.inf
    assert topk_items(DenseScorer(scores), torch.arange(1), 3, seen=None).tolist() == [[3, 400, 0]]


@pytest.mark.parametrize("num_items", [20, 500])
def test_nan_names_the_first_user(num_items):
    scores = torch.zeros(9, num_items)
    scores[5, 7] = scores[6, 0] = torch.nan
    with pytest.raises(ValueError, match="user 5 contain NaN"):
        topk_items(DenseScorer(scores), torch.tensor([8, 5, 6]), 2, seen=None)
    item = torch.ones(num_items, 3)
    user = torch.ones(9, 3)
    user[2] = torch.nan
    with pytest.raises(ValueError, match="user 2 contain NaN"):
        topk_items(FactorScorer(user, item), torch.arange(9), 2, seen=None)


def test_requests_that_cannot_be_served():
    scorer, users = DenseScorer(torch.zeros(4, 10)), torch.arange(4)
    with pytest.raises(UserError, match="length of 11, wanted at most the 10 items"):
        topk_items(scorer, users, 11, seen=None)
    with pytest.raises(ValueError, match="at least 1"):
        topk_items(scorer, users, 0, seen=None)
    with pytest.raises(ValueError, match="int64"):
        topk_items(scorer, users.float(), 2, seen=None)
    with pytest.raises(ValueError, match="seen is"):
        topk_items(scorer, users, 2, seen=sp.csr_array((4, 9)))
    with pytest.raises(ValueError, match="wanted floats"):
        topk_items(OnlyScores(torch.zeros(4, 10, dtype=torch.int64)), users, 2, seen=None)


def test_low_precision_settings_do_not_reach_the_product():
    """Float32 keys under settings that allow bfloat16 or TF32, and the settings survive."""

    class Watched(FactorScorer):
        def factors(self):
            found.append((torch.get_float32_matmul_precision(), (self.user @ self.item.T).dtype))
            return super().factors()

    found, rng = [], torch.Generator().manual_seed(5)
    scorer = Watched(torch.randn(40, 64, generator=rng), torch.randn(3000, 64, generator=rng))
    plain = topk_items(scorer, torch.arange(40), 100, seen=None)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(topk_items(scorer, torch.arange(40), 100, seen=None), plain)
            assert (scorer.score(torch.arange(2))).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "medium"
        assert found == [("highest", torch.float32)] * 2
    finally:
        torch.set_float32_matmul_precision(before)


def test_half_factors_are_multiplied_in_float32():
    rng = torch.Generator().manual_seed(6)
    user, item = torch.randn(8, 16, generator=rng).bfloat16(), torch.randn(600, 16, generator=rng).bfloat16()
    narrow = topk_items(FactorScorer(user, item), torch.arange(8), 10, seen=None)
    assert torch.equal(narrow, topk_items(FactorScorer(user.float(), item.float()), torch.arange(8), 10, seen=None))


def test_gradients_are_not_recorded():
    user = torch.randn(3, 4, requires_grad=True)
    assert topk_items(FactorScorer(user, torch.randn(9, 4)), torch.arange(3), 2, seen=None).shape == (3, 2)


def test_blocks_obey_the_budget():
    assert rows_per_block(30_000, 91_599, 256) == 160  # 183 rows of 16 bytes a score, in steps of 32
    assert rows_per_block(30_000, 91_599, 1) == rows_per_block(30_000, 10**9, 256) == 1
    assert rows_per_block(30_000, np.int64(40_981), 3) == 4
    assert rows_per_block(1, 500, 256) == 32 and rows_per_block(33, 500, 256) == 64
    asked = OnlyScores(torch.zeros(100, 1000))
    topk_items(asked, torch.arange(100), 3, seen=None, memory_mb=0.55)
    assert asked.sizes == [32, 32, 32, 4]


def test_small_scorers_keep_the_protocol():
    assert isinstance(FactorScorer(torch.zeros(2, 3), torch.zeros(4, 3)), Scorer)
    assert isinstance(DenseScorer(torch.zeros(2, 4)), Scorer)


PEAK = """
import resource, numpy as np, scipy.sparse as sp, torch
from gfml.ranking.topk import FactorScorer, topk_items
torch.set_num_threads(1)
# Not ru_maxrss: a new program inherits that of the process that started it.
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
class Distances(FactorScorer):
    factors = lambda self: None
    def score(self, users):
        x, y = self.user[users], self.item
        return -torch.log((x.square().sum(1)[:, None] - 2 * (x @ y.T) + y.square().sum(1)).clamp(min=0) + 0.01)
user, item, users = torch.randn(100, 64), torch.randn(91599, 64), torch.arange(600) % 100
seen = sp.csr_array((np.random.default_rng(0).random((100, 91599)) < 0.001).astype(np.float32))
topk_items(FactorScorer(user, item[:2000]), users, 20, seen=None)
start = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
for kind in (FactorScorer, Distances):
    topk_items(kind(user, item), users, 20, seen=seen)
    topk_items(kind(user * 0, item * 0), users, 20, seen=seen)
print(peak() - start)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident size from /proc")
def test_peak_memory_stays_under_the_budget():
    """600 rows x 91,599 items, D = 64, distinct and equal scores, as dot product and as scores."""
    steady = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": str(2**20)
    }  # large blocks go back at once, whatever glibc would keep
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, env=steady)
    assert float(done.stdout) < 256


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu():
    user, item = whole_numbers(300, 6, seed=7), whole_numbers(4000, 6, seed=8)
    seen = random_seen(np.random.default_rng(8), (300, 4000), 0.01)
    on_cpu = topk_items(FactorScorer(user, item), torch.arange(300), 20, seen=seen)
    on_cuda = topk_items(FactorScorer(user.cuda(), item.cuda()), torch.arange(300), 20, seen=seen, memory_mb=8)
    assert on_cuda.is_cuda and torch.equal(on_cuda.cpu(), on_cpu)


@pytest.mark.parametrize("columns", (50, 700))
@pytest.mark.parametrize("levels", (3, 10**6))
def test_keys_select_what_the_rule_says(columns, levels):
    """What devices do without learning how many rows have ties, on scores with many ties, zeros of both signs and gaps."""
    generator = torch.Generator().manual_seed(columns + levels)
    block = torch.randint(-levels, levels + 1, (40, columns), generator=generator) / 7
    block[torch.rand(block.shape, generator=generator) < 0.1] = -torch.inf
    block[3], block[4, 5:] = -torch.inf, -torch.inf
    block = torch.where((block == 0) & (torch.rand(block.shape, generator=generator) < 0.5), -0.0, block)
    ids, broken = select_by_key(block, 9)
    order = block.sort(dim=1, descending=True, stable=True).indices[:, :9]
    wanted = order.masked_fill(block.gather(1, order) == -torch.inf, -1)
    assert torch.equal(ids, wanted) and not broken.any()
    block[7, columns - 1] = torch.nan
    assert select_by_key(block, 9)[1].nonzero().tolist() == [[7]]
