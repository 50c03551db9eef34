"""Keys of stage results: what a result depends on, its digest, and how two of them differ."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

RESERVED = {"tmp", "leases", "damaged", "checkpoints", "roots", "manifests"}
"""The store's own folders, beside those of the stages."""
DIGEST = "[0-9a-f]{64}"
"""Of a key, as a regular expression."""


@dataclass(frozen=True, eq=False)
class StageKey:
    """What a stage's result depends on, and nothing else; equal digests mean equal results.

    `spec` is copied in plain JSON types (tuples become lists). 1 and 1.0 are different values: let the config
    class settle the type. Raises TypeError for what JSON cannot hold and ValueError for NaN or infinity.
    """

    stage: str
    spec: Mapping[str, Any]

    def __post_init__(self):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.stage) or self.stage in RESERVED:
            raise ValueError(f"{self.stage!r} cannot name a stage")
        if self.spec.get("stage", self.stage) != self.stage:
            raise ValueError(f"the spec of stage {self.stage} says stage {self.spec['stage']}")
        object.__setattr__(self, "spec", plain(self.spec, f"key of {self.stage}"))

    @cached_property
    def digest(self) -> str:
        return canonical_sha256({**self.spec, "stage": self.stage})

    @property
    def inputs(self) -> Mapping[str, str]:
        """The digests of what it is made from, by stage."""
        return self.spec.get("inputs", {})

    @property
    def short(self) -> str:
        return self.digest[:12]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StageKey) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        return f"{self.stage} {self.short}"


def ends(keys: Mapping[str, StageKey]) -> list[str]:
    """Of the stages of one pipeline, in order, those that no other one needs."""
    needed: set[str] = set()
    for name, key in reversed([*keys.items()]):
        needed |= _needs(name, key, keys)
    return [name for name in keys if name not in needed]


def to_make(keys: Mapping[str, StageKey], is_there: Callable[[StageKey], bool]) -> list[StageKey]:
    """Of the stages of one pipeline, in order, those that must be made so that its `ends` are there.

    They are resolved from the ends: what is there needs nothing before it, and that is not asked for.
    """
    needed, missing = {*ends(keys)}, []
    for name, key in reversed([*keys.items()]):
        if name in needed and not is_there(key):
            missing.append(key)
            needed |= _needs(name, key, keys)
    return missing[::-1]


def _needs(name: str, key: StageKey, keys: Mapping[str, StageKey]) -> set[str]:
    """A stage whose key tells no inputs may need all before it."""
    return {*key.inputs} if "inputs" in key.spec else {*itertools.takewhile(lambda other: other != name, keys)}


def plain(value: Any, where: str) -> Any:
    """A copy of `value` in JSON types; raises TypeError or ValueError naming where it cannot be one."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}: {value} is not a number that JSON can hold")
        return value
    if isinstance(value, Mapping):
        if bad := [name for name in value if not isinstance(name, str)]:
            raise TypeError(f"{where}: {bad[0]!r} is no JSON field name")
        return {name: plain(item, f"{where}, {name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}, item {i}") for i, item in enumerate(value)]
    raise TypeError(f"{where}: {value!r} ({type(value).__name__}) is no JSON value")


def canonical_sha256(value: Any) -> str:
    """The sha256 (hex) of `value` as canonical JSON: sorted names, no spaces, ASCII."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(
    stage: str,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    find_spec: Callable[[str], Mapping[str, Any] | None],
    *,
    prefix: str = "",
) -> str:
    """What differs between two specs of `stage`, inside its inputs too; "" where nothing does.

    `find_spec(digest)` gives the spec of an input, or None if unknown. `prefix` is put before the names of changed
    parameters.
    """
    texts = []
    before, after = flat(old), flat(new)
    for path in sorted(before.keys() | after.keys()):
        a, b = before.get(path, "unset"), after.get(path, "unset")
        if a == b and type(a) is type(b):
            continue
        if {} in (a, b):  # what is in it on the other side has paths of its own
            continue
        section, _, name = path.partition(".")
        change = f"{_brief(a)} -> {_brief(b)}"
        if section == "inputs":
            old_input, new_input = find_spec(a), find_spec(b)
            inside = differences(name, old_input, new_input, find_spec) if old_input and new_input else ""
            texts.append(f"input {name} changed" + (f" ({inside})" if inside else ""))
        elif section == "data":
            texts.append(f"{path.replace('.', ' ', 1)} changed")
        elif section == "params":
            texts.append(f"{prefix}{name} {change}")
        elif section == "version":
            texts.append(f"{stage} code version {change}")
        else:
            texts.append(f"{path} {change}")
    more = [f"and {len(texts) - 4} more"] if len(texts) > 4 else []
    return ", ".join(texts[:4] + more)


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """{"params.sigma": 0.1, ...}: every value in nested mappings, by its path."""
    if isinstance(value, Mapping) and value:
        parts = [flat(item, f"{path}.{name}" if path else name) for name, item in value.items()]
        return {name: item for part in parts for name, item in part.items()}
    return {path: value}


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
