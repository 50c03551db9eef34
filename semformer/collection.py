"""What a store still needs, and the removal of the rest.

A root records what a sweep or study needs: the digests of its stages. Each of its drivers has one of its own, named
"SWEEP.ID". What a root reaches, directly or as the input of something reached, is never removed. Leases stay: by their
numbers, a holder that was away for long learns that another came after it.
"""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from semformer.artifact import Artifact
from semformer.errors import UserError
from semformer.keys import DIGEST
from semformer.leases import is_alive, machine
from semformer.storage import Entry, Storage, at_once

if TYPE_CHECKING:
    from semformer.store import Store


STAGE, WHOLE, SHORT = "(?P<stage>[a-z][a-z0-9_]*)", f"(?P<digest>{DIGEST})", "(?P<digest>[0-9a-f]{12})"
NAMES = {
    "leases": rf"leases/(?P<stage>){WHOLE}/\d+(\.released)?",
    "workspaces": rf"tmp/{STAGE}-{SHORT}\.[^/]+",
    "tmp": r"tmp/(?P<stage>)(?P<digest>)(probe|removed|write)-[0-9a-f]{16}",
    "damaged": rf"damaged/{STAGE}-{SHORT}-[^/]+",
    "checkpoints": rf"checkpoints/{STAGE}/{WHOLE}",
    "manifests": rf"manifests/{STAGE}/{WHOLE}\.json",
    "artifacts": rf"{STAGE}/{WHOLE}",
}
"""What the names begin with that belong to a kind of thing; the first that fits."""
UNREADABLE = (ValueError, KeyError, TypeError)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Root:
    """What was recorded: the digests, when (ISO 8601), and what for."""

    digests: frozenset[str]
    kept: str
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Collected:
    """Something that nothing needs: `names` are those of its files' folders, or its file, in the storage."""

    stage: str
    digest: str
    bytes: int
    why: str
    names: tuple[str, ...]


def keep(storage: Storage, name: str, digests: Iterable[str], about: Mapping[str, Any]) -> None:
    """See `Store.keep`."""
    digests = sorted(set(digests))
    if bad := [digest for digest in digests if not re.fullmatch(DIGEST, digest)]:
        raise ValueError(f"{bad[0]!r} is no digest of a stage")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    content = json.dumps({"kept": now, "about": about, "digests": digests}, indent=1, allow_nan=False)
    storage.write(_file(name), content.encode())


def kept(storage: Storage, name: str) -> Root | None:
    """See `Store.kept`."""
    try:
        return _parse(storage.read(_file(name))[0])
    except FileNotFoundError:
        return None
    except UNREADABLE as error:
        log.warning("%s in the store %s cannot be read (%r), and does not count", _file(name), storage.location, error)
        return None


def roots(storage: Storage, without: Iterable[str] = ()) -> dict[str, Root]:
    """See `Store.roots`."""
    found = {}
    for name in sorted(set(_names(storage)).difference(*(_names_of(storage, sweep) for sweep in without))):
        try:
            found[name] = _parse(storage.read(_file(name))[0])
        except FileNotFoundError:  # dropped meanwhile
            continue
        except UNREADABLE as error:
            raise UserError(
                f"{_file(name)} in the store {storage.location} cannot be read ({error!r}): resume its sweep, which "
                "writes it anew, or remove it if nothing needs what it named"
            ) from error
    return found


def drop(storage: Storage, sweep: str) -> None:
    """See `Store.drop`."""
    for name in _names_of(storage, sweep):
        storage.remove(_file(name))


def _names(storage: Storage) -> list[str]:
    return [unquote(file.removeprefix("roots/").removesuffix(".json")) for file in storage.entries("roots/")]


def _names_of(storage: Storage, sweep: str) -> list[str]:
    """Of a sweep's roots; raises UserError if there is none."""
    names = _names(storage)
    found = [name for name in names if name == sweep or name.rpartition(".")[:2] == (sweep, ".")]
    if not found:
        known = ", ".join(sorted(names)) or "nobody"
        raise UserError(f"the store {storage.location} keeps nothing for {sweep!r}, only for {known}")
    return found


def _parse(content: bytes) -> Root:
    """Raises one of UNREADABLE."""
    told = json.loads(content)
    return Root(frozenset(told["digests"]), told["kept"], told["about"])


