"""Which runs a table shows: of one data set, and in each row of one protocol and the same settings."""

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from analysis.runs import FIELDS, MASKS, NOBODY, Record, plain_text
from semformer.config import Config, Goal, flatten
from semformer.errors import UserError
from sweeps.plan.protocol import PROTOCOL, of_scores, of_stages, uses
from sweeps.plan.scores import LINKS, furthest, goal_of_field, link_of
from sweeps.plan.table import Metric, Table, resolve

IMAGES = tuple(name for name, setting in PROTOCOL.items() if setting.images_of)


@dataclass(frozen=True)
class Candidate:
    """A trial that fills a row. `differs` has the config fields in which it is not what was asked for: its value, and
    the wanted one. `varied` are the fields that the table is about, `scores` its values."""

    row: str
    record: Record
    differs: Mapping[str, tuple[str, str]]
    varied: frozenset[str]
    scores: tuple[str, ...]

    @cached_property
    def settings(self) -> dict[str, str]:
        """What must agree with others for a comparison: its protocol, and all fields that are not as asked for."""
        matters = of_scores(self.scores)
        told = {n: text for n, text in self.record.protocol.items() if n not in PROTOCOL or n in matters}
        protocol = {n: text for n, text in told.items() if FIELDS.get(n) not in self.varied}
        protocol[MASKS] = self._masks_read_by()
        if any(map(_of_data, self.varied)):
            protocol = {n: text for n, text in protocol.items() if n not in ("data", *IMAGES)}
        covered = {FIELDS.get(name) for name in protocol}
        return protocol | {field: value for field, (value, _) in self.differs.items() if field not in covered}

    def _masks_read_by(self) -> str:
        """The stages that read pixel masks on the way to the scores, and those that score, whether the row has them or
        not."""
        scoring, told = {link.stage for link in LINKS.values()}, self.record.protocol.get(MASKS, NOBODY)
        if told == NOBODY:
            return told
        readers = {name for name in told.split(", ") if name not in scoring}
        return ", ".join(sorted(readers | self._stages(), key=lambda name: (name in scoring, name)))

    def lacks(self, name: str) -> bool:
        """Whether its run has no stage that one of others' `settings` is of, as far as is recorded."""
        if not self.record.stages or name in self.settings:
            return False
        if name in PROTOCOL:
            return name not in of_stages(self.record.stages, self.record.config)
        return not self.uses(name)

    def uses(self, field: str) -> bool:
        """Whether its run has a stage with a use for a config field, as far as is recorded."""
        return not self.record.stages or uses(field, self.record.stages, self.record.config)

    @property
    def goes_far_enough(self) -> bool:
        """Whether its run has all stages that measure the table's scores, as far as is recorded."""
        return not self.record.stages or self._stages() <= self.record.stages.keys()

    def _stages(self) -> set[str]:
        return {LINKS[link_of(name)].stage for name in self.scores}

    @property
    def measured(self) -> frozenset[tuple[str, str]]:
        """The stages that measured its scores, with their digests: those of a run that goes further are the same."""
        return frozenset((name, digest) for name, digest in self.record.stages.items() if name in self._stages())

    def agrees_with(self, other: "Candidate") -> bool:
        """As far as is known: a trial that has not begun has told no more than its protocol."""
        if self.record.begun:
            return self.settings == other.settings
        return self.settings.items() <= other.settings.items()


@dataclass(frozen=True)
class Choice:
    """`shown` are one candidate for each row and seed, in the table's order; `sentences` tell what was left out.

    `left_out` has the seeds, by row, of which there is a finished trial that is not shown."""

    shown: tuple[Candidate, ...]
    left_out: Mapping[str, set[int]]
    sentences: tuple[str, ...]


def choose(table: Table, records: Sequence[Record], preset: str, overrides: Mapping[str, Any]) -> Choice:
    """Of the data sets the one that is asked for, then that of most cells; of the settings in a row the ones nearest to
    what table file, preset and `overrides` say, then those of most cells; of equal trials the newest finished one.

    Raises UserError when no trial is of a row of the table.
    """
    candidates = list(_candidates(table, records, preset, overrides))
    if not candidates:
        raise UserError(f"no run is of a row of {table.path}: have the rows been renamed since the sweep?")
    furthest = _furthest(candidates)
    data = _data(table, furthest)
    comparable = [candidate for candidate in furthest if candidate.record.data == data[candidate.row]]
    cells = Counter(settings for _, settings in {(c.row, _frozen(c)) for c in comparable if c.record.finished})
    rows = [[candidate for candidate in comparable if candidate.row == row.id] for row in table.rows]
    shown = tuple(candidate for own in rows if own for candidate in _of_row(own, cells))
    ids = {(candidate.row, candidate.record.run_id) for candidate in shown}
    told = {(c.row, stage) for c in shown if c.record.finished for stage in c.measured}
    left = [
        c
        for c in candidates
        if (c.row, c.record.run_id) not in ids
        and not (c.measured and told.issuperset((c.row, stage) for stage in c.measured))
    ]
    sentences = tuple(_sentences(table, left, {candidate.row: candidate for candidate in shown}))
    seeds: dict[str, set[int]] = {}
    for candidate in left:
        if candidate.record.finished:
            seeds.setdefault(candidate.row, set()).add(candidate.record.seed)
    return Choice(shown, seeds, sentences)


def _candidates(
    table: Table, records: Iterable[Record], preset: str, overrides: Mapping[str, Any]
) -> Iterable[Candidate]:
    """Rows that share a trial may differ in fields that do not count; the nearest row tells what was asked for."""
    wanted = {row.id: _texts(resolve(table, row, preset, overrides, 0)) for row in table.rows}
    varied = frozenset(field for field in next(iter(wanted.values())) if _overlaps(field, table.varied))
    scores = tuple(metric.name for metric in table.measured)
    for record in records:
        rows = [row for row in record.rows_of(table.name) if row in wanted]
        differs = min((_differences(record, wanted[row], table.goal) for row in rows), key=len, default={})
        yield from (Candidate(row, record, differs, varied, scores) for row in rows)


