"""Where a store keeps its bytes: files by name, whose ages are told by the storage's own clock, and artifacts.

A name has parts between slashes ("leases/<digest>/3"). `folder.Folder` is a folder, `bucket.Bucket` a bucket. While the
storage cannot be reached, every call is repeated until it succeeds or the storage's patience ends.
"""

import copy
import functools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from semformer.errors import StoreError
from semformer.keys import StageKey
from semformer.store.artifact import Artifact
from semformer.store.local import Local

T = TypeVar("T")
R = TypeVar("R")
PARTIAL = ".partial"
"""How the name of a checkpoint ends that is being written."""
AT_ONCE = 16
"""Requests to a storage at the same time."""
log = logging.getLogger(__name__)


class StorageUnreachable(StoreError):
    """The storage was away for longer than its patience. Nothing is lost; the same may succeed later."""


@dataclass(frozen=True)
class Entry:
    size: int  # bytes
    age: float  # seconds since it was written or touched


class Storage(ABC):
    """`location` names it for people, and for `store.open_store`; `patience` is in seconds.

    `local` is where artifacts are worked on and read: the files of one are in local.root / `place`.
    """

    BELOW_DIGEST = ""
    """What follows <stage>/<digest> in a `place`, as a regular expression."""

    def __init__(self, location: str, patience: float, local: Local):
        self.location, self.patience, self.local = location, patience, local

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

    # Artifacts, each published with its manifest, all at once or not at all

    @abstractmethod
    def place(self, stage: str, digest: str, sha256: str) -> str:
        """The folder of an artifact's files, by name; `sha256` is that of its manifest."""

    @abstractmethod
    def stages(self) -> list[str]:
        """Those of which something is published, in order."""

    @abstractmethod
    def digests(self, stage: str) -> Iterable[str]:
        """Of what is published of a stage."""

    @abstractmethod
    def ages(self, stage: str) -> dict[str, float]:
        """Digest -> age (which orders them; by which clock does not matter) of what is published of a stage."""

    @abstractmethod
    def manifest(self, stage: str, digest: str) -> bytes:
        """Of a published artifact. Raises FileNotFoundError."""

    @abstractmethod
    def publish(self, workspace: Path, artifact: Artifact, manifest: bytes) -> bool:
        """Make the files in `workspace`, its manifest among them, those of an artifact; False if there is one."""

    @abstractmethod
    def withdraw(self, artifact: Artifact) -> None:
        """Remove what a `publish` has left that found another artifact there."""

    @abstractmethod
    def set_aside(self, key: StageKey, manifest: bytes | None) -> str | None:
        """Move what is damaged away, unless its manifest (None: it has none) is another by now; returns where to."""

    @abstractmethod
    def sizes(self, artifact: Artifact) -> dict[str, int]:
        """Of its files that are there, in bytes."""

    @abstractmethod
    def have(self, artifact: Artifact, name: str, *, verify: bool = False) -> None:
        """Have a file of an artifact in its local place, and with `verify` its contents as its manifest tells.

        Raises DamagedArtifact where that is impossible.
        """

    @abstractmethod
    def workspace(self, key: StageKey) -> Path:
        """A fresh local folder to build an artifact in."""

    # Checkpoints, under a name of their own

    @abstractmethod
    def checkpoints(self, key: StageKey) -> Path:
        """The local folder for resumable state of an unfinished stage, with what was saved last."""

    @abstractmethod
    def save_checkpoints(self, key: StageKey) -> None:
        """Make them last beyond this host."""

    @abstractmethod
    def remove_checkpoints(self, key: StageKey) -> None: ...


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
