import importlib.util
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from unispect.errors import ConfigError, MissingExtraError
from unispect.features.base import Extractor
from unispect.features.engine import Engine, WithImage, available_cores, engine
from unispect.features.pyramid import PyramidExtractor


def _images(number: int = 5, height: int = 64, width: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (number, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def lite() -> Extractor:
    return PyramidExtractor("tf_efficientnet_lite0", ["blocks.2", "blocks.4"], (1.0, 0.5), ["blocks.4"])


@pytest.fixture(scope="module")
def resnet() -> Extractor:
    return PyramidExtractor("resnet18", [1, 2], weights="random")


@pytest.fixture(scope="module")
def openvino_lite(lite: Extractor) -> Engine:
    return engine(lite, "openvino", threads=2)


def _relative(levels: list[Tensor], others: list[Tensor]) -> float:
    pairs = zip(levels, others, strict=True)
    return max(float((level - other).abs().max() / other.abs().max()) for level, other in pairs)


@pytest.mark.parametrize("size", [(64, 64), (64, 48)])
def test_both_engines_agree_on_pretrained_weights(lite: Extractor, openvino_lite: Engine, size: tuple[int, int]) -> None:
    images = _images(3, *size)
    levels, expected = openvino_lite(images), engine(lite, "torch")(images)
    assert _relative(levels, expected) < 1e-4
    assert all(level.dtype == torch.float32 and level.is_contiguous() for level in levels + expected)


def test_both_engines_agree_on_another_network(resnet: Extractor) -> None:
    images = _images()
    assert _relative(engine(resnet, "openvino")(images), engine(resnet, "torch")(images)) < 1e-4


def test_torch_engine_is_the_extractor(lite: Extractor) -> None:
    with torch.no_grad():
        expected = lite(_images())
    levels = engine(lite, "torch")(_images())
    assert all(torch.equal(level, other) for level, other in zip(levels, expected, strict=True))
    assert not any(level.is_inference() for level in levels)


def test_an_image_gives_the_same_bits_in_any_batch(openvino_lite: Engine) -> None:
    images = _images(7)
    together = openvino_lite(images)
    order = torch.tensor([3, 6, 0, 3])
    assert all(torch.equal(a[order], b) for a, b in zip(together, openvino_lite(images[order]), strict=True))
    for place in range(7):
        alone = openvino_lite(images[place : place + 1])
        assert all(torch.equal(a[place : place + 1], b) for a, b in zip(together, alone, strict=True))


def test_images_in_another_memory_order_are_the_same_images(openvino_lite: Engine) -> None:
    images = _images(2)
    turned = images.to(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(openvino_lite(images), openvino_lite(turned), strict=True))


def test_threads_may_share_an_engine(openvino_lite: Engine) -> None:
    batches = [_images(number) for number in range(1, 7)]
    expected = [openvino_lite(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(openvino_lite, batches))
    for levels, others in zip(results, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(levels, others, strict=True))


@pytest.mark.parametrize("kind", ["torch", "openvino"])
def test_bf16_is_used_when_asked_and_only_then(resnet: Extractor, kind: str) -> None:
    images = _images(2)
    exact = engine(resnet, "torch")(images)
    try:
        reduced = engine(resnet, kind, "bf16")(images)
    except ConfigError as error:
        assert "computes in f32" in str(error)  # noqa: PT017 - a processor without bf16 must say so
        return
    assert 1e-4 < _relative(reduced, exact) < 0.1
    assert all(level.dtype == torch.float32 for level in reduced)


def test_a_processor_without_bf16_is_an_error(resnet: Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    class Processor(openvino.Core):
        def compile_model(self, model: object, device: str, hints: dict[str, str]) -> openvino.CompiledModel:
            return super().compile_model(model, device, hints | {"INFERENCE_PRECISION_HINT": "f32"})

    monkeypatch.setattr(openvino, "Core", Processor)
    with pytest.raises(ConfigError, match="precision='bf16': this processor computes in f32"):
        engine(resnet, "openvino", "bf16")(_images(1))


def test_nothing_is_sent_anywhere(resnet: Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino_telemetry

    def caught(*_: object, **__: object) -> None:
        raise AssertionError("something was sent")

    monkeypatch.setattr(openvino_telemetry.Telemetry, "__init__", caught)
    monkeypatch.setattr(openvino_telemetry.Telemetry, "send_event", caught)
    monkeypatch.setattr(socket.socket, "connect", caught)
    engine(resnet, "openvino")(_images(1))


def test_auto_takes_openvino_where_it_is(resnet: Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine(resnet).name == "openvino on cpu"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert engine(resnet).name == "torch on cpu"
    with pytest.raises(MissingExtraError, match=r"pip install unispect\[openvino\]"):
        engine(resnet, "openvino")


def test_fingerprint_is_of_the_function_not_of_the_engine(lite: Extractor, resnet: Extractor) -> None:
    assert engine(resnet, "torch").fingerprint == engine(resnet, "openvino").fingerprint
    different = [engine(resnet, "torch"), engine(resnet, "torch", "bf16"), engine(lite, "torch")]
    assert len({other.fingerprint for other in different}) == 3


@pytest.mark.parametrize(
    ("kind", "precision", "device", "message"),
    [
        ("openvin", "f32", "cpu", "did you mean 'openvino'"),
        ("torch", "fp16", "cpu", "unknown precision 'fp16'"),
        ("openvino", "f32", "cuda", "device='cpu' only"),
    ],
)
def test_impossible_engines(resnet: Extractor, kind: str, precision: str, device: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine(resnet, kind, precision, device)


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)])
def test_only_batches_of_bytes_are_images(resnet: Extractor, images: Tensor) -> None:
    for kind in ("torch", "openvino"):
        with pytest.raises(ValueError, match=r"expected uint8 \(N, 3, H, W\)"):
            engine(resnet, kind)(images)


def test_at_least_one_core() -> None:
    assert available_cores() >= 1


def test_the_image_comes_after_all_levels_and_is_part_of_the_function(openvino_lite: Engine) -> None:
    both, images = WithImage(openvino_lite), _images(2)
    *levels, image = both(images)
    assert all(torch.equal(level, other) for level, other in zip(levels, openvino_lite(images), strict=True))
    assert torch.equal((255 * image).round().to(torch.uint8), images)
    assert torch.equal((255 * image.half().float()).round().to(torch.uint8), images)
    assert both.fingerprint != openvino_lite.fingerprint
    assert both.name == openvino_lite.name
