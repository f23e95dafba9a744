"""train.py and eval.py as a user calls them: every type, files, numbers that agree, resuming, and one-line errors."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gfml.base.checkpoints import load_state, save_state
from gfml.base.errors import UserError
from hlrm import eval as evaluation
from hlrm import experiment, settings, train

ROOT = Path(__file__).resolve().parents[2]
TINY = """--demo-users 60 --demo-items 40 --demo-interactions 900 --emb_size 8 --num_relations 3 --num_inter 4
    --train_batch_size 128 --lr 0.02 --epochs 3 --topk 5 --eval_size 10 --threads 1 --device cpu
    --no-progress""".split()
TYPES = {
    "base": ["--hlrm_type", "base"],
    "plus": ["--hlrm_type", "plus"],
    "base of the port": ["--hlrm_type", "base", "--relation-form", "diagonal"],
    "plus of the port": ["--hlrm_type", "plus", "--relation-form", "diagonal", "--compat", "1"],
    "second memory": ["--diff-memory", "--beta", "0.7", "--clip-memory"],
    "sparse data": ["--copy-relations", "--history-sampling", "unpop", "--clip-memory"],
    "lrml": ["--model", "lrml"],
    "cml": ["--model", "cml"],
    "transcf": ["--model", "transcf"],
    "attcml": ["--model", "attcml"],
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def tiny(*more):
    """The tiny settings without those that a compared model does not take, and with ``more``, which win."""
    given = [*more]
    drop = {"cml": {"--num_inter", "--num_relations"}, "lrml": {"--num_inter"}, "transcf": {"--num_relations"},
            "attcml": {"--num_relations"}}  # fmt: skip
    model = given[given.index("--model") + 1] if "--model" in given else "hlr"
    pairs = [TINY[k : k + 2] for k in range(0, len(TINY) - 1, 2)]
    return [word for pair in pairs if pair[0] not in drop.get(model, ()) for word in pair] + [TINY[-1], *given]


def run_of(folder="runs"):
    (found,) = [path for path in Path(folder).iterdir() if path.name.startswith("hlrm-")]
    return found


def tables(text):
    """Everything printed of the two tables, without the lines that say where files are."""
    return [
        line
        for line in text.splitlines()
        if not line.startswith(("run directory", "saved model", "numbers", "attention", "report", "/", "runs"))
    ]


@pytest.mark.parametrize("name", TYPES)
def test_every_type_trains_and_eval_gives_the_same_numbers(name, capsys):
    assert train.main(tiny(*TYPES[name])) == 0
    printed = tables(capsys.readouterr().out)
    rows = [json.loads(line) for line in (run_of() / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    result = json.loads((run_of() / "result.json").read_text())
    for saved in ("hlrm_base.pt", str(run_of())):
        assert evaluation.main(["--save_dir", saved]) == 0
        assert tables(capsys.readouterr().out) == printed
    stored = json.loads(Path("hlrm_base.eval.json").read_text())
    assert stored["test"] == result["test"] and stored["sampled"] == result["sampled"]
    for name in ("hit", "map", "mrr", "ndcg", "precision", "recall"):
        assert 0 <= stored["test"][f"{name}@5"] <= 1
    for name in ("HitRate@5", "MAP@5", "MRR@5", "NDCG@5", "PREC@5", "REC@5"):
        assert sum(name in line for line in printed) == 2
    assert any("full catalogue" in line for line in printed) and any("sampled users" in line for line in printed)


TRAIN_SYNOPSIS = """--train_batch_size --eval_batch_size --num_inter --hlrm_type --epochs --lr --lr_scheduler_gamma
    --clip --patience --emb_size --num_relations --is_pretrained_embs --freeze_embs --save_model -- save_dir
    --loss_margin"""
EVAL_SYNOPSIS = """--eval_batch_size --num_inter --hlrm_type --save_dir --eval_size --emb_size --topk --num_relations
    --is_pretrained_embs"""
# The same flags with the published defaults; --epochs 2, for one is warned about.
TRAIN_FLAGS = """--train_batch_size 5000 --eval_batch_size 10000 --num_inter 50 --hlrm_type base --epochs 2 --lr 2e-5
    --lr_scheduler_gamma 0.98 --clip 3 --patience 10 --emb_size 100 --num_relations 20 --is_pretrained_embs False
    --freeze_embs False --save_model True --save_dir hlrm_base.pt --loss_margin 0.2"""
EVAL_FLAGS = """--eval_batch_size 10000 --num_inter 50 --hlrm_type base --save_dir hlrm_base.pt --eval_size 1000
    --emb_size 100 --topk 10 --num_relations 20 --is_pretrained_embs False"""


def test_the_published_command_lines():
    """The synopsis as printed, which shows no values, means the defaults; with values it runs."""
    assert vars(train.PROGRAM.parse(TRAIN_SYNOPSIS.split())) == vars(train.PROGRAM.parse([]))
    assert vars(settings.parse_eval(EVAL_SYNOPSIS.split())) == vars(settings.parse_eval([]))
    small = ["--demo-users", "60", "--demo-items", "40", "--demo-interactions", "900", "--threads", "1"]
    assert train.main([*TRAIN_FLAGS.split(), *small]) == 0
    assert evaluation.main(EVAL_FLAGS.split()) == 0
    assert evaluation.main(EVAL_SYNOPSIS.split()) == 0
    assert Path("hlrm_base.eval.json").exists()


def test_words_for_true_and_false(capsys):
    for word in ("yes", "TRUE", "t", "y", "1"):
        assert train.PROGRAM.parse(["--save_model", word]).save_model is True
    for word in ("no", "False", "f", "N", "0"):
        assert train.PROGRAM.parse(["--save_model", word]).save_model is False
    assert train.PROGRAM.parse(["--freeze_embs", "--lr", "1e-3"]).freeze_embs is True
    with pytest.raises(SystemExit):
        train.PROGRAM.parse(["--save_model", "maybe"])
    assert "wanted true or false" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["train", "eval"])
def test_help_from_another_folder(program, tmp_path):
    command = [sys.executable, str(ROOT / "hlrm" / f"{program}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "--hlrm-type" in done.stdout and done.stderr == ""
    code = f"import sys, hlrm.train; print('torch' in sys.modules, 'scipy' in sys.modules)"  # noqa: F541
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.stdout.split() == ["False", "False"]


# -- the best weights are the best


class Scripted:
    """A validation that gives the losses 3, 2, 4, 4, ... and remembers the weights it saw."""

    losses = (3.0, 2.0, 4.0, 4.0, 1.0, 1.0)

    def __init__(self, run):
        self.seen = []
        Scripted.last = self

    def __call__(self, model, split):
        self.seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"minus_loss": -self.losses[len(self.seen) - 1]}


def test_patience_and_best_weights(monkeypatch):
    """Losses 3, 2, 4, 4 with patience 2: training ends after epoch 4, and every file holds the weights of epoch 2."""
    monkeypatch.setattr(experiment, "Validation", Scripted)
    assert train.main(tiny("--epochs", "6", "--patience", "2")) == 0
    seen = Scripted.last.seen
    assert len(seen) == 4
    assert any(not torch.equal(seen[1][name], seen[3][name]) for name in seen[1])
    for path in ("hlrm_base.pt", run_of() / "final.pt", run_of() / "best.pt"):
        model = load_state(path)["model"]
        assert model.keys() == seen[1].keys()
        assert all(torch.equal(model[name], seen[1][name]) for name in model), path
    assert json.loads((run_of() / "result.json").read_text())["selection"]["epoch"] == 2


def test_the_rate_decays_once_an_epoch_and_gradients_are_clipped():
    given = train.PROGRAM.parse(
        tiny("--lr_scheduler_gamma", "0.5", "--clip", "0.001", "--optimizer", "sgd", "--lr", "1")
    )
    this = experiment.HLRM(given, experiment.HLRM.load(given))
    model = this.build()
    training = this.training(model)
    optimizer, scheduler, step = training.optimizer, training.scheduler, training.step
    with torch.no_grad():
        model.encoder.nodes.mul_(0.1)  # inside the ball, so that the projection moves nothing
    before = [parameter.detach().clone() for parameter in model.parameters()]
    batch = next(iter(training.batches(1)))
    step(lambda: model.loss(batch), optimizer)
    moved = sum(float((old - new.detach()).square().sum()) for old, new in zip(before, model.parameters(), strict=True))
    assert moved**0.5 == pytest.approx(0.001, rel=1e-3)
    for epoch in range(1, 4):
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5**epoch)


def test_resuming_repeats_the_uninterrupted_run(monkeypatch):
    assert train.main(tiny("--epochs", "4", "--out", "whole")) == 0
    assert train.main(tiny("--epochs", "2", "--out", "parts")) == 0
    assert train.main(["--resume", str(run_of("parts")), "--epochs", "4"]) == 0
    whole, parts = load_state(run_of("whole") / "last.pt"), load_state(run_of("parts") / "last.pt")
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name
    first, second = (json.loads((run_of(out) / "result.json").read_text())["test"] for out in ("whole", "parts"))
    assert first == second


def test_a_compared_model_resumes_too():
    assert train.main(tiny("--model", "cml", "--epochs", "2")) == 0
    assert train.main(["--resume", str(run_of()), "--epochs", "3"]) == 0
    assert len((run_of() / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_done_run_is_shown_and_eval_only_agrees(capsys):
    assert train.main(tiny()) == 0
    first = tables(capsys.readouterr().out)
    assert train.main(tiny()) == 0
    shown = capsys.readouterr().out
    assert "is done" in shown and tables(shown) == first
    assert train.main([*tiny(), "--eval-only"]) == 0
    assert tables(capsys.readouterr().out) == first


def test_selecting_by_a_ranking_metric_of_some_users():
    assert train.main(tiny("--select-metric", "ndcg@3", "--select-users", "7")) == 0
    selection = json.loads((run_of() / "result.json").read_text())["selection"]
    assert selection["metric"] == "ndcg@3" and selection["protocol"] == "selected on validation"


def test_validation_pairs_have_open_negatives_and_train_histories():
    given = train.PROGRAM.parse(tiny())
    this = experiment.HLRM(given, experiment.HLRM.load(given))
    data, validation = this.data, experiment.Validation(this)
    known, train_pairs = data.train_and_valid.toarray() > 0, data.train.toarray() > 0
    assert sum(map(len, validation.batches)) == data.valid.nnz
    for batch in validation.batches:
        assert not known[batch.users, batch.neg].any()
        rows = batch.users[:, None].expand_as(batch.history.ids)[batch.history.mask]
        assert train_pairs[rows, batch.history.ids[batch.history.mask]].all()
    test = this.histories("test")
    rows = torch.arange(data.num_users)[:, None].expand_as(test.ids)[test.mask]
    assert known[rows, test.ids[test.mask]].all()
    assert torch.equal(test.counts, torch.from_numpy(np.diff(data.train_and_valid.indptr)).clamp(max=4))


# -- start values


def start_files(num_users=60, num_items=40, dim=8, scale=0.1):
    draw = np.random.default_rng(0).normal(size=(num_users + num_items, dim)).astype(np.float32) * scale
    np.savez("start.npz", user=draw[:num_users], item=draw[num_users:])
    np.save("user.npy", draw[:num_users])
    np.save("item.npy", draw[num_users:])
    return torch.from_numpy(draw)


@pytest.mark.parametrize(
    "source", [["--pretrained", "start.npz"], ["--user-emb", "user.npy", "--item-emb", "item.npy"]]
)
def test_frozen_start_vectors_stay_and_relations_learn(source):
    wanted = start_files(scale=2.0)  # some outside the ball: frozen means untouched
    assert train.main(tiny("--is_pretrained_embs", "true", "--freeze_embs", "yes", *source)) == 0
    model = load_state("hlrm_base.pt")["model"]
    assert torch.equal(model["encoder.nodes"], wanted)
    memory = model["relation.memory"]
    assert (
        train.main(
            tiny("--is_pretrained_embs", "true", "--freeze_embs", "yes", "--epochs", "0", "--out", "start", *source)
        )
        == 0
    )
    assert not torch.equal(load_state(run_of("start") / "final.pt")["model"]["relation.memory"], memory)


def test_start_from_an_earlier_run():
    assert train.main(tiny("--model", "cml", "--out", "cml")) == 0
    earlier = load_state(run_of("cml") / "final.pt")["model"]["encoder.nodes"]
    assert train.main(tiny("--is_pretrained_embs", "True", "--pretrained", str(run_of("cml")), "--epochs", "0")) == 0
    assert torch.equal(load_state("hlrm_base.pt")["model"]["encoder.nodes"], earlier)
    assert train.main(tiny("--is_pretrained_embs", "True", "--pretrained", str(run_of("cml")), "--epochs", "2")) == 0
    assert not torch.equal(load_state("hlrm_base.pt")["model"]["encoder.nodes"], earlier)


def test_start_from_another_program_of_the_repository():
    """A checkpoint as recsys and the CML program write it: final.pt with encoder.nodes beside other weights."""
    nodes = start_files()
    Path("other").mkdir()
    save_state(
        "other/final.pt", {"model": {"encoder.nodes": nodes, "gravity.log_lamb": torch.zeros(())}, "selection": {}}
    )
    assert train.main(tiny("--is_pretrained_embs", "True", "--pretrained", "other", "--epochs", "0")) == 0
    torch.testing.assert_close(load_state("hlrm_base.pt")["model"]["encoder.nodes"], nodes)


# -- what users get wrong


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pretrained", "missing.npz"], "there is no file missing.npz"),
        (["--pretrained", "missing"], "there is no missing"),
        (["--pretrained", "narrow.npz"], "wanted (60, 8)"),
        (["--pretrained", "fewer.npz"], "wanted (60, 8)"),
        (["--pretrained", "names.npz"], "wanted the arrays user and item"),
        (["--pretrained", "nan.npz"], "not finite"),
        (["--pretrained", "text.npz"], "cannot read"),
        (["--pretrained", "masses.pt"], "holds no encoder.nodes"),
        (["--pretrained", "wide.pt"], "wanted (100, 8)"),
        (["--user-emb", "missing.npy", "--item-emb", "start.npz"], "there is no file missing.npy"),
        (["--user-emb", "start.npz", "--item-emb", "start.npz"], "holds 2 tables"),
    ],
)
def test_bad_start_vectors(flags, message):
    start_files()
    np.savez("narrow.npz", user=np.zeros((60, 7)), item=np.zeros((40, 7)))
    np.savez("fewer.npz", user=np.zeros((59, 8)), item=np.zeros((40, 8)))
    np.savez("names.npz", users=np.zeros((60, 8)))
    np.savez("nan.npz", user=np.full((60, 8), np.nan), item=np.zeros((40, 8)))
    Path("text.npz").write_text("no archive")
    save_state("masses.pt", {"model": {"mass": torch.zeros(3)}})
    save_state("wide.pt", {"model": {"encoder.nodes": torch.zeros(100, 9)}})
    with pytest.raises(UserError) as error:
        train.main(tiny("--is_pretrained_embs", "true", *flags))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hlrm_type", "bace"], "did you mean 'base'"),
        (["--relation-form", "diag"], "choose one of memory, diagonal"),
        (["--is_pretrained_embs", "true"], "needs --pretrained"),
        (["--pretrained", "x"], "without --is_pretrained_embs"),
        (["--is_pretrained_embs", "true", "--user-emb", "x"], "go together"),
        (["--model", "cml", "--freeze_embs", "true"], "nothing to train"),
        (["--model", "cml", "--hlrm_type", "plus"], "belongs to --model hlr"),
        (["--hlrm_type", "plus", "--diff-memory"], "serves the user slot"),
        (["--relation-form", "diagonal", "--beta", "0.5"], "--beta belongs to"),
        (["--select-metric", "auc"], "wanted one of loss"),
        (["--mirror", "two_step", "--clip", "3"], "--mirror-clip"),
        (["--data-config", "missing.json"], "cannot read missing.json"),
        (["--epoch", "3"], "unknown flag --epoch"),
    ],
)
def test_flags_that_do_not_fit(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        train.PROGRAM.parse(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_an_untrained_model_is_warned_of_once_and_in_training(capsys):
    assert train.main(tiny("--epochs", "1")) == 0
    assert capsys.readouterr().err.count("leaves the model untrained: give --epochs 100") == 1
    assert evaluation.main([]) == 0
    assert "untrained" not in capsys.readouterr().err


def test_what_eval_refuses(tmp_path):
    with pytest.raises(UserError, match="there is no saved model hlrm_base.pt"):
        evaluation.main([])
    assert train.main(tiny()) == 0
    for flags, message in (
        (["--hlrm_type", "plus"], "trained with --hlrm-type base"),
        (["--emb_size", "9"], "trained with --embedding-dim 8"),
        (["--num_relations", "20"], "trained with --num-relations 3"),
        (["--topk", "41"], "at most the 40 items"),
        (["--pair", "3", "nobody"], "unknown title 'nobody'"),
    ):
        with pytest.raises(UserError, match=message):
            evaluation.main(flags)
    saved = load_state("hlrm_base.pt")
    other = dict(saved["model"]) | {"relation.memory": torch.zeros(5, 8)}
    save_state("shape.pt", saved | {"model": other})
    with pytest.raises(UserError, match="model of another shape"):
        evaluation.main(["--save_dir", "shape.pt"])
    save_state("data.pt", saved | {"data": "0" * 64})
    with pytest.raises(UserError, match="trained on other data"):
        evaluation.main(["--save_dir", "data.pt"])
    save_state("foreign.pt", {"model": {}})
    with pytest.raises(UserError, match="was not written by hlrm/train.py"):
        evaluation.main(["--save_dir", "foreign.pt"])
    Path("broken.pt").write_bytes(Path("hlrm_base.pt").read_bytes()[:200])
    with pytest.raises(UserError, match="broken.pt"):
        evaluation.main(["--save_dir", "broken.pt"])


# -- judging and explaining


def test_other_settings_of_eval(capsys):
    assert train.main(tiny()) == 0
    capsys.readouterr()
    read = lambda: json.loads(Path("hlrm_base.eval.json").read_text())  # noqa: E731
    assert evaluation.main(["--topk", "3", "7", "--eval-split", "valid", "--eval_size", "4", "--num-cohorts", "3"]) == 0
    found = read()
    assert found["protocol"] | {"users": 0} == {
        "split": "valid",
        "users": 0,
        "cohorts": 3,
        "cohort_size": 4,
        "seen items": "left out",
    }
    assert {"recall@3", "recall@7"} <= found["val"].keys() and "test" not in found and "mmr@7" in found["sampled"]
    assert evaluation.main(["--eval_batch_size", "3"]) == 0
    blocks = read()
    assert evaluation.main([]) == 0
    assert read()["test"] == blocks["test"]
    assert evaluation.main(["--no-mask-seen"]) == 0
    assert read()["test"]["recall@5"] <= blocks["test"]["recall@5"]
    assert evaluation.main(["--num_inter", "9", "--history-sampling", "last", "--result", "more.json"]) == 0
    assert json.loads(Path("more.json").read_text())["test"] != blocks["test"]


@pytest.mark.parametrize("name", ["base", "plus", "base of the port"])
def test_attention_is_written_and_drawn(name):
    assert train.main(tiny(*TYPES[name])) == 0
    assert evaluation.main(["--attention", "3", "--pair", "5", "7"]) == 0
    folder = Path("hlrm_base.attention")
    assert sorted(path.name for path in folder.glob("*.png")) == [f"pair-{k}.png" for k in (1, 2, 3, 4)]
    with np.load(folder / "attention.npz", allow_pickle=False) as arrays:
        found = {key: arrays[key] for key in arrays.files}
    assert found["users"][0] == 5 and found["items"][0] == 7
    np.testing.assert_allclose(found["user_weights"].sum(1), 1, atol=1e-5)
    assert not found["user_weights"][found["references"] == -2].any()
    if "addresses" in found:
        np.testing.assert_allclose(found["addresses"].sum(2), 1, atol=1e-5)
    assert ("item_weights" in found) == (name == "plus")
    with open(folder / "attention.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == int((found["references"] != -2).sum())
    total = sum(float(row["user_attention"]) for row in rows if (row["user"], row["item"]) == ("5", "item 7"))
    assert total == pytest.approx(1, abs=1e-4)
    assert evaluation.main(["--pair", "5", "item 7"]) == 0
    assert [path.name for path in folder.glob("*.png")] == ["pair-1.png"], "pictures of other pairs are gone"


def test_models_without_relations_have_nothing_to_explain():
    assert train.main(tiny("--model", "cml")) == 0
    with pytest.raises(UserError, match="no relations to explain"):
        evaluation.main(["--attention", "1"])


# -- data of the port's config


def ratings_file(folder):
    rng = np.random.default_rng(0)
    users, items = np.divmod(np.flatnonzero(rng.random(40 * 30) < 0.5), 30)
    lines = [f"{u},{i},{rng.integers(1, 6)},{k}" for k, (u, i) in enumerate(zip(users, items, strict=True))]
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "\n".join(lines) + "\n")


def test_the_ports_config_file(tmp_path, capsys):
    ratings_file(tmp_path)
    config = {
        "name": "ml-20m", "path": str(tmp_path), "interactions": "ratings.csv", "binary": True, "pos_threshold": 4,
        "n_core": 3, "split_method": "fo", "random_state": 2021, "file_format": "csv",
    }  # fmt: skip
    Path("config.json").write_text(json.dumps({"dataset": config, "cache": {"path": "cache"}}))
    given = train.PROGRAM.parse(["--data-config", "config.json"])
    assert (given.threshold, given.kcore, given.split, given.split_seed) == (4, 3, "global", 2021)
    small = [*TINY[6:], "--no-cache", "--data-config", "config.json"]
    assert train.main(small) == 0
    assert evaluation.main([]) == 0
    capsys.readouterr()
    for change, message in (
        ({"n_corr": 1}, "dataset.n_corr"),
        ({"split_method": "ufo"}, "split_method 'ufo'"),
        ({"binary": False}, "not binary"),
    ):
        Path("bad.json").write_text(json.dumps({"dataset": config | change}))
        with pytest.raises(SystemExit):
            train.PROGRAM.parse(["--data-config", "bad.json"])
        assert message in capsys.readouterr().err


def test_hlr_finds_two_tastes():
    """Every user likes two of sixteen groups of eight items; a list of five then holds most of what is held out."""
    rng = np.random.default_rng(0)
    lines = []
    for user in range(120):
        for block in rng.choice(16, 2, replace=False):
            lines += [f"{user},{block * 8 + item}" for item in rng.choice(8, 6, replace=False)]
    Path("toy.csv").write_text("user,item\n" + "\n".join(lines) + "\n")
    flags = """--dataset toy.csv --no-cache --emb_size 8 --epochs 40 --lr 0.02 --train_batch_size 256 --num_inter 12
        --lr_scheduler_gamma 1 --clip 0 --loss_margin 1 --topk 5 --threads 1 --select-metric recall@5 --eval-every 20
        --no-progress"""
    assert train.main(flags.split()) == 0
    result = json.loads((run_of() / "result.json").read_text())
    assert result["test"]["recall@5"] > 0.6 > 0.2 > result["baselines"]["popularity"]["test"]["recall@5"]
