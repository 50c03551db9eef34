"""The removal of what no root needs any more.

What a root reaches, directly or as the input of something reached, is never removed, nor are the packs of the images
and masks that it was made from. Leases stay: by their numbers, a holder that was away for long learns that another
came after it.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from semformer.errors import UserError
from semformer.keys import DIGEST
from semformer.store.artifact import Artifact
from semformer.store.local import worker
from semformer.store.processes import is_alive
from semformer.store.storage import Entry, Storage, at_once
from semformer.store.store import Store

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


@dataclass(frozen=True)
class Collected:
    """Something that nothing needs: `names` are those of its files' folders, or its file, in the storage."""

    stage: str
    digest: str
    bytes: int
    why: str
    names: tuple[str, ...]


def collect(
    store: Store, *, apply: bool = False, grace: float = 24 * 3600.0, without: Collection[str] = ()
) -> list[Collected]:
    """What no root reaches and nobody has touched for `grace` seconds; removed only with `apply`.

    The roots of the sweeps named in `without` do not count. One that is written meanwhile does, unless that happens
    during the removal itself. Raises UserError as `Roots.all` does, and if nothing was ever recorded, for then nothing
    says what is needed.
    """
    groups = _groups(store)
    live = store.leases.live()
    known = store.roots.all(without=without)
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
        late = set().union(*(root.digests for root in store.roots.all(without=without).values())) - wanted
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


def _groups(store: Store) -> dict[tuple[str, str, str], dict[str, Entry]]:
    """(kind, stage, digest or its start) -> name, size and age of the files and folders kept or removed as a whole.

    What is not named as the store names its files is left alone.
    """
    groups: dict[tuple[str, str, str], dict[str, Entry]] = defaultdict(dict)
    patterns = {**NAMES, "artifacts": f"{NAMES['artifacts']}{store.storage.BELOW_DIGEST}"}
    for file, entry in store.storage.entries("").items():
        for kind, pattern in patterns.items():
            if match := re.match(f"({pattern})(/|$)", file):
                name, owner = match[1], (kind.replace("manifests", "artifacts"), match["stage"], match["digest"])
                before = groups[owner].get(name, Entry(0, entry.age))
                groups[owner][name] = Entry(before.size + entry.size, min(before.age, entry.age))
                break
    return groups


def _reach(
    store: Store, groups: Mapping[tuple[str, str, str], object], wanted: set[str]
) -> tuple[set[str], dict[str, str | None]]:
    """`wanted` with all inputs and packs; and of what is published of it, the name of its files' folder (None:
    unreadable)."""
    stages = {digest: stage for kind, stage, digest in groups if kind == "artifacts"}
    found = store.read_with_inputs((stages[digest], digest) for digest in wanted if digest in stages)
    data = {one for artifact in found.values() if isinstance(artifact, Artifact) for one in _data(artifact)}
    packs = store.read_many(("pack", digest) for digest, stage in stages.items() if stage == "pack")
    found |= {digest: one for digest, one in packs.items() if not isinstance(one, Artifact) or _data(one) & data}
    read = {digest: one for digest, one in found.items() if isinstance(one, Artifact)}
    reached = wanted.union(read, *(artifact.key.inputs.values() for artifact in read.values()))
    places = {digest: one.path.relative_to(store.root).as_posix() for digest, one in read.items()}
    return reached, {**dict.fromkeys(found), **places}


def _data(artifact: Artifact) -> set[str]:
    """The digests of the images and masks that something was made from."""
    return {digest for digest in artifact.key.spec.get("data", {}).values() if isinstance(digest, str)}


def _why(name: str, kind: str, digest: str, reached: set[str], places: Mapping[str, str | None]) -> str | None:
    """Why something old that nobody is building can go, or None if it must stay."""
    if kind == "leases":
        return None
    if kind == "damaged":
        return "was damaged"
    if kind in ("tmp", "workspaces"):
        pid = worker(name)
        return None if pid and is_alive(pid) else "left by a process that has ended"
    if digest not in reached:
        return "no root reaches it"
    if kind == "checkpoints":
        return "checkpoints of what is published" if digest in places else None
    if digest not in places:
        return "left by a publisher that did not finish"
    if places[digest] in (None, name) or name.startswith("manifests/"):
        return None
    return "left by a publisher that was not the first"
