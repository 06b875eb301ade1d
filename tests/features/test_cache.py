import hashlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from unispect.errors import DataError, UnispectError
from unispect.features import cache as module
from unispect.features.cache import FeatureCache, FeatureSet, cache_folder
from unispect.features.engine import Engine
from unispect.types import Batch, Features

DAY = 86400


class Planted(Engine):
    """Two dense levels and a pooled one, made from the pixels by sums; counts the images that it is given."""

    precision = "f32"
    name = "planted"

    def __init__(self, fingerprint: str = "planted", gain: float = 1.0) -> None:
        self.own = fingerprint
        self.gain = gain
        self.images = 0

    @property
    def fingerprint(self) -> str:
        return self.own

    def __call__(self, images: Tensor) -> Features:
        self.images += len(images)
        x = self.gain * images.float() / 255
        fine = torch.cat([x, x.roll(1, 2), x.roll(2, 3) - 0.5], 1)
        return [fine, torch.nn.functional.avg_pool2d(fine, (2, 4))[:, :5], x.mean((2, 3), keepdim=True)]


def _pixels(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (number, 3, 6, 8), generator=generator, dtype=torch.uint8)


def _contents(images: Tensor) -> list[str]:
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images]


def _passes(images: Tensor, broken: frozenset[int] = frozenset(), size: int = 3) -> Callable[[list[int]], Iterator[Batch]]:
    def batches(wanted: list[int]) -> Iterator[Batch]:
        fine = [place for place in wanted if place not in broken]
        for start in range(0, len(fine), size):
            index = torch.tensor(fine[start : start + size])
            yield Batch(images[index], index)

    return batches


def _features(
    cache: FeatureCache, images: Tensor, engine: Engine, broken: frozenset[int] = frozenset(), key: str = "6x8"
) -> FeatureSet:
    paths = [Path(f"image{place}.png") for place in range(len(images))]
    return cache.features(paths, _contents(images), _passes(images, broken), engine, key)


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


def test_reads_what_the_engine_gave_to_half_precision(cache: FeatureCache) -> None:
    images, engine = _pixels(7), Planted()
    features = _features(cache, images, engine)
    expected = engine(images)
    assert features.shapes == [(9, 6, 8), (5, 3, 2), (3, 1, 1)]
    for place in range(7):
        for vectors, level in zip(features.read(place), expected, strict=True):
            rows = level[place].flatten(1).T
            assert vectors.dtype == np.float16
            assert not vectors.flags.writeable
            # Half precision keeps 11 bits: the error is at most half a step, 2^-11 of the value.
            assert np.all(np.abs(vectors.astype(np.float64) - rows.numpy()) <= np.abs(rows.numpy()) * 2**-11 + 1e-7)


def test_batches_are_all_images_in_order(cache: FeatureCache) -> None:
    images, engine = _pixels(7), Planted()
    passes = list(_features(cache, images, engine).batches(3))
    assert [index.tolist() for index, _ in passes] == [[0, 1, 2], [3, 4, 5], [6]]
    for number, level in enumerate(engine(images)):
        together = torch.cat([levels[number] for _, levels in passes])
        assert together.dtype == torch.float32
        assert together.is_contiguous()
        assert torch.equal(together, level.half().float())


def test_gather_equals_a_naive_loop(cache: FeatureCache) -> None:
    features = _features(cache, _pixels(5), Planted())
    random = np.random.default_rng(0)
    images, places = random.integers(0, 5, 4), random.integers(0, 48, (4, 6))
    expected = [features.read(int(image))[0][place] for image, row in zip(images, places, strict=True) for place in row]
    gathered = features.gather(0, images, places)
    assert gathered.dtype == torch.float32
    np.testing.assert_array_equal(gathered.numpy(), np.stack(expected).astype(np.float32))
    with pytest.raises(IndexError):
        features.gather(0, images, places + 48)


