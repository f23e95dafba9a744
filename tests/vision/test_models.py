"""Networks by name: sizes, stems, channels, and one line for a wrong name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from gfml import attention, longtail
from gfml.attention import AttentionSettings, gravity_attentions
from gfml.base.errors import UserError
from gfml.distances import DISTANCES
from vision import models
from vision.main import PROGRAM
from vision.models import build_model
from vision.vit import ViT, ViTSettings

TINY = ViTSettings(4, 24, 24, 2, 4)


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet18", 11.18), ("densenet121", 6.96), ("efficientnetb2", 7.71), ("vgg19", 139.6)]
)
def test_published_sizes_of_the_cnns(name, millions) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=10)
    assert num_parameters(model) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("stem", models.STEMS)
@pytest.mark.parametrize("name", [name for name in models.CNNS if name != "vgg19"])
def test_cnns_classify_small_images_of_any_channels(name, stem) -> None:
    torch.manual_seed(0)
    model = build_model(name, num_classes=7, in_channels=1, stem=stem).eval()
    out = model(torch.randn(2, 1, 32, 32))
    assert out.shape == (2, 7) and out.isfinite().all()


def test_cifar_stems_keep_the_size() -> None:
    """The map before the head is 4 x 4 and larger where the published stem leaves one pixel."""
    for name in ("resnet18", "densenet121"):
        sides = {}
        for stem in models.STEMS:
            model, found = build_model(name, num_classes=10, stem=stem).eval(), []
            last = model.layer4 if name == "resnet18" else model.features
            last.register_forward_hook(lambda layer, inputs, output, found=found: found.append(output.shape[-1]))
            model(torch.randn(1, 3, 32, 32))
            sides[stem] = found[0]
        assert sides == {"imagenet": 1, "cifar": 4}


def test_small_vgg_ends_in_one_linear_map() -> None:
    model = build_model("vgg19", num_classes=10, stem="cifar").eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    assert num_parameters(model) == pytest.approx(20.03e6, rel=1e-3)


def test_vision_transformers_by_name() -> None:
    for name, heads in (("vit", 0), ("vit_gra", 4)):
        torch.manual_seed(0)
        model = build_model(name, num_classes=5, image_size=16, in_channels=2, vit=TINY)
        assert isinstance(model, ViT) and model(torch.randn(2, 2, 16, 16)).shape == (2, 5)
        assert all(layer.num_gravity_heads == heads for _, layer in gravity_attentions(model))


def test_any_timm_model() -> None:
    model = build_model("resnet10t", num_classes=3, image_size=32, in_channels=1).eval()
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 3)
    options = {"num_classes": 3, "image_size": 32, "vit": ViTSettings(mass_pos="tail")}
    # Its patch size is one number.
    assert build_model("xcit_nano_12_p16_224", num_classes=3).training
    model = build_model("vit_tiny_patch16_224_gra", **options, attention=AttentionSettings(mix="split", num_split=1))
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    assert [(name, layer.num_gravity_heads) for name, layer in gravity_attentions(model)] == [("blocks.11.attn", 1)]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnt18", {}, "unknown model 'resnt18': .* did you mean 'resnet18'"),
        ("vit_tiny_patch16_225", {}, "did you mean 'vit_tiny_patch16_224'"),
        ("vit_tinny_patch16_224_gra", {}, "did you mean 'vit_tiny_patch16_224'"),
        ("vit", {"image_size": 30}, "model vit: found images of side 30 and 8 patches per side"),
        ("vit", {"vit": ViTSettings(hidden=100)}, "found width 100 and 12 heads"),
        ("vit_gra", {"attention": AttentionSettings(mix="split", num_split=13)}, "found num_split 13 and 12 heads"),
        ("vit_tiny_patch16_224", {"image_size": 30}, "found images of side 30 and patches of 16 pixels"),
        ("resnet10t_gra", {}, r"found no standard timm attention in ResNet"),
        ("resnet18", {"stem": "large"}, "unknown stem 'large'"),
        ("densenet121", {"image_size": 16}, "densenet121 takes no images of side 16 .*: give --image-size 32"),
        ("crossvit_tiny_240", {}, "takes no images of side 32 .*: give --image-size 240"),
        ("crossvit_tiny_240_gra", {}, "takes no images of side 32 .*: give --image-size 240"),
    ],
)
def test_wrong_names_and_sizes_are_one_line(name, options, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_model(name, num_classes=10, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "choices"),
    [
        ("mass_pos", attention.MASS_POSITIONS), ("mix_mode", attention.MIXES[1:]), ("dist_mode", DISTANCES),
        ("gra_scale", attention.SCALES), ("dot_scale", attention.SCALES[:2]), ("mass_from", attention.MASSES),
        ("mass_param", attention.MASS_PARAMS), ("stem", models.STEMS), ("imb_type", longtail.PROFILES),
    ],
)  # fmt: skip
def test_flags_offer_what_the_modules_know(flag, choices) -> None:
    """The flags are written down where nothing heavy is imported."""
    found = {action.dest: action.choices for action in PROGRAM.parser()._actions}
    assert {*found[flag]} == {*choices}


def test_importing_models_does_not_import_the_libraries() -> None:
    code = "import sys, vision.models; print(*sorted(sys.modules.keys() & {'torchvision', 'timm', 'matplotlib'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
