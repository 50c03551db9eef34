"""Packs of a split's images and of its masks: found or made like any stage, by whatever needs them first.

A pack is how a data set is kept, no step of the method: what comes of it is keyed by the digest of the files.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from semformer.data.pack import Kind, Packed, Table, write_pack
from semformer.data.voc import Split
from semformer.keys import StageKey
from semformer.machine import Note
from semformer.stages.context import Progress
from semformer.store import Artifact, DamagedArtifact, Lease, LeaseHolder, Store

VERSION = 1


def pack_key(split: Split, kind: Kind) -> StageKey:
    digest = split.digest if kind == "images" else split.mask_digest
    return StageKey("pack", {"stage": "pack", "version": VERSION, "params": {}, "data": {kind: digest}, "inputs": {}})


def packed(
    split: Split,
    kinds: Iterable[Kind],
    store: Store,
    *,
    progress: Callable[[Progress], None] = lambda told: None,
    waiting: Callable[[StageKey, LeaseHolder], None] = lambda key, holder: None,
) -> Packed:
    """The split with its packs of these kinds. Raises UserError for files that cannot be used."""
    tables = {kind: Table(find_or_pack(split, kind, store, progress, waiting)[0].file(_name(kind))) for kind in kinds}
    parts = {field.name: getattr(split, field.name) for field in fields(Split)}
    return Packed(**parts, images=tables.get("images"), masks=tables.get("masks"))


def find_or_pack(
    split: Split,
    kind: Kind,
    store: Store,
    progress: Callable[[Progress], None] = lambda told: None,
    waiting: Callable[[StageKey, LeaseHolder], None] = lambda key, holder: None,
) -> tuple[Artifact, bool]:
    """The artifact of a pack, and whether it was found.

    What a pack holds is checked once on a machine, not by each trial: it is as large as the data set.
    """
    key = pack_key(split, kind)
    note = None
    with suppress(DamagedArtifact):
        if there := store.find(key, verify=False):
            note = Note([there.file(_name(kind))], about=key.digest)
            if note.read():
                return there, True

    def make(workspace: Path, lease: Lease) -> Mapping[str, Any]:
        started = time.monotonic()

        def told(done: int, total: int) -> None:
            lease.check()
            progress(Progress.of_images("pack", done, total, started, note=kind))

        write_pack(split, kind, workspace / _name(kind), told)
        return {"split": split.name, "images": len(split), "seconds": time.monotonic() - started}

    artifact, found = store.find_or_make(key, make, wait=partial(waiting, key))
    if note and found:
        note.write("intact")
    return artifact, found


def _name(kind: Kind) -> str:
    return f"{kind}.arrow"
