import hashlib
import json

import pytest
import timm
import torch

from unispect.errors import ConfigError
from unispect.features.backbones import Backbone
from unispect.features.pyramid import PyramidExtractor
from unispect.features.weights import load_backbone_weights

LITE = "tf_efficientnet_lite0"


def _images(seed: int = 0, side: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (2, 3, side, side), generator=generator, dtype=torch.uint8)


def _features_only(name: str, indices: tuple[int, ...], weights: str) -> torch.nn.Module:
    """timm's own feature extraction of the same weights, loaded by name."""
    state, _ = load_backbone_weights(name, weights)
    network = timm.create_model(name, features_only=True, out_indices=indices, pretrained=False).eval()
    wanted = network.state_dict()
    network.load_state_dict({key: value for key, value in state.items() if key in wanted})
    return network


@pytest.mark.parametrize(
    ("name", "indices", "weights", "pixel_mean", "pixel_std"),
    [
        (LITE, (0, 1, 2, 3, 4), "auto", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        (LITE, (1, 3), "auto", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("resnet18", (1, 2), "random", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_equals_features_only_of_timm_to_the_bit(
    name: str, indices: tuple[int, ...], weights: str, pixel_mean: tuple[float, ...], pixel_std: tuple[float, ...]
) -> None:
    images = _images()
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (pixel_mean, pixel_std))
    backbone = Backbone(name, indices, weights)
    reference = _features_only(name, indices, weights)
    with torch.inference_mode():
        expected = reference((images.float() / 255 - mean) / std)
        levels = backbone(images)
    assert all(torch.equal(level, other) for level, other in zip(levels, expected, strict=True))
    assert backbone.channels == tuple(reference.feature_info.channels())
    assert backbone.strides == tuple(reference.feature_info.reduction())


def test_what_comes_after_the_last_used_layer_is_gone() -> None:
    whole = Backbone(LITE, ["blocks.6"])
    cut = Backbone(LITE, ["blocks.2"])
    assert len(cut.trunk.blocks) == 3
    assert len(whole.trunk.blocks) == 7
    children = dict(Backbone("resnet18", [1, 2], "random").trunk.network.named_children())
    assert "layer2" in children
    assert not {"layer3", "layer4", "fc"} & set(children)


def test_every_stage_of_an_efficientnet_is_a_layer_in_any_order() -> None:
    images = _images()
    names = [f"blocks.{stage}" for stage in (5, 0, 3, 6)]
    backbone = Backbone(LITE, names)
    x = backbone.normalise(images)
    network = timm.create_model(LITE, num_classes=0).eval()
    network.load_state_dict(load_backbone_weights(LITE)[0])
    outputs = {}
    for name in names:
        network.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
    with torch.inference_mode():
        network(x)
        levels = backbone(images)
    assert all(torch.equal(level, outputs[name]) for level, name in zip(levels, names, strict=True))
    assert backbone.channels == (192, 16, 80, 320)
    assert backbone.strides == (32, 2, 16, 32)


def test_a_number_and_a_name_are_the_same_layer() -> None:
    assert Backbone(LITE, [3, "2"]).layers == Backbone(LITE, ["blocks.4", "blocks.2"]).layers
    assert Backbone("resnet18", [2, "layer1"], "random").layers == ("layer2", "layer1")


def test_order_of_layers_of_other_networks_is_the_order_asked() -> None:
    images = _images()
    forth, back = Backbone("resnet18", [1, 2], "random"), Backbone("resnet18", [2, 1], "random")
    assert back.channels == forth.channels[::-1] == (128, 64)
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(forth(images), back(images)[::-1], strict=True))


def test_stays_frozen_in_training() -> None:
    backbone = Backbone("resnet18", [1], "random").train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone(_images())
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("layers", "message"),
    [(["blocks.7"], "did you mean 'blocks"), ([5], "unknown layer of backbone .*'5'"), ([], "expected one or more of")],
)
def test_layers_that_are_not_there(layers: list[str | int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Backbone(LITE, layers)


TAPS = ["blocks.2.2.conv_pwl", "blocks.4.1.conv_pwl", "blocks.5.2.conv_pwl"]


def test_layers_inside_the_blocks_of_a_mobilenet() -> None:
    """The encoder of CFLOW-AD's MobileNetV3-L: the projections of torchvision's blocks 6, 12 and 15."""
    images, name = _images(side=96), "mobilenetv3_large_100"
    backbone = Backbone(name, [*TAPS, "blocks.4.1", "blocks.5"], "random")
    assert backbone.channels == (40, 112, 160, 112, 160)
    assert backbone.strides == (8, 16, 32, 16, 32)
    assert len(backbone.trunk.blocks) == 6
    network = timm.create_model(name, num_classes=0).eval()
    network.load_state_dict(load_backbone_weights(name, "random")[0])
    outputs = {}
    for layer in backbone.layers:
        network.get_submodule(layer).register_forward_hook(
            lambda _, __, out, name=layer: outputs.update({name: out.clone()})
        )
    with torch.inference_mode():
        network(backbone.normalise(images))
        levels = backbone(images)
    assert all(torch.equal(level, outputs[layer]) for level, layer in zip(levels, backbone.layers, strict=True))


def test_layers_inside_the_blocks_of_an_efficientnet() -> None:
    images = _images()
    backbone, whole = Backbone(LITE, ["blocks.2.1.conv_pwl", "blocks.4"]), Backbone(LITE, ["blocks.4"])
    with torch.inference_mode():
        assert torch.equal(backbone(images)[1], whole(images)[0])
    assert backbone.channels == (40, 112)
    with pytest.raises(ConfigError, match=r"unknown layer of backbone .*'blocks\.2\.9\.conv_pwl'"):
        Backbone(LITE, ["blocks.2.9.conv_pwl"])


def test_a_mobilenet_is_that_of_timm() -> None:
    images, name = _images(), "mobilenetv3_large_100"
    backbone, reference = Backbone(name, [0, 2, 3], "random"), _features_only(name, (0, 2, 3), "random")
    with torch.inference_mode():
        levels = backbone(images)
        expected = reference(backbone.normalise(images))
    assert all(torch.equal(level, other) for level, other in zip(levels, expected, strict=True))


def test_the_residual_encoders_of_cflow() -> None:
    backbone = Backbone("resnet18", ["layer2", "layer3", "layer4"], "random", "reflect")
    assert backbone.channels == (128, 256, 512)
    assert backbone.strides == (8, 16, 32)
    with torch.device("meta"):
        info = {entry["module"]: entry for entry in timm.create_model("wide_resnet50_2").feature_info}
    assert [info[layer]["num_chs"] for layer in backbone.layers] == [512, 1024, 2048]
    assert [info[layer]["reduction"] for layer in backbone.layers] == [8, 16, 32]


def test_reflect_padding_is_that_of_every_padded_convolution() -> None:
    """Against the network with unpadded convolutions whose inputs are padded by hand."""
    images = _images(side=96)
    backbone = Backbone("resnet18", ["layer2", "layer4"], "random", "reflect")
    network = timm.create_model("resnet18", num_classes=0).eval()
    network.load_state_dict(load_backbone_weights("resnet18", "random")[0])
    outputs, padded = {}, 0
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size != (1, 1):
            side = module.kernel_size[0] // 2
            module.padding, padded = (0, 0), padded + 1
            module.register_forward_pre_hook(
                lambda _, x, side=side: (torch.nn.functional.pad(x[0], [side] * 4, mode="reflect"),)
            )
    for layer in backbone.layers:
        network.get_submodule(layer).register_forward_hook(lambda _, __, out, name=layer: outputs.update({name: out}))
    with torch.inference_mode():
        network(backbone.normalise(images))
        levels, zeros = backbone(images), Backbone("resnet18", ["layer2", "layer4"], "random")(images)
    assert padded == 17
    for layer, level, other in zip(backbone.layers, levels, zeros, strict=True):
        torch.testing.assert_close(level, outputs[layer], rtol=1e-5, atol=1e-6)
        assert (level - other).abs().max() > 1e-3


def test_padding_is_part_of_the_fingerprint_and_zeros_leave_it_as_it_was() -> None:
    default, zeros, reflect = (
        PyramidExtractor("resnet18", ["layer2"], (1.0, 0.5), ["layer3"], "random", **options)
        for options in ({}, {"padding": "zeros"}, {"padding": "reflect"})
    )
    constants = [default.backbone.mean.flatten().tolist(), default.backbone.std.flatten().tolist()]
    parts = ["pyramid", "resnet18", default.backbone.sha256, constants, (1.0, 0.5), ("layer2",), ("layer3",)]
    assert default.fingerprint == zeros.fingerprint == hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    assert default.fingerprint != reflect.fingerprint


def test_padding_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="unknown padding 'reflection': did you mean 'reflect'"):
        Backbone("resnet18", ["layer2"], "random", "reflection")
    with pytest.raises(ConfigError, match="expected 'zeros', only ResNets can be padded otherwise"):
        Backbone(LITE, ["blocks.2"], padding="reflect")
