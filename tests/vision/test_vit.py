"""The small-image vision transformer: stored vectors, parameter counts, and where gravity sits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gfml.attention import AttentionSettings, attention_weights, gravity_attentions, mass_parameters
from vision.vit import ViT, ViTSettings

POSITIONS = ("full", "full_fix", "head", "tail")
MIXES = {
    "off": {"mix": "off"},
    "normal": {"mix": "normal"},
    "split0": {"mix": "split"},
    "split1": {"mix": "split", "split_mix": True},
}
# the stored name of every parameter outside the attention; block names have the block's number in front
TOP = {"embed": "patch_embed", "head_norm": "head_norm", "head": "head"}
IN_BLOCK = {"norm1": "norm1", "norm2": "norm2", "mlp.0": "mlp1", "mlp.3": "mlp2", "attention.proj": "out"}


def stored_state(golden: Mapping[str, Tensor], cls_token: bool, prefix: str = "param__") -> dict[str, Tensor]:
    """The state of a :class:`ViT` under its own names; query, key and value are one map there."""
    position = "position_embed" if cls_token else "position_embed_no_class_token"
    state = {"position": golden[f"{prefix}{position}"]}
    if cls_token:
        state["class_token"] = golden[f"{prefix}class_token"]
    for part in ("weight", "bias"):
        state |= {f"{ours}.{part}": golden[f"{prefix}{name}_{part}"] for ours, name in TOP.items()}
        for block in range(golden["num_layers"].item()):
            stored = f"{prefix}block{block}"
            state |= {f"blocks.{block}.{o}.{part}": golden[f"{stored}_{n}_{part}"] for o, n in IN_BLOCK.items()}
            maps = [golden[f"{stored}_{name}_{part}"] for name in ("query", "key", "value")]
            state[f"blocks.{block}.attention.qkv.{part}"] = torch.cat(maps)
    return state


def stored_model(golden: Mapping[str, Tensor], *, cls_token: bool = True, mass_pos: str = "full",
                 attention: AttentionSettings | None = None) -> ViT:  # fmt: skip
    state = stored_state(golden, cls_token)
    mlp_hidden, hidden = state["blocks.0.mlp.0.weight"].shape
    settings = ViTSettings(
        golden["patches_per_side"].item(), hidden, mlp_hidden, golden["num_layers"].item(), golden["num_heads"].item(),
        cls_token=cls_token, mass_pos=mass_pos,
    )  # fmt: skip
    size = {"image_size": golden["images"].shape[-1], "settings": settings, "attention": attention}
    model = ViT(len(golden["param__head_bias"]), **size).double()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(".mass." in name for name in missing)
    for row, parameter in enumerate(mass_parameters(model)):
        parameter.data.copy_(golden["mass_key_per_layer"][row : row + 1])
    return model


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_model_is_the_stored_one(stored: Callable[[str], dict[str, Tensor]], close, pooling) -> None:
    golden = stored("vit")
    model = stored_model(golden, cls_token=pooling == "cls")
    images, tag = golden["images"].clone().requires_grad_(), f"orig_{pooling}"
    close(model.patches(images), golden[f"{tag}__patches"])
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: outputs.append(output))
    logits = model(images)
    close(logits, golden[f"{tag}__logits"])
    close(torch.stack(outputs), golden[f"{tag}__blocks"])
    close(torch.stack([*attention_weights(model, images).values()]), golden[f"{tag}__attention"])
    assert sum(p.numel() for p in model.parameters()) == golden[f"{tag}__num_parameters"].item()
    close(F.cross_entropy(logits, golden["labels"]), golden[f"{tag}__ce_loss"])
    smoothing = golden["natural_equivalent_uniform_smoothing"].item()
    loss = F.cross_entropy(logits, golden["labels"], label_smoothing=smoothing)
    close(loss, golden[f"{tag}__smoothed_loss"])
    loss.backward()
    close(images.grad, golden[f"{tag}__grad_images"], grad=True)


def test_gradients_are_the_stored_ones(stored, close) -> None:
    golden = stored("vit")
    model = stored_model(golden)
    smoothing = golden["natural_equivalent_uniform_smoothing"].item()
    F.cross_entropy(model(golden["images"]), golden["labels"], label_smoothing=smoothing).backward()
    wanted = stored_state(golden, True, "orig_cls__grad__")
    found = {name: p.grad for name, p in model.named_parameters()}
    assert {*found} == {*wanted}
    for name, gradient in wanted.items():
        close(found[name], gradient, grad=True)


CASES = [(p, m, d) for p, m, d in itertools.product(POSITIONS, MIXES, ("l2", "l1"))]


def gravity_model(golden: Mapping[str, Tensor], mass_pos: str, mix: str, **options: object) -> ViT:
    numbers = {
        "lamb": golden["lamb_gra"].item(),
        "lamb_mix": golden["lamb_mix"].item(),
        "num_split": golden["num_split"].item(),
    }
    return stored_model(golden, mass_pos=mass_pos, attention=AttentionSettings(**numbers, **MIXES[mix], **options))


@pytest.mark.parametrize(("mass_pos", "mix", "distance"), CASES)
def test_gravity_models_are_the_stored_ones(stored, close, mass_pos, mix, distance) -> None:
    golden = stored("gravity_vit")
    tag = f"{mass_pos}__{mix}__{distance}__logits"
    if f"natural__{tag}" in golden:
        close(gravity_model(golden, mass_pos, mix, distance=distance)(golden["images"]), golden[f"natural__{tag}"])
    massless = gravity_model(golden, mass_pos, mix, distance=distance, mass="none", head_order="original")
    # the published "full" is plain attention
    published = stored_model(golden) if mass_pos == "full" else massless
    close(published(golden["images"]), golden[f"orig__{tag}"])
    if f"natural_massless__{tag}" in golden:
        close(massless(golden["images"]), golden[f"natural_massless__{tag}"])


@pytest.mark.parametrize(
    ("hidden", "num_classes", "wanted"), [(384, 10, 6_268_810), (384, 100, 6_303_460), (512, 10, 11_110_922)]
)
def test_parameter_counts(hidden, num_classes, wanted) -> None:
    model = ViT(num_classes, settings=ViTSettings(hidden=hidden, mlp_hidden=hidden, num_heads=8))
    assert sum(p.numel() for p in model.parameters()) == wanted


def test_stored_parameter_counts(stored) -> None:
    for num_classes, hidden, wanted in stored("vit")["orig_parameter_counts"].tolist():
        model = ViT(num_classes, settings=ViTSettings(hidden=hidden, mlp_hidden=hidden, num_heads=8))
        assert sum(p.numel() for p in model.parameters()) == wanted


SMALL = {"patch": 2, "hidden": 12, "mlp_hidden": 10, "num_layers": 3, "num_heads": 3}


def small(attention: AttentionSettings | None = None, seed: int = 0, **settings: object) -> ViT:
    torch.manual_seed(seed)
    return ViT(4, image_size=8, settings=ViTSettings(**{**SMALL, **settings}), attention=attention).double()


def images(n: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_patches_by_their_formula_and_back() -> None:
    model = ViT(2, image_size=12, in_channels=2, settings=ViTSettings(**{**SMALL, "patch": 3}))
    pictures = torch.arange(2 * 2 * 144.0).view(2, 2, 12, 12)
    found = model.patches(pictures)
    back = torch.zeros_like(pictures)
    for row, col, r, c, channel in itertools.product(range(3), range(3), range(4), range(4), range(2)):
        value = found[:, row * 3 + col, (r * 4 + c) * 2 + channel]
        assert torch.equal(value, pictures[:, channel, row * 4 + r, col * 4 + c])
        back[:, channel, row * 4 + r, col * 4 + c] = value
    assert torch.equal(back, pictures)


@pytest.mark.parametrize(
    ("mass_pos", "layers"), [("full", [0, 1, 2]), ("full_fix", [0, 1, 2]), ("head", [0]), ("tail", [2])]
)
@pytest.mark.parametrize(
    "options",
    [
        {}, {"per_head": True}, {"mix": "split", "num_split": 2, "per_head": True}, {"mass": "content"},
        {"mass": "none"}, {"learn_lamb": True, "mix": "normal"},
    ],
)  # fmt: skip
def test_gravity_sits_where_it_should_and_every_parameter_learns(mass_pos, layers, options) -> None:
    model = small(AttentionSettings(**options), mass_pos=mass_pos)
    heads = {name: layer.num_gravity_heads for name, layer in gravity_attentions(model)}
    count = options.get("num_split", 3)
    assert heads == {f"blocks.{i}.attention": count if i in layers else 0 for i in range(3)}
    masses = [layer.mass for _, layer in gravity_attentions(model) if layer.mass is not None]
    if options.get("mass") == "none":
        assert not masses
    else:
        shared = mass_pos == "full_fix" and options.get("mass") != "content"
        assert len(masses) == len(layers) and len({id(mass) for mass in masses}) == (1 if shared else len(layers))
    model(images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(parameter.grad.any() for parameter in mass_parameters(model))


def test_masses_cost_one_number_per_token() -> None:
    plain = sum(p.numel() for p in small().parameters())
    for mass_pos, layers in (("full", 3), ("full_fix", 1), ("head", 1), ("tail", 1)):
        assert sum(p.numel() for p in small(AttentionSettings(), mass_pos=mass_pos).parameters()) == plain + 5 * layers


@pytest.mark.parametrize("kernel", ["auto", "explicit"])
def test_no_gravity_heads_is_the_plain_model(kernel) -> None:
    """Same seed, same weights, same output and gradients."""
    plain, none = small(), small(AttentionSettings(mix="split", num_split=0, kernel=kernel))
    assert {*plain.state_dict()} == {*none.state_dict()}
    for name, value in plain.state_dict().items():
        assert torch.equal(value, none.state_dict()[name])
    for model in (plain, none):
        model(images()).square().sum().backward()
    torch.testing.assert_close(plain(images()), none(images()), rtol=1e-10, atol=1e-10)
    for a, b in zip(plain.parameters(), none.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10)


def test_gravity_starts_from_the_plain_model_s_weights() -> None:
    plain, gravity = small().state_dict(), small(AttentionSettings()).state_dict()
    assert all(torch.equal(value, gravity[name]) for name, value in plain.items())
    assert {*gravity} - {*plain} == {f"blocks.{i}.attention.mass.key" for i in range(3)}


def test_models_do_not_share_settings() -> None:
    alone = small(AttentionSettings(lamb=1.0))(images())
    one, other = small(AttentionSettings(lamb=1.0)), small(AttentionSettings(lamb=5.0, distance="l1"))
    other(images())
    assert torch.equal(one(images()), alone)
    assert (other(images()) - alone).abs().max() > 1e-3


@pytest.mark.parametrize("options", [None, *MIXES.values()])
def test_a_model_can_learn_its_training_images_by_heart(options) -> None:
    attention = None if options is None else AttentionSettings(lamb=3.0, num_split=2, **options)
    model = small(attention, hidden=48, mlp_hidden=48, num_layers=2, num_heads=3).float()
    x, y = images(64).float(), torch.arange(64) % 4
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert (model(x).argmax(-1) == y).float().mean() > 0.99


def test_dropout_is_off_in_eval_mode() -> None:
    model = small(AttentionSettings(), dropout=0.5)
    assert not torch.equal(model(images()), model(images()))
    model.eval()
    assert torch.equal(model(images()), model(images()))


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="found images of side 8 and 3 patches per side"):
        small(patch=3)
    with pytest.raises(ValueError, match="heads divide"):
        small(num_heads=5)
    with pytest.raises(ValueError, match="unknown mass_pos"):
        small(AttentionSettings(), mass_pos="middle")
    with pytest.raises(ValueError, match=r"found images of shape \(1, 8, 8\), wanted \(3, 8, 8\)"):
        small()(images()[:, :1])
