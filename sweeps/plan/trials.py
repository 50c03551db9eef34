"""Tables -> trials -> distinct stages.

Rows that ask for the same result share one trial; trials that need the same stage share that stage. Nothing is trained
here, and no network is built.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from semformer import pipeline
from semformer.config import Config, Goal, flatten
from semformer.errors import UserError
from semformer.keys import StageKey, canonical_sha256, ends, to_make
from semformer.store import Store
from sweeps.plan import scores
from sweeps.plan.table import SEVERAL, Row, Table, resolve
from sweeps.plan.weights import Weights


class Cell(NamedTuple):
    """A row of a table, by id, under one seed."""

    table: str
    row: str
    seed: int


@dataclass(frozen=True)
class Trial:
    """One distinct config, as far as its stages go."""

    config: Config
    data: Path | None
    """The devkit's folder, the same on every node; None for the embedded data set."""
    data_name: str
    """What the scores of its maps are measured on."""
    keys: Mapping[str, StageKey]
    cells: tuple[Cell, ...]

    @cached_property
    def ends(self) -> tuple[StageKey, ...]:
        """The stages that none of the others needs: they measure its scores."""
        return tuple(self.keys[name] for name in ends(self.keys))

    @cached_property
    def key(self) -> str:
        """Its identity in Tune, MLflow and the store: the digest of the stage that ends it, or one of several's."""
        digests = [key.digest for key in self.ends]
        return digests[0] if len(digests) == 1 else canonical_sha256(digests)

    @property
    def rows(self) -> tuple[str, ...]:
        """ "table03/CF" for every row that it fills."""
        return tuple(dict.fromkeys(f"{cell.table}/{cell.row}" for cell in self.cells))

    @property
    def name(self) -> str:
        """For people: its first row, and how many more it fills."""
        return _first(self.rows)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of its config that its stages have a use for."""
        groups = {"seed", "precision", "data", *(stage.group for stage in self._stages())}
        return {name: value for name, value in flatten(self.config).items() if name.partition(".")[0] in groups}

    @property
    def masks_read_by(self) -> tuple[str, ...]:
        """The stages that read pixel masks."""
        return tuple(stage.name for stage in self._stages() if stage.reads_masks(self.config))

    def _stages(self) -> list[pipeline.Stage]:
        return [stage for stage in pipeline.STAGES if stage.name in self.keys]


def distinct_stages(trials: Iterable[Trial]) -> list[StageKey]:
    """The keys of all stages of the trials, each once, in order."""
    return list({key.digest: key for trial in trials for key in trial.keys.values()}.values())


def missing_stages(trial: Trial, there: Collection[str]) -> list[StageKey]:
    """Those that must be made, in order, where the stages with the digests in `there` are in the store."""
    return to_make(trial.keys, lambda key: key.digest in there)


class Count(NamedTuple):
    """How many rows ask for a kind of stage, how many different ones that makes, how many of these are in the store."""

    requested: int
    distinct: int
    cached: int


class Sweep(Protocol):
    """What is driven, recorded and priced: a plan, all of whose trials are known, or a search, which finds them."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def tables(self) -> tuple[Table, ...]: ...
    @property
    def preset(self) -> str: ...
    @property
    def overrides(self) -> Mapping[str, Any]: ...
    @property
    def seeds(self) -> tuple[int, ...]: ...
    @property
    def trials(self) -> tuple[Trial, ...]:
        """Those that are known beforehand."""

    @property
    def samples(self) -> tuple[Trial, ...]:
        """Trials like those that may be run: what nodes must have and memory must hold is judged by them."""

    @property
    def cached(self) -> frozenset[str]:
        """Digests of the stages that were in the store."""

    @property
    def scores(self) -> tuple[str, ...]:
        """What its trials are judged by, named as in `plan.scores`, the main one first."""

    @property
    def stages(self) -> dict[str, Count]: ...
    @property
    def documents(self) -> dict[str, str]:
        """File name -> text of what the sweep was started from."""

    def summary(self) -> dict[str, Any]: ...
    def as_json(self) -> dict[str, Any]: ...
    def name_of(self, trial: Trial) -> str:
        """Of a trial, for people."""
        ...


