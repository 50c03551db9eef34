"""Which files leave a full cache, and what counts as there."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from semformer.store import cache as module
from semformer.store.cache import IN_USE, Cache


@pytest.fixture
def fill(tmp_path):
    """fill(name=(bytes, seconds since its last use)...) -> their paths."""

    def fill(**files: tuple[int, float]) -> dict[str, Path]:
        paths = {}
        for name, (size, age) in files.items():
            paths[name] = tmp_path / "caae" / "digest" / name
            paths[name].parent.mkdir(parents=True, exist_ok=True)
            paths[name].write_bytes(bytes(size))
            os.utime(paths[name], (time.time() - age,) * 2)
        return paths

    return fill


def left(paths: dict[str, Path]) -> set[str]:
    return {name for name, path in paths.items() if path.exists()}


OLD = IN_USE + 100


@pytest.mark.parametrize(("limit", "expected"), [(30, "abc"), (29, "bc"), (20, "bc"), (19, "c"), (0, "")])
def test_the_least_recently_used_go_until_there_is_room(fill, tmp_path, limit, expected):
    paths = fill(a=(10, OLD + 3), c=(10, OLD + 1), b=(10, OLD + 2))
    Cache(tmp_path, limit).added([])
    assert left(paths) == set(expected)


def test_what_was_in_use_just_now_stays_whatever_the_limit(fill, tmp_path):
    paths = fill(a=(10, OLD), b=(10, IN_USE - 100), c=(10, OLD + 1), new=(10, OLD))
    Cache(tmp_path, 5).added([paths["new"]])
    assert left(paths) == {"b", "new"}


def test_what_was_added_is_used_now_and_counts(fill, tmp_path, monkeypatch):
    paths, looks, real = fill(a=(60, OLD)), [], Cache._files
    monkeypatch.setattr(Cache, "_files", lambda self: looks.append(1) or real(self))
    monkeypatch.setattr(module, "SLACK", 0.5)
    cache = Cache(tmp_path, 100)
    cache.added([])
    assert len(looks) == 1, "the first time, it may be full"
    more = fill(b=(49, OLD), c=(1, OLD))
    cache.added([more["b"]])
    assert len(looks) == 1
    cache.added([more["c"]])
    assert len(looks) == 2, "half of its limit has come"
    assert left(paths | more) == {"b", "c"}
    cache.added([])
    assert len(looks) == 2


def test_what_is_no_artifact_neither_counts_nor_goes(fill, tmp_path):
    paths = fill(a=(10, OLD))
    for name in ("checkpoints/caae/x", "tmp/y", "roots/z", "clock"):
        paths[name] = tmp_path / name
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        paths[name].write_bytes(bytes(1000))
        os.utime(paths[name], (0, 0))
    Cache(tmp_path, 10).added([])
    assert left(paths) == set(paths)


def test_a_file_that_another_process_has_removed_is_gone(fill, tmp_path, monkeypatch):
    paths = fill(a=(10, OLD))
    gone = [(0.0, 10, tmp_path / "caae" / "digest" / "gone")]
    real = Cache._files
    monkeypatch.setattr(Cache, "_files", lambda self: [*gone, *real(self)])
    Cache(tmp_path, 10).added([])
    assert left(paths) == {"a"}


def test_a_file_is_there_if_it_is_what_is_told_and_is_used_now(fill, tmp_path):
    path, cache = fill(a=(10, OLD))["a"], Cache(tmp_path, 100)
    right = {"size": 10, "sha256": hashlib.sha256(bytes(10)).hexdigest()}
    assert not cache.has(path, right | {"size": 9}, verify=False)
    assert not cache.has(path, right | {"sha256": "0"}, verify=True)
    assert not cache.has(tmp_path / "caae" / "b", right, verify=False)
    assert path.stat().st_mtime < time.time() - IN_USE, "who finds another file does not use it"
    assert cache.has(path, right | {"sha256": "0"}, verify=False)
    assert path.stat().st_mtime > time.time() - IN_USE
    assert cache.has(path, right, verify=True)
