import pytest
import torch
from torch.nn.functional import interpolate

from unispect.errors import ConfigError
from unispect.features.backbones import Backbone
from unispect.features.pyramid import PyramidExtractor, TrainedEncoder

LITE = "tf_efficientnet_lite0"


def _images(side: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_levels_come_by_scale_then_layer_then_pooled() -> None:
    extractor = PyramidExtractor(LITE, [2, "blocks.4"], (1.0, 0.5), ["blocks.6", "blocks.4"])
    images = _images()
    backbone = Backbone(LITE, ["blocks.2", "blocks.4", "blocks.6"])
    with torch.inference_mode():
        levels = extractor(images)
        x = backbone.normalise(images)
        full = backbone.levels(x, backbone.layers)
        half = backbone.levels(interpolate(x, (32, 32), mode="bilinear", align_corners=True), backbone.layers)
    expected = [full["blocks.2"], full["blocks.4"], half["blocks.2"], half["blocks.4"]]
    expected += [full["blocks.6"].mean((2, 3), keepdim=True), full["blocks.4"].mean((2, 3), keepdim=True)]
    assert all(torch.equal(level, other) for level, other in zip(levels, expected, strict=True))
    dense = ("blocks.2", "blocks.4", "blocks.2@0.5", "blocks.4@0.5")
    assert extractor.level_names == (*dense, "pool:blocks.6", "pool:blocks.4")
    assert extractor.channels == tuple(level.shape[1] for level in levels)


def test_one_run_a_scale_and_no_stage_for_nothing() -> None:
    extractor = PyramidExtractor(LITE, ["blocks.2"], (1.0, 0.5), ["blocks.4"])
    runs = []
    for stage, block in enumerate(extractor.backbone.trunk.blocks):
        block.register_forward_hook(lambda _, inputs, __, stage=stage: runs.append((stage, inputs[0].shape[-1])))
    with torch.inference_mode():
        extractor(_images())
    assert [stage for stage, _ in runs] == [0, 1, 2, 3, 4, 0, 1, 2]


def test_pooled_levels_are_of_the_full_image_even_if_no_dense_level_is() -> None:
    both = PyramidExtractor(LITE, [1], (1.0, 0.5), [2])
    small = PyramidExtractor(LITE, [1], (0.5,), [2])
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(both(_images())[1:], small(_images()), strict=True))


def test_the_resize_keeps_corners() -> None:
    """Corner pixels of the image are those of the copy, which is what align_corners means."""
    from unispect.features.pyramid import _scaled

    image = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    copy = _scaled(image, 0.5)
    assert copy.shape == (1, 3, 4, 6)
    torch.testing.assert_close(copy[..., 0, 0], image[..., 0, 0])
    torch.testing.assert_close(copy[..., -1, -1], image[..., -1, -1])


def test_fingerprint_tells_functions_apart_and_not_spellings() -> None:
    plain = PyramidExtractor(LITE, [0, 1]).fingerprint
    assert plain == PyramidExtractor(f"{LITE}.in1k", ["blocks.0", "1"], (1,)).fingerprint
    others = [
        PyramidExtractor(LITE, [1, 0]),
        PyramidExtractor(LITE, [0, 1], (1.0, 0.5)),
        PyramidExtractor(LITE, [0, 1], pooled=[1]),
        PyramidExtractor(LITE, [0, 1], weights="random"),
    ]
    assert len({plain, *(other.fingerprint for other in others)}) == 5


@pytest.mark.parametrize(
    ("layers", "scales", "message"),
    [
        ([1], (), "scales=.*above 0"),
        ([1], (2.0,), "scales="),
        ([1], (1.0, 1), "scales="),
        ([1, "layer1"], (1,), "once"),
    ],
)
def test_impossible_pyramids(layers: list[str | int], scales: tuple[float, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PyramidExtractor("resnet18", layers, scales, weights="random")


def test_joined_layers_are_one_level_a_scale_on_the_largest_grid() -> None:
    apart = PyramidExtractor(LITE, [2, "blocks.4"], (1.0, 0.5), ["blocks.6"])
    joined = PyramidExtractor(LITE, [2, "blocks.4"], (1.0, 0.5), ["blocks.6"], joined=True)
    with torch.inference_mode():
        levels, found = apart(_images()), joined(_images())
    expected = []
    for first, second in (levels[:2], levels[2:4]):
        larger = interpolate(second, first.shape[2:], mode="bilinear", align_corners=False)
        expected.append(torch.cat([first, larger], 1))
    assert all(torch.equal(level, other) for level, other in zip(found, [*expected, levels[4]], strict=True))
    assert joined.level_names == ("blocks.2+blocks.4", "blocks.2+blocks.4@0.5", "pool:blocks.6")
    assert joined.channels == tuple(level.shape[1] for level in found)
    assert joined.fingerprint != apart.fingerprint


def test_an_encoder_to_train_begins_as_the_extractor_and_leaves_it_alone() -> None:
    """Bit by bit, from pixels in half precision, too."""
    extractor, images = PyramidExtractor(LITE, ["blocks.2", "blocks.4"]), _images()
    encoder, pixels = TrainedEncoder(extractor).train(), images / 255
    expected = extractor(images)
    for given in (pixels, pixels.half().float()):
        assert all(torch.equal(level, other) for level, other in zip(encoder(given), expected, strict=True))
    assert not any(module.training for module in encoder.extractor.backbone.modules())
    with torch.no_grad():
        for parameter in encoder.parameters():
            assert parameter.requires_grad
            parameter += 1
    assert all(torch.equal(level, other) for level, other in zip(extractor(images), expected, strict=True))
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
