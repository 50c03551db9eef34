"""Leases: of the processes that want one key, one builds it.

    <folder>/<digest>.<generation>   who builds the key (JSON); its modification time is the last heartbeat
    <folder>/clock                   touched to read the file system's clock

Generations count up; the highest is the current one and is never removed, so a number is never given twice and
a stale holder can only ever touch its own file. Release sets the heartbeat to 0.
"""

import hashlib
import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

from semformer.keys import StageKey

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeaseHolder:
    host: str
    pid: int
    since: float  # seconds since the epoch, by the holder's clock
    age: float  # seconds since its last heartbeat, by the file system's clock

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (last heartbeat {self.age:.0f} s ago)"


class LeaseHeld(Exception):
    """Another live process (or another part of this one) is building the key; see `.holder`."""

    def __init__(self, key: StageKey, holder: LeaseHolder):
        super().__init__(f"{key} is being built by {holder}")
        self.holder = holder


class LeaseLost(Exception):
    """The lease expired and another process has taken it over."""


class Leases:
    """The leases in a folder, which must exist.

    `heartbeat` and `expiry` are seconds: a lease not renewed for `expiry` may be taken over. Raises ValueError
    unless expiry is at least twice the heartbeat.
    """

    def __init__(self, folder: Path, heartbeat: float, expiry: float):
        if not 0 < 2 * heartbeat <= expiry:
            raise ValueError(f"expiry ({expiry} s) must be at least twice the heartbeat ({heartbeat} s)")
        self.folder, self.heartbeat, self.expiry = folder, heartbeat, expiry

    def take(self, key: StageKey) -> "Lease | None":
        """The lease on `key`, or None if it is held or another process was faster; raises OSError."""
        generation = self.latest(key) + 1
        if self.holder(key) is not None:
            return None
        path = self.path(key, generation)
        note = {"host": socket.gethostname(), "pid": os.getpid(), "machine": machine(), "since": time.time()}
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return None
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(note, file)
        except OSError:
            os.utime(path, (0, 0))
            raise
        if self.latest(key) > generation:  # we looked too long ago: an old number
            path.unlink(missing_ok=True)
            return None
        self.remove_before(key, generation)
        return Lease(self, key, generation)

    def holder(self, key: StageKey) -> LeaseHolder | None:
        """Who is building `key` now; None if nobody, or their lease has expired or their process is gone."""
        while generation := self.latest(key):
            path = self.path(key, generation)
            try:
                renewed, text = path.stat().st_mtime, path.read_text(encoding="utf-8")
            except FileNotFoundError:  # taken over and cleaned up between the two looks
                continue
            age = max(0.0, self.now() - renewed)
            try:
                note = json.loads(text)
            except ValueError:  # created, not yet written
                note = {"host": "an unknown host", "pid": 0, "machine": "", "since": renewed}
            gone = note["machine"] == machine() and not is_alive(note["pid"])
            if gone or age > self.expiry:
                return None
            return LeaseHolder(note["host"], note["pid"], note["since"], age)
        return None

    def path(self, key: StageKey, generation: int) -> Path:
        return self.folder / f"{key.digest}.{generation}"

    def latest(self, key: StageKey) -> int:
        """The current generation, 0 if `key` never had a lease."""
        return max(self._generations(key), default=0)

    def remove_before(self, key: StageKey, generation: int) -> None:
        for older in self._generations(key):
            if older < generation:
                self.path(key, older).unlink(missing_ok=True)

    def now(self) -> float:
        """The time by the file system's clock, which also stamps the heartbeats: hosts' clocks may differ."""
        clock = self.folder / "clock"
        clock.touch()
        return clock.stat().st_mtime

    def _generations(self, key: StageKey) -> list[int]:
        return [int(p.name.rpartition(".")[2]) for p in self.folder.glob(f"{key.digest}.*")]


class Lease:
    """The right to build one key, kept by a heartbeat thread until `release` or the end of the `with` block."""

    def __init__(self, leases: Leases, key: StageKey, generation: int):
        self.key, self.generation = key, generation
        self._leases, self._path = leases, leases.path(key, generation)
        self._lost, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease {key}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    def check(self) -> None:
        """Raises LeaseLost if another process has taken over; call it between epochs."""
        if self.lost:
            raise LeaseLost(f"the lease on {self.key} expired and another process has taken it over")

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        try:
            os.utime(self._path, (0, 0))
            self._leases.remove_before(self.key, self.generation)
        except OSError as error:
            if not self.lost:
                log.warning("could not release the lease on %s (%s); it will expire", self.key, error)

    def _beat(self) -> None:
        while not self._stop.wait(self._leases.heartbeat):
            try:
                if self._leases.latest(self.key) > self.generation:
                    self._lost.set()
                    return
                os.utime(self._path)
            except FileNotFoundError:
                self._lost.set()
                return
            except OSError as error:
                log.warning("heartbeat of %s failed, trying again: %s", self.key, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@cache
def machine() -> str:
    """Names the set of processes among which a pid is unique: the host, its boot and the pid namespace."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # not Linux
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def is_alive(pid: int) -> bool:
    """Whether a process of this `machine` still runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
