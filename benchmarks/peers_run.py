"""Load one model in a process of its own, run it on images, tell time and memory: `benchmarks/peers.py` starts it.

Once the model has run and its memory is noted, the bare backbone is loaded, too, and both take the same images in turns,
round by round: what slows the machine slows both. It needs numpy and OpenVINO, and whoever runs the model.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIDE = 256  # pixels
Pass = Callable[[np.ndarray], tuple[list[float], list[float]]]  # images -> seconds of each or of all, and their scores
Look = Callable[[np.ndarray], float]  # one image -> its score


def main() -> None:
    """Command line; what was measured is the last line that it prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=RUNNERS, help="who runs the model")
    parser.add_argument("model", type=Path, help="its .xml file, or its folder where unispect runs it")
    parser.add_argument("floor", type=Path, help=".xml file of the bare backbone")
    parser.add_argument("images", type=Path, help=".npy file, (n, 3, H, W) uint8")
    parser.add_argument("--streams", type=int, default=1, help="1: one image after another; more: so many at a time")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args()
    os.sched_setaffinity(0, given.cores)
    print("\n" + json.dumps(measured(given)))


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """Peak memory, MiB; seconds until the first score; of each round, seconds of backbone and model; scores."""
    images = np.load(given.images)
    start = time.perf_counter()
    own = RUNNERS[given.kind](given.model, given.streams, len(given.cores))
    own(images[:1])
    begun = time.perf_counter() - start
    _, scores = own(images)
    peak = resident()
    floor = bare(given.floor, given.streams, len(given.cores))
    floor(images)
    rounds = [(floor(images)[0], own(images)[0]) for _ in range(given.rounds)]
    return {"peak": peak, "begun": begun, "rounds": rounds, "scores": scores}


def resident() -> float:
    """The most memory that this process has held, MiB."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
    return int(found[1]) / 1024 if found else float("nan")


def hints(streams: int, threads: int) -> dict[str, str]:
    """The same for every model, whoever runs it."""
    return {
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": str(streams),
        "INFERENCE_NUM_THREADS": str(threads),
    }


# Who runs a model.


def bare(model: Path, streams: int, threads: int) -> Pass:
    """The compiled model alone; so many requests in flight where there are streams."""
    compiled = compiled_for_bytes(model, hints(streams, threads))
    score = scored_by(compiled)
    if streams > 1:
        return in_flight(compiled, streams, score)
    request = compiled.create_infer_request()

    def look(image: np.ndarray) -> float:
        request.infer({0: image[None]}, share_inputs=True)
        return told(request, score)

    return one_by_one(look)


def anomalib(model: Path, streams: int, threads: int) -> Pass:
    """anomalib's own inferencer, which takes one image after another."""
    from anomalib.deploy import OpenVINOInferencer

    inferencer = OpenVINOInferencer(model, device="CPU", config=hints(streams, threads))
    return one_by_one(lambda image: float(np.squeeze(inferencer.predict(image).pred_score)), channels_last=True)


def unispect(model: Path, streams: int, threads: int) -> Pass:
    """unispect's own inspector of exported models; with streams it is given all images at once."""
    from unispect.runtime import Inspector

    inspector = Inspector.load(model, hint="latency" if streams == 1 else "throughput", threads=threads)
    if streams == 1:
        return one_by_one(lambda image: inspector.inspect(image).score, channels_last=True)

    def run(images: np.ndarray) -> tuple[list[float], list[float]]:
        shown = laid_out(images, channels_last=True)
        start = time.perf_counter()
        scores = [finding.score for finding in inspector.inspect(shown)]
        return [time.perf_counter() - start], scores

    return run


RUNNERS = {"bare": bare, "anomalib": anomalib, "unispect": unispect}


def one_by_one(look: Look, channels_last: bool = False) -> Pass:
    """Every image by itself, timed by itself."""

    def run(images: np.ndarray) -> tuple[list[float], list[float]]:
        seconds, scores = [], []
        for image in laid_out(images, channels_last):
            start = time.perf_counter()
            scores.append(look(image))
            seconds.append(time.perf_counter() - start)
        return seconds, scores

    return run


def in_flight(compiled: Any, requests: int, score: int | None) -> Pass:
    """So many requests at a time, all images timed together."""
    import openvino

    queue = openvino.AsyncInferQueue(compiled, requests)
    scores: dict[int, float] = {}
    queue.set_callback(lambda request, place: scores.__setitem__(place, told(request, score)))

    def run(images: np.ndarray) -> tuple[list[float], list[float]]:
        start = time.perf_counter()
        for place in range(len(images)):
            queue.start_async({0: images[place : place + 1]}, place, share_inputs=True)
        queue.wait_all()
        return [time.perf_counter() - start], [scores[place] for place in range(len(images))]

    return run


def laid_out(images: np.ndarray, channels_last: bool) -> np.ndarray:
    """(n, 3, H, W) -> the same, or (n, H, W, 3); before the clock starts."""
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1)) if channels_last else images


def compiled_for_bytes(model: Path, config: dict[str, str]) -> Any:
    """The model for one square image of bytes, (1, 3, H, W), that needs no resizing any more.

    One that expects values in [0, 1] scales them inside: no faster way to bring it an image of bytes is known here. One of
    unispect is entered behind its own resizing, as its inspector does; anomalib's leaves it out for images of its size.
    """
    import openvino
    from openvino.preprocess import PrePostProcessor

    core = openvino.Core()
    read = core.read_model(model)
    if "images" in read.input(0).names:
        from unispect.runtime import OpenVinoNetwork

        read = OpenVinoNetwork._behind(read)
    read.reshape([1, 3, SIDE, SIDE])
    if read.input(0).element_type != openvino.Type.u8:
        steps = PrePostProcessor(read)
        steps.input().tensor().set_element_type(openvino.Type.u8)
        steps.input().preprocess().convert_element_type(openvino.Type.f32).scale(255.0)
        read = steps.build()
    return core.compile_model(read, "CPU", config)


def scored_by(compiled: Any) -> int | None:
    """Which output is the score of the image; None where there is none, as of the backbone."""
    named = (place for place, output in enumerate(compiled.outputs) if any("score" in name for name in output.names))
    return next(named, None)


def told(request: Any, score: int | None) -> float:
    """The score in a finished request."""
    return float("nan") if score is None else float(np.squeeze(request.get_output_tensor(score).data))


if __name__ == "__main__":
    main()