def test_levels_start_on_a_cache_line(cache: FeatureCache) -> None:
    for vectors in _features(cache, _pixels(1), Planted()).read(0):
        assert vectors.ctypes.data % 64 == 0
        assert vectors.flags.c_contiguous


def test_only_what_is_missing_is_computed(cache: FeatureCache) -> None:
    images, engine = _pixels(6), Planted()
    _features(cache, images[:4], engine)
    _features(cache, images, engine)
    _features(cache, images.flip(0), engine)
    assert engine.images == 6
    _features(cache, images, engine, key="other preparation")
    assert engine.images == 12
    _features(cache, images, other := Planted("other weights"))
    assert other.images == 6


def test_equal_files_are_computed_once(cache: FeatureCache) -> None:
    images, engine = _pixels(2)[[0, 1, 0, 0]], Planted()
    features = _features(cache, images, engine)
    assert engine.images == 2
    assert features.indices.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(features.read(0)[0], features.read(3)[0])


def test_broken_images_are_left_out_and_asked_for_again(cache: FeatureCache) -> None:
    images, engine = _pixels(5), Planted()
    features = _features(cache, images, engine, frozenset({0, 3}))
    assert features.indices.tolist() == [1, 2, 4]
    assert len(features) == 3
    np.testing.assert_array_equal(features.read(1)[0], _features(cache, images, engine).read(2)[0])
    assert engine.images == 5
    with pytest.raises(DataError, match="none of 5 images"):
        _features(cache, images, Planted("new"), frozenset(range(5)))


def test_progress_counts_what_is_missing(cache: FeatureCache) -> None:
    images, seen = _pixels(7), []
    _features(cache, images[:2], Planted())
    paths = [Path("x.png")] * 7
    cache.features(paths, _contents(images), _passes(images), Planted(), "6x8", lambda *state: seen.append(state))
    assert seen == [(3, 5), (5, 5)]


@pytest.mark.parametrize("value", [7e4, float("inf"), float("nan")])
def test_what_half_precision_cannot_hold_is_an_error_with_the_image(cache: FeatureCache, value: float) -> None:
    class Wild(Planted):
        def __call__(self, images: Tensor) -> Features:
            levels = super().__call__(images)
            levels[1][1, 2, 0, 0] = value
            return levels

    with pytest.raises(UnispectError, match=r"image1\.png: features of level 1 reach"):
        _features(cache, _pixels(3), Wild())


def _damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    damaged = {
        "empty": b"",
        "header": content[:20],
        "short": content[:-1],
        "long": content + b"\0",
        "zeros": bytes(len(content)),
        "version": content[:8] + b"\xff" + content[9:],
    }
    file.write_bytes(damaged[how])


@pytest.mark.parametrize("how", ["empty", "header", "short", "long", "zeros", "version"])
def test_a_damaged_file_is_computed_again(cache: FeatureCache, how: str) -> None:
    images, engine = _pixels(3), Planted()
    before = [level.copy() for level in _features(cache, images, engine).read(1)]
    _damage(next(cache.root.glob(f"*/*/{_contents(images)[1]}.f16")), how)
    after = _features(cache, images, engine).read(1)
    assert engine.images == 4
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_writer_killed_before_its_last_step_leaves_nothing_wrong(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(self: Path, target: Path) -> None:
        raise Killed

    images, engine = _pixels(3), Planted()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            _features(cache, images, engine)
    leftovers = list(cache.root.glob("*/*/*"))
    assert [file.suffix for file in leftovers] == [".tmp"]
    assert len(_features(cache, images, engine)) == 3
    assert cache.prune() == (0, 0)  # it could still belong to a running writer
    os.utime(leftovers[0], (0, 0))
    assert cache.prune()[0] == 1
    assert {file.suffix for file in cache.root.glob("*/*/*")} == {".f16"}


def _write_all(root: Path, rounds: int) -> None:
    for number in range(rounds):
        _features(FeatureCache(root), _pixels(40), Planted(), key=f"round {number}")


def test_two_processes_may_write_the_same_at_once(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_write_all, args=(tmp_path, 3)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    unused = Planted()
    for number in range(3):
        features = _features(FeatureCache(tmp_path), _pixels(40), unused, key=f"round {number}")
        np.testing.assert_array_equal(features.read(39)[2].squeeze(), unused(_pixels(40))[2][39].half().squeeze())
    assert unused.images == 3 * 40  # all by the comparison, none by the cache
    assert not list(tmp_path.glob("*/*/*.tmp"))


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files where the system lists them")
def test_no_more_images_are_open_than_allowed(tmp_path: Path) -> None:
    features = _features(FeatureCache(tmp_path, open_files=4), _pixels(30), Planted())
    before = _open_files()
    for _ in range(2):
        for place in range(30):
            features.read(place)
    assert _open_files() - before <= 4


def test_the_limit_of_the_process_bounds_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 100))
    assert module.affordable(4096) == 50
    assert module.affordable(10) == 10