def _file(name: str) -> str:
    return f"roots/{quote(name, safe='')}.json"


def collect(store: "Store", *, apply: bool, grace: float, without: Collection[str] = ()) -> list[Collected]:
    """See `Store.collect`. A root that is written meanwhile counts, unless that happens during the removal itself."""
    groups = _groups(store)
    live = store.leases.live()
    known = roots(store.storage, without)
    if not known and not without:
        raise UserError(
            f"the store {store.location} has no roots, so nothing says what is needed and nothing is removed: "
            "start the sweeps again whose results are to stay"
        )
    wanted = set().union(live, *live.values(), *(root.digests for root in known.values()))
    reached, places = _reach(store, groups, wanted)
    reasons: dict[tuple[str, str, str], dict[str, Entry]] = defaultdict(dict)
    for (kind, stage, digest), things in groups.items():
        if min(entry.age for entry in things.values()) < grace or any(key.startswith(digest or "-") for key in live):
            continue
        for name, entry in things.items():
            if why := _why(name, kind, digest, reached, places):
                reasons[stage, digest, why][name] = entry
    collected = [
        Collected(stage, digest, sum(entry.size for entry in things.values()), why, tuple(things))
        for (stage, digest, why), things in reasons.items()
    ]
    if apply:
        late = set().union(*(root.digests for root in roots(store.storage, without).values())) - wanted
        reached, _ = _reach(store, groups, late)
        collected = [item for item in collected if item.digest not in reached]
        names = [name for item in collected for name in item.names]
        for manifests in (True, False):  # readers look there first
            part = [name for name in names if name.startswith("manifests/") == manifests]
            at_once(lambda name: _remove(store.storage, name), part)
    return collected


def _remove(storage: Storage, name: str) -> None:
    storage.remove(name)
    storage.remove_folder(name)


def _groups(store: "Store") -> dict[tuple[str, str, str], dict[str, Entry]]:
    """(kind, stage, digest or its start) -> name, size and age of the files and folders kept or removed as a whole.

    What is not named as the store names its files is left alone.
    """
    groups: dict[tuple[str, str, str], dict[str, Entry]] = defaultdict(dict)
    patterns = {**NAMES, "artifacts": f"{NAMES['artifacts']}{store.BELOW_DIGEST}"}
    for file, entry in store.storage.entries("").items():
        for kind, pattern in patterns.items():
            if match := re.match(f"({pattern})(/|$)", file):
                name, owner = match[1], (kind.replace("manifests", "artifacts"), match["stage"], match["digest"])
                before = groups[owner].get(name, Entry(0, entry.age))
                groups[owner][name] = Entry(before.size + entry.size, min(before.age, entry.age))
                break
    return groups


def _reach(
    store: "Store", groups: Mapping[tuple[str, str, str], object], wanted: set[str]
) -> tuple[set[str], dict[str, str | None]]:
    """`wanted` with all inputs; and of what of it is published, the name of its files' folder (None: unreadable)."""
    stages = {digest: stage for kind, stage, digest in groups if kind == "artifacts"}
    found = store.read_with_inputs((stages[digest], digest) for digest in wanted if digest in stages)
    read = {digest: one for digest, one in found.items() if isinstance(one, Artifact)}
    reached = wanted.union(*(artifact.key.inputs.values() for artifact in read.values()))
    places = {digest: one.path.relative_to(store.root).as_posix() for digest, one in read.items()}
    return reached, {**dict.fromkeys(found), **places}


def _why(name: str, kind: str, digest: str, reached: set[str], places: Mapping[str, str | None]) -> str | None:
    """Why something old that nobody is building can go, or None if it must stay."""
    if kind == "leases":
        return None
    if kind == "damaged":
        return "was damaged"
    if kind in ("tmp", "workspaces"):
        _, *owner = name.split(".")
        alive = len(owner) == 3 and owner[0] == machine() and is_alive(int(owner[1]))
        return None if alive else "left by a process that has ended"
    if digest not in reached:
        return "no root reaches it"
    if kind == "checkpoints":
        return "checkpoints of what is published" if digest in places else None
    if digest not in places:
        return "left by a publisher that did not finish"
    if places[digest] in (None, name) or name.startswith("manifests/"):
        return None
    return "left by a publisher that was not the first"
