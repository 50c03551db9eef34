"""Events on their way to MLflow: rows of an sqlite file on disk, delivered in order, each surviving the driver's death.

    <folder>/journal.db    events that are not delivered yet, and the descriptions that they refer to
    <folder>/files/        what `Tracker.log_file` was given

One process at a time has a journal open. What it holds is in the hands of the operating system; a power cut may lose
its last moments, but damages nothing. A locked journal needs no shared memory, so it may lie on a network folder.
"""

import json
import logging
import sqlite3
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from semformer.errors import UserError

log = logging.getLogger(__name__)
Event = dict[str, Any]
FILE = "journal.db"
MOST = 100_000
"""Events that are kept in memory while the disk is full."""


class Journal:
    """Appended to by one thread, read by another.

    Raises UserError where the folder cannot be written to, and for a journal that another process has open.
    """

    def __init__(self, folder: Path):
        self.files = folder / "files"
        self._lock = threading.Lock()
        self._unwritten: list[tuple[str, str | None]] = []  # events (and keys) that the disk has no room for
        self.trouble = ""
        """Why events are kept in memory, while they are."""
        self._done = 0  # the last one that is delivered, whether or not it could be deleted
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._database = _connect(folder / FILE)
            self._database.executescript(
                "create table if not exists events (id integer primary key autoincrement, body text not null);"
                "create table if not exists described (key text primary key, body text not null);"
            )
            (self._rows,) = self._database.execute("select count(*) from events").fetchone()
        except (OSError, sqlite3.Error) as error:
            locked = isinstance(error, sqlite3.Error) and "locked" in str(error)
            told = "another process has them open" if locked else getattr(error, "strerror", None) or error
            raise UserError(f"{folder}: a sweep keeps its events there, but: {told}") from error

    @property
    def undelivered(self) -> int:
        return self._rows + len(self._unwritten)

    def append(self, event: Mapping[str, Any], *, describes: str | None = None) -> None:
        """Keep an event, and what it describes under a key, for `described`.

        While the disk is full, events are kept in memory until there is room. Raises OSError where these are too many,
        and the first of them is lost.
        """
        with self._lock:
            self._unwritten.append((json.dumps(event, default=float), describes))
            self._write()
            if len(self._unwritten) > MOST:
                del self._unwritten[0]
                raise OSError(f"an event is lost: {self.trouble}")

    def described(self, key: str) -> Event | None:
        """The latest event that describes this key."""
        with self._lock:
            row = self._database.execute("select body from described where key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def read(self, limit: int) -> list[tuple[int, Event]]:
        """The next events to deliver, each with the number that `advance` is to be told; at least one, if any is
        undelivered. Raises OSError while there are only events that the disk has no room for, and where it fails.
        """
        query = "select id, body from events where id > ? order by id limit ?"
        with self._lock:
            self._write()
            try:
                rows = self._database.execute(query, (self._done, limit)).fetchall()
            except sqlite3.Error as error:
                raise OSError(f"{self.files.parent / FILE} cannot be read: {error}") from error
        if not rows and self._unwritten:
            raise OSError(self.trouble)
        return [(number, json.loads(body)) for number, body in rows]

    def advance(self, number: int, events: int) -> None:
        """So many `events`, up to this number, have been delivered."""
        with self._lock:
            self._done, self._rows = number, self._rows - events
            try:
                with self._database:
                    self._database.execute("delete from events where id <= ?", (number,))
            except sqlite3.Error as error:  # they may be delivered again, which changes nothing
                log.warning("%s cannot be written: %s", self.files.parent / FILE, error)

    def clear(self) -> None:
        """Forget what was described, where nothing refers to it any more."""
        if not self.undelivered:
            with self._lock, suppress(sqlite3.Error), self._database:
                self._database.execute("delete from described")

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def _write(self) -> None:
        if not self._unwritten:
            return
        try:
            with self._database:
                for body, key in self._unwritten:
                    self._database.execute("insert into events (body) values (?)", (body,))
                    if key:
                        self._database.execute("insert or replace into described values (?, ?)", (key, body))
        except sqlite3.Error as error:
            if not self.trouble:
                self.trouble = f"{self.files.parent / FILE} cannot be written ({error}): is the disk full?"
                log.warning("%s Events are kept in memory until there is room.", self.trouble)
            return
        self._rows += len(self._unwritten)
        self._unwritten.clear()
        self.trouble = ""


def has_backlog(folder: Path) -> bool:
    """Whether the journal of a folder holds events that have not been delivered."""
    if not (folder / FILE).exists():
        return False
    journal = Journal(folder)
    try:
        return journal.undelivered > 0
    finally:
        journal.close()


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=2.0, check_same_thread=False)
    database.execute("pragma locking_mode = exclusive")
    database.execute("pragma journal_mode = wal")  # no wait for the disk at each event
    database.execute("pragma synchronous = normal")
    return database
