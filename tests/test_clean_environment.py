"""Inspection where torch is not installed: a virtual environment with numpy, Pillow and one runtime."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from unispect.data.factory import write_products
from unispect.export.bundle import export
from unispect.inspector import Inspector

ROOT = Path(__file__).parents[1]
UV = shutil.which("uv", path=str(Path(sys.executable).parent))
NEEDED = {"onnx": ("numpy", "pillow", "onnxruntime"), "openvino": ("numpy", "pillow", "openvino")}
COMMANDS = ("typer", "rich")  # of the command line alone
SAID = """
import importlib.util, sys
from unispect.runtime import Inspector
inspector = Inspector.load(sys.argv[1])
finding = inspector.inspect(sys.argv[2])
for name in ("torch", "torchvision", "timm", "scipy"):
    assert importlib.util.find_spec(name) is None, name
print(repr(finding.score), finding.verdict, finding.product)
"""


def locked(*names: str) -> list[str]:
    """The versions of the lock file."""
    text = (ROOT / "requirements.lock").read_text("utf-8")
    return [re.search(rf"^{name}==\S+", text, re.MULTILINE)[0] for name in names]  # type: ignore[index]


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_products(tmp_path_factory.mktemp("products"), 26, 1, 1, 64, products=["gear"])


@pytest.fixture(scope="module")
def inspector(products: Path) -> Inspector:
    return Inspector.fit(products, {"method": "opca", "preparation": {"size": 64}, "decision": {"false_alarm_rate": 0.3}})


@pytest.mark.slow
@pytest.mark.skipif(UV is None, reason="uv, which the Makefile installs, is not there")
@pytest.mark.parametrize("to", NEEDED)
def test_inspection_needs_numpy_pillow_and_a_runtime(to: str, products: Path, inspector: Inspector, tmp_path: Path) -> None:
    export(inspector, tmp_path / "model", to)
    image = next((products / "gear" / "test").rglob("*.png"))

    python = tmp_path / "venv" / "bin" / "python"
    run(UV, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv")
    run(UV, "pip", "install", "--quiet", "--python", python, *locked(*NEEDED[to]))
    run(UV, "pip", "install", "--quiet", "--python", python, "--no-deps", ROOT)
    said = run(python, "-c", SAID, tmp_path / "model", image).split()
    expected = inspector.inspect(image)
    assert float(said[0]) == pytest.approx(expected.score, rel=1e-3)  # type: ignore[union-attr]
    assert said[1:] == [expected.verdict, "gear"]  # type: ignore[union-attr]

    run(UV, "pip", "install", "--quiet", "--python", python, *locked(*COMMANDS))
    assert '"anomalous"' in run(python, "-m", "unispect", "inspect", tmp_path / "model", image, "--json")
    new = write_products(tmp_path / "more", 9, 1, 0, 64, seed=3, products=["gear"])
    assert "Version 2: calibrated on 9 images" in run(python, "-m", "unispect", "calibrate", tmp_path / "model", new)
    found = run(python, "-m", "unispect", "inspect", tmp_path / "model", new, "--json")
    (tmp_path / "log").write_text(found)
    assert "10 images" in run(python, "-m", "unispect", "monitor", tmp_path / "model", tmp_path / "log")
    fit = [str(python), "-m", "unispect", "fit", str(products), "-o", str(tmp_path / "new")]
    asked = subprocess.run(fit, capture_output=True, text=True, check=False)
    assert asked.returncode == 2
    assert re.search(r"pip install unispect\[fit\]", asked.stderr)
    installed = run(UV, "pip", "list", "--python", python)
    assert not re.search(r"^(torch|timm|scipy)\b", installed, re.MULTILINE)
