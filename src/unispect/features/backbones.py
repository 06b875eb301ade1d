"""Frozen timm networks, cut off after the last layer that is used."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import timm
import torch
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.resnet import ResNet
from torch import Tensor, nn

from unispect.errors import ConfigError, unknown_name
from unispect.features.weights import empty_network, load_backbone_weights

PADDINGS = ("zeros", "reflect")
Staged = EfficientNet | MobileNetV3  # a stem and `blocks`, stages of blocks


class Backbone(nn.Module):
    """Pixels to the outputs of some layers; the normalisation that the weights were trained with is part of it.

    layers   timm's out_index numbers, names of timm's feature modules ("layer2"), or, of an EfficientNet or MobileNetV3,
             any stage ("blocks.4"), block ("blocks.4.1") or layer inside a block ("blocks.4.1.conv_pwl": the projection
             before its normalisation); a number and the name it stands for are the same layer
    padding  "zeros" as the weights were trained, or "reflect" in every padded convolution of a ResNet, as in the encoders
             of CFLOW-AD
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, layers: Sequence[str | int], weights: str = "auto", padding: str = "zeros") -> None:
        super().__init__()
        state, self.source = load_backbone_weights(name, weights)
        network = empty_network(name)
        config: dict[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
        self.layers = _resolved(layers, network, name)
        self.trunk = _trunk(network, self.layers, state)
        self.padding = padding
        _pad(self.trunk, padding, name, isinstance(network, ResNet))
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1))
        self.requires_grad_(False)
        super().train(False)
        self.channels, self.strides = self.trunk.channels, self.trunk.strides

    @property
    def sha256(self) -> str:
        """Of the weights, the layers that were cut off included."""
        return self.source.sha256

    def train(self, mode: bool = True) -> Backbone:
        """Stays frozen: batch statistics never enter."""
        return super().train(False)

    def normalise(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> float32, as the weights expect it."""
        return self.standardise(images.float() / 255)

    def standardise(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> as the weights expect it."""
        return (images - self.mean) / self.std

    def levels(self, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """Normalised images (N, 3, H, W) -> the wanted layers by name, each (N, C, h, w)."""
        levels: dict[str, Tensor] = self.trunk(x, wanted)
        return levels

    def forward(self, images: Tensor) -> list[Tensor]:
        levels = self.levels(self.normalise(images), self.layers)
        return [levels[layer] for layer in self.layers]


class _EfficientNetTrunk(nn.Module):
    """Stem and stages of an EfficientNet. timm's own feature extractor keeps and runs the unused last stages."""

    def __init__(self, network: Staged, layers: Sequence[str], state: dict[str, Tensor]) -> None:
        super().__init__()
        network.load_state_dict(state)
        self.stem = nn.Sequential(network.conv_stem, network.bn1)
        self.blocks = network.blocks[: 1 + max(map(_stage, layers))]
        self.channels, self.strides = _measured(self.eval(), layers)

    def forward(self, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        x = self.stem(x)
        levels: dict[str, Tensor] = {}
        for stage in range(1 + max(map(_stage, wanted))):
            inside = [layer for layer in wanted if layer.startswith(f"blocks.{stage}.")]
            name, blocks = f"blocks.{stage}", self.blocks[stage]
            levels |= _looked_into(blocks, name, inside, x) if inside else {name: blocks(x)}
            x = levels[name]
        return {layer: levels[layer] for layer in wanted}


def _looked_into(stage: nn.Module, name: str, inside: Sequence[str], x: Tensor) -> dict[str, Tensor]:
    """What a stage gives, what its blocks give, and what is wanted from inside them."""
    levels: dict[str, Tensor] = {}
    for number, block in stage.named_children():
        path = f"{name}.{number}"
        levels |= {layer: _begun(block, layer, x) for layer in inside if layer.startswith(f"{path}.")}
        levels[path] = x = block(x)
    return levels | {name: x}


def _begun(block: nn.Module, layer: str, x: Tensor) -> Tensor:
    """A block up to one of its layers, which run in the order in which they stand."""
    for name, module in block.named_children():
        x = module(x)
        if layer.endswith(f".{name}"):
            break
    return x


class _TimmTrunk(nn.Module):
    """Any other network through timm's feature extraction, which cuts it off itself."""

    def __init__(self, network: nn.Module, layers: Sequence[str], state: dict[str, Tensor]) -> None:
        super().__init__()
        info: list[dict[str, Any]] = network.feature_info  # type: ignore[assignment]
        places = {entry["module"]: place for place, entry in enumerate(info)}
        self.names = sorted(set(layers), key=places.__getitem__)
        config: dict[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
        self.network = timm.create_model(
            f"{config['architecture']}",
            features_only=True,
            out_indices=[places[layer] for layer in self.names],
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": state},
        )
        self.channels = tuple(info[places[layer]]["num_chs"] for layer in layers)
        self.strides = tuple(info[places[layer]]["reduction"] for layer in layers)

    def forward(self, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        levels = dict(zip(self.names, self.network(x), strict=True))
        return {layer: levels[layer] for layer in wanted}


def _trunk(network: nn.Module, layers: Sequence[str], state: dict[str, Tensor]) -> _EfficientNetTrunk | _TimmTrunk:
    if isinstance(network, Staged) and all(layer.startswith("blocks.") for layer in layers):
        return _EfficientNetTrunk(network, layers, state)
    return _TimmTrunk(network, layers, state)


def _pad(trunk: nn.Module, padding: str, name: str, residual: bool) -> None:
    """The padding of the convolutions. That of pooling stays."""
    if padding not in PADDINGS:
        raise ConfigError(unknown_name("padding", padding, PADDINGS))
    if padding == "zeros":
        return
    if not residual:
        raise ConfigError(
            f"padding={padding!r} of backbone {name!r}: expected 'zeros', only ResNets can be padded otherwise"
        )
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d) and any(module.padding):
            module.padding_mode = "reflect"


def _stage(layer: str) -> int:
    return int(layer.split(".")[1])


def _measured(trunk: _EfficientNetTrunk, layers: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channels and strides of the layers; timm lists them for five of the stages only."""
    side = 64
    with torch.inference_mode():
        levels = trunk(torch.zeros(1, 3, side, side), layers)
    channels = tuple(levels[layer].shape[1] for layer in layers)
    return channels, tuple(side // levels[layer].shape[2] for layer in layers)


def _resolved(layers: Sequence[str | int], network: nn.Module, name: str) -> tuple[str, ...]:
    """Names of the layers, in the order asked."""
    listed, known = _listed(network), _stages(network)
    inside = _inside(network)
    if not layers:
        raise ConfigError(f"layers=[] of backbone {name!r}: expected one or more of {', '.join(known)}")
    return tuple(_layer_name(str(layer), listed, known, inside, name) for layer in layers)


def _listed(network: nn.Module) -> list[str]:
    """The layers that timm numbers."""
    info: list[dict[str, Any]] = getattr(network, "feature_info", [])
    return [entry["module"] for entry in info]


def _stages(network: nn.Module) -> list[str]:
    """The layers that a network is cut into."""
    if isinstance(network, Staged):
        return [f"blocks.{stage}" for stage in range(len(network.blocks))]
    return _listed(network)


def _inside(network: nn.Module) -> set[str]:
    """Blocks of the stages and what they are made of."""
    if not isinstance(network, Staged):
        return set()
    depths = {name: name.count(".") for name, _ in network.named_modules() if name.startswith("blocks.")}
    return {name for name, depth in depths.items() if depth in (2, 3)}


def _layer_name(layer: str, listed: list[str], known: list[str], inside: Collection[str], name: str) -> str:
    if layer.isdecimal() and int(layer) < len(listed):
        return listed[int(layer)]
    if layer not in known and layer not in inside:
        choices = [*known, *map(str, range(len(listed)))]
        raise ConfigError(unknown_name(f"layer of backbone {name!r}:", layer, choices))
    return layer
