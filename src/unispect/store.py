"""Saved models and checkpoints: files with hashes, written whole or not at all, read without running anything.

A model is a folder of files beside MANIFEST.json, which names the format, its version and the sha256 of every file.
Tensors are safetensors, the rest is text; nothing is unpickled. Hashes find damage, not malice: they are not signed.

A writer works in a hidden sibling `.NAME.xxxxxxxx.partial`, flushes it to the disk and moves the result into place in
one step. Killed at any moment, it leaves the old model or the new one, and a sibling that the next writer removes.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unispect.errors import StoreError

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "MANIFEST.json"
MODEL, EXPORT = "unispect-model", "unispect-export"  # formats
NAMES = {MODEL: "model", EXPORT: "exported model"}  # of the formats, for people
VERSION = 1
CHECKPOINT = "unispect-checkpoint"


def write_folder(path: Path, files: Mapping[str, bytes], overwrite: bool = False, kind: str = MODEL) -> Path:
    """A folder of this format with these files, in place of an older one of it only where `overwrite` says so."""
    target = Path(os.path.realpath(path))  # through a link, the folder it points to is replaced
    for name in files:
        _check_name(name)
    try:
        _check_target(target, path, overwrite, kind)
        with _workplace(target) as workplace:
            new = workplace / "new"
            _write_files(new, {**files, MANIFEST: _manifest(files, kind)})
            _move_into_place(new, target, workplace, path, overwrite)
        _flush(target.parent)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}") from error
    return Path(path)


def rewrite(
    path: Path, out: Path, change: Callable[[Mapping[str, bytes]], Mapping[str, bytes]], overwrite: bool = False
) -> Path:
    """A folder of a known format with some files changed, in place where `out` is `path`; all others as they are.

    change   all files -> those that change

    Raises StoreError where it is no such folder, or is damaged.
    """
    kind = kind_of(path)
    if kind is None:
        raise StoreError(f"{path} is not a unispect model: expected a folder that `unispect fit` or `unispect export` wrote")
    files = read_model(path, None, kind)
    return write_folder(out, files | dict(change(files)), overwrite, kind)


def check_free(path: Path, overwrite: bool = False, kind: str = MODEL) -> None:
    """Raises StoreError where `write_folder` would: to be asked before long work."""
    _check_target(Path(os.path.realpath(path)), path, overwrite, kind)


def read_model(path: Path, names: Sequence[str] | None = None, kind: str = MODEL) -> dict[str, bytes]:
    """The named files of a folder of this format, or all, after every file in it was found whole."""
    path = Path(path)
    for name in names or ():
        _check_name(name)
    hashes = _read_manifest(path, kind)
    absent = sorted(set(names or ()) - set(hashes))
    if absent:
        raise StoreError(f"{path} holds no {', '.join(absent)}: it holds {', '.join(sorted(hashes))}")
    wanted = {}
    for name, digest in hashes.items():
        content = _read_whole(path / name, digest)
        if names is None or name in names:
            wanted[name] = content
    return wanted


def kind_of(path: Path) -> str | None:
    """The format of a folder that `write_folder` wrote, MODEL or EXPORT; None for anything else."""
    try:
        manifest = json.loads((Path(path) / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    return found if found in NAMES else None


def write_file(path: Path, content: bytes) -> None:
    """A file with this content, in place of an older one in one step."""
    target = Path(os.path.realpath(path))
    try:
        with _workplace(target) as workplace:
            _write_files(workplace / "new", {"content": content})
            os.replace(workplace / "new" / "content", target)
        _flush(target.parent)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}") from error


def pack_json(value: Any) -> bytes:
    """Plain values as a file of JSON."""
    return json.dumps(value, indent=1, sort_keys=True).encode()


def pack_tensors(tensors: Mapping[str, Tensor | np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """The tensors as one safetensors file."""
    from safetensors.torch import save

    return save({name: _stored(value) for name, value in tensors.items()}, dict(metadata) if metadata else None)


def unpack_tensors(content: bytes) -> dict[str, Tensor]:
    """The inverse of `pack_tensors`; the tensors are on the CPU."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(content)
    except (SafetensorError, KeyError) as error:
        raise StoreError(f"tensors are damaged: {error}; save the model again") from error


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor | np.ndarray], meta: Mapping[str, Any]) -> None:
    """One file with tensors and JSON-plain `meta`, in place of an older one in one step."""
    stored = {name: _stored(value) for name, value in tensors.items()}
    text = json.dumps(meta)
    write_file(path, pack_tensors(stored, {"format": CHECKPOINT, "meta": text, "sha256": _digest(stored, text)}))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `write_checkpoint` wrote; None where there is no file."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    try:
        tensors, header = unpack_tensors(content), _metadata(content)
    except (StoreError, ValueError, KeyError) as error:
        raise StoreError(f"checkpoint {path} is damaged: {error}; delete it to start anew") from error
    if header.get("format") != CHECKPOINT:
        raise StoreError(f"{path} is not a unispect checkpoint; choose another file")
    if header.get("sha256") != _digest(tensors, header.get("meta", "")):
        raise StoreError(f"checkpoint {path} is damaged: the hash does not fit; delete it to start anew")
    return tensors, json.loads(header["meta"])


