"""A table as data: which configs its rows stand for, the paper's values, and how it is laid out.

`sweeps/tables/*.yaml` are the paper's tables; a file of the same form anywhere on disk is as good. A row's config is

    preset  <  the table's `baseline`  <  --set  <  the row's `set`  <  the row's `presets`, of the chosen preset

`set` has the paper's value of an axis; `presets` has what takes its place in a preset with smaller networks.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from semformer.config import PRESETS, Config, Goal, field_names, load_config, unknown_field
from semformer.errors import UserError
from sweeps.plan import scores

TABLES = Path(__file__).parents[1] / "tables"
SEVERAL = "tables"
"""The name of a sweep of several tables."""
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
Location = tuple[str | int, ...]


class Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Metric(Spec):
    """`name`: one of `scores.NAMES`, in percent; another one for what no run of ours measures, with `elsewhere`: who
    does."""

    name: str
    header: str
    best: Literal["max", "min"] = "max"
    elsewhere: str = ""


class Mark(Spec):
    """A line (or column) of the table that tells what a row is: a check mark, or a value.

    With a `field`, what our run had in it is shown too wherever that is not the paper's value.
    """

    name: Name
    header: str
    latex: str = ""
    field: str = ""


class Layout(Spec):
    """`transposed`: one column per row of `rows`, marks and metrics below each other.

    `compared` names a mark: the best value is that of the rows which have the same there; without one, of all.
    """

    transposed: bool = False
    compared: str = ""
    marks: Annotated[tuple[Mark, ...], Field(strict=False)] = ()


class PaperRow(Spec):
    """A row that only the paper has values for. `marks`: true is a check mark, text stands for itself."""

    id: Name
    label: str
    marks: Mapping[str, bool | int | float | str] = {}
    paper: Mapping[str, float | None] = {}
    """Metric name -> the paper's value; none, or null, where the paper has none."""


class Row(PaperRow):
    """A row of ours: `set` holds the fields in which it differs from the baseline.

    `presets` maps the name of a preset to the fields of `set` that have another value there.
    """

    set: Mapping[str, Any] = {}
    presets: Mapping[str, Mapping[str, Any]] = {}


class Table(Spec):
    """A table file. `where` tells the file and line of one of its parts, `text` is the file as it was read."""

    name: Name
    title: str
    source: str = ""
    """Where in the paper the values stand."""
    notes: Annotated[tuple[str, ...], Field(strict=False)] = ()
    baseline: Mapping[str, Any] = {}
    """Fields that all rows set alike."""
    metrics: Annotated[tuple[Metric, ...], Field(strict=False, min_length=1)]
    layout: Layout = Layout()
    rows: Annotated[tuple[Row, ...], Field(strict=False, min_length=1)]
    paper_only: Annotated[tuple[PaperRow, ...], Field(strict=False)] = ()

    _path: Path = PrivateAttr()
    _text: str = PrivateAttr()
    _lines: dict[Location, int] = PrivateAttr()

    @property
    def path(self) -> Path:
        return self._path

    @property
    def text(self) -> str:
        return self._text

    @property
    def measured(self) -> tuple[Metric, ...]:
        """The metrics that runs of ours measure."""
        return tuple(metric for metric in self.metrics if not metric.elsewhere)

    @property
    def goal(self) -> Goal:
        """How far its runs go."""
        return scores.goal_of(metric.name for metric in self.measured)

    @cached_property
    def positions(self) -> dict[str, int]:
        """Row id -> its place in `rows`."""
        return {row.id: i for i, row in enumerate(self.rows)}

    @cached_property
    def varied(self) -> dict[str, str]:
        """The fields that rows set, each with the id of the first row that does."""
        fields: dict[str, str] = {}
        for row in self.rows:
            for name in row.set:
                fields.setdefault(name, row.id)
        return fields

    @cached_property
    def paper_metrics(self) -> frozenset[str]:
        """The metrics that the paper has a value of, in any row."""
        values = (item for row in (*self.rows, *self.paper_only) for item in row.paper.items())
        return frozenset(name for name, value in values if value is not None)

    def where(self, *location: str | int) -> str:
        """ "FILE:LINE" of a part, such as ("rows", 2, "set", "segmentor.sigma")."""
        return _where(self._path, self._lines, location)


def table_names() -> tuple[str, ...]:
    """The names of the built-in tables."""
    return tuple(sorted(path.stem for path in TABLES.glob("*.yaml")))


