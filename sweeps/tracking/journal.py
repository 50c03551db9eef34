"""Events on their way to MLflow: lines of JSON on disk, delivered in order, each surviving the death of the driver.

    <folder>/events-1.jsonl        one event a line, with its time
    <folder>/events-1.delivered    how many bytes of it have been delivered
    <folder>/files/                what `Tracker.log_file` was given

A driver locks the journal it writes to. Another driver in the same folder writes to events-2.jsonl, and so on; a
driver that starts again takes the first journal that nobody holds, and delivers what is left in it.
"""

import fcntl
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from semformer.errors import UserError

log = logging.getLogger(__name__)
Event = dict[str, Any]


class Journal:
    """One locked journal. `append` belongs to one thread; `read` and `advance` may belong to another.

    `undelivered` is the number of events that are still to be delivered. Raises BlockingIOError if another process
    (or another Journal in this one) holds it.
    """

    def __init__(self, path: Path):
        self.path, self._cursor = path, path.with_suffix(".delivered")
        self._file = path.open("ab", buffering=0)
        self._counting = threading.Lock()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._delivered = min(_read_cursor(self._cursor), path.stat().st_size)
            self._mend()
        except OSError:
            self._file.close()
            raise
        self.undelivered = sum(1 for _ in self._lines(self._delivered))

    @classmethod
    def open(cls, folder: Path) -> "Journal":
        """The first journal of `folder` that nobody holds, emptied if all of it was delivered. Raises UserError."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for n in count(1):
                try:
                    journal = cls(folder / f"events-{n}.jsonl")
                except BlockingIOError:
                    continue
                if not journal.undelivered:
                    journal._empty()
                return journal
        except OSError as error:
            raise UserError(f"{folder}: a sweep keeps its events there, but: {error.strerror}") from error

    @classmethod
    def left_in(cls, folder: Path) -> Iterator["Journal"]:
        """The journals of `folder` that nobody holds, one after the other; each is closed afterwards."""
        for path in sorted(folder.glob("events-*.jsonl")):
            try:
                journal = cls(path)
            except BlockingIOError:
                continue
            try:
                yield journal
            finally:
                journal.close()

    @property
    def files(self) -> Path:
        return self.path.parent / "files"

    def append(self, event: Mapping[str, Any]) -> None:
        """One line, in the hands of the operating system when this returns. Raises OSError."""
        line = json.dumps(event, default=float).encode() + b"\n"
        with self._counting:
            if self._file.write(line) != len(line):
                self._mend()
                raise OSError(f"{self.path} was written in part: is the disk full?")
            self.undelivered += 1

    def history(self) -> Iterator[Event]:
        """The events that were delivered before."""
        for event, end in self._events(0):
            if end > self._delivered:
                return
            if event is not None:
                yield event

    def read(self, limit: int) -> list[tuple[Event | None, int]]:
        """The next events to deliver, each with what `advance` is to be told; None for a damaged line."""
        return [item for item, _ in zip(self._events(self._delivered), range(limit), strict=False)]

    def advance(self, end: int, events: int) -> None:
        """So many `events`, up to byte `end`, have been delivered."""
        try:
            self._write_cursor(end)
        except OSError as error:  # they may be delivered again, which changes nothing
            log.warning("%s cannot be written: %s", self._cursor, error.strerror)
        with self._counting:
            self.undelivered -= events

    def close(self) -> None:
        self._file.close()

    def _events(self, start: int) -> Iterator[tuple[Event | None, int]]:
        for line, end in self._lines(start):
            try:
                yield json.loads(line), end
            except ValueError:
                log.warning("skipping a damaged line that ends at byte %d of %s", end, self.path)
                yield None, end

    def _lines(self, start: int) -> Iterator[tuple[bytes, int]]:
        with self.path.open("rb") as file:
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):  # being written
                    return
                start += len(line)
                yield line, start

    def _mend(self) -> None:
        """End a line that a dead driver or a full disk left half-written."""
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            file.seek(max(0, size - 1))
            if size and file.read(1) != b"\n":
                self._file.write(b"\n")

    def _empty(self) -> None:
        self._write_cursor(0)
        self._file.truncate(0)

    def _write_cursor(self, end: int) -> None:
        self._delivered = end
        partial = self._cursor.with_suffix(".partial")
        partial.write_text(str(end))
        os.replace(partial, self._cursor)


def has_backlog(folder: Path) -> bool:
    """Whether any journal of `folder` holds events that have not been delivered."""
    paths = folder.glob("events-*.jsonl")
    return any(path.stat().st_size > _read_cursor(path.with_suffix(".delivered")) for path in paths)


def _read_cursor(path: Path) -> int:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0
