"""An ONNX file as a model of OpenVINO."""

from __future__ import annotations

import tempfile
from pathlib import Path

from unispect.errors import MissingExtraError
from unispect.export.onnx import onnx_model
from unispect.inspector import Inspector


def openvino_model(inspector: Inspector, int8: bool = False) -> tuple[bytes, bytes]:
    """Content of model.xml and of model.bin.

    Raises what `onnx_model` raises.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("exporting to openvino needs the package: pip install unispect[openvino]") from error
    model = openvino.Core().read_model(onnx_model(inspector, products=True, int8=int8))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(model, path, compress_to_fp16=False)
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()
