"""A sweep's folder: how it was started, what it is doing, and who drives it.

    runs/sweeps/<name>/
        sweep.json    the command line and where it was given, for `resume`; only its owner may read it
        id            random, of this folder alone: what the store keeps for the sweep is named after both
        state.json    what every trial does, written by the driver about once a second, for `status`
        stop          written by `stop`; the driver ends when it sees it
        driver.lock   locked while a driver lives

The store holds what was made; a folder that is lost costs nothing but these commands.
"""

import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from semformer.errors import UserError

SWEEPS = Path("runs/sweeps")


class SweepFolder:
    def __init__(self, path: Path):
        self.path, self.name = path, path.name

    @property
    def id(self) -> str:
        """Tells the sweep from those of the same name elsewhere; made when it is asked for first."""
        path = self.path / "id"
        if not path.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            path.write_text(secrets.token_hex(4), encoding="utf-8")
        return path.read_text(encoding="utf-8")

    @contextmanager
    def drive(self, arguments: Sequence[str]) -> Iterator[None]:
        """Be the driver of this sweep, started with such arguments. Raises UserError as `lock` does."""
        with self.lock():
            (self.path / "stop").unlink(missing_ok=True)
            (self.path / "state.json").unlink(missing_ok=True)
            told = {"cwd": os.getcwd(), "arguments": list(arguments)}
            self._write("sweep.json", told, mode=0o600)  # addresses may hold passwords
            yield

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Raises UserError when another process has it, and when the folder cannot be written to."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / "driver.lock", "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot use {self.path} as the sweep's folder: {error.strerror}") from error
        with lock:
            for attempt in range(20):  # `driver` holds the lock for a moment
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if attempt == 19:
                        raise UserError(f"the sweep {self.name} is driven already, by {self.driver()}") from None
                    time.sleep(0.05)
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
            yield

    def driver(self) -> str:
        """Who drives it now, as "process 12 on host"; "" when nobody does."""
        try:
            with open(self.path / "driver.lock", encoding="utf-8") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError:
                    return lock.read()
        except FileNotFoundError:
            pass
        return ""

    def started(self) -> tuple[str, list[str]]:
        """In which folder and with which arguments. Raises UserError when that cannot be read."""
        told = self._read("sweep.json")
        return told["cwd"], told["arguments"]

    def save(self, state: Mapping[str, Any]) -> None:
        self._write("state.json", state)

    def state(self) -> dict[str, Any] | None:
        """What `save` wrote last; None before that."""
        return self._read("state.json") if (self.path / "state.json").exists() else None

    def ask_to_stop(self) -> None:
        (self.path / "stop").touch()

    def asked_to_stop(self) -> bool:
        return (self.path / "stop").exists()

    def wait_for_driver(self, seconds: float) -> bool:
        """Whether the driver has ended, within so many seconds."""
        until = time.monotonic() + seconds
        while self.driver():
            if time.monotonic() > until:
                return False
            time.sleep(0.2)
        return True

    def _write(self, name: str, value: Mapping[str, Any], mode: int = 0o666) -> None:
        partial = self.path / f"{name}.partial"
        partial.unlink(missing_ok=True)
        with open(os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_EXCL, mode), "w", encoding="utf-8") as file:
            file.write(json.dumps(value))
        os.replace(partial, self.path / name)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.path / name}: {error}") from error


def new_sweep(root: Path, name: str) -> SweepFolder:
    """The folder of a sweep of that name, or NAME-2 ... while others of the name are being driven."""
    for n in range(1, 1000):
        folder = SweepFolder(root / (name if n == 1 else f"{name}-{n}"))
        if not folder.driver():
            return folder
    raise UserError(f"there are too many sweeps {name} in {root}")


def find_sweep(root: Path, name: str | None) -> SweepFolder:
    """The sweep of that name, or the one that was started last. Raises UserError when there is none."""
    known = sorted(root.glob("*/sweep.json"), key=lambda path: path.stat().st_mtime)
    if not known:
        raise UserError(f"there is no sweep in {root}: start one with semformer-sweep run (--sweeps DIR if elsewhere)")
    if name is None:
        return SweepFolder(known[-1].parent)
    if root / name / "sweep.json" not in known:
        names = ", ".join(path.parent.name for path in known)
        raise UserError(f"there is no sweep {name!r} in {root}: there are {names}")
    return SweepFolder(root / name)
