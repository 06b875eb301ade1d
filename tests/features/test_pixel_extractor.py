"""Images as features: exact, through the cache and in an inspector."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unispect.data.factory import write_products
from unispect.data.folder import read_folder
from unispect.errors import ConfigError
from unispect.features.cache import FeatureCache
from unispect.features.engine import TorchEngine, engine
from unispect.features.pixels import PixelExtractor
from unispect.inspector import FeatureSettings, Inspector
from unispect.types import Batch

PIXELS = FeatureSettings("pixels", layers=(), pooled=())


def every_level(side: int = 16) -> Tensor:
    """All 256 grey levels in each channel, in another order."""
    levels = torch.arange(256, dtype=torch.uint8)
    return torch.stack([levels, levels.flip(0), levels.roll(99)]).view(1, 3, side, side)


def test_the_level_is_the_image() -> None:
    extractor = PixelExtractor()
    (level,) = extractor(every_level())
    assert level.dtype == torch.float32
    assert torch.equal(level.double(), (every_level().float() / 255).double())
    assert (level.min(), level.max()) == (0, 1)
    assert (extractor.channels, extractor.level_names) == ((3,), ("pixels",))
    assert extractor.fingerprint == PixelExtractor().fingerprint
    assert not extractor.state_dict()


def test_every_grey_level_comes_back_from_the_cache(tmp_path: Path) -> None:
    images = torch.cat([every_level(), every_level().flip(2)])
    found = FeatureCache(tmp_path).features(
        [Path("a"), Path("b")], ["a" * 64, "b" * 64], lambda wanted: [Batch(images[wanted], torch.tensor(wanted))],
        engine(PixelExtractor(), "torch"), "",
    )  # fmt: skip
    assert found.shapes == [(3, 16, 16)]
    (stored,) = found.stacked([0, 1])
    assert torch.equal((stored * 255).round().to(torch.uint8), images)
    assert (stored * 255 - images).abs().max() < 0.07  # of a grey level: half precision has 11 bits


@pytest.mark.parametrize("kind", ["auto", "torch"])
def test_settings_build_it(kind: str) -> None:
    built = FeatureSettings("pixels", layers=(), pooled=(), engine=kind).build()
    assert isinstance(built, TorchEngine)
    assert isinstance(built.extractor, PixelExtractor)
    assert torch.equal(built(every_level())[0], every_level() / 255)
    assert built.fingerprint == PIXELS.build().fingerprint


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"layers": ("blocks.3",)}, r"features\.layers=\['blocks\.3'\]: .* no network, expected \[\]"),
        ({"pooled": ("blocks.6",)}, r"features\.pooled=\['blocks\.6'\]: .* expected \[\]"),
        ({"scales": (1.0, 0.5)}, r"features\.scales=\[1\.0, 0\.5\]: .* expected \[1\.0\]"),
        ({"weights": "random"}, r"features\.weights='random': .* expected 'auto'"),
        ({"joined": True}, r"features\.joined=True: .* expected False"),
        ({"padding": "reflect"}, r"features\.padding='reflect': .* expected 'zeros'"),
        ({"precision": "bf16"}, r"features\.precision='bf16': .* expected 'f32'"),
        ({"engine": "openvino"}, r"features\.engine='openvino': .* expected 'auto' or 'torch'"),
        ({"engine": "torhc"}, r"unknown engine 'torhc': did you mean 'torch'"),
    ],
)
def test_what_means_nothing_without_a_network_is_refused(setting: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        FeatureSettings(**{"backbone": "pixels", "layers": (), "pooled": (), **setting}).build()


def test_the_default_layers_are_no_layers_of_pixels() -> None:
    with pytest.raises(ConfigError, match=r"features\.layers=\['blocks\.3', 'blocks\.4'\]"):
        FeatureSettings("pixels").build()


CONFIG: dict[str, Any] = {
    "method": "draem",
    "preparation": {"size": 32},
    "training": {"steps": 4, "images": 4, "checks": 1},
    "draem": {"width": 2, "segmentation_width": 2, "map_side": 32},
    "decision": {"false_alarm_rate": 0.2},
}


@pytest.mark.parametrize("named", [True, False])
def test_a_model_of_pixels_is_learnt_saved_and_loaded(tmp_path: Path, named: bool) -> None:
    """Where no product is named, clusters of mean colours stand in."""
    folder = write_products(tmp_path / "data", 30, 2, 1, 32, products=["fabric", "gear"])
    records = [record if named else replace(record, product=None) for record in read_folder(folder)]
    inspector = Inspector.fit(records, CONFIG, cache=FeatureCache(tmp_path / "cache"))
    assert inspector.facts["clustered"] != named
    assert inspector.facts["shapes"] == [[3, 32, 32]]
    loaded = Inspector.load(inspector.save(tmp_path / "model"))
    image = folder / "gear" / "test" / "good" / "000.png"
    one, other = inspector.inspect(image), loaded.inspect(image)
    assert not isinstance(one, list)
    assert not isinstance(other, list)
    assert json.dumps(one.as_dict()) == json.dumps(other.as_dict())
    assert one.map.shape == (32, 32)
    assert "Backbone: pixels, 32 px" in inspector.card()