@dataclass(frozen=True)
class Plan:
    """Of the rows of tables."""

    name: str
    """Of the sweep: that of its table, or `table.SEVERAL`."""
    title: str
    tables: tuple[Table, ...]
    preset: str
    overrides: Mapping[str, Any]
    seeds: tuple[int, ...]
    trials: tuple[Trial, ...]
    cached: frozenset[str]
    """Digests of the stages that are in the store, by their names alone: what is damaged shows when it is read."""
    until: Goal = "cams"
    """How far trials go, also where their table needs less."""

    @property
    def samples(self) -> tuple[Trial, ...]:
        return self.trials

    @property
    def scores(self) -> tuple[str, ...]:
        """Those of its tables, and what else its trials go for."""
        asked = dict.fromkeys(metric.name for table in self.tables for metric in table.measured)
        names = [*asked] or [scores.MAIN["cams"]]
        beyond = scores.GOALS[1 : scores.GOALS.index(self.until) + 1]
        return (*names, *(scores.MAIN[goal] for goal in beyond if scores.MAIN[goal] not in names))

    @property
    def documents(self) -> dict[str, str]:
        """File name -> text of what the sweep was started from."""
        return {f"{table.name}.yaml": table.text for table in self.tables}

    @cached_property
    def stages(self) -> dict[str, Count]:
        counts = {}
        for name in dict.fromkeys(stage for trial in self.trials for stage in trial.keys):
            digests = {trial.keys[name].digest for trial in self.trials if name in trial.keys}
            requested = sum(len(trial.cells) for trial in self.trials if name in trial.keys)
            counts[name] = Count(requested, len(digests), len(digests & self.cached))
        return counts

    def rows_of(self, trial: Trial) -> tuple[str, ...]:
        """For people: with the table only where there are several."""
        return trial.rows if len(self.tables) > 1 else tuple(dict.fromkeys(cell.row for cell in trial.cells))

    def name_of(self, trial: Trial) -> str:
        """As `Trial.name`, with the table only where there are several."""
        return _first(self.rows_of(trial))

    def missing(self) -> dict[StageKey, list[Trial]]:
        """The distinct stages that must be made, each with the trials that need it, in the pipeline's order."""
        wanted: dict[StageKey, list[Trial]] = {}
        for trial in self.trials:
            for key in missing_stages(trial, self.cached):
                wanted.setdefault(key, []).append(trial)
        order = [stage.name for stage in pipeline.STAGES]
        return dict(sorted(wanted.items(), key=lambda item: order.index(item[0].stage)))

    def summary(self) -> dict[str, Any]:
        return {
            "rows": sum(len(table.rows) for table in self.tables),
            "trials": len(self.trials),
            "stages": {name: count._asdict() for name, count in self.stages.items()},
        }

    def as_json(self) -> dict[str, Any]:
        """The summary, and every trial with its cells and the keys of its stages."""
        return {
            **self.summary(),
            "tables": [table.name for table in self.tables],
            "preset": self.preset,
            "overrides": dict(self.overrides),
            "seeds": list(self.seeds),
            "trial_list": [
                {
                    "key": trial.key,
                    "cells": [cell._asdict() for cell in trial.cells],
                    "stages": {
                        name: {"key": key.digest, "cached": key.digest in self.cached}
                        for name, key in trial.keys.items()
                    },
                }
                for trial in self.trials
            ],
        }


def _first(rows: Sequence[str]) -> str:
    more = len(rows) - 1
    return rows[0] + (f" + {more} row{'s' * (more > 1)}" if more else "")


@contextmanager
def _naming(table: Table, row: Row) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{table.where('rows', table.positions[row.id])}: row {row.id!r}: {error}") from error


def make_plan(
    tables: Sequence[Table],
    preset: str,
    overrides: Mapping[str, Any],
    seeds: Sequence[int],
    data: Path | None,
    store: Store,
    progress: Callable[[int, int], None] | None = None,
    weights: Weights | None = None,
    until: Goal = "cams",
) -> Plan:
    """Every cell of the tables, as trials in the order of the rows, that go as far as the table's scores and `until`.

    `data` is a VOC devkit, or None for the embedded data set (made now, with `progress`, if it is not there yet).
    Raises UserError for a row that makes no sound config, for data that cannot be used, and for `weights` that no row
    has a use for.
    """
    opened: dict[Any, pipeline.Data] = {}  # by the one field that decides which data set is meant
    trials: dict[str, Trial] = {}
    configs = {
        (table.name, row.id): resolve(table, row, preset, overrides, seeds[0]) for table in tables for row in table.rows
    }
    weights = weights or Weights()
    weights.check_used(configs.values())
    for seed in seeds:
        for table in tables:
            goal = scores.furthest([table.goal, until])
            for row in table.rows:
                config = configs[table.name, row.id].model_copy(update={"seed": seed})
                if config.data.shapes not in opened:
                    opened[config.data.shapes] = pipeline.open_data(config, data, progress)
                source = opened[config.data.shapes]
                with _naming(table, row):
                    config = weights.of(config)
                    keys = pipeline.stage_keys(config, source, pipeline.ends(config, goal))
                name = source.describe(config.data.eval_split)
                trial = Trial(config, data, name, keys, (Cell(table.name, row.id, seed),))
                if known := trials.get(trial.key):
                    trial = replace(known, cells=(*known.cells, *trial.cells))
                trials[trial.key] = trial
    stages = distinct_stages(trials.values())
    published = store.published({key.stage for key in stages})
    cached = frozenset(published & {key.digest for key in stages})
    name, title = (tables[0].name, tables[0].title) if len(tables) == 1 else (SEVERAL, f"{len(tables)} tables")
    all_trials = tuple(trials.values())
    return Plan(name, title, tuple(tables), preset, dict(overrides), tuple(seeds), all_trials, cached, until)
