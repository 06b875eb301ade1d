"""Extractors as one ONNX graph with a free batch, bytes in: two engines make of it what torch does."""

from pathlib import Path

import pytest
import torch
from torch import nn

from exported import ENGINES, Engine, Levels, exported
from unispect.features.engine import WithImage, engine
from unispect.features.pixels import PixelExtractor
from unispect.features.pyramid import PyramidExtractor, TrainedEncoder

EXTRACTORS = {
    "lite": lambda: PyramidExtractor("tf_efficientnet_lite0", ["blocks.3", "blocks.4"], (1.0, 0.5), ["blocks.4"]),
    "joined": lambda: PyramidExtractor("tf_efficientnet_lite0", ["blocks.2", "blocks.4"], joined=True),
    "efficientnet": lambda: PyramidExtractor("efficientnet_b0", [1, "blocks.4.1.conv_pwl"], weights="random"),
    "resnet": lambda: PyramidExtractor("resnet18", ["layer1", "layer2"], weights="random", padding="reflect"),
    "image": lambda: WithImage(engine(PyramidExtractor("tf_efficientnet_lite0", ["blocks.2"]), "torch")).network,
    "pixels": PixelExtractor,
}


def _images(count: int, side: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def _agree(network: nn.Module, path: Path, images: list[torch.Tensor]) -> None:
    for kind in ENGINES:
        run = Engine(path, kind)
        for some in images:
            with torch.inference_mode():
                levels = network(some)
            for given, expected in zip(run(some), levels, strict=True):
                torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", EXTRACTORS)
def test_two_engines_agree_with_torch_at_any_batch(name: str, tmp_path: Path) -> None:
    network = EXTRACTORS[name]().eval()
    path = exported(Levels(network), (_images(2),), tmp_path / "features.onnx")
    _agree(network, path, [_images(count) for count in (1, 2, 5)])


def test_a_trained_encoder_reads_the_image(tmp_path: Path) -> None:
    network = TrainedEncoder(PyramidExtractor("tf_efficientnet_lite0", ["blocks.2"])).eval()
    images = [_images(count) / 255 for count in (1, 2, 5)]
    path = exported(Levels(network), (images[1],), tmp_path / "features.onnx")
    _agree(network, path, images)


def test_the_network_of_an_engine_is_what_it_computes() -> None:
    both = WithImage(engine(PyramidExtractor("tf_efficientnet_lite0", ["blocks.2"]), "torch"))
    with torch.inference_mode():
        levels = both.network(_images(2))
    assert all(map(torch.equal, levels, both(_images(2))))
