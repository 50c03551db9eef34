"""How a recorded run is made again: its config, and the command lines that have it."""

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from analysis.runs import Record
from semformer.config import Config, Goal, field_names, flatten, load_config
from semformer.errors import UserError
from semformer.pipeline import STAGES
from sweeps.plan.scores import GOALS, LINKS, furthest
from sweeps.plan.table import TABLES, Row, Table, resolve

WEIGHTS = ("caae.weights", "segmentor.weights")
"""Which a sweep takes by backbone: its rows may differ in that."""


def config_of(record: Record) -> Config:
    """The config of a run that has begun; fields that its stages have no use for are the preset's.

    Raises UserError where this version has not all of its fields, or other values of them.
    """
    settings = {name: value for name, value in record.config.items() if name in field_names()}
    if unknown := sorted(name for name in record.config.keys() - settings.keys() if name != "data.shapes"):
        raise UserError(f"run {record.run_id} was of another version, with {', '.join(unknown)}")
    return load_config(record.preset, settings, source=f"run {record.run_id}")


def differences(record: Record, base: Config) -> dict[str, Any]:
    """The fields that a run has a use for, but for the seed, in which its config is not as another: its values.

    Raises UserError as `config_of` does.
    """
    own, others = flatten(config_of(record)), flatten(base)
    fields = [field for field in own if field in record.config and field != "seed"]
    return {field: own[field] for field in fields if field not in others or own[field] != others[field]}


def goal_of(record: Record) -> Goal:
    """How far the run went."""
    return furthest(link.goal for link in LINKS.values() if link.stage in record.stages)


def single_command(record: Record) -> str:
    """The `semformer run` whose stages have the keys of a run's. Raises UserError as `config_of` does."""
    preset = load_config(record.preset)
    seed = {} if record.seed == preset.seed else {"seed": record.seed}
    fields = seed | differences(record, preset)
    return shlex.join(["semformer", "run", "--preset", record.preset, *_set(fields), *_rest(record, GOALS[0])])


def sweep_command(table: Table, row: Row, records: Sequence[Record]) -> str:
    """The `semformer-sweep run` of a table, whose trials for a row are runs that differ in nothing but the seed.

    Raises UserError as `config_of` does, and if the table's file has another value now in a field that it is about.
    """
    record, config = records[0], config_of(records[0])
    planned = resolve(table, row, record.preset, {}, config.seed)
    fields = _that_count(record, config, planned)
    if changed := [field for field in fields if field in table.varied]:
        raise UserError(f"row {row.id!r} of {table.path} has other values now of {', '.join(changed)}")
    weights = []
    for backbone, names in _pretrained(record, config).items():
        files = {fields.get(name, "") for name in names}
        if len(files) == 1 and all(files):
            weights += ["--weights", f"{backbone}={files.pop()}"]
            fields = {name: value for name, value in fields.items() if name not in names}
    seeds = ",".join(str(one.seed) for one in records)
    name = table.name if table.path.parent == TABLES else str(table.path)
    told = ["semformer-sweep", "run", name, "--preset", record.preset, "--seeds", seeds]
    return shlex.join([*told, *_set(fields), *weights, *_rest(record, table.goal)])


def _pretrained(record: Record, config: Config) -> dict[str, list[str]]:
    """The fields of weights of the run's networks that start from some, by backbone."""
    names: dict[str, list[str]] = {}
    for name in WEIGHTS:
        stage = name.partition(".")[0]
        if getattr(config, stage).pretrained and (not record.stages or stage in record.stages):
            names.setdefault(getattr(config, stage).backbone, []).append(name)
    return names


def _that_count(record: Record, config: Config, planned: Config) -> dict[str, Any]:
    """The differences that change a stage of the run: rows that share it may differ in others."""
    told = differences(record, planned)
    for group in {stage.group for stage in STAGES if stage.name in record.stages}:
        with suppress(UserError):  # without a file that has gone, all that differs has to count
            own, others = (_leaves(getattr(one, group).key_parameters(), group) for one in (config, planned))
            idle = {field for field in told if field.startswith(f"{group}.") and own.get(field) == others.get(field)}
            told = {field: value for field, value in told.items() if field not in idle}
    return told


def _leaves(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name, value in tree.items():
        told |= _leaves(value, f"{prefix}.{name}") if isinstance(value, Mapping) else {f"{prefix}.{name}": value}
    return told


def _set(fields: Mapping[str, Any]) -> list[str]:
    return [part for field, value in fields.items() for part in ("--set", f"{field}={_text(value)}")]


def _text(value: Any) -> str:
    """As a command line has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)


def _rest(record: Record, goal: Goal) -> list[str]:
    """Data and how far it goes, where that is further than `goal`."""
    own = furthest([goal_of(record), goal])
    return ["--data", record.data_folder] * bool(record.data_folder) + ["--until", own] * (own != goal)
