"""Leases: of the processes that want one key, one builds it.

    leases/<digest>/<number>            who builds the key (JSON); its age is the time since the last heartbeat
    leases/<digest>/<number>.released   empty: nobody does any more

Numbers count up. The newest file of a key alone counts, and it is not removed: so a number is never given twice, and a
stale holder can only ever touch its own file. Names and ages, which one listing tells, say what is being built.
"""

import json
import logging
import os
import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, Self

from semformer.errors import UserError
from semformer.keys import DIGEST, StageKey
from semformer.store.processes import is_alive, machine
from semformer.store.storage import Storage

NAME = re.compile(rf"leases/(?P<digest>{DIGEST})/(?P<number>\d+)(?P<released>\.released)?")
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


class LeaseLost(UserError):
    """The lease expired and another process has taken it over: the same may be found or waited for now."""


class LeaseFile(NamedTuple):
    """One of the files of a key, which are written in this order."""

    number: int
    released: bool
    name: str


NEVER = LeaseFile(0, True, "")
"""In place of the newest file of a key that was never taken."""


class Leases:
    """The leases in a storage.

    `heartbeat` and `expiry` are seconds: a lease not renewed for `expiry` may be taken over. Raises ValueError
    unless expiry is at least twice the heartbeat.
    """

    def __init__(self, storage: Storage, heartbeat: float, expiry: float):
        if not 0 < 2 * heartbeat <= expiry:
            raise ValueError(f"expiry ({expiry} s) must be at least twice the heartbeat ({heartbeat} s)")
        self.storage, self.heartbeat, self.expiry = storage, heartbeat, expiry

    def patient(self, seconds: float) -> "Leases":
        """The same leases, where the storage has another patience."""
        return Leases(self.storage.patient(seconds), self.heartbeat, self.expiry)

    def take(self, key: StageKey) -> "Lease | None":
        """The lease on `key`, or None if it is held or another process was faster; raises OSError."""
        number = self.newest(key).number + 1
        mine = LeaseFile(number, False, f"leases/{key.digest}/{number}")
        if self.holder(key) is not None:
            return None
        note = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": machine(),
            "since": time.time(),
            "inputs": list(key.inputs.values()),
        }
        if not self.storage.create(mine.name, json.dumps(note).encode()):
            return None
        if self.tidy(key) > mine:  # we looked too long ago: an old number
            return None
        return Lease(self, key, mine)

    def holder(self, key: StageKey) -> LeaseHolder | None:
        """Who is building `key` now; None if nobody, or their lease has expired or their process is gone."""
        while not (newest := self.newest(key)).released:
            with suppress(FileNotFoundError):  # released or taken over between the two looks
                return self._holder(*self.storage.read(newest.name))
        return None

    def live(self) -> dict[str, list[str]]:
        """Digest -> digests of its inputs, for every key that is being built now."""
        found, entries = {}, self.storage.entries("leases/")
        for digest, files in _by_key(entries).items():
            newest = max(files)
            if newest.released or entries[newest.name].age > self.expiry:
                continue
            with suppress(FileNotFoundError):
                if holder := self._holder(*self.storage.read(newest.name)):
                    found[digest] = list(holder.inputs)
        return found

    def newest(self, key: StageKey) -> LeaseFile:
        """The file of `key` that counts; its number tells how often the key was taken."""
        return max(self._files(key), default=NEVER)

    def tidy(self, key: StageKey) -> LeaseFile:
        """Remove the files of `key` but the newest, and return that."""
        *older, newest = sorted(self._files(key)) or [NEVER]
        for file in older:
            self.storage.remove(file.name)
        return newest

    def _files(self, key: StageKey) -> list[LeaseFile]:
        return _by_key(self.storage.entries(f"leases/{key.digest}/"))[key.digest]

    def _holder(self, content: bytes, age: float) -> LeaseHolder | None:
        try:
            note = json.loads(content)
        except ValueError:  # created, not yet written
            note = {"host": "an unknown host", "pid": 0, "machine": "", "since": time.time() - age}
        gone = note["machine"] == machine() and not is_alive(note["pid"])
        if gone or age > self.expiry:
            return None
        return LeaseHolder(note["host"], note["pid"], note["since"], age, tuple(note.get("inputs", ())))


class Lease:
    """The right to build one key, kept by a heartbeat thread until `release` or the end of the `with` block."""

    def __init__(self, leases: Leases, key: StageKey, file: LeaseFile):
        self.key, self.file, self._leases = key, file, leases
        self._lost, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease {key}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    def check(self) -> None:
        """Raises LeaseLost if another process has taken over; call it between epochs."""
        if self.lost:
            raise LeaseLost(
                f"this process gave no sign for so long that another has taken over {self.key}: run again, which finds "
                "or waits for what that makes"
            )

    def renew(self) -> None:
        """A heartbeat, after which `lost` is up to date. Raises OSError and UserError where the storage fails."""
        self._renew(self._leases.patient(0.0))

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        leases = self._leases.patient(self._leases.expiry)  # after which it has expired anyway
        try:
            if leases.newest(self.key) == self.file:
                leases.storage.create(f"{self.file.name}.released", b"")
                leases.tidy(self.key)
        except (OSError, UserError) as error:
            if not self.lost:
                log.warning("could not release the lease on %s (%s); it will expire", self.key, error)

    def _beat(self) -> None:
        leases, failing = self._leases.patient(0.0), False  # the next beat is the next try
        while not self._stop.wait(leases.heartbeat):
            try:
                self._renew(leases)
                if self.lost:
                    return
                failing = False
            except (OSError, UserError) as error:
                if not failing:
                    log.warning("heartbeat of %s failed, trying again: %s", self.key, error)
                failing = True

    def _renew(self, leases: Leases) -> None:
        with suppress(FileNotFoundError):
            if leases.newest(self.key) == self.file:
                leases.storage.touch(self.file.name)
                return
        self._lost.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _by_key(names: Iterable[str]) -> dict[str, list[LeaseFile]]:
    """By the digest of the key; names of other files are left out."""
    found: dict[str, list[LeaseFile]] = defaultdict(list)
    for name in names:
        if match := NAME.fullmatch(name):
            found[match["digest"]].append(LeaseFile(int(match["number"]), bool(match["released"]), name))
    return found
