"""Weights of Mirror-Gradient's own program: names, widths, redrawn tables, scores, the command of its users' guide."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gfml.base.errors import UserError
from mirror_grad import experiment, foreign
from mirror_grad.main import PROGRAM, main

parse = PROGRAM.parse

HERE = Path(__file__).resolve().parents[1] / "golden" / "checkpoints"
ALL = Path(__file__).resolve().parents[3] / "shared" / "golden" / "checkpoints"
NAMES = json.loads((HERE / "names.json").read_text(encoding="utf-8"))
# What the files' makers chose otherwise than the published search's first values.
CHOSEN = {**{model: ["--knn-k", "5"] for model in ("DRAGON", "FREEDOM", "LATTICE", "MGCN")},
          "SELFCFED_LGN": ["--n-layers", "2"], "BM3": ["--n-layers", "2"]}  # fmt: skip


def folder_of(model: str) -> Path:
    folder = next((root / model for root in (HERE, ALL) if (root / model / "weights.pth").is_file()), None)
    if folder is None:
        pytest.skip(f"the original's file of {model} is not at hand")
    return folder


def arguments(model: str, file: Path) -> list[str]:
    return ["--model", model, "--dataset", str(HERE / "ckpt_toy"), "--resume", str(file), "--topks", "5",
            "--published-protocol", "--no-cache", *CHOSEN.get(model, [])]  # fmt: skip


@pytest.mark.parametrize("model", sorted(foreign.NAMES))
def test_scores_and_metrics_of_the_original(model: str) -> None:
    folder = folder_of(model)
    options = parse(arguments(model, folder / "weights.pth"))
    this = experiment.MirrorGrad(options, experiment.MirrorGrad.load(options))
    data = this.data
    found, notes = experiment.weights_model(this, folder / "weights.pth")
    with torch.no_grad():
        scores = found.scorer().score(torch.arange(data.num_users)).numpy()
    stored = np.load(folder / "scores.npy")
    if model == "SLMRec":  # the original prints the sigmoid of the product
        scores = 1 / (1 + np.exp(-scores))
    np.testing.assert_allclose(scores, stored, rtol=0, atol=5e-6)
    judged = this.evaluation(found, "test")
    means = judged.means
    if (folder / "top20.npy").is_file():
        lists = {row[0]: row[1:6] for row in np.load(folder / "top20.npy").tolist()}
        assert {u: top.tolist() for u, top in zip(judged.users.tolist(), judged.top, strict=True)} == {
            u: lists[u] for u in judged.users.tolist()
        }
    if model in foreign.DRAWS:  # where both behaviours rank alike
        asked = parse([*arguments(model, folder / "weights.pth"), "--behaviour", "fixed"])
        fixed, _ = experiment.weights_model(experiment.MirrorGrad(asked, data), folder / "weights.pth")
        with torch.no_grad():
            np.testing.assert_allclose(
                fixed.scorer().score(torch.arange(data.num_users)).numpy(), stored, rtol=0, atol=5e-6
            )
    if (folder / "not_in_the_file.npz").is_file():  # what the original drew, or made of the data
        check_drawn(found, dict(np.load(folder / "not_in_the_file.npz")))
    exact = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["exact"]
    assert means == pytest.approx(means | exact, abs=1e-12)
    assert any("renamed" in note for note in notes)
    assert any("published --resume" in note for note in notes) == (model in foreign.RESUME_NOTES)


TABLES = {"id_embedding": "id", "v_gcn.preference": "branches.image.preference",
          "t_gcn.preference": "branches.text.preference"}  # fmt: skip


def check_drawn(model: torch.nn.Module, theirs: dict[str, np.ndarray]) -> None:
    """Drawn tables bit for bit; of a user graph every neighbour with its weight."""
    state = model.state_dict()
    for name in theirs.keys() & TABLES.keys():
        np.testing.assert_array_equal(state[TABLES[name]].numpy(), theirs[name])
    if "user_index" in theirs:
        vectors = torch.randn(len(theirs["user_index"]), 3, dtype=torch.float64)
        mixed = torch.einsum(
            "uk,ukd->ud", torch.from_numpy(theirs["user_weight"]).double(), vectors[theirs["user_index"]]
        )
        torch.testing.assert_close(model.user_graph(vectors.float()).double(), mixed, rtol=1e-5, atol=1e-5)


def theirs_of(model: str) -> dict[str, torch.Tensor]:
    """A state with the original's names (from the name map) and tensors that tell which is which."""
    state = {}
    for entry in NAMES[model].values():
        for name in entry["from"] if entry["how"] != "random" else []:
            # A name that only ends in .bias or is a weight of one axis has one axis in the map too: the value is what counts.
            state[name] = torch.full((2, 3, 1) if entry["how"] == "squeeze" else (2, 3), float(len(state)))
    return state


