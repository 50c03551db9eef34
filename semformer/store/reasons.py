"""Why stages must be made, beside what is published."""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from semformer.keys import StageKey, differences, flat
from semformer.store.artifact import Artifact
from semformer.store.store import Store

NEAREST = 50
"""So many of a stage's newest artifacts are compared with."""
Spec = Mapping[str, Any]


def reasons(store: Store, keys: Iterable[StageKey]) -> dict[StageKey, str]:
    """Why each of the keys must be made, beside the published artifact of the same stage that differs least.

    "caae.decoder_depth 8 -> 4", "input caae changed (decoder_depth 8 -> 4)" (published -> wanted). What changed inside
    an input is told if its key is one of them, or is published.
    """
    keys = list(keys)
    published = {stage: store.newest_first(stage) for stage in {key.stage for key in keys}}
    there = {digest for digests in published.values() for digest in digests}
    newest = {stage: digests[:NEAREST] for stage, digests in published.items()}
    specs = _specs(store, keys, newest)
    damaged = sorted({name.split("/")[1] for name in store.storage.entries("damaged/")})
    aside = {name.rpartition("-")[0]: name for name in damaged}  # the last of each

    @cache
    def values(digest: str) -> frozenset[tuple[str, str]]:
        return _values(specs[digest], specs.get)

    def reason(key: StageKey) -> str:
        if key.digest in there:
            return "already published"
        if moved := aside.get(f"{key.stage}-{key.short}"):
            return f"the published artifact was damaged (moved to {store.location}/damaged/{moved})"
        others = [digest for digest in newest[key.stage] if digest in specs]
        if not others:
            return "nothing published for this stage yet"
        nearest = min(others, key=lambda digest: len(values(digest) ^ values(key.digest)))
        return differences(key.stage, specs[nearest], key.spec, specs.get, prefix=f"{key.stage}.")

    return {key: reason(key) for key in keys}


def _specs(store: Store, keys: Iterable[StageKey], newest: Mapping[str, Iterable[str]]) -> dict[str, Spec]:
    """Of the keys, of the newest artifacts of their stages, and of all that these were made from, by digest."""
    known = {key.digest: key.spec for key in keys}
    names = {(stage, digest) for stage, digests in newest.items() for digest in digests}
    names |= {name for key in keys for name in key.inputs.items() if name[1] not in known}
    read = store.read_with_inputs(names, but=known).items()
    return known | {digest: one.key.spec for digest, one in read if isinstance(one, Artifact)}


def _values(spec: Spec, find_spec: Callable[[str], Spec | None], prefix: str = "") -> frozenset[tuple[str, str]]:
    """Path and JSON of every value of a spec, and of the specs of its inputs as far as they are known."""
    found: set[tuple[str, str]] = set()
    for path, value in flat(spec).items():
        inside = find_spec(value) if path.startswith("inputs.") else None
        found |= _values(inside, find_spec, f"{prefix}{path}.") if inside else {(prefix + path, json.dumps(value))}
    return frozenset(found)
