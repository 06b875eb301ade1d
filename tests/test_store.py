"""What is stored comes back, whole or with an error that names the damage; a kill leaves the old or the new."""

import ast
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from unispect import store
from unispect.errors import StoreError
from unispect.store import (
    pack_tensors,
    read_checkpoint,
    read_model,
    unpack_tensors,
    write_checkpoint,
    write_folder,
)

SOURCE = Path(store.__file__).parent
FILES = {"config.toml": b"a = 1\n", "weights.safetensors": bytes(range(256)), "empty": b""}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", FILES)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# Folders


def test_files_come_back_and_nothing_else_is_left(model: Path) -> None:
    assert read_model(model, list(FILES)) == FILES
    assert read_model(model, ["config.toml"]) == {"config.toml": b"a = 1\n"}
    assert names(model) == sorted([*FILES, "MANIFEST.json"])
    assert names(model.parent) == ["model"]


def test_hashes_are_those_of_sha256sum(model: Path) -> None:
    manifest = json.loads((model / "MANIFEST.json").read_text())
    assert manifest["format"] == "unispect-model"
    assert manifest["version"] == 1
    lines = "".join(f"{digest}  {name}\n" for name, digest in manifest["files"].items())
    subprocess.run(["sha256sum", "--check", "--strict"], input=lines, text=True, cwd=model, check=True)


def test_others_may_read_it_as_far_as_the_umask_lets_them(model: Path) -> None:
    (model.parent / "usual").mkdir()
    assert model.stat().st_mode == (model.parent / "usual").stat().st_mode


def test_missing_parents_are_made_and_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert read_model(write_folder(tmp_path / "a" / "b" / "m", FILES), ["empty"]) == {"empty": b""}
    (tmp_path / "empty").mkdir()
    assert read_model(write_folder(tmp_path / "empty", FILES), list(FILES)) == FILES


def test_an_older_model_is_replaced_only_when_asked(model: Path) -> None:
    with pytest.raises(StoreError, match="model exists; choose another -o or pass --overwrite"):
        write_folder(model, {"new": b"1"})
    assert read_model(model, list(FILES)) == FILES
    write_folder(model, {"new": b"1"}, overwrite=True)
    assert read_model(model, ["new"]) == {"new": b"1"}
    assert names(model) == ["MANIFEST.json", "new"]
    assert names(model.parent) == ["model"]


def test_without_a_swap_in_one_step_the_result_is_the_same(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_exchange", lambda one, other: False)
    write_folder(model, {"new": b"1"}, overwrite=True)
    assert read_model(model, ["new"]) == {"new": b"1"}
    assert names(model.parent) == ["model"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_a_model_is_left_alone(tmp_path: Path, overwrite: bool) -> None:
    for name, content in [("photos", None), ("file", b"x"), ("foreign", b'{"format": "other"}'), ("broken", b"{")]:
        place = tmp_path / name
        if name == "file":
            place.write_bytes(b"x")
        else:
            place.mkdir()
            (place / ("MANIFEST.json" if content else "cat.png")).write_bytes(content or b"cat")
        with pytest.raises(StoreError, match="left alone: choose another -o"):
            write_folder(place, FILES, overwrite=overwrite)
        assert place.is_file() or len(names(place)) == 1
    assert names(tmp_path) == ["broken", "file", "foreign", "photos"]


def test_a_link_keeps_pointing_at_the_model(model: Path) -> None:
    link = model.parent / "latest"
    link.symlink_to(model)
    write_folder(link, {"new": b"1"}, overwrite=True)
    assert link.is_symlink()
    assert read_model(model, ["new"]) == read_model(link, ["new"]) == {"new": b"1"}


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", "/etc/x", "", ".", "..", "C:x", "a\0", "MANIFEST.json"])
def test_names_do_not_lead_out_of_the_folder(model: Path, name: str) -> None:
    with pytest.raises(StoreError, match="expected a plain name"):
        write_folder(model.parent / "other", {name: b""})
    with pytest.raises(StoreError, match="expected a plain name"):
        read_model(model, [name])
    manifest = json.loads((model / "MANIFEST.json").read_text())
    (model / "MANIFEST.json").write_text(json.dumps(manifest | {"files": {name: "0"}}))
    with pytest.raises(StoreError, match="expected a plain name"):
        read_model(model, [])
    assert names(model.parent) == ["model"]


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "remove"])
@pytest.mark.parametrize("asked", [[], ["weights.safetensors"]])
def test_damage_is_found_in_every_file(model: Path, damage: str, asked: list[str]) -> None:
    file = model / "weights.safetensors"
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        changed = {"flip": b"\x80" + content[1:], "cut": content[:-1], "grow": content + b"\0"}[damage]
        file.write_bytes(changed)
    with pytest.raises(StoreError, match=r"weights.safetensors is (damaged|missing)"):
        read_model(model, asked)