@pytest.mark.parametrize("model", sorted(NAMES))
def test_names_agree_with_the_stored_map(model: str) -> None:
    state = theirs_of(model)
    assert model in foreign.recognise(state)
    ours = foreign.rename(model, state)
    drawn = {name for name, entry in NAMES[model].items() if entry["how"] == "random"}
    assert ours.keys() | drawn == NAMES[model].keys()
    for name, entry in NAMES[model].items():
        if entry["how"] == "random":
            continue
        parts = [state[part] for part in entry["from"]]
        wanted = {"copy": lambda: parts[0], "concatenate": lambda: torch.cat(parts), "squeeze": lambda: parts[0][..., 0],
                  "transpose": lambda: parts[0].T}[entry["how"]]()  # fmt: skip
        assert torch.equal(ours[name], wanted), name


@pytest.mark.parametrize("model", sorted(NAMES))
def test_another_model_is_named(model: str, tmp_path: Path) -> None:
    torch.save(theirs_of(model), tmp_path / "theirs.pth")
    other = "VBPR" if model != "VBPR" else "BM3"
    with pytest.raises(UserError, match=f"has the names of .*{model}.*give --model"):
        main(arguments(other, tmp_path / "theirs.pth"))
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.pth"]


def file_of(model: str, net: torch.nn.Module, num_users: int) -> dict[str, torch.Tensor]:
    """The weights of one of our models under the original's names, as its program would have written them."""
    state, theirs = net.state_dict(), {}
    for ours, entry in NAMES[model].items():
        if ours not in state:  # of a kind of features that the data has not
            continue
        value = state[ours].repeat(2)[:2] if ours == "modal_weight" else state[ours]
        if entry["how"] == "concatenate":
            theirs |= dict(zip(entry["from"], (value[:num_users], value[num_users:]), strict=True))
        elif entry["how"] != "random":
            how = {"copy": lambda v: v, "squeeze": lambda v: v[..., None], "transpose": lambda v: v.T}[entry["how"]]
            theirs[entry["from"][0]] = how(value).clone()
    return theirs


# The originals of these stop with one kind of features.
BOTH = ("MGCN", "MVGAE", "SLMRec")


@pytest.mark.parametrize(
    ("model", "kinds"),
    [(model, kinds) for model in sorted(NAMES) for kinds in ("image text", *(["image"] if model not in BOTH else []))],
)
def test_every_model_comes_back_from_such_a_file(model: str, kinds: str, tmp_path: Path) -> None:
    """Written under the original's names by any way of saving, it scores as it did; what the file does not tell is said."""
    small = ["--model", model, "--dataset", str(HERE / "ckpt_toy"), "--topks", "5", "--no-cache", "--embedding-dim", "6",
             "--modalities", *kinds.split()]  # fmt: skip
    asked = parse(small)
    grids = {name: asked.__dataclass_fields__[name].metadata["setting"].grid for name in foreign.ASSUMED.get(model, ())}
    first = [word for name, grid in grids.items() if grid for word in (f"--{name.replace('_', '-')}", str(grid[0]))]
    options = parse([*small, *first, "--behaviour", "published"])
    this = experiment.MirrorGrad(options, experiment.MirrorGrad.load(options))
    net = this.build()
    if model in foreign.DRAWS:
        net.load_state_dict(net.state_dict() | foreign.DRAWS[model](this.data, net.state_dict(), options.seed))
    if model in ("DRAGON", "DualGNN"):
        net.user_graph.fill(foreign._numpy_positions(net.user_graph, this.data, options.seed, 6))
    theirs = {f"module.{name}": value for name, value in file_of(model, net, this.data.num_users).items()}
    torch.save({"state_dict": theirs, "epoch": 3, "best": torch.tensor(1.0)}, tmp_path / "w.pth")
    found, notes = experiment.weights_model(experiment.MirrorGrad(asked, this.data), tmp_path / "w.pth")
    users = torch.arange(this.data.num_users)
    with torch.no_grad():
        torch.testing.assert_close(found.scorer().score(users), net.eval().scorer().score(users))
    said = " ".join(notes)
    assert all(f"--{name.replace('_', '-')} " in said for name in foreign.ASSUMED.get(model, ()))
    assert ("drawn again" in said) == (model in foreign.DRAWS)


