"""Learn and export anomalib's models, in anomalib's own environment: `benchmarks/peers.py` starts it.

All three take their features from blocks.3 and blocks.4 of EfficientNet-Lite0 with the weights that unispect uses, and are
learnt and exported by anomalib's own engine. What was needed for that:

- anomalib traces a network that it is given with torch.fx, which cannot follow padding that depends on the size of the
  image. At a fixed even size that padding is a constant, and is put in as one: the function stays the same.
- Its FastFlow builds two ResNets and two transformers only. It is built with one of them, whose parts are then replaced by
  those of Lite0, made by anomalib's own function for them.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path

import timm
import torch
from anomalib.data import Folder
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from anomalib.models import Fastflow, Padim, Patchcore
from anomalib.models.components import AnomalibModule
from anomalib.models.image.fastflow.torch_model import create_fast_flow_block
from anomalib.pre_processing import PreProcessor
from safetensors.torch import load_file
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, Normalize, Resize

SIDE, STRIDE = 256, 16
LAYERS = ("blocks.3", "blocks.4")
METHODS = ("patchcore", "padim", "fastflow")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with weights.safetensors and images below data/, see peers.py")
    given = parser.parse_args()
    logging.getLogger("anomalib").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    for method in METHODS:
        if not (given.folder / method / "about.json").is_file():
            learn(method, given.folder)


def learn(method: str, folder: Path) -> None:
    """One model, exported to METHOD/weights/openvino, with what is to be told of it beside."""
    torch.manual_seed(0)
    target = folder / method
    model = built(method, backbone(folder / "weights.safetensors"))
    images = Folder(
        name="good",
        root=folder / "data",
        normal_dir="learn",
        normal_test_dir="good",
        abnormal_dir="bad",
        val_split_mode="same_as_test",
        num_workers=0,
    )
    engine = Engine(default_root_dir=target / "run", accelerator="cpu", devices=1, max_epochs=1, logger=False)
    engine.fit(model, datamodule=images)
    engine.export(model, ExportType.OPENVINO, export_root=target, input_size=(SIDE, SIDE))
    vectors = len(model.model.memory_bank) if method == "patchcore" else None
    (target / "about.json").write_text(json.dumps({"vectors": vectors}), "utf-8")


def built(method: str, network: nn.Module) -> AnomalibModule:
    """A model of anomalib on a network."""
    about = network.pretrained_cfg
    scaling = Compose([Resize((SIDE, SIDE), antialias=True), Normalize(about["mean"], about["std"])])
    common = {
        "pre_trained": False,
        "pre_processor": PreProcessor(transform=scaling),
        "visualizer": False,
        "evaluator": False,
    }
    if method == "patchcore":
        return Patchcore(backbone=network, layers=LAYERS, coreset_sampling_ratio=0.1, num_neighbors=9, **common)
    if method == "padim":
        return Padim(backbone=network, layers=list(LAYERS), n_features=100, **common)
    return on_lite(Fastflow(backbone="resnet18", flow_steps=8, **common), network)


def on_lite(model: Fastflow, network: nn.Module) -> Fastflow:
    """The same FastFlow, on Lite0 in place of a ResNet."""
    trunk, side = Levels(network), SIDE // STRIDE
    shapes = [(level.shape[1], side, side) for level in trunk(torch.zeros(1, 3, SIDE, SIDE))]
    model.model.feature_extractor = trunk.requires_grad_(False)
    model.model.norms = nn.ModuleList(nn.LayerNorm(shape) for shape in shapes)
    model.model.fast_flow_blocks = nn.ModuleList(
        create_fast_flow_block(shape, conv3x3_only=False, hidden_ratio=1.0, flow_steps=8) for shape in shapes
    )
    return model


class Levels(nn.Module):
    """The layers of a network as a list, cut off after the last."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.stem, self.first, self.last = (
            nn.Sequential(network.conv_stem, network.bn1),
            network.blocks[:4],
            network.blocks[4],
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> 2 levels (N, C, h, w)."""
        third = self.first(self.stem(images))
        return [third, self.last(third)]


def backbone(weights: Path) -> nn.Module:
    """EfficientNet-Lite0 with constant padding."""
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
    network.load_state_dict(load_file(weights), strict=True)
    for path, layer in list(network.named_modules()):
        if isinstance(layer, Conv2dSame):
            network.set_submodule(path, padded(layer))
    return network.eval()


def padded(layer: Conv2dSame) -> nn.Module:
    """The same convolution for sides that its stride divides."""
    more = layer.kernel_size[0] - layer.stride[0]
    first, second = more // 2, more - more // 2
    size = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride
    plain = nn.Conv2d(*size, groups=layer.groups, bias=layer.bias is not None)
    plain.load_state_dict(layer.state_dict())
    return nn.Sequential(nn.ZeroPad2d((first, second, first, second)), plain)


if __name__ == "__main__":
    main()
