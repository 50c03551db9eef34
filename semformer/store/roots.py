"""What a store must keep, and for whom.

A root records what a sweep or study needs: the digests of its stages. Each of its drivers has one of its own, named
"SWEEP.ID".
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, unquote

from semformer.errors import UserError
from semformer.keys import DIGEST
from semformer.store.storage import Storage

UNREADABLE = (ValueError, KeyError, TypeError)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Root:
    """What was recorded: the digests, when (ISO 8601), and what for."""

    digests: frozenset[str]
    kept: str
    about: Mapping[str, Any]


class Roots:
    """The roots in a storage."""

    def __init__(self, storage: Storage):
        self.storage = storage

    def keep(self, name: str, digests: Iterable[str], about: Mapping[str, Any] | None = None) -> None:
        """Record that `name` needs these stages and all that they were made from: a sweep or study, or a driver of it
        with an id of its own, as "SWEEP.ID".

        Replaces what was recorded under the name. Raises ValueError for what is no digest.
        """
        digests = sorted(set(digests))
        if bad := [digest for digest in digests if not re.fullmatch(DIGEST, digest)]:
            raise ValueError(f"{bad[0]!r} is no digest of a stage")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        content = json.dumps({"kept": now, "about": about or {}, "digests": digests}, indent=1, allow_nan=False)
        with self.storage.local.errors(f"recording what {name} needs"):
            self.storage.write(_file(name), content.encode())

    def kept(self, name: str) -> Root | None:
        """What `keep` recorded under this very name; None if that is nothing, or, with a warning, not readable."""
        try:
            return _parse(self.storage.read(_file(name))[0])
        except FileNotFoundError:
            return None
        except UNREADABLE as error:
            told = "%s in the store %s cannot be read (%r), and does not count"
            log.warning(told, _file(name), self.storage.location, error)
            return None

    def all(self, *, without: Iterable[str] = ()) -> dict[str, Root]:
        """Everything recorded by `keep`, by name, but for the sweeps named in `without`.

        Raises UserError for a record that cannot be read, and if nothing is recorded for one of `without`.
        """
        found = {}
        for name in sorted(set(self._names()).difference(*map(self._names_of, without))):
            try:
                found[name] = _parse(self.storage.read(_file(name))[0])
            except FileNotFoundError:  # dropped meanwhile
                continue
            except UNREADABLE as error:
                raise UserError(
                    f"{_file(name)} in the store {self.storage.location} cannot be read ({error!r}): resume its sweep, "
                    "which writes it anew, or remove it if nothing needs what it named"
                ) from error
        return found

    def drop(self, sweep: str) -> None:
        """Forget what was recorded for a sweep, by all of its drivers. Raises UserError if that is nothing."""
        for name in self._names_of(sweep):
            self.storage.remove(_file(name))

    def _names(self) -> list[str]:
        files = self.storage.entries("roots/")
        return [unquote(file.removeprefix("roots/").removesuffix(".json")) for file in files]

    def _names_of(self, sweep: str) -> list[str]:
        """Of a sweep's roots; raises UserError if there is none."""
        names = self._names()
        found = [name for name in names if name == sweep or name.rpartition(".")[:2] == (sweep, ".")]
        if not found:
            known = ", ".join(sorted(names)) or "nobody"
            raise UserError(f"the store {self.storage.location} keeps nothing for {sweep!r}, only for {known}")
        return found


def _parse(content: bytes) -> Root:
    """Raises one of UNREADABLE."""
    told = json.loads(content)
    return Root(frozenset(told["digests"]), told["kept"], told["about"])


def _file(name: str) -> str:
    return f"roots/{quote(name, safe='')}.json"
