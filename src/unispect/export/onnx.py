"""A learnt model as an ONNX file."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unispect.errors import ExportError, MissingExtraError
from unispect.export.program import Judged, Prepared
from unispect.export.quantised import quantised
from unispect.inspector import Inspector
from unispect.runtime import BETWEEN, INPUT

OPSET = 20
LARGEST = 2**31  # bytes of a constant that is computed beforehand


def onnx_model(inspector: Inspector, products: bool = False, int8: bool = False) -> bytes:
    """The file's content: opset 20, any number of images of any size.

    products   resize images by matrix products (see program.Prepared)
    int8       convolutions in 8 bits (see quantised)

    Raises ExportError where a part of the model has no form in ONNX, MissingExtraError.
    """
    _check_packages()
    import onnx

    inspector.detector.check_exportable()
    prepared, judged = Prepared(inspector.preparation, products), Judged(inspector)
    size, count = judged.size, 2
    # No two lengths are alike in the example, lest they be taken for one.
    images = torch.zeros(count, size + 3, size + 5, 3, dtype=torch.uint8)
    first = _graph(prepared, images, {0: "images", 1: "height", 2: "width"}, INPUT, [BETWEEN])
    second = _graph(judged, torch.zeros(count, 3, size, size), {0: "images"}, BETWEEN, judged.names)
    if int8:
        second = quantised(second, inspector)
    joined = onnx.compose.merge_models(
        onnx.compose.add_prefix(first, "p.", rename_inputs=False, rename_outputs=False),
        onnx.compose.add_prefix(second, "j.", rename_inputs=False, rename_outputs=False),
        [(BETWEEN, BETWEEN)],
        name="unispect",
    )
    content: bytes = joined.SerializeToString()
    return content


def _graph(part: nn.Module, example: Tensor, axes: Mapping[int, str], takes: str, gives: Sequence[str]) -> Any:
    """A part as an ONNX model, whose named axes may have any length."""
    shapes = (dict.fromkeys(axes, torch.export.Dim.DYNAMIC),)
    with torch.no_grad(), _quiet():
        try:
            program = torch.export.export(part.eval(), (example,), dynamic_shapes=shapes)
            made = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=[takes], output_names=list(gives), verbose=False
            )
        except Exception as error:  # the exporter fails in every way there is
            said = " ".join(str(error).split())[:300]
            raise ExportError(f"the model cannot be written as one graph: {type(error).__name__}: {said}") from error
    assert made is not None
    from onnxscript.optimizer import optimize_ir

    # What is known of all products is stacked once, here, and not in every run.
    optimize_ir(made.model, input_size_limit=LARGEST, output_size_limit=LARGEST)
    model = made.model_proto
    for axis, name in axes.items():
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    return model


def _check_packages() -> None:
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(f"exporting needs the package {package}: pip install unispect[export]")


@contextmanager
def _quiet() -> Iterator[None]:
    """What the exporter says of itself is not for users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
