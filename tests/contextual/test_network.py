"""Pooling, heads, frozen statistics, and what cannot be built named in one line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from contextual.network import EmbeddingNet, GeM, GlobalPool, Projector, SmallNet, batch_norms, build_backbone
from gfml.base.errors import UserError


def small(batch_norm: str = "train", **options: object) -> EmbeddingNet:
    torch.manual_seed(0)
    backbone, channels = build_backbone("small", pretrained=False, image_size=32, width=8)
    return EmbeddingNet(backbone, channels, 16, **({"pooling": "avg"} | options), batch_norm=batch_norm)


@pytest.fixture
def pictures() -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_pooling_by_hand() -> None:
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 0.0]]]])
    assert GlobalPool("max")(maps).tolist() == [[3.0]]
    assert GlobalPool("avg")(maps).tolist() == [[1.5]]
    assert GlobalPool("maxavg")(maps).tolist() == [[4.5]]
    assert GeM(3.0)(maps).item() == pytest.approx((36 / 4) ** (1 / 3))
    assert GeM(1.0)(maps).item() == pytest.approx(1.5)


def test_gem_survives_negative_features_and_half_precision() -> None:
    maps = torch.full((1, 1, 2, 2), -1.0, requires_grad=True)
    GeM()(maps).sum().backward()
    assert torch.isfinite(maps.grad).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert GeM()(torch.full((1, 1, 2, 2), 100.0, dtype=torch.bfloat16)).item() == pytest.approx(100.0)


@pytest.mark.parametrize(("pooling", "layer_norm"), [("avg", False), ("max", True), ("gem", False), ("maxavg", True)])
def test_embeddings_are_unit_vectors_also_under_autocast(pooling: str, layer_norm: bool, pictures: Tensor) -> None:
    net = small(pooling=pooling, layer_norm=layer_norm, kaiming=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = net(pictures)
    assert found.dtype == torch.float32 and found.shape == (6, 16)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(Projector(16, 40)(found).norm(dim=1), torch.ones(6))


def test_layer_norm_has_no_parameters() -> None:
    assert not list(small(layer_norm=True).norm.parameters())


@pytest.mark.parametrize(
    ("batch_norm", "statistics_move", "affine_moves"),
    [("train", True, True), ("stats", False, True), ("frozen", False, False)],
)
def test_what_batch_norm_does_in_training(
    batch_norm: str, statistics_move: bool, affine_moves: bool, pictures: Tensor
) -> None:
    net = small(batch_norm).train()
    layer = next(batch_norms(net))
    before = {"mean": layer.running_mean.clone(), "weight": layer.weight.detach().clone()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        net(pictures)[:, 0].sum().backward()
        optimizer.step()
    assert (not torch.equal(layer.running_mean, before["mean"])) == statistics_move
    assert (not torch.equal(layer.weight, before["weight"])) == affine_moves


def test_frozen_layers_stay_in_eval_mode_through_evaluations() -> None:
    net = small("stats")
    net.eval()
    net.train()
    assert net.training and not any(layer.training for layer in batch_norms(net))


@pytest.mark.parametrize(("size", "side"), [(32, 4), (48, 6), (64, 4), (96, 6)])
def test_small_network_takes_32_to_96_pixels(size: int, side: int) -> None:
    maps = SmallNet(size, 8)(torch.zeros(1, 3, size, size))
    assert maps.shape == (1, 32, side, side)


def test_timm_backbones_give_maps() -> None:
    net, channels = build_backbone("resnet18", pretrained=False, image_size=64)
    assert channels == 512 and net(torch.zeros(1, 3, 64, 64)).shape == (1, 512, 2, 2)
    net, channels = build_backbone("resnet18", pretrained=False, image_size=64, own_pooling=True)
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 512)
    # Its num_features, 288, is the width before the layer that stands behind its pooling.
    for own, shape in ((False, (1, 1024, 2, 2)), (True, (1, 1024))):
        net, channels = build_backbone("mobilenetv3_small_050", pretrained=False, image_size=64, own_pooling=own)
        assert channels == 1024 and net(torch.zeros(1, 3, 64, 64)).shape == shape


def test_networks_without_maps_ask_for_their_own_pooling() -> None:
    name = "vit_tiny_patch16_224"
    with pytest.raises(UserError, match="give --pooling backbone"):
        build_backbone(name, pretrained=False, image_size=224)
    net, channels = build_backbone(name, pretrained=False, image_size=224, own_pooling=True)
    assert isinstance(net, nn.Module) and channels == 192


def test_what_cannot_be_built_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="unknown backbone 'resnet5O'.*did you mean 'resnet50'"):
        build_backbone("resnet5O", pretrained=False, image_size=64)
    with pytest.raises(UserError, match="small has no pretrained weights"):
        build_backbone("small", pretrained=True, image_size=64)
    with pytest.raises(UserError, match="does not take pictures of 100 pixels"):
        build_backbone("vit_tiny_patch16_224", pretrained=False, image_size=100, own_pooling=True)

    def offline(*args: object, **options: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("gfml.program.weights._place", lambda name: None)
    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(
        UserError, match="cannot get the pretrained weights of resnet50.tv_in1k .ConnectionError.*--pretrained 0"
    ):
        build_backbone("resnet50", pretrained=True, image_size=224)