def test_a_foreign_folder_is_named(model: Path) -> None:
    with pytest.raises(StoreError, match="no such does not exist: expected the folder of a unispect model"):
        read_model(model.parent / "no such", [])
    with pytest.raises(StoreError, match=r"is not a unispect model: no MANIFEST.json"):
        read_model(model.parent, [])
    with pytest.raises(StoreError, match=r"is not a unispect model: no MANIFEST.json"):
        read_model(model / "empty", [])
    with pytest.raises(StoreError, match=r"holds no card.md: it holds config.toml, empty"):
        read_model(model, ["card.md"])


@pytest.mark.parametrize(
    ("manifest", "text"),
    [
        ("{", "MANIFEST.json is damaged"),
        ("[1]", "is not a unispect model"),
        ('{"format": "onnx"}', "has format 'onnx', expected 'unispect-model'"),
        ('{"format": "unispect-model", "version": 2, "files": {}}', "newer unispect: model version 2, .* upgrade"),
        ('{"format": "unispect-model", "version": "1", "files": {}}', "is damaged: version '1'"),
        ('{"format": "unispect-model", "version": 1}', "is damaged"),
        ('{"format": "unispect-model", "version": 1, "files": ["a"]}', "is damaged"),
    ],
)
def test_a_manifest_of_another_kind_is_named(model: Path, manifest: str, text: str) -> None:
    (model / "MANIFEST.json").write_text(manifest)
    with pytest.raises(StoreError, match=text):
        read_model(model, [])


def test_a_model_of_a_newer_version_is_not_overwritten(model: Path) -> None:
    (model / "MANIFEST.json").write_text('{"format": "unispect-model", "version": 2, "files": {}}')
    with pytest.raises(StoreError, match=r"newer unispect.*left alone"):
        write_folder(model, FILES, overwrite=True)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for write in (
        lambda: write_folder(tmp_path / "file" / "model", FILES),
        lambda: write_checkpoint(tmp_path / "file" / "c", {}, {}),
    ):
        with pytest.raises(StoreError, match=r"cannot be written: (Not a directory|File exists)"):
            write()


@pytest.mark.parametrize("when", ["_write_files", "_move_into_place"])
def test_a_failing_writer_leaves_the_old_model_and_no_litter(
    model: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def fail(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, when, fail)
    with pytest.raises(StoreError, match="model cannot be written: No space left on device"):
        write_folder(model, {"new": b"1"}, overwrite=True)
    assert read_model(model, list(FILES)) == FILES
    assert names(model.parent) == ["model"]


# Writers that are killed: each event that Python reports for a file operation is a moment to die at.

KILLED = """
import os, signal, sys
from pathlib import Path
from unispect import store

def watched(moment):
    seen = 0
    def watch(event, arguments):
        nonlocal seen
        if event in {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}:
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
    return watch

if sys.argv[2] == "two steps":
    store._exchange = lambda one, other: False
status, moment = 1, 0
while status:
    moment += 1
    place = Path(sys.argv[1]) / str(moment) / "model"
    store.write_folder(place, {"old": b"0"})
    child = os.fork()  # a new Python for every moment would take long
    if child == 0:
        sys.addaudithook(watched(moment))
        store.write_folder(place, {"new": b"1", "more": b"2"}, overwrite=True)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
"""
OLD, NEW = {"old": b"0"}, {"new": b"1", "more": b"2"}


def found(place: Path) -> dict[str, bytes]:
    manifest = json.loads((place / "MANIFEST.json").read_text())
    return read_model(place, list(manifest["files"]))


def swaps_in_one_step(folder: Path) -> bool:
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    return store._exchange(folder / "a", folder / "b")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes of the POSIX kind")
@pytest.mark.parametrize("swap", ["one step", "two steps"])
def test_a_writer_killed_at_any_moment_loses_nothing(tmp_path: Path, swap: str) -> None:
    if swap == "one step" and not swaps_in_one_step(tmp_path):
        pytest.skip("this disk cannot swap folders in one step")
    runs = tmp_path / "runs"
    subprocess.run([sys.executable, "-c", KILLED, str(runs), swap], check=True)
    outcomes = [outcome(run / "model", swap) for run in runs.iterdir()]
    assert OLD in outcomes
    assert NEW in outcomes
    assert len(outcomes) > 10  # moments to die at were found


def outcome(place: Path, swap: str) -> dict[str, bytes]:
    """What a killed writer left in place, after the next writer came by."""
    if swap == "one step":  # between two steps the old model may be out of place, until the next writer
        assert found(place) in (OLD, NEW), place
    write_checkpoint(place.parent / "other", {}, {})  # of something else: touches nothing of the model
    store._sweep(place)
    kept = found(place)
    assert kept in (OLD, NEW), place
    write_folder(place, FILES, overwrite=True)
    assert [entry for entry in place.parent.iterdir() if entry.is_dir() and any(entry.iterdir())] == [place]
    return kept


def test_everything_is_on_the_disk_before_it_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    real_flush, real_rename = os.fsync, os.rename

    def flush(handle: int) -> None:
        real_flush(handle)
        flushed.append(os.fstat(handle).st_ino)

    def rename(old: Path, new: Path) -> None:
        assert {entry.stat().st_ino for entry in [old, *old.iterdir()]} == set(flushed)
        real_rename(old, new)
        flushed.append(-1)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "rename", rename)
    write_folder(tmp_path / "model", FILES)
    assert flushed[-2:] == [-1, tmp_path.stat().st_ino]