# Reading


def _read_manifest(path: Path, kind: str) -> dict[str, str]:
    """File name -> sha256."""
    if not path.exists():
        raise StoreError(f"{path} does not exist: expected the folder of a unispect {NAMES[kind]}")
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(f"{path} is not a unispect {NAMES[kind]}: no {MANIFEST}") from error
    except OSError as error:
        raise StoreError(f"{path / MANIFEST} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise StoreError(f"{path / MANIFEST} is damaged: {error}; save the model again") from error
    _check_manifest(manifest, path, kind)
    return dict(manifest["files"])


def _check_manifest(manifest: Any, path: Path, kind: str) -> None:
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != kind:
        raise StoreError(f"{path} is not a unispect {NAMES[kind]}: {MANIFEST} has format {found!r}, expected {kind!r}")
    version, files = manifest.get("version"), manifest.get("files")
    if isinstance(version, int) and version > VERSION:
        raise StoreError(
            f"{path} was written by a newer unispect: model version {version}, this one reads up to {VERSION}; "
            "upgrade unispect"
        )
    if version != VERSION or not isinstance(files, dict):
        raise StoreError(f"{path / MANIFEST} is damaged: version {version!r} or list of files; save the model again")
    for name in files:
        _check_name(name)


def _read_whole(file: Path, digest: str) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise StoreError(f"{file.name} is missing or cannot be read in {file.parent}: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise StoreError(f"{file.name} is damaged: {file} does not fit its hash in {MANIFEST}; save the model again")
    return content


def _metadata(content: bytes) -> dict[str, str]:
    """The texts in the header of a safetensors file: 8 bytes of length, then JSON."""
    end = 8 + int.from_bytes(content[:8], "little")
    return dict(json.loads(content[8:end]).get("__metadata__") or {})


def _stored(value: Tensor | np.ndarray) -> Tensor:
    import torch

    # Copies: safetensors refuses tensors that share memory, such as views of one buffer.
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """sha256 of names, types, shapes and values. A safetensors file has no check of its own."""
    import torch

    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


# Writing


def _manifest(files: Mapping[str, bytes], kind: str) -> bytes:
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
    return (json.dumps({"format": kind, "version": VERSION, "files": hashes}, indent=2) + "\n").encode()


def _check_name(name: str) -> None:
    # A name from outside must not lead out of the folder.
    if name in ("", ".", "..", MANIFEST) or re.search(r"[/\\:\0]", name):
        raise StoreError(f"file name {name!r} in a model: expected a plain name without folders, and not {MANIFEST}")


def _check_target(target: Path, path: Path, overwrite: bool, kind: str) -> None:
    """An empty folder may be taken: nothing is lost."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        _read_manifest(target, kind)
    except StoreError as error:
        raise StoreError(f"{error}; what exists there is left alone: choose another -o") from error
    if not overwrite:
        raise StoreError(f"{path} exists; choose another -o or pass --overwrite")


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir()
    for name, content in files.items():
        with open(folder / name, "xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    _flush(folder)


def _move_into_place(new: Path, target: Path, workplace: Path, path: Path, overwrite: bool) -> None:
    if overwrite and target.exists():
        if not _exchange(new, target):
            os.rename(target, workplace / "old")
            os.rename(new, target)
        return
    try:
        os.rename(new, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not overwrite:
            raise StoreError(f"{path} exists; choose another -o or pass --overwrite") from error
        _move_into_place(new, target, workplace, path, overwrite)  # another writer was faster; ours comes later


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system cannot (other than Linux, some network disks)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


@contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """A hidden folder beside the target, locked as long as its writer lives."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    folder.mkdir()
    try:
        with locked(folder, wait=True):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Remove what killed writers of this target have left. The system frees the lock of a process that dies."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.partial")
    for folder in [entry for entry in target.parent.iterdir() if pattern.fullmatch(entry.name)]:
        try:
            # An empty one may be a live writer's that comes to its lock only now.
            if not any(folder.iterdir()):
                continue
            with locked(folder, wait=False):
                _remove_workplace(folder, target)
        except OSError:
            continue  # at work, or gone


def _remove_workplace(folder: Path, target: Path) -> None:
    # Its writer may have died between the two steps of a swap; then the only model is here.
    old = folder / "old"
    if old.exists() and not target.exists():
        os.rename(old, target)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """The folder for one process alone; BlockingIOError where another holds it and `wait` is false."""
    if sys.platform == "win32":  # a folder cannot be locked: take every other writer for alive
        if not wait:
            raise BlockingIOError
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            if not wait:
                raise  # with `wait`, a disk without locks, where no sweep gets one either
        yield
    finally:
        os.close(handle)


def _flush(folder: Path) -> None:
    """Names in a folder reach the disk with the folder, not with the files."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