def load_table(name_or_path: str | Path) -> Table:
    """A built-in table ("table03", "table03_losses") or a YAML file.

    Raises UserError, naming file and line, for anything that is missing, unknown, ill-typed or there twice.
    """
    path = _find(str(name_or_path))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the table {path}: {getattr(error, 'strerror', None) or error}") from error
    data, lines = _parse(text, path)
    try:
        table = Table.model_validate(data)
    except ValidationError as error:
        told = [item for item in error.errors() if item["type"] != "too_short" or not item["input"]]
        raise UserError("\n".join(_explain(item, path, lines, data) for item in told)) from error
    table._path, table._text, table._lines = path, text, lines
    if mistakes := list(_mistakes(table)):
        raise UserError("\n".join(mistakes))
    return table


def load_tables(names: Sequence[str | Path]) -> list[Table]:
    """Several tables. Raises UserError as `load_table` does, and for a table or a `name` that is there twice."""
    tables: dict[str, Table] = {}
    for table in map(load_table, names):
        if known := tables.get(table.name):
            if known.path.resolve() == table.path.resolve():
                raise UserError(f"the table {table.name} is given twice")
            raise UserError(f"{known.path} and {table.path} are both named {table.name!r}: change the `name` of one")
        tables[table.name] = table
    return list(tables.values())


def load_all_tables(until: Goal = "cams") -> list[Table]:
    """The built-in tables that are filled by runs that go so far, in the paper's order."""
    return [table for table in load_tables(table_names()) if scores.furthest([table.goal, until]) == until]


def resolve(table: Table, row: Row, preset: str, overrides: Mapping[str, Any], seed: int) -> Config:
    """The config of a row. Raises UserError naming the row's line for a value that does not fit its field,
    and for an override of what the rows themselves vary."""
    if "seed" in overrides:
        raise UserError("--set seed: a sweep's seeds are given by --seeds")
    for name in overrides:
        if clash := next((row for field, row in table.varied.items() if _overlap(name, field)), None):
            raise UserError(f"--set {name}: row {clash!r} of {table.name} is about this very field")
    replaced = row.presets.get(preset, {})
    values = {**table.baseline, **overrides, **row.set, **replaced, "seed": seed}
    index = table.positions[row.id]
    try:
        return load_config(preset, values, source=f"{table.where('rows', index)}: row {row.id!r}")
    except UserError:
        for location, name, value in (
            *((("baseline", name), name, value) for name, value in table.baseline.items()),
            *((("rows", index, "set", name), name, value) for name, value in row.set.items() if name not in replaced),
            *((("rows", index, "presets", preset, name), name, value) for name, value in replaced.items()),
        ):
            inside = "baseline" if location[0] == "baseline" else f"row {row.id!r}"
            load_config(preset, {name: value}, source=f"{table.where(*location)}: {inside}")
        load_config(preset, overrides)
        raise


def _overlap(a: str, b: str) -> bool:
    return a == b or a.startswith(b + ".") or b.startswith(a + ".")


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    number = re.fullmatch(r"(?:[Tt]able)?0*([0-9]{1,3})", name)  # "table3" and "3" as well
    wanted = f"table{int(number[1]):02}" if number else name
    matches = [stem for stem in table_names() if stem == name or stem.partition("_")[0] == wanted]
    if len(matches) == 1:
        return TABLES / f"{matches[0]}.yaml"
    known = [f"{stem.partition('_')[0]} ({stem})" for stem in table_names()]
    near = difflib.get_close_matches(name, [stem.partition("_")[0] for stem in table_names()], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"no table is named {name!r}: {hint}There are {', '.join(known)}; a table of your own is given by its path, "
        "ending in .yaml"
    )


