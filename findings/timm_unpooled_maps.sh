#!/usr/bin/env bash
# timm 1.0.31 (torch 2.15.0): the maps of global_pool="" averaged by hand are not the features that the same network pools itself.
#
# Behaviour: create_model(name, num_classes=0) ends in the network's head without classifier, and with global_pool="" only the
# pooling of that head is left out: whatever stands behind the pooling now works at every place of the map. ConvNeXt has a
# LayerNorm there, MobileNetV3 a convolution with hard-swish. Same weights, same pictures: the average over places of ConvNeXt's
# maps is far from its own pooled features, that of MobileNetV3's is near and not equal; ResNet and EfficientNet agree.
# Neither are they forward_features' maps: MobileNetV3's have 1024 channels, num_features and forward_features have 288.
# Good guess: num_classes=0, global_pool="" gives the last maps, as the documentation's example with ResNet shows; averaged they are
# what num_classes=0 gives, and both are num_features wide.
# Who is hurt: image retrieval and transfer with a pooling of one's own (average, maximum, GeM) over pretrained maps, compared with
# the published pooled features; nothing is raised.
# Output seen (shape of the maps, num_features, whether the average is the pooled row): see the assertion.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check timm==1.0.31 torch==2.15.0 torchvision
"$folder/env/bin/python" - <<'PYTHON'
import timm
import torch

torch.manual_seed(0)
pictures = torch.randn(2, 3, 96, 96)
found = {}
for name in ("test_resnet", "test_efficientnet", "mobilenetv3_small_050", "test_convnext"):
    pooled = timm.create_model(name, num_classes=0).eval()
    unpooled = timm.create_model(name, num_classes=0, global_pool="").eval()
    unpooled.load_state_dict(pooled.state_dict())  # every key matches
    with torch.no_grad():
        rows, maps = pooled(pictures), unpooled(pictures)
    apart = float((maps.mean((2, 3)) - rows).norm() / rows.norm())
    found[name] = (maps.shape[1], pooled.num_features, "equal" if apart < 1e-5 else "near" if apart < 0.1 else "far")
print(found)
assert found == {
    "test_resnet": (96, 96, "equal"),
    "test_efficientnet": (256, 256, "equal"),
    "mobilenetv3_small_050": (1024, 288, "near"),
    "test_convnext": (64, 64, "far"),
}
PYTHON