def test_size_and_prune_by_fingerprint_and_all(cache: FeatureCache) -> None:
    _features(cache, _pixels(4), Planted())
    _features(cache, _pixels(2), Planted("other"))
    sizes = cache.size()
    assert sorted(files for files, _ in sizes.values()) == [2, 4]
    assert sum(size for _, size in sizes.values()) == sum(file.stat().st_size for file in cache.root.glob("*/*/*"))
    first = max(sizes, key=lambda name: sizes[name][0])
    assert cache.prune(fingerprint=first) == sizes[first]
    assert list(cache.size()) == [name for name in sizes if name != first]
    cache.prune(everything=True)
    assert cache.size() == {}
    assert list(cache.root.iterdir()) == []


def test_prune_by_last_use(tmp_path: Path) -> None:
    images = _pixels(4)
    now = 1000 * DAY
    cache = FeatureCache(tmp_path, clock=lambda: now)
    _features(cache, images, Planted())
    for file in cache.root.glob("*/*/*"):
        os.utime(file, (now - 40 * DAY,) * 2)
    _features(cache, images[:1], Planted())  # a use
    assert cache.prune(older_than_days=30)[0] == 3
    assert [file.stem for file in cache.root.glob("*/*/*")] == _contents(images[:1])


def test_prune_to_a_size_removes_the_least_recently_used(tmp_path: Path) -> None:
    images = _pixels(4)
    cache = FeatureCache(tmp_path)
    _features(cache, images, Planted())
    for age, content in enumerate(_contents(images)):
        os.utime(next(tmp_path.glob(f"*/*/{content}.f16")), (age + 1, age + 1))
    one = sum(size for _, size in cache.size().values()) // 4
    assert cache.prune(max_bytes=2 * one + 1) == (2, 2 * one)
    assert {file.stem for file in tmp_path.glob("*/*/*")} == set(_contents(images)[2:])


def test_pruned_while_in_use_says_so(cache: FeatureCache) -> None:
    features = _features(cache, _pixels(3), Planted())
    held = features.read(0)[0]
    cache.prune(everything=True)
    assert np.isfinite(held).all()  # what is mapped stays
    with pytest.raises(UnispectError, match="left the feature cache while it was in use"):
        features.read(1)


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UnispectError, match=r"cannot write to the feature cache.*UNISPECT_CACHE"):
        _features(FeatureCache(tmp_path / "file"), _pixels(1), Planted())


def test_the_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": "/x"}
    assert cache_folder(environment) == Path("/x/unispect")
    assert cache_folder({**environment, "UNISPECT_CACHE": "/y"}) == Path("/y")
    assert cache_folder({}).name == "unispect"
    monkeypatch.setenv("UNISPECT_CACHE", str(tmp_path))
    assert FeatureCache().root == tmp_path / "features"
