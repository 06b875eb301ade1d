"""The same frozen network in torch or in OpenVINO, which is the faster one on a CPU."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import threading
import warnings
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from unispect.errors import ConfigError, MissingExtraError, unknown_name
from unispect.features.base import Extractor
from unispect.types import Features

PRECISIONS = ("f32", "bf16")


class Engine(ABC):
    """Runs an extractor: images on the CPU to features on the CPU, always float32."""

    extractor: Extractor
    precision: str

    @property
    @abstractmethod
    def name(self) -> str:
        """The library and device, for reports."""

    @abstractmethod
    def __call__(self, images: Tensor) -> Features:
        """(N, 3, H, W) uint8 RGB -> L levels (N, C, h, w) float32."""

    @property
    def network(self) -> nn.Module:
        """What it computes as one module, (N, 3, H, W) uint8 RGB -> L levels (N, C, h, w), to be part of another graph."""
        return self.extractor

    @property
    def fingerprint(self) -> str:
        """Of the function computed. The engine is no part of it: engines agree, and so may share a cache."""
        return hashlib.sha256(f"{self.extractor.fingerprint} {self.precision}".encode()).hexdigest()


class WithImage(Engine):
    """What another engine gives and, as the last level, the image itself, (N, 3, H, W) in [0, 1]."""

    def __init__(self, inner: Engine) -> None:
        self.inner, self.extractor, self.precision = inner, inner.extractor, inner.precision

    @property
    def name(self) -> str:
        return self.inner.name

    def __call__(self, images: Tensor) -> Features:
        return [*self.inner(images), images.float() / 255]

    @property
    def network(self) -> nn.Module:
        return _ThenImage(self.inner.network)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.inner.fingerprint} image".encode()).hexdigest()


def engine(
    extractor: Extractor,
    kind: str = "auto",
    precision: str = "f32",
    device: str = "cpu",
    threads: int | None = None,
) -> Engine:
    """The engine to run an extractor with.

    kind        "torch", "openvino" or "auto": OpenVINO on a CPU where it is installed, else torch
    precision   "f32" or "bf16", of the network's arithmetic; what comes out is float32
    threads     of OpenVINO; all cores that this process may use unless given
    """
    if precision not in PRECISIONS:
        raise ConfigError(unknown_name("precision", precision, PRECISIONS))
    chosen = _automatic(device) if kind == "auto" else kind
    if chosen == "torch":
        return TorchEngine(extractor, precision, device)
    if chosen != "openvino":
        raise ConfigError(unknown_name("engine", chosen, ("auto", "torch", "openvino")))
    if device != "cpu":
        raise ConfigError(f"engine='openvino' runs on device='cpu' only, got {device!r}: use engine='torch'")
    return OpenVinoEngine(extractor, precision, threads or available_cores())


def available_cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class TorchEngine(Engine):
    """torch on any device."""

    def __init__(self, extractor: Extractor, precision: str, device: str) -> None:
        self.extractor = extractor.to(device).eval()
        self.precision = precision
        self.device = torch.device(device)

    @property
    def name(self) -> str:
        return f"torch on {self.device}"

    def __call__(self, images: Tensor) -> Features:
        _check(images)
        reduced = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        # f32 is a promise: cudnn would round the inputs of convolutions to 10 bits.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.inference_mode(), reduced, exact:
            levels = self.extractor(images.to(self.device))
        return [level.float().cpu().clone() for level in levels]


class OpenVinoEngine(Engine):
    """OpenVINO on the CPU, one image a request: what an image gives does not depend on the images beside it.

    A network is compiled for every size of image when the first of that size comes.
    """

    def __init__(self, extractor: Extractor, precision: str, threads: int) -> None:
        if importlib.util.find_spec("openvino") is None:
            raise MissingExtraError("engine='openvino' needs the package openvino: pip install unispect[openvino]")
        self.extractor = extractor.cpu().eval()
        self.precision = precision
        self.threads = threads
        self._queues: dict[tuple[int, int], Any] = {}
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return "openvino on cpu"

    def __call__(self, images: Tensor) -> Features:
        _check(images)
        with self._lock:  # a queue has one owner at a time
            queue = self._queue(int(images.shape[2]), int(images.shape[3]))
            return _run(queue, np.ascontiguousarray(images.numpy()))

    def _queue(self, height: int, width: int) -> Any:
        if (height, width) not in self._queues:
            self._queues[height, width] = self._compiled(height, width)
        return self._queues[height, width]

    def _compiled(self, height: int, width: int) -> Any:
        import openvino

        model = _converted(self.extractor, height, width)
        hints = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "NUM_STREAMS": str(self.threads),
            "INFERENCE_NUM_THREADS": str(self.threads),
        }
        compiled = openvino.Core().compile_model(model, "CPU", hints)
        used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if used != self.precision:
            raise ConfigError(f"precision={self.precision!r}: this processor computes in {used}, use {used!r}")
        queue = openvino.AsyncInferQueue(compiled, self.threads)
        queue.set_callback(_collect)
        return queue


def _run(queue: Any, images: np.ndarray) -> Features:
    """(N, 3, H, W) uint8 -> L levels (N, C, h, w), by N requests."""
    shapes = [tuple(output.shape)[1:] for output in queue[0].model_outputs]
    levels = [np.empty((len(images), *shape), np.float32) for shape in shapes]
    for place in range(len(images)):
        queue.start_async({0: images[place : place + 1]}, (levels, place))
    queue.wait_all()
    return [torch.from_numpy(level) for level in levels]


def _collect(request: Any, target: tuple[list[np.ndarray], int]) -> None:
    levels, place = target
    for number, level in enumerate(levels):
        level[place] = request.get_output_tensor(number).data[0]


def _converted(extractor: Extractor, height: int, width: int) -> Any:
    """OpenVINO model for one image of a fixed size.

    The frontend is called directly: `openvino.convert_model` reports every call to its maker over the network.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(_traced(extractor, height, width))
    model = frontend.convert(frontend.load(decoder))
    model.reshape([1, 3, height, width])
    return model


def _traced(extractor: Extractor, height: int, width: int) -> Any:
    image = torch.zeros(1, 3, height, width, dtype=torch.uint8)
    with warnings.catch_warnings(), torch.no_grad():
        # Paddings and sizes become constants in a trace, which is right: the size of the image is fixed.
        warnings.filterwarnings("ignore", category=TracerWarning)
        # Tracing is deprecated, but OpenVINO 2026.4 logs tracebacks over a program of torch.export.
        warnings.filterwarnings("ignore", message=r".*torch\.jit", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.jit", category=DeprecationWarning)
        return torch.jit.trace(_Levels(extractor), image, check_trace=False)


class _ThenImage(nn.Module):
    """What another network gives and, as the last level, the image itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Features:
        return [*self.inner(images), images.float() / 255]


class _Levels(nn.Module):
    """A trace gives tuples, not lists."""

    def __init__(self, extractor: Extractor) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.extractor(images))


def _automatic(device: str) -> str:
    return "openvino" if device == "cpu" and importlib.util.find_spec("openvino") else "torch"


def _check(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        came = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"images: expected uint8 (N, 3, H, W), got {came}; see unispect.data.loader")
