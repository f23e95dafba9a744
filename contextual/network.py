"""The embedding network: backbone, pooling, head; a projector that only training sees; frozen batch statistics.

Backbones are timm's, by any of its names; ``small`` is a residual network of three stages for pictures of 32 to 96
pixels, made to be trained from scratch on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gfml.base.errors import UserError, suggest

Pooling = Literal["max", "avg", "maxavg", "gem", "backbone"]
BatchNorm = Literal["train", "stats", "frozen"]
SMALL = "small"
# The weights both published programs start from; timm's own default for resnet50 is another recipe's.
PLAIN_NAMES = {"resnet50": "resnet50.tv_in1k"}


class GeM(nn.Module):
    """Generalised mean over positions, (mean x^p)^(1/p), x clamped to at least eps. [B, C, H, W] -> [B, C].

    Radenovic, Tolias, Chum, Fine-tuning CNN Image Retrieval with No Human Annotation, TPAMI 2019; p is fixed here.
    """

    def __init__(self, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.p, self.eps = p, eps

    def forward(self, maps: Tensor) -> Tensor:
        # In full precision: a cube of half-precision features overflows at 40.
        with torch.autocast(maps.device.type, enabled=False):
            return maps.float().clamp(min=self.eps).pow(self.p).mean(dim=(-2, -1)).pow(1 / self.p)


class GlobalPool(nn.Module):
    """Maximum, mean, or the sum of both over positions. [B, C, H, W] -> [B, C]."""

    def __init__(self, kind: Literal["max", "avg", "maxavg"]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, maps: Tensor) -> Tensor:
        largest = maps.amax(dim=(-2, -1)) if self.kind != "avg" else 0.0
        mean = maps.mean(dim=(-2, -1)) if self.kind != "max" else 0.0
        return largest + mean


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        same = stride == 1 and inputs == outputs
        self.short = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.short(x))


class SmallNet(nn.Sequential):
    """Stem and three residual blocks of ``width``, 2 and 4 times ``width`` channels; strides stem, 1, 2, 2.

    Shape: [B, 3, H, W] -> [B, 4 * width, H / (4 stem), W / (4 stem)]; stem is 2 up to 48 pixels, 4 above.
    """

    def __init__(self, image_size: int, width: int = 32) -> None:
        stride = 2 if image_size <= 48 else 4
        stem = nn.Sequential(
            nn.Conv2d(3, width, 2 * stride - 1, stride, stride - 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        stages = [_Residual(width, width, 1), _Residual(width, 2 * width, 2), _Residual(2 * width, 4 * width, 2)]
        super().__init__(stem, *stages)
        self.num_features = 4 * width


class EmbeddingNet(nn.Module):
    """Images to unit vectors: backbone, pooling, optional LayerNorm without parameters, Linear, L2 norm.

    Shape: [B, 3, H, W] -> [B, D] float32, also under autocast. batch_norm: "train" ordinary; "stats" running
    statistics stay, scale and shift train (the 256 pipeline); "frozen" neither moves (the 224 pipeline).
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_features: int,
        dim: int,
        *,
        pooling: Pooling,
        layer_norm: bool = False,
        kaiming: bool = False,
        batch_norm: BatchNorm = "train",
    ) -> None:
        super().__init__()
        pools = {"gem": GeM, "backbone": nn.Identity}
        self.backbone, self.batch_norm = backbone, batch_norm
        self.pool = pools[pooling]() if pooling in pools else GlobalPool(pooling)
        self.norm = nn.LayerNorm(num_features, elementwise_affine=False) if layer_norm else nn.Identity()
        self.head = nn.Linear(num_features, dim)
        if kaiming:
            nn.init.kaiming_normal_(self.head.weight, mode="fan_out")
            nn.init.zeros_(self.head.bias)
        if batch_norm == "frozen":
            for layer in batch_norms(backbone):
                layer.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        features = self.pool(self.backbone(images))
        return F.normalize(self.head(self.norm(features)).float(), dim=-1)

    def train(self, mode: bool = True) -> EmbeddingNet:
        """As usual, but batch statistics that are not to move stay in eval mode."""
        super().train(mode)
        if mode and self.batch_norm != "train":
            for layer in batch_norms(self.backbone):
                layer.eval()
        return self


class Projector(nn.Module):
    """The training-only layer behind the embedding: Linear without bias, L2 norm. [B, D] -> [B, E]."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, width, bias=False)

    def forward(self, embeddings: Tensor) -> Tensor:
        return F.normalize(self.linear(embeddings).float(), dim=-1)


def batch_norms(module: nn.Module) -> Iterator[nn.Module]:
    """Every layer with batch statistics."""
    return (layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm))


def build_backbone(
    name: str, *, pretrained: bool, image_size: int, own_pooling: bool = False, width: int = 32
) -> tuple[nn.Module, int]:
    """The backbone without classifier, and the number of its channels.

    own_pooling: the backbone ends with its own pooling ([B, C]), which networks without feature maps need.
    UserError: an unknown name, weights that cannot be had, or no feature maps to pool.
    """
    if name == SMALL:
        if pretrained:
            raise UserError(
                "--backbone small has no pretrained weights: give --pretrained 0, or a timm name such as resnet50"
            )
        return SmallNet(image_size, width), 4 * width
    return _timm_backbone(PLAIN_NAMES.get(name, name), pretrained, image_size, own_pooling)


def _timm_backbone(name: str, pretrained: bool, image_size: int, own_pooling: bool) -> tuple[nn.Module, int]:
    import timm

    from gfml.program.weights import packaged_network, packaged_place
    from gfml.program.weights import pretrained as with_weights

    if name.startswith("packaged:"):
        packaged_place(name)
    elif not timm.is_model(name):
        near = suggest(name, timm.list_models())
        raise UserError(f"unknown backbone {name!r}: give small or a model name of timm such as resnet50{near}")
    pooled = {} if own_pooling else {"global_pool": ""}
    if pretrained:
        advice = "connect to the network once, put them in the cache of huggingface_hub, or train from scratch with --pretrained 0"
        model = with_weights(name, advice, num_classes=0, **pooled)
    elif name.startswith("packaged:"):
        model = packaged_network(name, load=False, **pooled)
    else:
        model = timm.create_model(name, pretrained=False, num_classes=0, **pooled)
    return model, _width(model, name, image_size, own_pooling)


@torch.no_grad()
def _width(model: nn.Module, name: str, image_size: int, own_pooling: bool) -> int:
    """The number of channels that come out; UserError where no maps do."""
    training = model.training
    try:
        shape = tuple(model.eval()(torch.zeros(1, 3, image_size, image_size)).shape)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"{name} does not take pictures of {image_size} pixels ({str(error).splitlines()[0]}): mend --image-size"
        ) from error
    finally:
        model.train(training)
    wanted = 2 if own_pooling else 4
    # timm 1.0: num_features is the width before a head with a convolution or hidden layer of its own, as MobileNetV3's.
    widths = (model.num_features, getattr(model, "head_hidden_size", None))
    if len(shape) != wanted or shape[1] not in widths:
        kind = "[B, C]" if own_pooling else "maps [B, C, H, W]"
        raise UserError(
            f"{name} gives features of shape {shape}, wanted {kind}: give --pooling backbone, or another --backbone"
        )
    return shape[1]
