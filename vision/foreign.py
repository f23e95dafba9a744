"""Weights of ViT-CIFAR, and of the published gravity version, under this program's names.

Sources: omihub777/ViT-CIFAR, commit ab9043ea; MLAI-Yonsei/GFML, gfml-vis 918c2359 (names and shapes).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from gfml.base.errors import UserError
from gfml.program.foreign import Source, matching, renamed, require

State = dict[str, Tensor]
NAMES = {
    r"cls_token": "class_token",
    r"pos_emb": "position",
    r"emb\.(weight|bias)": r"embed.\1",
    r"enc\.(\d+)\.la([12])\.(weight|bias)": r"blocks.\1.norm\2.\3",
    r"enc\.(\d+)\.msa\.([qkv])\.(weight|bias)": r"blocks.\1.attention.\2.\3",
    r"enc\.(\d+)\.msa\.o\.(weight|bias)": r"blocks.\1.attention.proj.\2",
    r"enc\.(\d+)\.msa\.mass_k\.weight": r"blocks.\1.attention.mass.key",
    r"enc\.(\d+)\.msa\.mass_q\.weight": r"blocks.\1.attention.mass.query",
    r"enc\.(\d+)\.mlp\.([03])\.(weight|bias)": r"blocks.\1.mlp.\2.\3",
    r"fc\.0\.(weight|bias)": r"head_norm.\1",
    r"fc\.1\.(weight|bias)": r"head.\1",
    r"mass_[qk]\.weight": "",  # the same tensors again as in the layers that use them
}


def vit_cifar(state: Mapping[str, Tensor]) -> State:
    """A vision transformer, from the state of its Lightning module: ``model.`` goes, q, k and v become one map.

    Gravity masses of token positions [T, 1] become a row [1, T]; the query's, which cancel in the softmax, are left out.
    """
    own = {name.removeprefix("model."): value for name, value in state.items() if not name.startswith("criterion.")}
    found = renamed(own, NAMES)
    require(own, "pos_emb", "emb.weight", "enc.0.mlp.0.bias")
    joined: State = {}
    for name, value in found.items():
        match = re.fullmatch(r"(blocks\.\d+\.attention\.)([qkv])\.(weight|bias)", name)
        if match and match[2] == "q":
            parts = [found.get(f"{match[1]}{part}.{match[3]}") for part in "qkv"]
            if any(part is None for part in parts):
                raise UserError(f"the file has {name} without its key or value map: give a whole vision transformer")
            joined[f"{match[1]}qkv.{match[3]}"] = torch.cat(parts)
        elif name.endswith(".mass.key"):
            joined[name] = value.reshape(1, -1)
        elif not match and not name.endswith(".mass.query"):
            joined[name] = value
    return joined


def flags(state: Mapping[str, Tensor], _: str) -> list[str]:
    """Sizes from the shapes, and the layers that have masses.

    The original divides logits by the root of the full width. Its masses never reach its logits and its split heads are in
    another order, so a file with masses is judged so unless the flags say otherwise.
    """
    ours = vit_cifar(state)
    tokens, width = ours["position"].shape[1:]
    layers = 1 + max(int(name.split(".")[1]) for name in ours if name.startswith("blocks."))
    massed = sorted(int(name.split(".")[1]) for name in ours if name.endswith(".mass.key"))
    with_token = "class_token" in ours
    patch, side = math.isqrt(tokens - with_token), math.isqrt(ours["embed.weight"].shape[1] // 3)
    found = [f"--patch={patch}", f"--image-size={patch * side}", f"--hidden={width}", f"--num-layers={layers}",
             f"--mlp-hidden={len(ours['blocks.0.mlp.0.bias'])}", f"--model-name={'vit_gra' if massed else 'vit'}",
             "--dot-scale=sqrt_hidden"]  # fmt: skip
    if massed:
        shared = any(name.removeprefix("model.").startswith("mass_k.") for name in state)
        place = {(0,): "head", (layers - 1,): "tail"}.get(tuple(massed), "full_fix" if shared else "full")
        found += [f"--mass-pos={place}", "--mass-from=none", "--head-order=original"]
    return found if with_token else [*found, "--off-cls-token"]


SOURCES = {
    "vit-cifar": Source(
        vit_cifar,
        program=lambda _: "vision.main",
        flags=flags,
        assumed=("head",),
        unread=matching(r"(.+\.)?mass_q\.weight|model\.mass_k\.weight|criterion\..+"),
    )
}
