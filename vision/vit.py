"""Vision transformer for small images (the ViT-CIFAR base) with gravity attention in chosen layers.

Differences from the usual ViT, kept because the published numbers belong to them: a second GELU after the second
linear map of the MLP, an MLP as wide as the tokens, dot logits divided by the root of the full width, class token and
position table drawn from N(0, 1), no norm between the last block and the head's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gfml.attention import PLAIN, AttentionSettings, GravityAttention, gravity_layers, shared_mass


@dataclass(frozen=True)
class ViTSettings:
    """patch: patches per side. cls_token False: the head reads the mean token. mass_pos: which layers have gravity."""

    patch: int = 8
    hidden: int = 384
    mlp_hidden: int = 384
    num_layers: int = 7
    num_heads: int = 12
    dropout: float = 0.0
    cls_token: bool = True
    mass_pos: str = "full"


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, attention: GravityAttention, mlp_hidden: int, dropout: float) -> None:
        super().__init__()
        width = attention.width
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), attention, nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_hidden), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(mlp_hidden, width), nn.GELU(), nn.Dropout(dropout),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches, a linear embedding, pre-norm blocks, and a linear head on the class token (or the mean token).

    attention: settings of the layers that ``settings.mass_pos`` selects; None is plain dot attention everywhere.
    Shape: images [B, C, S, S] -> logits [B, num_classes]. S must be a multiple of ``settings.patch``.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        image_size: int = 32,
        in_channels: int = 3,
        settings: ViTSettings = ViTSettings(),
        attention: AttentionSettings | None = None,
    ) -> None:
        super().__init__()
        if settings.patch < 1 or image_size % settings.patch:
            raise ValueError(
                f"found images of side {image_size} and {settings.patch} patches per side, wanted a side they divide"
            )
        self.settings, self.image_size, self.in_channels = settings, image_size, in_channels
        self.patch_size = image_size // settings.patch
        width = settings.hidden
        num_tokens = settings.patch**2 + settings.cls_token
        self.embed = nn.Linear(in_channels * self.patch_size**2, width)
        self.class_token = nn.Parameter(torch.randn(1, 1, width)) if settings.cls_token else None
        self.position = nn.Parameter(torch.randn(1, num_tokens, width))
        self.blocks = nn.Sequential(*self._blocks(num_tokens, attention))
        self.head_norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def _blocks(self, num_tokens: int, attention: AttentionSettings | None) -> list[Block]:
        s = self.settings
        chosen = gravity_layers(s.mass_pos, s.num_layers) if attention else range(0)
        mass = shared_mass(attention, s.mass_pos, s.num_heads, num_tokens) if attention else None
        plain = PLAIN if attention is None else AttentionSettings(
            mix="split", num_split=0, dot_scale=attention.dot_scale, kernel=attention.kernel
        )  # fmt: skip
        blocks = []
        for index in range(s.num_layers):
            own = (attention, mass) if index in chosen else (plain, None)
            layer = GravityAttention(s.hidden, s.num_heads, num_tokens, own[0], dropout=s.dropout, mass=own[1])
            blocks.append(Block(layer, s.mlp_hidden, s.dropout))
        return blocks

    def patches(self, images: Tensor) -> Tensor:
        """Patch vectors [B, P*P, s*s*C]: patches row by row, within one row, column, channel (fastest)."""
        if images.shape[1:] != (self.in_channels, self.image_size, self.image_size):
            wanted = (self.in_channels, self.image_size, self.image_size)
            raise ValueError(f"found images of shape {tuple(images.shape[1:])}, wanted {wanted}")
        grid = (self.settings.patch, self.patch_size)
        return images.unflatten(3, grid).unflatten(2, grid).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def features(self, images: Tensor) -> Tensor:
        """Tokens after the last block, [B, n, width]; the class token is token 0."""
        x = self.embed(self.patches(images))
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        return self.blocks(x + self.position)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.features(images)
        return self.head(self.head_norm(tokens.mean(1) if self.class_token is None else tokens[:, 0]))