def _furthest(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Without those that have no scores, in rows of which there are others that are to have all, and without those that
    have some, where others are finished."""
    rows = {candidate.row for candidate in candidates if candidate.goes_far_enough}
    full = {candidate.row for candidate in candidates if candidate.goes_far_enough and candidate.record.finished}
    return [c for c in candidates if c.goes_far_enough or c.row not in (full if c.measured else rows)]


def _texts(config: Config) -> dict[str, str]:
    return {field: plain_text(value) for field, value in flatten(config).items() if field != "seed"}


def _overlaps(field: str, names: Iterable[str]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in names)


def _differences(record: Record, wanted: Mapping[str, str], goal: Goal) -> dict[str, tuple[str, str]]:
    """In the fields that matter to a run that goes so far."""
    had = {
        field: _without_path(field, record.config[field], text)
        for field, text in wanted.items()
        if field in record.config and furthest([goal_of_field(field), goal]) == goal
    }
    return {field: (text, wanted[field]) for field, text in had.items() if text != wanted[field]}


def _without_path(field: str, had: str, wanted: str) -> str:
    """Files of weights that were given by --weights differ with the backbone: what counts is that there is one."""
    return "a file" if field.endswith(".weights") and had and not wanted else had


def _data(table: Table, candidates: Sequence[Candidate]) -> dict[str, str]:
    """The data set of each row: one for all, unless the table is about data."""
    rows = {candidate.row for candidate in candidates}
    if not any(map(_of_data, table.varied)):
        return dict.fromkeys(rows, _data_of_most(candidates))
    return {row: _data_of_most([candidate for candidate in candidates if candidate.row == row]) for row in rows}


def _of_data(field: str) -> bool:
    return field.partition(".")[0] == "data"


def _data_of_most(candidates: Sequence[Candidate]) -> str:
    """Of those who were asked for the data (fields `data.*`) most exactly, the data set with most measured cells."""
    measured = [candidate for candidate in candidates if candidate.record.finished] or candidates
    cells = Counter(data for _, data in {(candidate.row, candidate.record.data) for candidate in measured})

    def rank(candidate: Candidate) -> tuple[int, ...]:
        others, record = sum(map(_of_data, candidate.differs)), candidate.record
        return others, -cells[record.data], len(candidate.differs), -record.started

    return min(measured, key=rank).record.data


def _of_row(own: Sequence[Candidate], cells: Mapping[frozenset, int]) -> list[Candidate]:
    """One for each seed, in order."""
    best = min([c for c in own if c.record.begun] or own, key=lambda c: (len(c.differs), -cells[_frozen(c)], *_age(c)))
    seeds: dict[int, Candidate] = {}
    for candidate in sorted((c for c in own if c.agrees_with(best)), key=_age):
        seeds.setdefault(candidate.record.seed, candidate)
    return [seeds[seed] for seed in sorted(seeds)]


def _frozen(candidate: Candidate) -> frozenset[tuple[str, str]]:
    return frozenset(candidate.settings.items())


def _age(candidate: Candidate) -> tuple[bool, bool, int]:
    """Finished ones first, then running ones, then the newest."""
    record = candidate.record
    return not record.finished, record.status != "running", -record.started


def _sentences(table: Table, left: Iterable[Candidate], shown: Mapping[str, Candidate]) -> Iterable[str]:
    groups: dict[tuple[str, str], list[Candidate]] = {}
    for candidate in left:
        groups.setdefault(_reason(candidate, shown.get(candidate.row)), []).append(candidate)
    for (what, how), group in groups.items():
        n = len({candidate.record.run_id for candidate in group})
        hint = f" ({how} shows {'it' if n == 1 else 'them'})" if how else ""
        yield f"{n} other run{'s' * (n > 1)} left out: {what}{_scores(table.measured[0], group)}{hint}."


def _reason(candidate: Candidate, shown: Candidate | None) -> tuple[str, str]:
    """What a run that is left out has other than the one shown, and the options that would show it instead."""
    own = candidate.record.data
    if shown is None or own != shown.record.data:
        return (f"on {own}", f"--data {shlex.quote(own)}") if own else ("data not recorded", "")
    if not candidate.record.begun:
        return "not begun", ""
    if candidate.agrees_with(shown):
        return "another version of a stage", ""
    if candidate.goes_far_enough != shown.goes_far_enough:
        return f"{'with all' if candidate.goes_far_enough else 'without some'} of the scores", ""
    told = {field: value for field, (value, _) in candidate.differs.items()}
    options = "" if candidate.varied & set(told) else " ".join(_option(*item) for item in told.items())
    if not told:
        had, names = candidate.settings, dict.fromkeys((*shown.settings, *candidate.settings))
        told = {name: had.get(name, "not recorded") for name in names if had.get(name) != shown.settings.get(name)}
    return ", ".join(f"{name} = {value}" for name, value in told.items()), options


def _option(field: str, value: str) -> str:
    return f"--set {field}={shlex.quote(value.replace(', ', ','))}"


def _scores(metric: Metric, group: Sequence[Candidate]) -> str:
    scores = sorted(score for c in group if (score := c.record.score(metric.name)) is not None)
    if not scores:
        return f", {' or '.join(sorted({candidate.record.status for candidate in group}))}"
    span = dict.fromkeys(f"{score:.1f}" for score in (scores[0], scores[-1]))
    return f", {metric.header} {' to '.join(span)}"