def test_a_live_writer_is_not_disturbed(tmp_path: Path) -> None:
    with store._workplace(tmp_path / "model") as workplace:
        (workplace / "half").write_bytes(b"")
        write_folder(tmp_path / "model", FILES)
        assert (workplace / "half").exists()
    assert names(tmp_path) == ["model"]


def test_what_a_killed_writer_of_another_model_left_is_not_touched(tmp_path: Path) -> None:
    others = [".model.b.12345678.partial", ".model.partial", ".model.1234567g.partial", "model.12345678.partial"]
    for name in [*others, ".model.12345678.partial"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_bytes(b"")
    write_folder(tmp_path / "model", FILES)
    assert names(tmp_path) == sorted([*others, "model"])


def test_writers_at_the_same_time_leave_one_whole_model(tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for _ in range(5):
                write_folder(tmp_path / "model", {"who": bytes([number]) * 1000}, overwrite=True)
        except StoreError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(set(read_model(tmp_path / "model", ["who"])["who"])) == 1
    assert names(tmp_path) == ["model"]


# Tensors


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, generator=generator)
    return {
        "double": x.double(), "half": x.half(), "brain": x.bfloat16(), "turned": x.T, "part": x[1:, ::2],
        "whole": torch.arange(3), "flag": torch.tensor([True, False]), "one": torch.tensor(3.5), "same": x, "again": x,
        "none": torch.empty(0, 3), "learnt": torch.nn.Parameter(x), "odd": torch.tensor([torch.nan, -torch.inf, -0.0]),
    }  # fmt: skip


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and bits(one) == bits(other)


def bits(x: torch.Tensor) -> bytes:
    return x.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()


def test_tensors_come_back_bit_by_bit() -> None:
    again = unpack_tensors(pack_tensors(tensors()))
    assert set(again) == set(tensors())
    for name, value in tensors().items():
        assert same_bits(value, again[name]), name
    assert unpack_tensors(pack_tensors({})) == {}


def test_arrays_of_numpy_come_back_as_tensors() -> None:
    fixed = np.arange(6.0).reshape(2, 3)[:, ::-1]
    fixed.flags.writeable = False
    again = unpack_tensors(pack_tensors({"x": fixed, "n": np.array(3), "b": np.array([True])}))
    np.testing.assert_array_equal(again["x"].numpy(), fixed)
    assert again["n"].item() == 3
    assert again["b"].dtype == torch.bool


def test_the_same_tensors_give_the_same_bytes() -> None:
    backwards = dict(reversed(tensors().items()))
    assert pack_tensors(tensors()) == pack_tensors(tensors()) == pack_tensors(backwards)


def test_what_is_stored_no_longer_follows_the_tensor() -> None:
    x = torch.zeros(3)
    again = unpack_tensors(pack_tensors({"x": x}))["x"]
    again += 1
    assert x.sum() == 0


def test_damaged_tensors_are_an_error_and_never_a_crash() -> None:
    content = pack_tensors({"x": torch.arange(4.0), "y": torch.ones(2, 2)})
    header = 8 + int.from_bytes(content[:8], "little")
    for end in range(len(content)):
        with pytest.raises(StoreError, match="tensors are damaged"):
            unpack_tensors(content[:end])
    for place in range(header):
        for value in (0, 57, 255):
            changed = content[:place] + bytes([value]) + content[place + 1 :]
            with suppress(StoreError):  # a name may change and still be a name
                unpack_tensors(changed)


# Checkpoints


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "run" / "checkpoint.safetensors"
    meta = {"epoch": 3, "rate": 0.1, "names": ["a", "ü"], "none": None, "deep": {"x": [1, 2.5]}}
    assert read_checkpoint(path) is None
    for epoch in (3, 4):
        write_checkpoint(path, tensors(), meta | {"epoch": epoch})
        again = read_checkpoint(path)
        assert again is not None
        assert again[1] == meta | {"epoch": epoch}
        assert all(same_bits(value, again[0][name]) for name, value in tensors().items())
    assert names(path.parent) == ["checkpoint.safetensors"]


def test_who_reads_a_checkpoint_while_it_is_replaced_reads_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "c"
    write_checkpoint(path, {"x": torch.ones(2)}, {"epoch": 1})
    content = path.read_bytes()
    with path.open("rb") as stream:
        write_checkpoint(path, {"x": torch.zeros(2)}, {"epoch": 2})
        assert stream.read() == content
    assert path.read_bytes() != content


def test_a_checkpoint_without_tensors_or_meta_is_one_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", {}, {})
    assert read_checkpoint(tmp_path / "c") == ({}, {})


def test_every_changed_byte_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    path = tmp_path / "c"
    write_checkpoint(path, {"x": torch.arange(3.0)}, {"epoch": 1})
    content = path.read_bytes()
    padding = content[8:].index(b"}}") + 10  # spaces after the header mean nothing
    header = 8 + int.from_bytes(content[:8], "little")
    for place in [*range(padding), *range(header, len(content))]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(StoreError, match=r"is damaged|is not a unispect checkpoint"):
            read_checkpoint(path)
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(StoreError, match="is damaged"):
            read_checkpoint(path)


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(pack_tensors(tensors()))
    with pytest.raises(StoreError, match="is not a unispect checkpoint"):
        read_checkpoint(tmp_path / "w")
    with pytest.raises(StoreError, match="cannot be read"):
        read_checkpoint(tmp_path)


def test_a_writer_of_a_checkpoint_that_fails_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    write_checkpoint(path, {"x": torch.ones(2)}, {"epoch": 1})

    def fail(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match="cannot be written: No space left"):
        write_checkpoint(path, {"x": torch.zeros(2)}, {"epoch": 2})
    again = read_checkpoint(path)
    assert again is not None
    assert again[1] == {"epoch": 1}
    assert names(tmp_path) == ["c"]


def test_the_leftover_of_a_killed_checkpoint_writer_goes_with_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".c.0123abcd.partial" / "new"
    left.mkdir(parents=True)
    (left / "checkpoint").write_bytes(b"half")
    write_checkpoint(tmp_path / "c", {}, {"epoch": 1})
    assert names(tmp_path) == ["c"]


# No pickle

UNSAFE_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def unsafe(source: str) -> list[str]:
    """What in a source may run code from a file."""
    spotted = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            spotted += [name for name in modules if name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.Call):
            spotted += unsafe_call(ast.unparse(node.func), {word.arg: word.value for word in node.keywords})
    return spotted


def unsafe_call(function: str, words: dict[str | None, ast.expr]) -> list[str]:
    given = {name: ast.unparse(value) for name, value in words.items()}
    loads = function == "torch.load" and given.get("weights_only") != "True"
    allowed = given.get("allow_pickle", "False") != "False"
    return [function] if function == "torch.save" or loads or allowed else []


def test_nothing_is_pickled_or_unpickled() -> None:
    spotted = {path.name: unsafe(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py")}
    assert spotted
    assert not {name: calls for name, calls in spotted.items() if calls}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "def f():\n    import joblib as j", "torch.save(x, p)",
        "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)",
        "np.save(p, x, allow_pickle=y)",
    ],
)  # fmt: skip
def test_the_search_for_pickle_finds_it(source: str) -> None:
    assert unsafe(source)


@pytest.mark.parametrize("source", ["torch.load(p, weights_only=True)", "np.load(p)", "np.load(p, allow_pickle=False)"])
def test_the_search_for_pickle_lets_safe_calls_pass(source: str) -> None:
    assert not unsafe(source)
