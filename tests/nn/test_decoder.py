"""Bottleneck and decoder of reverse distillation against torchvision's residual blocks and the published code's numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck as Residual

from unispect.errors import ConfigError
from unispect.nn.decoder import Block, Bottleneck, Decoder, check_levels, global_cosine, place_distance
from unispect.nn.maps import upsampled

WIDE = [(256, 64, 64), (512, 32, 32), (1024, 16, 16)]  # Wide ResNet-50 at 256 px
SMALL = [(6, 16, 8), (10, 8, 4), (4, 4, 2)]
PUBLISHED = np.load(Path(__file__).parents[1] / "fixtures" / "revdist.npz")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def torchvisions(channels: int, resample: str) -> Residual:
    """Four planes of a network twice as wide: 8 inner channels, 16 out."""
    stride, shortcut = (2 if resample == "halved" else 1), None
    if resample == "doubled":
        shortcut = nn.Sequential(nn.ConvTranspose2d(channels, 16, 2, stride=2, bias=False), nn.BatchNorm2d(16))
    elif resample or channels != 16:
        shortcut = nn.Sequential(nn.Conv2d(channels, 16, 1, stride=stride, bias=False), nn.BatchNorm2d(16))
    block = Residual(channels, 4, stride, shortcut, base_width=128)
    if resample == "doubled":
        block.conv2 = nn.ConvTranspose2d(8, 8, 2, stride=2, bias=False)
    return block


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("channels", "resample"), [(16, ""), (12, ""), (24, "halved"), (24, "doubled")])
def test_a_block_is_that_of_torchvision(channels: int, resample: str, training: bool) -> None:
    ours, theirs = Block(channels, 8, 16, resample), torchvisions(channels, resample)
    parts = [
        (ours.first, theirs.conv1, theirs.bn1),
        (ours.middle, theirs.conv2, theirs.bn2),
        (ours.last, theirs.conv3, theirs.bn3),
    ]
    for mine, convolution, norm in parts:
        convolution.load_state_dict(mine[0].state_dict())
        nn.init.normal_(mine[1].weight)
        norm.load_state_dict(mine[1].state_dict())
    if theirs.downsample is not None:
        theirs.downsample.load_state_dict(ours.shortcut.state_dict())
    x = draw(3, channels, 6, 4)
    found, expected = ours.train(training)(x), theirs.train(training)(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.shape[2:] == {"": (6, 4), "halved": (3, 2), "doubled": (12, 8)}[resample]


def test_sizes_of_the_published_networks() -> None:
    with torch.device("meta"):
        bottleneck, decoder = Bottleneck(WIDE), Decoder(WIDE, (3, 4, 6))
        assert millions(bottleneck) == pytest.approx(58.89, abs=0.01)
        assert millions(decoder) == pytest.approx(24.92, abs=0.01)
        narrow = bottleneck([torch.empty(1, *shape) for shape in WIDE])
        assert narrow.shape == (1, 2048, 8, 8)
        assert [tuple(level.shape[1:]) for level in decoder(narrow)] == WIDE


def test_levels_come_back_in_their_shapes() -> None:
    levels = [draw(2, *shape) for shape in SMALL]
    narrow = Bottleneck(SMALL)(levels)
    assert narrow.shape == (2, 8, 2, 1)
    assert [level.shape for level in Decoder(SMALL, (1, 2, 1))(narrow)] == [level.shape for level in levels]


def test_convolutions_start_as_in_residual_networks_and_transposed_ones_as_in_torch() -> None:
    decoder = Decoder([(256, 8, 8)], (2,))
    first, second = decoder.stages[0]
    assert float(second.middle[0].weight.detach().std()) == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    bound = (128 * 4) ** -0.5  # torch's Kaiming uniform with a = sqrt 5 over the fan of (in, out, 2, 2)
    assert float(first.middle[0].weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)


@pytest.mark.parametrize("level", range(3))
def test_like_maps_cost_nothing_and_opposite_ones_two(level: int) -> None:
    maps = draw(4, *SMALL[level])
    assert float(global_cosine(maps, 3 * maps)) == pytest.approx(0, abs=1e-6)
    assert float(global_cosine(maps, -maps)) == pytest.approx(2, abs=1e-6)


def test_loss_and_map_are_those_of_the_published_code() -> None:
    pairs = [
        tuple(torch.from_numpy(PUBLISHED[f"{side}{level}"]).double() for side in ("encoder", "decoder"))
        for level in range(3)
    ]
    loss = sum(float(global_cosine(*pair)) for pair in pairs)
    assert loss == pytest.approx(float(PUBLISHED["loss"]), abs=1e-6)
    maps = torch.stack([upsampled(place_distance(*pair), 32) for pair in pairs]).sum(0)
    torch.testing.assert_close(maps[0], torch.from_numpy(PUBLISHED["map_first_image_32"]), rtol=0, atol=1e-6)
    by_place = sum(float(place_distance(*pair).mean()) for pair in pairs)
    assert abs(by_place - loss) > 1e-3  # the paper's formula is another one


@pytest.mark.parametrize(
    "grids", [[], [(8, 8), (8, 8)], [(8, 8), (4, 5)], [(6, 6), (3, 3)], [(4, 4), (8, 8)]], ids=lambda grids: str(grids)
)
def test_grids_must_halve(grids: list[tuple[int, int]]) -> None:
    said = ", ".join(f"{height} x {width}" for height, width in grids) or "none"
    with pytest.raises(ConfigError, match=rf"features\.layers: their grids are {said}, expected each to be half"):
        check_levels([(4, height, width) for height, width in grids])


@pytest.mark.parametrize("depths", [(1, 1), (1, 1, 0)])
def test_depths_must_fit_the_levels(depths: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"depths=.*expected a number of blocks, at least 1, for each of 3 levels"):
        Decoder(SMALL, depths)
