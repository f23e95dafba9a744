"""gfml import: every source's names, safetensors with ours, figures of tables, errors that leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gfml.base.errors import UserError
from gfml.base.weights import read_weights
from gfml.data.options import load_dataset
from gfml.gravity import Gravity, GravityScorer
from gfml.program.import_weights import main, sources
from gfml.ranking.evaluation import evaluate
from gfml.ranking.graph import build_graph, propagate
from gfml.ranking.topk import FactorScorer

DEMO = "--dataset demo --demo-users 60 --demo-items 40 --demo-interactions 900 --no-cache --topks 5".split()
SHARED = Path(__file__).resolve().parents[4] / "shared" / "golden" / "checkpoints" / "contextual"


@pytest.fixture(scope="module")
def data():
    return load_dataset("demo", demo_users=60, demo_items=40, demo_interactions=900, cache=False)


@pytest.fixture
def tables(data):
    torch.manual_seed(3)
    return {
        "embedding_user.weight": torch.randn(data.num_users, 8),
        "embedding_item.weight": torch.randn(data.num_items, 8),
    }


def figures(text: str) -> dict[str, float]:
    return {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if "@" in line.split(" ")[0]}


def test_every_source_is_found():
    assert set(sources()) == {"contextual", "gfml", "hlrm", "lightgcn", "mcl", "mirror-gradient", "vit-cifar"}


@pytest.mark.parametrize(
    ("name", "layers"), [("mf.pth.tar", 0), ("mf.pth.tar", 3), ("lgn-demo-3-8.pth.tar", 3), ("lgn-demo-2-8.pth.tar", 0)]
)
def test_lightgcn_is_judged_as_its_program_ranks(name, layers, data, tables, tmp_path, capsys):
    torch.save(tables, tmp_path / name, _use_new_zipfile_serialization=False)
    out = tmp_path / "w.safetensors"
    words = ["--from", "lightgcn", "--out", str(out), "--metrics-as", "lightgcn"]
    words += [] if f"-{layers}-" in name else ["--layers", str(layers)]
    assert main([str(tmp_path / name), *words, *DEMO]) == 0
    found = figures(capsys.readouterr().out)
    nodes = torch.cat(list(tables.values()))
    assert torch.equal(read_weights(out)["encoder.nodes"], nodes)
    user, item = propagate(build_graph(data.train), nodes, layers).split([data.num_users, data.num_items])
    wanted = evaluate(FactorScorer(user, item), data, "test", [5], mask_valid=False).means
    assert found["ndcg@5"] == pytest.approx(wanted["ndcg@5"], abs=5e-5)
    assert found["lightgcn:ndcg@5"] == found["ndcg@5"]


@pytest.mark.parametrize(("names", "mode"), [(("mass_u", "mass_i"), "both"), (("mass",), "user")])
def test_gravity_tables_with_their_masses(names, mode, data, tables, tmp_path, capsys):
    masses = {
        f"{name}.weight": torch.randn(size, 1)
        for name, size in zip(names, (data.num_users, data.num_items), strict=False)
    }
    torch.save(tables | masses, tmp_path / "w.pth.tar")
    out = tmp_path / "w.safetensors"
    assert main([str(tmp_path / "w.pth.tar"), "--from", "gfml", "--out", str(out), "--lamb", "3.08", *DEMO]) == 0
    said = capsys.readouterr().out
    assert "--score gravity --lamb 3.08" in said
    gravity = Gravity(data.num_users, data.num_items, mass=mode, lamb=3.08)
    state = {
        f"mass.{side}": read_weights(out)[f"gravity.mass.{side}"] for side in ("user", "item") if mode in (side, "both")
    }
    gravity.load_state_dict(state)
    scorer = GravityScorer(gravity, tables["embedding_user.weight"], tables["embedding_item.weight"])
    wanted = evaluate(scorer, data, "test", [5], mask_valid=False).means
    assert figures(said)["recall@5"] == pytest.approx(wanted["recall@5"], abs=5e-5)


def test_mcl_ranks_by_distance(data, tables, tmp_path, capsys):
    torch.save(tables, tmp_path / "w.pth.tar")
    assert main([str(tmp_path / "w.pth.tar"), "--from", "mcl", "--out", str(tmp_path / "o.safetensors"), *DEMO]) == 0
    said = capsys.readouterr().out
    user, item = (table.numpy().astype(np.float64) for table in tables.values())
    distance = ((user[:, None] - item[None]) ** 2).sum(-1)
    distance[data.train.nonzero()] = np.inf
    hits = [len({*np.argsort(distance[u])[:5]} & {*data.test[[u]].indices}) for u in range(len(user))]
    judged = np.flatnonzero(np.diff(data.test.indptr))
    assert figures(said)["precision@5"] == pytest.approx(np.mean([hits[u] / 5 for u in judged]), abs=5e-5)


def vit_state(width: int = 12, tokens: int = 5, patch: int = 48, classes: int = 4) -> dict[str, torch.Tensor]:
    """Random weights of two layers under the original's names."""
    torch.manual_seed(1)
    shapes = {
        "cls_token": (1, 1, width),
        "pos_emb": (1, tokens, width),
        "emb.weight": (width, patch),
        "emb.bias": (width,),
    }
    for layer in range(2):
        for part in ("la1", "la2"):
            shapes |= {f"enc.{layer}.{part}.weight": (width,), f"enc.{layer}.{part}.bias": (width,)}
        for part in ("msa.q", "msa.k", "msa.v", "msa.o", "mlp.0", "mlp.3"):
            shapes |= {f"enc.{layer}.{part}.weight": (width, width), f"enc.{layer}.{part}.bias": (width,)}
    shapes |= {"fc.0.weight": (width,), "fc.0.bias": (width,), "fc.1.weight": (classes, width), "fc.1.bias": (classes,)}
    return {f"model.{name}": torch.randn(shape) for name, shape in shapes.items()}


