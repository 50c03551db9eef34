"""Configs from presets and overrides ("segmentor.sigma=0.05"), and the names of their fields."""

import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from semformer.config.presets import PRESETS
from semformer.config.schema import Config
from semformer.config.settings import Settings
from semformer.errors import UserError


def load_config(preset: str, overrides: Mapping[str, Any] | None = None, *, source: str = "--set") -> Config:
    """A preset with some fields changed.

    `overrides` maps dotted names ("segmentor.sigma") to values; text is read as the field's type.
    Raises UserError that names `source`, the field and the nearest valid one, or the type that is wanted.
    """
    if preset not in PRESETS:
        raise UserError(f"no preset is named {preset!r}: choose one of {', '.join(PRESETS)}")
    tree: dict[str, Any] = {}
    for name, value in (*PRESETS[preset].items(), *(overrides or {}).items()):
        if name not in field_names() and name not in _groups():
            raise UserError(f"{source}: {unknown_field(name)}")
        if name in _groups() and not isinstance(value, Mapping) and value is not None:
            raise UserError(f"{source}: {name} is a group of fields, such as {_first_of(name)}: set those")
        if name not in _groups() and isinstance(value, Mapping):
            raise UserError(f"{source}: {name} is one value, not a group of fields")
        *groups, leaf = name.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        if isinstance(value, Mapping):
            node.setdefault(leaf, {}).update(value)
        else:
            node[leaf] = value
    defaults = Config().model_dump()
    try:
        return Config.model_validate(_merge(defaults, tree))
    except ValidationError as error:
        raise UserError("\n".join(_explain(item, source) for item in error.errors())) from error


def parse_overrides(assignments: list[str]) -> dict[str, str]:
    """["segmentor.sigma=0.05"] -> {"segmentor.sigma": "0.05"}. Raises UserError for anything else."""
    overrides = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment}: write FIELD=VALUE, for example --set segmentor.sigma=0.05")
        overrides[name.strip()] = value.strip()
    return overrides


def flatten(config: Settings) -> dict[str, Any]:
    """{"segmentor.sigma": 0.075, ...}: every leaf field with its JSON value."""
    return dict(_leaves(config.model_dump(mode="json"), ""))


@cache
def field_names() -> tuple[str, ...]:
    """The dotted names of all leaf fields."""
    return tuple(_fields(Config, ""))


def unknown_field(name: str) -> str:
    """One sentence that names the nearest valid fields."""
    near = difflib.get_close_matches(name, field_names(), n=3, cutoff=0.5)
    near = near or [valid for valid in field_names() if valid.endswith("." + name.rpartition(".")[2])]
    hint = f"did you mean {' or '.join(near)}?" if near else f"the groups are {', '.join(Config.model_fields)}"
    return f"unknown field {name!r}: {hint}"


def _fields(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        nested = _settings_type(field.annotation)
        if nested:
            yield from _fields(nested, f"{prefix}{name}.")
        else:
            yield prefix + name


def _settings_type(annotation: Any) -> type[Settings] | None:
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Settings)), None)


@cache
def _groups() -> set[str]:
    return {name.rpartition(".")[0] for name in field_names()} - {""}


def _first_of(group: str) -> str:
    return next(name for name in field_names() if name.startswith(f"{group}."))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _merge(base: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base or {})
    for name, value in changes.items():
        merged[name] = _merge(merged.get(name), value) if isinstance(value, Mapping) else value
    return merged


def _explain(item: Mapping[str, Any], source: str) -> str:
    name = ".".join(str(part) for part in item["loc"] if isinstance(part, str))
    if item["type"] == "extra_forbidden":
        return f"{source}: {unknown_field(name)}"
    message = item["msg"]
    if item["type"] == "value_error":
        told = message.removeprefix("Value error, ")  # of a field, or of a group: then it begins with the field
        return f"{source}: {name} {told}" if name in field_names() else f"{source}: {name}.{told}"
    return f"{source}: {name} = {item['input']!r}: {message[0].lower()}{message[1:]}"
