"""Whether near relations share genres: against plain loops, with planted truth, and through eval.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from gfml.base.errors import UserError
from hlrm import eval as evaluation
from hlrm import meaning, train
from tests.hlrm.test_programs import tiny


def test_shares_against_plain_loops() -> None:
    draw = np.random.default_rng(0)
    pairs, common = draw.integers(0, 8, (30, 2)), (draw.random((30, 4)) < 0.4).astype(np.float32)
    vectors = draw.normal(size=(30, 3)).astype(np.float32)
    hits, couples, agreeing = 0, 0, 0
    for a in range(30):
        others = [b for b in range(30) if (pairs[a] != pairs[b]).all()]
        agree = {b: bool((common[a] * common[b]).any()) for b in others}
        couples, agreeing = couples + len(others), agreeing + sum(agree.values())
        cosine = {b: vectors[a] @ vectors[b] / np.linalg.norm(vectors[a]) / np.linalg.norm(vectors[b]) for b in others}
        hits += agree[max(cosine, key=cosine.__getitem__)]
    found = meaning._shares(torch.from_numpy(pairs), torch.from_numpy(common), {"relation": torch.from_numpy(vectors)})
    assert found == pytest.approx({"relation": hits / 30, "chance": agreeing / couples})


def test_planted_relations_agree_and_others_do_not() -> None:
    """Relations that are the genre: every nearest pair agrees; relations without meaning: as often as chance."""
    draw = np.random.default_rng(1)
    genre = draw.integers(0, 5, 2000)
    pairs = torch.from_numpy(draw.permutation(4000).reshape(2000, 2))
    common = torch.from_numpy(np.eye(5, dtype=np.float32)[genre])
    noise = torch.from_numpy(draw.normal(size=(2000, 5)).astype(np.float32))
    found = meaning._shares(pairs, common, {"relation": common + 0.05 * noise, "item": noise})
    assert found["relation"] == 1.0
    assert found["item"] == pytest.approx(found["chance"], abs=0.04) and found["chance"] == pytest.approx(0.2, abs=0.02)


def test_eval_prints_and_stores_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [f"u{user},i{item}" for user in range(30) for item in range(20) if (user * 7 + item * 3) % 4 < 2]
    Path("own.csv").write_text("user_id,item_id\n" + "\n".join(rows) + "\n")
    Path("genres.csv").write_text("item_id,genres\n" + "".join(f"i{item},{'ab'[item % 2]}\n" for item in range(20)))
    words = tiny()
    assert train.main(["--dataset", "own.csv", *words[words.index("--emb_size") :]]) == 0
    capsys.readouterr()
    with pytest.raises(UserError, match="found no genres.*--item-info"):
        evaluation.main(["--analyse", "25"])
    assert evaluation.main(["--analyse", "25", "--item-info", "genres.csv"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(Path("hlrm_base.eval.json").read_text())["meaning"]
    assert found["pairs"] + found["left_out"] == 25 and 0 <= found["relation"] <= 1 and 0.4 < found["chance"] < 0.6
    assert re.search(rf"by relation {found['relation']:.4f} .* any two pairs {found['chance']:.4f}", printed)


def test_models_without_relations_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(tiny("--model", "cml")) == 0
    with pytest.raises(UserError, match="cml has no relation vectors"):
        evaluation.main(["--analyse", "10"])
