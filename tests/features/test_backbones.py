import pytest
import timm
import torch

from unispect.errors import ConfigError
from unispect.features.backbones import Backbone
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
