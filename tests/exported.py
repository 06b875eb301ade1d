"""A network as one ONNX file in the two engines that read it, for tests."""

import logging
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import torch
from torch import Tensor, nn
from torch.export import Dim

from unispect.detectors.base import Detector
from unispect.types import Scores

ENGINES = ("onnxruntime", "openvino")


class Fields(nn.Module):
    """A detector whose scores are a tuple, as a graph gives them: image, maps and products where it has them."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, *levels: Tensor) -> tuple[Tensor, ...]:
        return present(self.detector(list(levels)))


class Levels(nn.Module):
    """An extractor whose levels are a tuple."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.extractor(images))


def present(scores: Scores) -> tuple[Tensor, ...]:
    """Image, maps and, where it has them, products."""
    return tuple(value for value in (scores.image, scores.maps, scores.products) if value is not None)


def exported(module: nn.Module, inputs: tuple[Tensor, ...], path: Path, many: bool = False) -> Path:
    """The module as an ONNX file whose batch is free. many: it takes its inputs as *inputs."""
    free = tuple({0: Dim.DYNAMIC} for _ in inputs)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        program = torch.export.export(module.eval(), inputs, dynamic_shapes=(free,) if many else free)
        onnx = torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False)
    assert onnx is not None
    onnx.save(path)
    return path


class Engine:
    """An ONNX file to be run."""

    def __init__(self, path: Path, kind: str) -> None:
        if kind == "onnxruntime":
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            names = [given.name for given in session.get_inputs()]
            self.run = lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))
        else:
            compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            self.run = lambda arrays: [compiled_output.copy() for compiled_output in compiled(arrays).values()]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        return [torch.from_numpy(np.asarray(out)) for out in self.run([given.numpy() for given in inputs])]
