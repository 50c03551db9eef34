"""Leases: of the processes that want one key, one builds it.

    leases/<digest>.<generation>   who builds the key (JSON); its age is the time since the last heartbeat

Generations count up; the highest is the current one and is not removed, so a number is never given twice and a stale
holder can only ever touch its own file.
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

from semformer.errors import UserError
from semformer.keys import StageKey
from semformer.storage import Storage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeaseHolder:
    host: str
    pid: int
    since: float  # seconds since the epoch, by the holder's clock
    age: float  # seconds since its last heartbeat, by the storage's clock
    inputs: tuple[str, ...] = ()  # digests of what it reads

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
    """The leases in a storage.

    `heartbeat` and `expiry` are seconds: a lease not renewed for `expiry` may be taken over. Raises ValueError
    unless expiry is at least twice the heartbeat.
    """

    def __init__(self, storage: Storage, heartbeat: float, expiry: float):
        if not 0 < 2 * heartbeat <= expiry:
            raise ValueError(f"expiry ({expiry} s) must be at least twice the heartbeat ({heartbeat} s)")
        self.storage, self.heartbeat, self.expiry = storage, heartbeat, expiry

    def take(self, key: StageKey) -> "Lease | None":
        """The lease on `key`, or None if it is held or another process was faster; raises OSError."""
        generation = self.latest(key) + 1
        if self.holder(key) is not None:
            return None
        note = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": machine(),
            "since": time.time(),
            "inputs": list(key.spec.get("inputs", {}).values()),
        }
        if not self.storage.create(self.name(key, generation), json.dumps(note).encode()):
            return None
        if self.latest(key) > generation:  # we looked too long ago: an old number
            self.storage.remove(self.name(key, generation))
            return None
        self.remove_before(key, generation)
        return Lease(self, key, generation)

    def holder(self, key: StageKey) -> LeaseHolder | None:
        """Who is building `key` now; None if nobody, or their lease has expired or their process is gone."""
        while generation := self.latest(key):
            try:
                content, age = self.storage.read(self.name(key, generation))
            except FileNotFoundError:  # taken over and cleaned up between the two looks
                continue
            return self._holder(content, age)
        return None

    def live(self) -> dict[str, list[str]]:
        """Digest -> digests of its inputs, for every key that is being built now."""
        found = {}
        for name, entry in self.storage.entries("leases/").items():
            if entry.age > self.expiry:
                continue
            with suppress(FileNotFoundError):
                content, age = self.storage.read(name)
                if holder := self._holder(content, age):
                    found[Path(name).stem] = list(holder.inputs)
        return found

    def name(self, key: StageKey, generation: int) -> str:
        return f"leases/{key.digest}.{generation}"

    def latest(self, key: StageKey) -> int:
        """The current generation, 0 if `key` never had a lease."""
        return max(self._generations(key), default=0)

    def remove_before(self, key: StageKey, generation: int) -> None:
        for older in self._generations(key):
            if older < generation:
                self.storage.remove(self.name(key, older))

    def _holder(self, content: bytes, age: float) -> LeaseHolder | None:
        try:
            note = json.loads(content)
        except ValueError:  # created, not yet written
            note = {"host": "an unknown host", "pid": 0, "machine": "", "since": time.time() - age}
        gone = note["machine"] == machine() and not is_alive(note["pid"])
        if gone or age > self.expiry:
            return None
        return LeaseHolder(note["host"], note["pid"], note["since"], age, tuple(note.get("inputs", ())))

    def _generations(self, key: StageKey) -> list[int]:
        return [int(name.rpartition(".")[2]) for name in self.storage.entries(f"leases/{key.digest}.")]


class Lease:
    """The right to build one key, kept by a heartbeat thread until `release` or the end of the `with` block."""

    def __init__(self, leases: Leases, key: StageKey, generation: int):
        self.key, self.generation = key, generation
        self._leases, self._name = leases, leases.name(key, generation)
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
        leases = self._with_patience(self._leases.expiry)  # after which it has expired anyway
        try:
            leases.storage.expire(self._name)
            leases.remove_before(self.key, self.generation)
        except (OSError, UserError) as error:
            if not self.lost:
                log.warning("could not release the lease on %s (%s); it will expire", self.key, error)

    def _beat(self) -> None:
        leases, failing = self._with_patience(0.0), False  # the next beat is the next try
        while not self._stop.wait(leases.heartbeat):
            try:
                if leases.latest(self.key) != self.generation:
                    self._lost.set()
                    return
                leases.storage.touch(self._name)
                failing = False
            except FileNotFoundError:
                self._lost.set()
                return
            except (OSError, UserError) as error:
                if not failing:
                    log.warning("heartbeat of %s failed, trying again: %s", self.key, error)
                failing = True

    def _with_patience(self, seconds: float) -> Leases:
        return Leases(self._leases.storage.patient(seconds), self._leases.heartbeat, self._leases.expiry)

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