def test_vit_cifar_scores_as_written_by_hand(tmp_path):
    """A small network of the original's structure, computed here token by token from its own names."""
    from vision.vit import ViT, ViTSettings

    width, heads, state = 12, 3, vit_state()
    torch.save(state, tmp_path / "w.pth")
    assert main([str(tmp_path / "w.pth"), "--from", "vit-cifar", "--out", str(tmp_path / "o.safetensors")]) == 0
    settings = ViTSettings(patch=2, hidden=width, mlp_hidden=width, num_layers=2, num_heads=heads)
    model = ViT(4, image_size=8, settings=settings)
    model.load_state_dict(read_weights(tmp_path / "o.safetensors"))

    images = torch.randn(2, 3, 8, 8)
    get = {name.removeprefix("model."): value for name, value in state.items()}

    def linear(x, name):
        return x @ get[f"{name}.weight"].T + get[f"{name}.bias"]

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, (width,), get[f"{name}.weight"], get[f"{name}.bias"])

    words = [
        images[:, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].permute(0, 2, 3, 1).flatten(1)
        for r in (0, 1)
        for c in (0, 1)
    ]
    x = torch.cat([get["cls_token"].expand(2, -1, -1), linear(torch.stack(words, 1), "emb")], 1) + get["pos_emb"]
    for layer in range(2):
        y = norm(x, f"enc.{layer}.la1")
        q, k, v = (linear(y, f"enc.{layer}.msa.{part}").split(width // heads, 2) for part in "qkv")
        mixed = [((a @ b.mT) / width**0.5).softmax(-1) @ c for a, b, c in zip(q, k, v, strict=True)]
        x = linear(torch.cat(mixed, 2), f"enc.{layer}.msa.o") + x
        gelu = torch.nn.functional.gelu
        x = gelu(linear(gelu(linear(norm(x, f"enc.{layer}.la2"), f"enc.{layer}.mlp.0")), f"enc.{layer}.mlp.3")) + x
    torch.testing.assert_close(model.eval()(images), linear(norm(x[:, 0], "fc.0"), "fc.1"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", ["full", "full_fix", "head", "tail"])
def test_masses_of_a_vision_transformer(place, tmp_path):
    """Tables of every layer, and one shared table that stands in the file once more under each layer that uses it."""
    from gfml.attention import AttentionSettings
    from vision.foreign import flags
    from vision.vit import ViT, ViTSettings

    state, layers = vit_state(), {"head": [0], "tail": [1]}.get(place, [0, 1])
    masses = [torch.rand(5, 1) for _ in layers] if place == "full" else [torch.rand(5, 1)] * len(layers)
    for layer, mass in zip(layers, masses, strict=True):
        state |= {f"model.enc.{layer}.msa.mass_{side}.weight": mass for side in "qk"}
    if place != "full":
        state |= {f"model.mass_{side}.weight": masses[0] for side in "qk"}
    torch.save(state, tmp_path / "w.pth")
    assert main([str(tmp_path / "w.pth"), "--from", "vit-cifar", "--out", str(tmp_path / "o.safetensors")]) == 0
    settings = ViTSettings(patch=2, hidden=12, mlp_hidden=12, num_layers=2, num_heads=3, mass_pos=place)
    model = ViT(4, image_size=8, settings=settings, attention=AttentionSettings())
    model.load_state_dict(read_weights(tmp_path / "o.safetensors"))
    for layer, mass in zip(layers, masses, strict=True):
        assert torch.equal(model.blocks[layer].attention.mass.key, mass.T)
    assert f"--mass-pos={place}" in flags(state, "")


def test_vit_cifar_is_judged(tmp_path, capsys):
    """On the embedded digits, against logits of the network by itself; masses are left out, as that program computes."""
    from vision.main import PROGRAM

    state = vit_state(width=8, tokens=17, patch=12, classes=10)
    state |= {"model.enc.0.msa.mass_k.weight": torch.rand(17, 1), "model.mass_k.weight": torch.rand(17, 1)}
    torch.save(state, tmp_path / "w.pth")
    words = ["--from", "vit-cifar", "--out", str(tmp_path / "o.safetensors"), "--dataset", "digits", "--head", "2"]
    assert main([str(tmp_path / "w.pth"), *words]) == 0
    said = capsys.readouterr().out
    assert "--mass-pos=head --mass-from=none" in said and "weights of" in said
    assert "--dot-scale=sqrt_hidden" in said and "assumed" not in said  # --head was given
    kind = PROGRAM.load_experiment()
    settings = PROGRAM.parse(said.split("judged by vision/main.py ")[1].split("\n")[0].split())
    this = kind(settings, kind.load(settings))
    model = this.build()
    model.load_state_dict({k: v for k, v in read_weights(tmp_path / "o.safetensors").items() if ".mass." not in k})
    right = this.predict(model.eval(), this.data.source.test).argmax(-1).numpy() == this.data.source.test.labels
    assert f"{right.mean():.4f}" in said.splitlines()[-1]


def test_what_is_left_out_is_said(tables, tmp_path, capsys):
    other = {"user_embeddings.weight": tables["embedding_user.weight"], "item_embeddings.weight": tables["embedding_item.weight"],
             "feat_extract_model.0.weight": torch.zeros(2, 2)}  # fmt: skip
    torch.save(other, tmp_path / "cml.pth.tar")
    assert main([str(tmp_path / "cml.pth.tar"), "--from", "gfml", "--out", str(tmp_path / "o.safetensors")]) == 0
    assert (
        "1 tensors of the file are read by nothing here and left out: feat_extract_model.0.weight"
        in capsys.readouterr().out
    )
    assert sources()["vit-cifar"].unread(vit_state() | {"model.enc.0.msa.mass_q.weight": torch.zeros(5, 1)}) == [
        "model.enc.0.msa.mass_q.weight"
    ]


def test_hlrm_is_judged(data, tmp_path, capsys):
    """By the port's relation, in float64 from its own names: hits of the five nearest items that a user has not."""
    torch.manual_seed(2)
    state = {"user_emb.weight": torch.randn(data.num_users, 6) / 4, "item_emb.weight": torch.randn(data.num_items, 6) / 4,
             "userattn.key_.weight": torch.randn(3, 6), "userattn.val_.weight": torch.randn(3, 6)}  # fmt: skip
    torch.save(state, tmp_path / "w.pth")
    words = ["--from", "hlrm", "--out", str(tmp_path / "o.safetensors"), "--baselines", "none", *DEMO]
    assert main([str(tmp_path / "w.pth"), *words]) == 0
    said = capsys.readouterr().out
    users, items, key, value = (table.double() for table in state.values())
    diagonal, hits, judged = (key * value).sum(0), 0.0, np.flatnonzero(np.diff(data.test.indptr))
    known = data.train_and_valid
    for u in judged:
        own = known[[u]].indices  # at most 50 items, so that none is left out
        slots = items[own]
        weights = ((slots * users[u] * diagonal) @ items.T).softmax(0)
        near = (users[u] + items * diagonal * (weights.T @ slots) - items).norm(dim=1)
        near[own] = torch.inf
        hits += len({*near.argsort()[:5].tolist()} & {*data.test[[u]].indices.tolist()}) / 5
    row = next(line for line in said.splitlines() if line.startswith("HLR, diagonal form of the port"))
    assert row.split()[-2] == f"{hits / len(judged):.4f}"


def test_mirror_gradient_is_judged(tmp_path, capsys):
    folder = Path(__file__).resolve().parents[2] / "golden" / "checkpoints"
    words = [
        "--from",
        "mirror-gradient",
        "--out",
        str(tmp_path / "o.safetensors"),
        "--dataset",
        str(folder / "ckpt_toy"),
    ]
    assert main([str(folder / "VBPR" / "weights.pth"), *words, "--topks", "5", "--no-cache"]) == 0
    said = capsys.readouterr().out
    assert all(figure in said for figure in ("0.4614", "0.1561", "0.2801", "0.3526"))  # the original's own


@pytest.mark.slow
def test_contextual_is_judged(tmp_path, capsys, monkeypatch):
    """The original's small file on the embedded digits, against neighbours of the network's own vectors."""
    from contextual import experiment
    from contextual.main import PROGRAM

    file = SHARED / "sop_network_256_state.pth"
    if not file.is_file():
        pytest.skip("the original's files are not at hand")
    monkeypatch.setattr(experiment, "build_backbone", lambda *_, **__: (small_resnet(32), 64))
    assert (
        main([str(file), "--from", "contextual", "--out", str(tmp_path / "o.safetensors"), "--dataset", "digits"]) == 0
    )
    said = capsys.readouterr().out
    settings = PROGRAM.parse(said.split("judged by contextual/main.py ")[1].split("\n")[0].split())
    this = experiment.Retrieve(settings, experiment.Retrieve.load(settings))
    net = this.adopt(read_weights(tmp_path / "o.safetensors"), "o").net
    vectors, labels = this.embeddings(this.data.test, net).double(), this.data.test.labels
    nearest = (vectors @ vectors.T).fill_diagonal_(-torch.inf).argmax(1).numpy()
    header, row = said.splitlines()[-2:]
    column = header.split().index("recall@1") - len(header.split())
    assert float(row.split()[column]) == pytest.approx((labels[nearest] == labels).mean(), abs=2e-3)


@pytest.mark.parametrize("name", ["hlrm", "vit-cifar", "contextual", "mirror-gradient"])
def test_flags_without_data(name, tmp_path):
    with pytest.raises(UserError, match="no --dataset"):
        main(["w.pth", "--from", name, "--head", "3"])
    with pytest.raises(UserError, match="wanted gfml import FILE --from"):
        main(["--from", name, "w.pth"])


def test_hlrm_fits_the_model_of_the_port(tmp_path, capsys):
    from gfml.ranking.encoders import Tables
    from hlrm.model import RelationModel
    from hlrm.relations import DiagonalRelation

    state = {"user_emb.weight": torch.randn(6, 4), "item_emb.weight": torch.randn(9, 4)}
    for side in ("user", "item"):
        state |= {f"{side}attn.key_.weight": torch.randn(5, 4), f"{side}attn.val_.weight": torch.randn(5, 4)}
    torch.save(state, tmp_path / "w.pth")
    assert main([str(tmp_path / "w.pth"), "--from", "hlrm", "--out", str(tmp_path / "o.safetensors")]) == 0
    assert f"judge them: gfml import {tmp_path / 'w.pth'} --from hlrm --dataset NAME" in capsys.readouterr().out
    model = RelationModel(Tables(6, 9, 4), DiagonalRelation(4, 5, "plus"))
    model.load_state_dict(read_weights(tmp_path / "o.safetensors"))
    assert torch.equal(model.relation.item_value, state["itemattn.val_.weight"])


@pytest.mark.parametrize("name", ["cub_network_256_pickled_module.pt", "sop_network_256_pickled_module.pt",
                                  "cub_network_256_state.pth", "resnet50_224_model_state_dict.pth"])  # fmt: skip
def test_contextual_vectors_of_the_original(name, tmp_path):
    """Files that the original classes wrote, at 1/32 of the widths: equal vectors of three pictures."""
    from contextual.network import EmbeddingNet

    if not (SHARED / name).is_file():
        pytest.skip("the original's files are not at hand")
    assert main([str(SHARED / name), "--from", "contextual", "--out", str(tmp_path / "o.safetensors")]) == 0
    state = read_weights(tmp_path / "o.safetensors")
    dim, width = state["head.weight"].shape
    stored = np.load(SHARED / f"{name.split('_pickled')[0].split('_state')[0].split('_model')[0]}_vectors.npz")
    backbone = small_resnet(2048 // width)
    how = {"cub": ("max", True), "sop": ("avg", False), "res": ("maxavg", False)}[name[:3]]
    net = EmbeddingNet(backbone, width, dim, pooling=how[0], layer_norm=how[1]).eval()
    net.load_state_dict(state)
    key = next(key for key in stored.files if stored[key].ndim == 4)
    vectors = next(stored[other] for other in stored.files if stored[other].ndim == 2)
    with torch.no_grad():
        found = net(torch.from_numpy(stored[key].astype(np.float32))).numpy()
    wanted = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


def small_resnet(factor: int):
    """timm's ResNet-50 with every width divided."""
    import timm
    from torch import nn

    net = timm.create_model("resnet50", num_classes=0, global_pool="")
    for parent in list(net.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, nn.Conv2d):
                inputs = part.in_channels if part.in_channels == 3 else part.in_channels // factor
                size = part.kernel_size, part.stride, part.padding
                setattr(parent, name, nn.Conv2d(inputs, part.out_channels // factor, *size, bias=False))
            elif isinstance(part, nn.BatchNorm2d):
                setattr(parent, name, nn.BatchNorm2d(part.num_features // factor))
    return net


@pytest.mark.parametrize(
    ("state", "source", "message"),
    [
        ({"a.weight": torch.zeros(2, 2)}, "lightgcn", "lacks embedding_user.weight"),
        ({"a.weight": torch.zeros(2, 2)}, "vit-cifar", "no name of that program"),
        ({"a.weight": torch.zeros(2, 2)}, "contextual", "no name of that program"),
        ({"a.weight": torch.zeros(2, 2)}, "mirror-gradient", "names of none of"),
        ({"embedding_user.weight": torch.zeros(3, 2), "embedding_item.weight": torch.zeros(3, 2), "mass.weight": torch.zeros(3, 1)},
         "gfml", "whose they are is unclear"),
        ({"user_emb.weight": torch.zeros(3, 2), "item_emb.weight": torch.zeros(4, 2), "userattn.val_.weight": torch.zeros(2, 2)},
         "hlrm", r"lacks userattn\.key_\.weight"),
        ({"user_emb.weight": torch.zeros(3, 2), "item_emb.weight": torch.zeros(4, 2), "userattn.other": torch.zeros(2, 2)},
         "hlrm", "has userattn.other, which is no name"),
        ({"backbone.conv1.weight": torch.zeros(2, 2), "remap.weight": torch.zeros(2, 2)}, "contextual", r"lacks remap\.bias"),
        ({"model.fc.0.bias": torch.zeros(2)}, "vit-cifar", "lacks pos_emb"),
    ],
)  # fmt: skip
def test_errors_leave_nothing(state, source, message, tmp_path, monkeypatch):
    torch.save(state, tmp_path / "theirs.pth")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as found:
        main(["theirs.pth", "--from", source])
    assert "delete" not in str(found.value) and [path.name for path in tmp_path.iterdir()] == ["theirs.pth"]


def test_tables_of_other_data(tables, tmp_path):
    torch.save({name: value[:7] for name, value in tables.items()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="the file has 7 users and 7 items, demo has"):
        main([str(tmp_path / "w.pth"), "--from", "lightgcn", "--out", str(tmp_path / "o.safetensors"), *DEMO])
