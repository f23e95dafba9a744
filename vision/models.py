"""Networks by name: the vision transformer with and without gravity, CNN baselines, and everything timm knows.

vit            ViT-CIFAR with plain dot attention
vit_gra        the same with gravity attention in the layers that mass_pos selects
resnet18 densenet121 efficientnetb2 vgg19      torchvision's, without pretrained weights
NAME           any timm model, without pretrained weights
NAME_gra       a timm vision transformer whose attention is replaced by gravity attention
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gfml.attention import AttentionSettings, replace_attention
from gfml.base.errors import UserError, suggest
from vision.vit import ViT, ViTSettings

VITS = ("vit", "vit_gra")
CNNS = ("resnet18", "densenet121", "efficientnetb2", "vgg19")
MODELS = (*VITS, *CNNS)
STEMS = ("imagenet", "cifar")
# What each of them takes, with either stem.
CNN_SIZE = 32
GRAVITY_SUFFIX = "_gra"


def build_model(
    name: str,
    *,
    num_classes: int,
    image_size: int = 32,
    in_channels: int = 3,
    vit: ViTSettings = ViTSettings(),
    attention: AttentionSettings = AttentionSettings(),
    stem: str = "imagenet",
) -> nn.Module:
    """A new, untrained network: images [B, in_channels, image_size, image_size] -> logits [B, num_classes].

    vit: sizes of vit and vit_gra; its mass_pos and ``attention`` also serve NAME_gra. vit takes ``attention``'s dot scale.
    stem: of the four CNNs. imagenet, as published: the input is halved twice or more at once, and 32 pixels end as
        one. cifar: the first convolution keeps the size and there is no pooling after it; vgg19 then ends in mean
        pooling and one linear map instead of the 120 million weights of its three.
    Raises UserError for an unknown name and for sizes that do not fit each other.
    """
    try:
        if name in VITS:
            sizes = {"image_size": image_size, "in_channels": in_channels, "settings": vit}
            plain = AttentionSettings(mix="split", num_split=0, dot_scale=attention.dot_scale, kernel=attention.kernel)
            return ViT(num_classes, **sizes, attention=attention if name == "vit_gra" else plain)
        if name in CNNS:
            return _fitting(_cnn(name, num_classes, in_channels, stem), name, image_size, in_channels, CNN_SIZE)
        return _timm(name, num_classes, image_size, in_channels, vit.mass_pos, attention)
    except ValueError as error:
        raise UserError(f"model {name}: {error}") from error


def _cnn(name: str, num_classes: int, in_channels: int, stem: str) -> nn.Module:
    if stem not in STEMS:
        raise ValueError(f"unknown stem {stem!r}: choose one of {', '.join(STEMS)}")
    from torchvision import models

    build: Callable[..., nn.Module] = getattr(models, {"efficientnetb2": "efficientnet_b2"}.get(name, name))
    model = build(num_classes=num_classes)
    if in_channels != 3 or (stem == "cifar" and name != "vgg19"):
        _replace_first_convolution(model, in_channels, small=stem == "cifar" and name != "vgg19")
    if stem == "cifar":
        _drop_early_pooling(model, name, num_classes)
    return model


def _replace_first_convolution(model: nn.Module, in_channels: int, small: bool) -> None:
    """Another number of input channels and, if ``small``, a 3 x 3 kernel with stride 1."""
    path, old = next((path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Conv2d))
    kernel, stride, padding = (3, 1, 1) if small else (old.kernel_size, old.stride, old.padding)
    new = nn.Conv2d(in_channels, old.out_channels, kernel, stride, padding, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _drop_early_pooling(model: nn.Module, name: str, num_classes: int) -> None:
    if name == "resnet18":
        model.maxpool = nn.Identity()
    elif name == "densenet121":
        model.features.pool0 = nn.Identity()
    elif name == "vgg19":
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, num_classes)


def _timm(
    name: str, num_classes: int, image_size: int, in_channels: int, mass_pos: str, attention: AttentionSettings
) -> nn.Module:
    import timm

    base = name.removesuffix(GRAVITY_SUFFIX)
    known = name if timm.is_model(name) else base if timm.is_model(base) else None
    if known is None:
        near = suggest(base, [*MODELS, *timm.list_models()])
        raise UserError(f"unknown model {name!r}: choose one of {', '.join(MODELS)} or a timm model{near}")
    model = _create(known, num_classes, image_size, in_channels)
    return (
        model
        if known == name
        else replace_attention(model, attention, mass_pos=mass_pos, input_size=(in_channels, image_size, image_size))
    )


def _create(name: str, num_classes: int, image_size: int, in_channels: int) -> nn.Module:
    """timm's model; those with a grid of patches are told the image size, the others may take any."""
    import timm

    options = {"pretrained": False, "num_classes": num_classes, "in_chans": in_channels}
    try:
        model = timm.create_model(name, img_size=image_size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        model = timm.create_model(name, **options)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    side = max(patch) if isinstance(patch, tuple) else patch
    if image_size % side:
        raise ValueError(f"found images of side {image_size} and patches of {side} pixels, wanted a multiple")
    return _fitting(model, name, image_size, in_channels, model.pretrained_cfg["input_size"][-1])


def _fitting(model: nn.Module, name: str, image_size: int, in_channels: int, usual: int) -> nn.Module:
    """The model; UserError where images of this size do not pass."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, in_channels, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise UserError(
            f"model {name} takes no images of side {image_size} ({why}): give --image-size {usual}"
        ) from error
    return model.train()
