"""JSON lines: every line has its answer, whatever is in it."""

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unispect.data.loader import decode
from unispect.stream import answers
from unispect.types import Finding

PLAIN = np.zeros((1, 1), np.float32)


class Toy:
    """Says the mean grey level."""

    def inspect(self, source: Any) -> Finding:
        image = decode(source)
        name = None if isinstance(source, bytes) else str(source)
        return Finding(name, float(image.mean()), 1.0, 0.5, True, None, None, (), PLAIN, image.shape[1], image.shape[0])


def asked(*lines: Any) -> list[dict[str, Any]]:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    return [json.loads(json.dumps(answer)) for answer in answers(Toy(), texts)]


def content(grey: int = 7) -> bytes:
    written = io.BytesIO()
    Image.new("L", (5, 3), grey).save(written, "PNG")
    return written.getvalue()


def test_a_file_and_its_content_have_the_same_answer(tmp_path: Any) -> None:
    (tmp_path / "a.png").write_bytes(content())
    first, second = asked(
        {"path": str(tmp_path / "a.png"), "id": 7}, {"image": base64.b64encode(content()).decode(), "id": {"any": [1]}}
    )
    assert (first["id"], first["score"], first["width"], first["path"]) == (7, 7.0, 5, str(tmp_path / "a.png"))
    assert (second["id"], second["score"], second["path"]) == ({"any": [1]}, 7.0, None)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not a line of JSON"),
        ("[1]", "expected an object"),
        ({"path": "no.png"}, "no.png: no such file"),
        ({"path": "/"}, "/: a folder"),
        ({"path": 3}, 'exactly one of "path"'),
        ({"path": "a", "image": "b"}, 'exactly one of "path"'),
        ({"id": 3}, 'exactly one of "path"'),
        ({"image": "?"}, "not base64"),
        ({"image": "A" * 80}, "not an image of a known format"),
        ({"paht": "a.png"}, "unknown key 'paht'"),
    ],
)
def test_a_wrong_line_is_answered_and_the_next_one_heard(line: Any, said: str) -> None:
    good = {"image": base64.b64encode(content()).decode(), "id": "next"}
    first, second = asked(line, good)
    assert said in first["error"]
    assert (second["id"], second["score"]) == ("next", 7.0)


def test_the_id_comes_back_with_an_error() -> None:
    assert asked({"path": "no.png", "id": 5})[0]["id"] == 5


def test_empty_lines_have_no_answer() -> None:
    assert asked("", "  \n") == []
