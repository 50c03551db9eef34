"""MLflow -> plain records: the trials of sweeps, as the sweeps recorded them. Nothing else is read."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from semformer.errors import UserError
from sweeps.plan import scores
from sweeps.plan.protocol import PROTOCOL, SCORED_BY_THRESHOLD
from sweeps.tracking import rows
from sweeps.tracking.connection import TAG, connecting, reading_client

SHORT = 8
"""Characters of a run id or trial key that are printed."""
MASKS = "pixel masks read by"
NOBODY = "no stage"
FIELDS = {name: setting.field for name, setting in PROTOCOL.items() if setting.field}
"""The config fields that a protocol tells of."""

VERSION = "version."
"""Tags of packages begin with this, after `TAG`."""

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """A trial's run. `started` and `ended` are in milliseconds, "" and 0 stand for what is not recorded.

    `status` is queued, running, stopped, finished, failed or pruned; `rows` are "table/row". `config` has the text of
    all config fields once the trial has `begun`, before that of the protocol's. `protocol` has MASKS in it, too.
    `versions` are of the packages, `found` tells of each stage whether it was in the store, `data_folder` is the
    devkit's.
    """

    run_id: str
    parent_run_id: str
    experiment: str
    trial_key: str
    seed: int
    rows: tuple[str, ...]
    status: str
    reason: str
    started: int
    begun: bool
    config: Mapping[str, str]
    protocol: Mapping[str, str]
    stages: Mapping[str, str]
    """Digests of its stages."""
    metrics: Mapping[str, float]
    preset: str
    ended: int
    commit: str
    host: str
    versions: Mapping[str, str]
    found: Mapping[str, bool]
    data_folder: str

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def data(self) -> str:
        """The data set that it was measured on."""
        return self.protocol.get("data", "")

    def score(self, name: str) -> float | None:
        """A measured value, such as "miou" in percent; None if there is none, or no finite one."""
        split = self.protocol.get(scores.LINKS[scores.link_of(name)].split, "")
        value = self.metrics.get(scores.full_name(name, split), math.nan)
        return value if self.finished and math.isfinite(value) else None

    def threshold(self, link: str) -> float | None:
        """At which the maps of a word of `scores.LINKS` are scored; None for what has no threshold."""
        return self.score(f"{link}/threshold") if link in SCORED_BY_THRESHOLD else None

    def rows_of(self, table: str) -> list[str]:
        """The rows of a table that the trial fills."""
        return [row for name, _, row in (pair.partition("/") for pair in self.rows) if name == table]


@dataclass(frozen=True)
class SweepRun:
    """A sweep's own run, the parent of those of its trials. `folder` is its name in `semformer-sweep status`, "" where
    that is not recorded; `tables` are the names of those that it was about."""

    run_id: str
    name: str
    folder: str
    experiment: str
    tables: tuple[str, ...]
    started: int

    def __str__(self) -> str:
        own = self.folder or self.name
        return f"{own!r} (experiment {self.experiment!r}, run {self.run_id[:SHORT]}, begun {time_text(self.started)})"


Unusable = tuple[tuple[str, ...], str]
"""The rows that a run fills, and a sentence on what is wrong with it."""


@dataclass(frozen=True)
class Trials:
    """What some experiments hold of a preset, read once: a record for each trial.

    `repeated` are the keys of the trials that have several runs.
    """

    records: Sequence[Record]
    unusable: Sequence[Unusable]
    repeated: frozenset[str]

    def unusable_of(self, tables: Collection[str]) -> dict[str, list[str]]:
        """The sentences on runs that fill rows of some tables, each with those rows."""
        kept = {why: [row for row in filled if row.partition("/")[0] in tables] for filled, why in self.unusable}
        return {why: filled for why, filled in kept.items() if filled}


def read_trials(tracking_uri: str, preset: str, experiments: Sequence[str] = ()) -> Trials:
    """The trials of a preset in some experiments, by default in all that are not deleted.

    Raises UserError if one of `experiments` is not there, or MLflow cannot be read.
    """
    records, unusable = read_records(tracking_uri, preset, experiments)
    counts = Counter(record.trial_key for record in records)
    repeated = frozenset(key for key, n in counts.items() if n > 1)
    return Trials(_merged(records), unusable, repeated)


def read_records(
    tracking_uri: str, preset: str = "", experiments: Sequence[str] = ()
) -> tuple[list[Record], list[Unusable]]:
    """The runs of trials, all of them, and what is wrong with others; of any preset where none is named.

    Raises UserError as `read_trials` does.
    """
    with connecting(tracking_uri):
        client = reading_client(tracking_uri)
        names = _experiments(client, experiments)
        runs = _trial_runs(client, names, *[f"tags.`{TAG}preset` = '{preset}'"] * bool(preset))
    records: list[Record] = []
    unusable: list[Unusable] = []
    for run in runs:
        experiment = names[run.info.experiment_id]
        try:
            records.append(_record(run, experiment))
        except (ValueError, RecursionError) as error:
            place = f"Run {run.info.run_id} of experiment {experiment!r}"
            unusable.append((tuple(rows.read(_tags(run))), f"{place} is left out: {error}"))
    return records, unusable


def read_sweeps(tracking_uri: str) -> list[SweepRun]:
    """The sweeps in all experiments, oldest first. Raises UserError as `read_trials` does."""
    with connecting(tracking_uri):
        client = reading_client(tracking_uri)
        names = _experiments(client, ())
        runs = _runs(client, names, f"tags.`{TAG}kind` = 'sweep'")
    return sorted((_sweep_run(run, names[run.info.experiment_id]) for run in runs), key=lambda one: one.started)


def _sweep_run(run: Run, experiment: str) -> SweepRun:
    tags, info = _tags(run), run.info
    tables = tuple(filter(None, tags.get("table", "").split(",")))
    return SweepRun(info.run_id, info.run_name or "", tags.get("sweep", ""), experiment, tables, info.start_time or 0)


def contents(tracking_uri: str, experiments: Sequence[str] = ()) -> str:
    """ "there are trials of ...": tables, each with a preset. Raises UserError as `read_trials` does."""
    with connecting(tracking_uri):
        client = reading_client(tracking_uri)
        tags = [_tags(run) for run in _trial_runs(client, _experiments(client, experiments))]
    there = {(row.partition("/")[0], tag.get("preset", "")) for tag in tags for row in rows.read(tag)}
    told = ", ".join(f"{table} {preset}" for table, preset in sorted(there))
    return f"there are trials of {told}" if told else "there is no trial at all: run a sweep first"


def log_texts(tracking_uri: str, run_ids: Iterable[str], texts: Mapping[str, str]) -> None:
    """Keep text files, by name, with some runs. Raises UserError if MLflow or its artifacts cannot be used."""
    with connecting(tracking_uri):
        client = reading_client(tracking_uri)
        for run_id in run_ids:
            for name, text in texts.items():
                client.log_text(run_id, text, name)


def _experiments(client: MlflowClient, wanted: Sequence[str]) -> dict[str, str]:
    """Id -> name."""
    known = {e.experiment_id: e.name for e in _pages(client.search_experiments)}
    for name in wanted:
        if name not in known.values():
            there = ", ".join(sorted(repr(name) for name in known.values() if name != "Default")) or "none yet"
            raise UserError(f"MLflow has no experiment {name!r}: there are {there} (choose with --experiment)")
    return {i: name for i, name in known.items() if not wanted or name in wanted}


def _trial_runs(client: MlflowClient, experiments: Iterable[str], *conditions: str) -> list[Run]:
    return _runs(client, experiments, f"tags.`{TAG}kind` = 'trial'", *conditions)


def _runs(client: MlflowClient, experiments: Iterable[str], *conditions: str) -> list[Run]:
    return _pages(client.search_runs, experiment_ids=list(experiments), filter_string=" AND ".join(conditions))


def _pages(search: Any, **query: Any) -> list[Any]:
    page = search(**query)
    found = list(page)
    while page.token:
        page = search(**query, page_token=page.token)
        found += page
    return found


def _merged(records: Iterable[Record]) -> list[Record]:
    """One record for each trial: of a finished run, else of the newest, with the rows of all its runs."""
    trials: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: (not record.finished, -record.started)):
        trials.setdefault(record.trial_key, []).append(record)
    return [
        replace(runs[0], rows=tuple(dict.fromkeys(row for run in runs for row in run.rows))) for runs in trials.values()
    ]


def _record(run: Run, experiment: str) -> Record:
    """Raises ValueError that names a tag that is missing or cannot be read."""
    tags = _tags(run)
    told = _parsed(tags, "protocol", _object) if tags.get("protocol") else {}
    masks = _parsed(tags, "masks_read_by", _names) if tags.get("masks_read_by") else []
    protocol = {name: plain_text(value) for name, value in told.items()}
    params = {name: parameter_text(value) for name, value in run.data.params.items()}
    status = _status(run)
    return Record(
        run_id=run.info.run_id,
        parent_run_id=run.data.tags.get(MLFLOW_PARENT_RUN_ID, ""),
        experiment=experiment,
        trial_key=_parsed(tags, "trial_key", str),
        seed=_parsed(tags, "seed", _seed),
        rows=tuple(rows.read(tags)),
        status=status,
        reason=f"{'while' if params else 'before'} it ran" if status == "stopped" else tags.get("reason", ""),
        started=run.info.start_time or 0,
        begun=bool(params),
        config=params | {field: protocol[name] for name, field in FIELDS.items() if name in protocol},
        protocol=protocol | {MASKS: ", ".join(masks) or NOBODY},
        stages=_parsed(tags, "stage_keys", _digests) if tags.get("stage_keys") else {},
        metrics=run.data.metrics,
        preset=tags.get("preset", ""),
        ended=run.info.end_time or 0,
        commit=tags.get("commit", ""),
        host=tags.get("host", ""),
        versions={name.removeprefix(VERSION): text for name, text in tags.items() if name.startswith(VERSION)},
        found=_parsed(tags, "stages_found", _object) if tags.get("stages_found") else {},
        data_folder=_data_folder(run),
    )


def _data_folder(run: Run) -> str:
    """Of its data sets, as MLflow has them; "" for images that the project makes itself."""
    inputs = run.inputs.dataset_inputs if run.inputs else []
    sources = [one.dataset.source for one in inputs if one.dataset.source_type == "local"]
    try:
        return str(_object(sources[0]).get("uri", "")) if sources else ""
    except (ValueError, RecursionError):
        return ""


def _status(run: Run) -> str:
    """A sweep that ends sets back what is not finished; it runs on when the sweep is resumed."""
    status, ended = _tags(run).get("status", ""), run.info.status
    if status in ("finished", "failed", "pruned"):
        return status
    return {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}.get(ended, status or "running")


def _tags(run: Run) -> dict[str, str]:
    return {name.removeprefix(TAG): text for name, text in run.data.tags.items() if name.startswith(TAG)}


def _parsed(tags: Mapping[str, str], name: str, parse: Callable[[str], T]) -> T:
    if not (text := tags.get(name)):
        raise ValueError(f"it has no tag {TAG}{name}")
    try:
        return parse(text)
    except (ValueError, RecursionError):
        raise ValueError(f"its tag {TAG}{name} = {text[:60]!r} cannot be read") from None


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**63:
        raise ValueError
    return seed


def _object(text: str) -> dict[str, Any]:
    return _of_type(dict, json.loads(text))


def _digests(text: str) -> dict[str, str]:
    return {name: _of_type(str, digest) for name, digest in _object(text).items()}


def _names(text: str) -> list[str]:
    return list(map(str, _of_type(list, json.loads(text))))


def _of_type(kind: type[T], value: Any) -> T:
    if not isinstance(value, kind):
        raise ValueError
    return value


def time_text(milliseconds: int) -> str:
    """ "2026-11-30T22:04:51Z"; "" for 0."""
    return f"{datetime.fromtimestamp(milliseconds // 1000, UTC):%Y-%m-%dT%H:%M:%SZ}" if milliseconds else ""


def plain_text(value: Any) -> str:
    """A JSON value for people: [0.5, 1.0] -> "0.5, 1.0", true -> "yes"."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(plain_text, value)) if isinstance(value, list | tuple) else str(value)


def parameter_text(parameter: str) -> str:
    """A parameter as the sweep records it (text as it is, else JSON), for people: '["CF", "SS"]' -> "CF, SS"."""
    try:
        return plain_text(json.loads(parameter))
    except (ValueError, RecursionError):
        return parameter
