"""Sizes, shapes, what passes by the narrow middle and what does not, and the weights at the start."""

import pytest
import torch
from torch import Tensor

from unispect.nn.unet import SPREAD, Reconstruction, Rise, Segmentation


def images(count: int = 2, height: int = 64, width: int = 32, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0))


def test_published_widths_have_the_published_sizes() -> None:
    with torch.device("meta"):
        networks = Reconstruction(128), Segmentation(6, 2, 64)
    sizes = [sum(value.numel() for value in network.parameters()) for network in networks]
    assert sizes == [69_048_579, 28_374_146]
    assert sizes == [pytest.approx(69.0e6, rel=2e-3), pytest.approx(28.4e6, rel=2e-3)]


def test_shapes() -> None:
    anew, middle = Reconstruction(4)(images())
    assert anew.shape == (2, 3, 64, 32)
    assert middle.shape == (2, 32, 4, 2)
    assert Segmentation(6, 2, 4)(images(channels=6)).shape == (2, 2, 64, 32)
    assert [level.shape[1:] for level in Segmentation(6, 3, 2).encoder(images(channels=6))] == [
        (2, 64, 32), (4, 32, 16), (8, 16, 8), (16, 8, 4), (16, 4, 2), (16, 2, 1)
    ]  # fmt: skip


def test_all_of_the_reconstruction_goes_through_its_narrow_middle() -> None:
    """Another image with the same middle gives the same reconstruction: there are no skips."""
    network = Reconstruction(4).eval()
    with torch.no_grad():
        anew, middle = network(images())
        assert torch.equal(network.last(network.decoder(middle)), anew)


def test_every_level_of_the_segmentation_passes_by() -> None:
    network = Segmentation(6, 2, 4).eval().double()
    x = images(channels=6).double()
    seen = network.encoder(x)
    for number, level in enumerate(seen):
        changed = [other + 1 if other is level else other for other in seen]
        handle = network.encoder.register_forward_hook(lambda *_, changed=changed: changed)
        with torch.no_grad():
            other = network(x)
            handle.remove()
            assert not torch.equal(other, network(x)), number


def test_a_rise_doubles_with_aligned_corners() -> None:
    rise = Rise(1, 1, 0, 1)
    rise.up = rise.join = torch.nn.Identity()
    ramp = torch.linspace(0, 1, 3)
    torch.testing.assert_close(rise(ramp.expand(1, 1, 3, 3)), torch.linspace(0, 1, 6).expand(1, 1, 6, 6))
    torch.testing.assert_close(rise(ramp[:, None].expand(1, 1, 3, 3)), torch.linspace(0, 1, 6)[:, None].expand(1, 1, 6, 6))


def test_weights_start_as_published_and_from_the_seed() -> None:
    network = Reconstruction(8, seed=3)
    convolutions = [part for part in network.modules() if isinstance(part, torch.nn.Conv2d)]
    weights = torch.cat([part.weight.detach().flatten() for part in convolutions])
    assert weights.mean().item() == pytest.approx(0, abs=5e-4)
    assert weights.std().item() == pytest.approx(SPREAD, rel=0.02) == pytest.approx(0.02, rel=0.02)
    scales = torch.cat([part.weight.detach() for part in network.modules() if isinstance(part, torch.nn.BatchNorm2d)])
    assert scales.mean().item() == pytest.approx(1, abs=5e-3)
    assert scales.std().item() == pytest.approx(0.02, rel=0.2)
    assert not any(part.bias.any() for part in network.modules() if getattr(part, "bias", None) is not None)
    same, other = Reconstruction(8, seed=3).state_dict(), Reconstruction(8, seed=4).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in network.state_dict().items())
    assert any(not torch.equal(value, other[name]) for name, value in network.state_dict().items())


def test_the_start_leaves_the_random_numbers_of_others_alone() -> None:
    """Layers of torch draw weights of their own when made; what matters is that ours do not depend on that."""
    torch.manual_seed(0)
    one = Segmentation(6, 2, 2, seed=1).state_dict()
    other = Segmentation(6, 2, 2, seed=1).state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