def _parse(text: str, path: Path) -> tuple[Any, dict[Location, int]]:
    """The data, and the line of every part of it. Raises UserError for bad YAML and for keys that are there twice."""
    lines: dict[Location, int] = {}

    def locate(node: yaml.Node, location: Location) -> None:
        lines.setdefault(location, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                locate(item, (*location, i))
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = (*location, key.value)
                if inner in lines:
                    raise UserError(
                        f"{path}:{key.start_mark.line + 1}: {key.value!r} is there twice, first in line {lines[inner]}"
                    )
                lines[inner] = key.start_mark.line + 1
                locate(value, inner)

    try:
        loader = LOADER(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}: a table file is a mapping with name, title, metrics and rows")
        data = loader.construct_document(node)
        locate(node, ())
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{path}:{line}: this is no YAML: {error.reason}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: this is no YAML: {error.problem}") from error
    except RecursionError:
        raise UserError(f"{path}: an anchor contains itself") from None
    except (ValueError, LookupError, AttributeError) as error:  # of yaml: there is no month 13
        raise UserError(f"{path}: a value is none of its type: {error}; quote it where text is meant") from error
    return data, lines


def _where(path: Path, lines: Mapping[Location, int], location: Sequence[str | int]) -> str:
    location = tuple(location)
    while location not in lines:
        location = location[:-1]
    return f"{path}:{lines[location]}"


def _explain(item: Mapping[str, Any], path: Path, lines: Mapping[Location, int], data: Any) -> str:
    location, place = item["loc"], _where(path, lines, item["loc"])
    name = ".".join(str(part) for part in location)
    if len(location) > 2 and location[0] in ("rows", "paper_only"):
        row = data[location[0]][location[1]]
        place += f": row {row.get('id', location[1] + 1)!r}"
        name = ".".join(str(part) for part in location[2:])
    if item["type"] == "extra_forbidden":
        models: dict[str, type[Spec]] = {"rows": Row, "paper_only": PaperRow, "metrics": Metric}
        models |= {"marks": Mark, "layout": Layout}
        section = next((part for part in reversed(location[:-1]) if isinstance(part, str)), "")
        valid = list(models.get(section, Table).model_fields)
        near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(valid)}"
        return f"{place}: unknown field {str(location[-1])!r}: {hint}"
    if item["type"] == "missing":
        return f"{place}: {name} is missing"
    return f"{place}: {name} = {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _mistakes(table: Table) -> Iterator[str]:
    """What no single value shows to be wrong."""
    if table.name == SEVERAL:
        yield f"{table.where('name')}: {SEVERAL!r} is the name of sweeps of several tables: choose another"
    for name in table.baseline:
        if mistake := _field_mistake(name):
            yield f"{table.where('baseline', name)}: baseline: {mistake}"
    metrics, marks = [m.name for m in table.metrics], [m.name for m in table.layout.marks]
    for section, names in (("metrics", metrics), ("layout", marks)):
        if twice := next((name for name in names if names.count(name) > 1), None):
            yield f"{table.where(section)}: {section}: {twice!r} is there twice"
    for i, metric in enumerate(table.metrics):
        place, name = table.where("metrics", i, "name"), metric.name
        if metric.elsewhere and name in scores.NAMES:
            yield f"{place}: metrics: {name!r} is measured by runs, not elsewhere: give it another name"
        elif not metric.elsewhere and name not in scores.NAMES:
            yield f"{place}: metrics: {name!r} is none of {', '.join(scores.NAMES)}"
    if not table.measured:
        yield f"{table.where('metrics')}: metrics: all are measured elsewhere: name one that runs measure"
    if (name := table.layout.compared) and name not in marks:
        known = ", ".join(marks) or "none"
        yield f"{table.where('layout', 'compared')}: layout: compared = {name!r} is none of the marks ({known})"
    for i, mark in enumerate(table.layout.marks):
        if mark.field and mark.field not in field_names():
            place = table.where("layout", "marks", i, "field")
            yield f"{place}: mark {mark.name!r}: {unknown_field(mark.field)}"
    seen: dict[str, str] = {}
    for section, rows in (("rows", table.rows), ("paper_only", table.paper_only)):
        for i, row in enumerate(rows):
            here = f"{table.where(section, i)}: row {row.id!r}"
            if row.id in seen:
                yield f"{here}: another row has this id, at {seen[row.id]}"
            seen.setdefault(row.id, table.where(section, i))
            if section == "paper_only" and not any(value is not None for value in row.paper.values()):
                yield f"{here}: a row of `paper_only` needs a value in `paper`: give one, or leave the row out"
            for part, valid in (("paper", metrics), ("marks", marks)):
                for name in getattr(row, part):
                    if name not in valid:
                        place = table.where(section, i, part, name)
                        known = "metrics" if part == "paper" else "marks of the layout"
                        yield f"{place}: row {row.id!r}: {name!r} is none of the {known} ({', '.join(valid) or 'none'})"
    marked = {mark.name: mark.field for mark in table.layout.marks if mark.field}
    for i, row in enumerate(table.rows):
        for name, field in marked.items():
            told, used = row.marks.get(name), row.set.get(field)
            if _is_number(told) and _is_number(used) and told != used:
                place = table.where("rows", i, "marks", name)
                yield f"{place}: row {row.id!r}: mark {name!r} says {told}, but {field} is set to {used}"
        for name in row.set:
            if mistake := _field_mistake(name):
                yield f"{table.where('rows', i, 'set', name)}: row {row.id!r}: {mistake}"
        for preset, fields in row.presets.items():
            if preset not in PRESETS:
                place = table.where("rows", i, "presets", preset)
                yield f"{place}: row {row.id!r}: no preset is named {preset!r}: there are {', '.join(PRESETS)}"
            for name in fields:
                if name not in row.set:
                    place = table.where("rows", i, "presets", preset, name)
                    yield f"{place}: row {row.id!r}: {name!r} of preset {preset} replaces nothing in `set`"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _field_mistake(name: str) -> str:
    if name == "seed":
        return "seeds are given by --seeds"
    groups = {field.rpartition(".")[0] for field in field_names()} - {""}
    return "" if name in field_names() or name in groups else unknown_field(name)