@pytest.mark.parametrize("model", sorted(NAMES))
def test_what_an_incomplete_file_lacks_is_named(model: str, tmp_path: Path) -> None:
    whole = theirs_of(model)
    foreign.check_whole(model, whole, "w.pth")
    for name in whole:
        part = {other: value for other, value in whole.items() if other != name}
        with pytest.raises(UserError, match=f"lacks {re.escape(name)} and has nothing"):
            foreign.check_whole(model, part, "w.pth")
    with pytest.raises(UserError, match="has extra.weight beyond them"):
        foreign.check_whole(model, whole | {"extra.weight": torch.zeros(1)}, "w.pth")
    foreign.check_whole(model, dict.fromkeys(NAMES[model], torch.zeros(1)), "w.pth")  # names of ours are no such file


def test_an_incomplete_file_is_one_line(tmp_path: Path) -> None:
    state = torch.load(folder_of("MMGCN") / "weights.pth", weights_only=True)
    del state["v_gcn.MLP.weight"]  # the width of the image branch is read from it
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"lacks v_gcn\.MLP\.weight and has nothing"):
        main(arguments("MMGCN", tmp_path / "w.pth"))


def test_the_command_of_the_guide_word_for_word(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    """The usual list lengths are longer than the small catalogue: those that fit are judged, those asked for are refused."""
    monkeypatch.chdir(tmp_path)
    words = ["--model", "VBPR", "--dataset", str(HERE / "ckpt_toy"), "--resume", str(folder_of("VBPR") / "weights.pth")]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "ckpt_toy has 24 items: lists of 5, 10, 20 are judged" in said.err and "recall@20" in said.out
    assert "recall@50" not in said.out and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="list length of 50, wanted at most the 24 items"):
        main([*words, "--topks", "5", "50"])


def test_the_command_of_the_guide(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments("VBPR", folder_of("VBPR") / "weights.pth")) == 0
    said = capsys.readouterr()
    assert "0.4614" in said.out and "0.1561" in said.out and "0.2801" in said.out and "0.3526" in said.out
    assert "renamed" in said.err and not list(tmp_path.iterdir())


def test_draws_of_the_originals() -> None:
    """MVGAE's four tables and DRAGON's filled-up lists as the original classes themselves drew them after seed 999."""
    stored = np.load(HERE / "draws.npz")
    features = {"image": torch.zeros(5, 6), "text": torch.zeros(5, 3)}
    shapes = {"experts.image.g.1.weight": torch.zeros(4, 4), "experts.image.project.weight": torch.zeros(128, 6)}
    drawn = foreign._mvgae_tables(SimpleNamespace(num_users=7, num_items=5, features=features), shapes, 999)
    assert len(drawn) == 4
    for name, table in drawn.items():
        np.testing.assert_array_equal(table.numpy(), stored[name])
    graph = SimpleNamespace(k=6, degree=torch.from_numpy(stored["degree"]))
    place = foreign._numpy_positions(graph, SimpleNamespace(num_users=9, num_items=25), 999, 64)
    some = stored["degree"] > 0  # a user without neighbours has a list of zeros with zero weights there
    filled = np.take_along_axis(stored["neighbours"], place.numpy(), 1)
    np.testing.assert_array_equal(filled[some], stored["filled"][some])
    weights = torch.from_numpy(stored["counts"]).gather(1, place).softmax(1).numpy()
    np.testing.assert_allclose(weights[some], stored["weights"][some], rtol=1e-6)
