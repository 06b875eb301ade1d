"""Inspection without torch: an exported model -> findings, with numpy, Pillow and onnxruntime or openvino.

    from unispect.runtime import Inspector

    inspector = Inspector.load("exported")
    print(inspector.inspect("part.png").verdict)

Decoding, network and decision of different images overlap: each image is one task, and there are more tasks under way than
cores, so that some decode while others are in the network.
"""

from __future__ import annotations

import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unispect.data.folder import images_below
from unispect.data.loader import Failure, Preparation, ahead, decode
from unispect.data.records import Record
from unispect.decide.judge import Judge, Said
from unispect.decide.versions import Versions
from unispect.errors import ConfigError, ImageError, MissingExtraError, StoreError, unknown_name
from unispect.store import EXPORT, read_model
from unispect.types import Finding

Source = Path | str | bytes | np.ndarray | Image.Image
HINTS = ("throughput", "latency")
ENGINES = ("auto", "onnxruntime", "openvino")
INPUT, BETWEEN = "images", "prepared"  # names in the graph
NAMES = ("score", "map", "product", "novelty")


class Network(ABC):
    """An exported graph. Any thread may ask.

    name   of the library that runs it
    """

    name: str

    @abstractmethod
    def whole(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """(N, H, W, 3) uint8 of any size -> outputs by name. The graph resizes."""

    @abstractmethod
    def prepared(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """One image (3, size, size) uint8, as `Preparation.image` makes it -> outputs by name."""


def network(files: Mapping[str, bytes], engine: str = "auto", hint: str = "throughput", threads: int = 0) -> Network:
    """The graph of an exported folder.

    engine    "onnxruntime" for ONNX, "openvino" for either, "auto": what is made for it, or what is installed
    hint      "throughput": several images at once, each on one core; "latency": each on all cores
    threads   cores to use; 0: all that this process may use
    """
    for argument, value, known in (("engine", engine, ENGINES), ("hint", hint, HINTS)):
        if value not in known:
            raise ConfigError(unknown_name(argument, value, known))
    count = threads or _cores()
    if "model.onnx" not in files and engine == "onnxruntime":
        raise ConfigError("engine='onnxruntime': the model was exported to openvino, so expected 'auto' or 'openvino'")
    if "model.onnx" in files and engine != "openvino":
        try:
            return OnnxNetwork(files["model.onnx"], hint, count)
        except MissingExtraError:
            if engine == "onnxruntime" or not _has_openvino():
                raise
    return OpenVinoNetwork(files, hint, count)


class OnnxNetwork(Network):
    """onnxruntime on the CPU."""

    def __init__(self, content: bytes, hint: str, threads: int) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("a model exported to onnx needs onnxruntime: pip install unispect[runtime]") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads if hint == "latency" else 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.name = f"onnxruntime {onnxruntime.__version__}"
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self._session.get_outputs()]

    def whole(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(self._names, self._session.run(None, {INPUT: images}), strict=True))

    def prepared(self, image: np.ndarray) -> dict[str, np.ndarray]:
        return self.whole(np.ascontiguousarray(image.transpose(1, 2, 0))[None])


class OpenVinoNetwork(Network):
    """OpenVINO on the CPU, in single precision.

    Prepared images enter behind the graph's own resizing, one a request.
    """

    def __init__(self, files: Mapping[str, bytes], hint: str, threads: int) -> None:
        try:
            import openvino
        except ImportError as error:
            raise MissingExtraError(
                "a model exported to openvino needs the package openvino: pip install unispect[openvino]"
            ) from error
        self.name = f"openvino {openvino.__version__.split('-')[0]}"
        streams = 1 if hint == "latency" else threads
        self._hints = {
            "INFERENCE_PRECISION_HINT": "f32",
            "NUM_STREAMS": str(streams),
            "INFERENCE_NUM_THREADS": str(threads),
        }
        self._core = openvino.Core()
        self._whole: Any = None
        self._files = files
        self._kept = threading.local()
        self._compiled = self._core.compile_model(self._behind(self._read()), "CPU", self._hints)
        self._names = [next(name for name in NAMES if name in output.get_names()) for output in self._compiled.outputs]

    def _read(self) -> Any:
        if "model.onnx" in self._files:
            return self._core.read_model(self._files["model.onnx"])
        import openvino

        weights = openvino.Tensor(np.frombuffer(self._files["model.bin"], np.uint8))
        return self._core.read_model(self._files["model.xml"], weights)

    @staticmethod
    def _behind(model: Any) -> Any:
        """The model from prepared images on, one a request."""
        import openvino
        from openvino import opset13

        between = next(
            output for node in model.get_ordered_ops() for output in node.outputs() if BETWEEN in output.get_names()
        )
        side = between.get_partial_shape()[2].get_length()
        entry = opset13.parameter([1, 3, side, side], np.uint8, name=BETWEEN)
        between.replace(opset13.convert(entry, np.float32).output(0))
        return openvino.Model(model.get_results(), [entry], "unispect")

    def whole(self, images: np.ndarray) -> dict[str, np.ndarray]:
        if self._whole is None:
            self._whole = self._core.compile_model(self._read(), "CPU", self._hints)
        said = self._whole([images])
        return {name: said[place].copy() for place, name in enumerate(self._names)}

    def prepared(self, image: np.ndarray) -> dict[str, np.ndarray]:
        request = getattr(self._kept, "request", None)
        if request is None:  # one for each thread
            request = self._kept.request = self._compiled.create_infer_request()
        request.infer([image[None]])
        return {name: request.get_output_tensor(place).data.copy() for place, name in enumerate(self._names)}


class Inspector:
    """An exported model: images in, findings out, as `unispect.Inspector` gives them."""

    def __init__(self, graph: Network, decision: Mapping[str, Any], about: Mapping[str, Any], threads: int = 0) -> None:
        self.network, self.about, self.threads = graph, dict(about), threads or _cores()
        self._decision = dict(decision)
        self.products = tuple(decision["products"])
        self.preparation = Preparation(**decision["preparation"])
        self.learnt = frozenset(decision["learnt"])
        self.versions = Versions.from_list(decision["versions"])
        self.calibration, self.decision = self.versions.current.calibration, self.versions.current.decision
        self.judge = Judge(self.calibration, self.decision, self.products, self.preparation)
        self.threshold = self.judge.threshold

    @classmethod
    def load(cls, path: Path | str, engine: str = "auto", hint: str = "throughput", threads: int = 0) -> Inspector:
        """Read a folder that `unispect export` wrote; for the arguments see `network`.

        Raises StoreError for a damaged or foreign folder, MissingExtraError.
        """
        files = read_model(Path(path), None, EXPORT)
        graph = network(files, engine, hint, threads)
        try:
            return cls(graph, json.loads(files["decision.json"]), json.loads(files["about.json"]), threads)
        except (KeyError, ValueError, TypeError) as error:
            raise StoreError(f"{path} is damaged or of another version of unispect ({error!r}): export it again") from error

    @property
    def false_alarm_rate(self) -> float:
        """The promised share of normal images that raise an alarm."""
        return self.judge.decision.false_alarm_rate

    @property
    def facts(self) -> dict[str, str]:
        """What it is and where it comes from, for the foot of a report."""
        about, size = self.about, self.preparation.size
        return {
            "Method": about["method"] + ("" if about["aligner"] == "none" else f" + {about['aligner']}"),
            "Backbone": f"{about['backbone']}, {size} px, {self.network.name}",
            "Exported": f"to {about['to']}, {about['exported']}",
            "Versions": ", ".join(f"{name} {number}" for name, number in about["versions"].items()),
        }

    def with_false_alarm_rate(self, rate: float) -> Inspector:
        """The same model under another promise.

        Raises CalibrationError where the calibration images cannot support it.
        """
        decision = replace(self.decision, false_alarm_rate=rate, threshold=None)
        return self.with_versions(self.versions.then("with_false_alarm_rate", f"false_alarm_rate={rate}", decision))

    def with_versions(self, versions: Versions) -> Inspector:
        """The same model, decided by the last of these versions.

        Raises CalibrationError where its calibration images cannot support its promise.
        """
        return Inspector(self.network, self._decision | {"versions": versions.as_list()}, self.about, self.threads)

    def inspect(self, source: Source | Sequence[Source]) -> Finding | list[Finding]:
        """What is to be said of an image, or of several.

        source   a file, its content, an array (H, W), (H, W, 3) or (H, W, 4), a Pillow image: one finding;
                 a folder, an array (N, H, W, 3) or a sequence of the above: a list, in order

        Raises ImageError for what is not an image.
        """
        if isinstance(source, Path | str) and Path(source).is_dir():
            return list(self._all(images_below(Path(source))))
        if isinstance(source, Path | str | bytes | Image.Image) or (isinstance(source, np.ndarray) and source.ndim < 4):
            return self._one(source)
        return list(self._all(source))

    def findings(self, records: Sequence[Record], strict: bool = False) -> Iterator[tuple[Record, Finding | Failure]]:
        """A finding for each record, in order, or what is wrong with its file. Reads the path of a record only."""
        return self._each(self._one, records, strict)

    def said(self, records: Sequence[Record], strict: bool = False) -> Iterator[tuple[Record, Said | Failure]]:
        """What the model says of each record's image, undecided, in order, or what is wrong with its file."""
        return self._each(lambda path: self._said(decode(path)), records, strict)

    def _each(
        self, function: Callable[[Path], Any], records: Sequence[Record], strict: bool
    ) -> Iterator[tuple[Record, Any | Failure]]:
        """What a function gives for each record's file, in order."""

        def tried(path: Path) -> Any:
            try:
                return function(path)
            except ImageError as error:
                return error

        for record, found in zip(records, self._ahead(tried, (record.path for record in records)), strict=True):
            if isinstance(found, ImageError) and strict:
                raise found
            yield record, Failure.of(record.path, found) if isinstance(found, ImageError) else found

    def _all(self, sources: Any) -> Iterator[Finding]:
        return self._ahead(self._one, sources)

    def _ahead(self, function: Callable[[Any], Any], items: Any) -> Iterator[Any]:
        return ahead(function, items, self.threads + 1, 4 * self.threads + 4)

    def _one(self, source: Source) -> Finding:
        array = decode(Path(source) if isinstance(source, str) else source)
        name = str(source) if isinstance(source, Path | str) else None
        return self.judge.finding(name, self._said(array), (array.shape[1], array.shape[0]))

    def _said(self, array: np.ndarray) -> Said:
        return said_of(self.network.prepared(self.preparation.image(array)))


def said_of(outputs: Mapping[str, np.ndarray]) -> Said:
    """What a graph says of the first of its images."""
    products = outputs.get("product")
    known = None if products is None else products[0]
    return Said(float(outputs["score"][0]), outputs["map"][0], known, float(outputs["novelty"][0]))


def _cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _has_openvino() -> bool:
    from importlib.util import find_spec

    return find_spec("openvino") is not None
