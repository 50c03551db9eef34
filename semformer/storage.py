"""Where a store keeps its bytes: files by name, whose ages are told by the storage's own clock.

A name has parts between slashes ("leases/<digest>/3"). `Folder` is a folder; `semformer.s3.Bucket` is a bucket. While
the storage cannot be reached, every call is repeated until it succeeds or the storage's patience ends.
"""

import copy
import errno
import functools
import logging
import os
import secrets
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from semformer.errors import StoreError

T = TypeVar("T")
R = TypeVar("R")
AT_ONCE = 16
"""Requests to a storage at the same time."""
AWAY = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH}
log = logging.getLogger(__name__)


class StorageUnreachable(StoreError):
    """The storage was away for longer than its patience. Nothing is lost; the same may succeed later."""


@dataclass(frozen=True)
class Entry:
    size: int  # bytes
    age: float  # seconds since it was written or touched


class Storage(ABC):
    """`location` names it for people, and for `semformer.store.open_store`; `patience` is in seconds."""

    def __init__(self, location: str, patience: float):
        self.location, self.patience = location, patience

    def patient(self, seconds: float) -> Self:
        """The same storage with another patience."""
        other = copy.copy(self)
        other.patience = seconds
        return other

    def retry(self, call: Callable[[], T]) -> T:
        """The result of call(), repeated ever more slowly while the storage cannot be reached.

        `call` must bear repetition. Raises StorageUnreachable when the patience ends, and any other error of `call`.
        """
        pause, end = 0.1, None
        while True:
            try:
                return call()
            except Exception as error:
                if not self.is_away(error):
                    raise
                if end is None:
                    end = time.monotonic() + self.patience
                    if self.patience:
                        log.warning("%s cannot be reached, trying again: %s", self.location, error)
                if time.monotonic() >= end:
                    raise StorageUnreachable(
                        f"the store {self.location} could not be reached for {self.patience:.0f} s ({error}). "
                        "Check that it is there, then run again: nothing published is lost."
                    ) from error
                time.sleep(min(pause, max(0.0, end - time.monotonic())))
                pause = min(2 * pause, 5.0)

    @abstractmethod
    def is_away(self, error: Exception) -> bool:
        """Whether `error` says that the storage cannot be reached now."""

    @abstractmethod
    def entries(self, prefix: str) -> dict[str, Entry]:
        """All files whose names start with `prefix`."""

    @abstractmethod
    def folders(self, prefix: str) -> list[str]:
        """The next parts of all names that start with `prefix` ("" or "caae/"), where more follows; in order."""

    @abstractmethod
    def read(self, name: str) -> tuple[bytes, float]:
        """Content and age; raises FileNotFoundError."""

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless there is one; of several who try, one gets True."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Write or replace a file, so that readers see the old content or the new."""

    @abstractmethod
    def touch(self, name: str) -> None:
        """Set the age to 0; raises FileNotFoundError."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove the file of this name, if there is one."""

    @abstractmethod
    def remove_folder(self, name: str) -> None:
        """Remove every file below `name`/."""


def at_once(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """function(item) of each, some at the same time. Raises what the first of them raises that fails."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(function, items))


def patiently(method: Callable[..., T]) -> Callable[..., T]:
    """Makes a method of a storage one that waits for the storage to come back."""

    @functools.wraps(method)
    def repeated(self: Storage, *args: Any) -> T:
        return self.retry(lambda: method(self, *args))

    return repeated


class Folder(Storage):
    """A folder on a disk, or one that several hosts have mounted."""

    def __init__(self, root: Path, patience: float):
        super().__init__(str(root), patience)
        self.root = root

    def is_away(self, error: Exception) -> bool:
        if not isinstance(error, OSError):
            return False
        return error.errno in AWAY or (error.errno == errno.ENOENT and not self.root.exists())

    @patiently
    def entries(self, prefix: str) -> dict[str, Entry]:
        folder, _, start = prefix.rpartition("/")
        now, found = self._now(), {}
        waiting = [item for item in _children(self.root / folder) if item.name.startswith(start)]
        while waiting:
            item = waiting.pop()
            with suppress(FileNotFoundError):  # removed meanwhile
                if item.is_dir():
                    waiting += _children(item)
                else:
                    state = item.stat()
                    found[item.path.removeprefix(f"{self.root}/")] = Entry(state.st_size, now - state.st_mtime)
        return found

    @patiently
    def folders(self, prefix: str) -> list[str]:
        self.root.stat()  # raises where it is away
        return sorted(item.name for item in _children(self.root / prefix) if item.is_dir())

    @patiently
    def read(self, name: str) -> tuple[bytes, float]:
        path = self.root / name
        changed = path.stat().st_mtime
        return path.read_bytes(), max(0.0, self._now() - changed)

    @patiently
    def create(self, name: str, content: bytes) -> bool:
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
        except OSError:
            path.unlink()
            raise
        return True

    @patiently
    def write(self, name: str, content: bytes) -> None:
        partial = self.root / "tmp" / f"write-{secrets.token_hex(8)}"
        try:
            partial.write_bytes(content)
            os.replace(partial, self.root / name)
        finally:
            partial.unlink(missing_ok=True)

    @patiently
    def touch(self, name: str) -> None:
        os.utime(self.root / name)

    @patiently
    def remove(self, name: str) -> None:
        if not (self.root / name).is_dir():
            (self.root / name).unlink(missing_ok=True)

    @patiently
    def remove_folder(self, name: str) -> None:
        """All at once for readers: it is moved away first."""
        away = self.root / "tmp" / f"removed-{secrets.token_hex(8)}"
        with suppress(FileNotFoundError):
            os.rename(self.root / name, away)
        shutil.rmtree(away, ignore_errors=True)

    def _now(self) -> float:
        """By the file system's clock, which also stamps the files: hosts' clocks may differ."""
        clock = self.root / "clock"
        clock.touch()
        return clock.stat().st_mtime


def _children(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as items:
        return list(items)
    return []
