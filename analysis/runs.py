"""MLflow -> pandas: the trials of a sweep, as the sweep recorded them. Nothing else is read."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Experiment, Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from semformer.config import Config, flatten
from semformer.errors import UserError
from sweeps.plan.table import Table, resolve

TAG = "semformer."
SHORT = 8
"""Characters of a run id or trial key that are printed."""
ENDED = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "failed"}


@dataclass(frozen=True)
class Trials:
    """The trial runs of one experiment, read once."""

    experiment: str
    runs: Sequence[Run]

    def of_table(self, table: str, preset: str) -> pd.DataFrame:
        """One line per run of `preset` and row of `table` that it fills; empty if there is none.

        Columns: row, seed, rows (all of this table that the run fills, comma-separated), run_id, parent_run_id,
        trial_key, status (queued, running, finished, failed), reason, started (UTC), commit, masks_read_by, and what
        MLflow holds by name: `metrics.<name>` floats, `params.<field>` and `protocol.<name>` text; empty where a run
        has none.
        """
        runs = [run for run in self.runs if _tag(run, "preset") == preset]
        return pd.DataFrame([_record(run, row, _rows(run, table)) for run in runs for row in _rows(run, table)])

    def contents(self) -> str:
        """Of which tables and presets it has trials, for people."""
        there = {(table, _tag(run, "preset")) for run in self.runs for table in _tag(run, "table").split(",")}
        told = ", ".join(f"{table} {preset}" for table, preset in sorted(there))
        return f"it has {told}" if told else "it has no trial at all"


def read_trials(tracking_uri: str, experiments: Sequence[str]) -> Trials:
    """The trials of the first of `experiments` that is there. Raises UserError if none is, or MLflow cannot be read."""
    client = _client(tracking_uri)
    experiment = _experiment(client, experiments)
    query = f"tags.`{TAG}kind` = 'trial'"
    runs = _pages(client.search_runs, experiment_ids=[experiment.experiment_id], filter_string=query)
    return Trials(experiment.name, runs)


def log_texts(tracking_uri: str, run_ids: Iterable[str], texts: Mapping[str, str]) -> None:
    """Keep text files, by name, with some runs. Raises UserError if MLflow cannot be used."""
    client = _client(tracking_uri)
    for run_id in run_ids:
        for name, text in texts.items():
            client.log_text(run_id, text, name)


def _client(tracking_uri: str) -> MlflowClient:
    """Reading must not leave a trace, but MLflow creates an sqlite database that is not there."""
    if tracking_uri.startswith("sqlite:///"):
        path = Path(tracking_uri.removeprefix("sqlite:///").partition("?")[0])
        if not path.is_file():
            raise UserError(
                f"there is no MLflow database {path}: run a sweep first (semformer-sweep run), or name the "
                "database with --tracking-uri"
            )
    try:
        client = MlflowClient(tracking_uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # MLflow passes on whatever the database driver or the HTTP library raises
        shown = re.sub(r"(?<=:)[^:@/]+(?=@)", "***", tracking_uri)
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read MLflow at {shown}: {first}") from error
    return client


def _experiment(client: MlflowClient, names: Sequence[str]) -> Experiment:
    for name in names:
        experiment = client.get_experiment_by_name(name)
        if experiment and experiment.lifecycle_stage == "active":
            return experiment
    known = sorted(e.name for e in _pages(client.search_experiments) if e.name != "Default")
    there = f"there are {', '.join(map(repr, known))}" if known else "there is none yet; run a sweep first"
    wanted = " or ".join(map(repr, names))
    raise UserError(f"MLflow has no experiment {wanted}: {there} (choose one with --preset or --experiment)")


def _pages(search: Any, **query: Any) -> list[Any]:
    found = page = search(**query)
    while page.token:
        page = search(**query, page_token=page.token)
        found = [*found, *page]
    return list(found)


def _rows(run: Run, table: str) -> list[str]:
    """The rows of `table` that the trial fills."""
    pairs = (name.partition("/") for name in _tag(run, "rows").split(","))
    return [row for name, _, row in pairs if name == table]


def _record(run: Run, row: str, rows: Sequence[str]) -> dict[str, Any]:
    status = _tag(run, "status")
    if status not in ENDED.values():
        status = ENDED.get(run.info.status, status or "running")
    protocol = json.loads(_tag(run, "protocol") or "{}")
    return {
        "row": row,
        "seed": int(_tag(run, "seed")),
        "rows": ",".join(rows),
        "run_id": run.info.run_id,
        "parent_run_id": run.data.tags.get(MLFLOW_PARENT_RUN_ID, ""),
        "trial_key": _tag(run, "trial_key"),
        "status": status,
        "reason": _tag(run, "reason"),
        "started": pd.Timestamp(run.info.start_time, unit="ms", tz="UTC"),
        "commit": _tag(run, "commit"),
        "masks_read_by": ", ".join(json.loads(_tag(run, "masks_read_by") or "[]")),
        **_prefixed("metrics.", run.data.metrics),
        **_prefixed("params.", run.data.params),
        **_prefixed("protocol.", {name: plain_text(value) for name, value in protocol.items()}),
    }


def _tag(run: Run, name: str) -> str:
    return run.data.tags.get(TAG + name, "")


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in values.items()}


def plain_text(value: Any) -> str:
    """A JSON value for people: [0.5, 1.0] -> "0.5, 1.0", true -> "yes"."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(plain_text, value)) if isinstance(value, list | tuple) else str(value)


def choose_runs(
    trials: pd.DataFrame, table: Table, preset: str, overrides: Mapping[str, Any] | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """One run for every row and seed, and sentences on the runs that are left out.

    The run nearest to what the table file, the preset and `overrides` say wins, then the newest trial; of several runs
    of one trial the newest finished one. Adds the column `differs`: field -> (the run's value, the wanted one).
    Raises UserError when no run is of a row of the table.
    """
    trials = trials[trials["row"].isin({row.id for row in table.rows})]
    if trials.empty:
        raise UserError(f"no run is of a row of {table.path}: have the rows been renamed since the sweep?")
    differs = [_differences(trial, table, preset, overrides or {}) for trial in trials.to_dict("records")]
    trials = trials.assign(
        differs=differs,
        distance=[len(fields) for fields in differs],
        trial_started=trials.groupby(["row", "seed", "trial_key"])["started"].transform("max"),
        finished=trials["status"].eq("finished"),
    )
    order = {"distance": True, "trial_started": False, "trial_key": True, "finished": False, "started": False}
    ranked = trials.sort_values(list(order), ascending=list(order.values()), ignore_index=True)
    chosen = ranked.drop_duplicates(["row", "seed"])
    return chosen, _left_out(ranked.drop(chosen.index), chosen)


def _left_out(left: pd.DataFrame, chosen: pd.DataFrame) -> list[str]:
    kept = chosen[["row", "seed", "trial_key", "run_id", "status"]]
    left = left.merge(kept, on=["row", "seed"], suffixes=("", "_kept"))
    same = left["trial_key"] == left["trial_key_kept"]
    sentences = []
    for key, group in left[same].groupby("trial_key", sort=False):
        winner = group.iloc[0]
        which = "newest finished" if winner["status_kept"] == "finished" else "newest"
        sentences.append(
            f"Trial {key[:SHORT]} has {group['run_id'].nunique() + 1} runs; the {which} one, "
            f"{winner['run_id_kept'][:SHORT]}, is shown."
        )
    others = left[~same]
    for settings, group in others.groupby(others["differs"].map(_settings_text), sort=False):
        n = group["run_id"].nunique()
        why = f"{settings} (--set chooses these settings)" if settings else "other data or another version of a stage"
        sentences.append(f"{n} other run{'s' * (n > 1)} of these cells left out: {why}.")
    return sentences


def _settings_text(differs: Mapping[str, tuple[str, str]]) -> str:
    return ", ".join(f"{field} = {value}" for field, (value, _) in differs.items())


def _differences(
    trial: Mapping[str, Any], table: Table, preset: str, overrides: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
    """Rows that share a trial may differ in fields that do not count; the nearest row is taken."""
    rows = [table.rows[table.positions[row]] for row in trial["rows"].split(",") if row in table.positions]
    wanted = [resolve(table, row, preset, overrides, trial["seed"]) for row in rows]
    return min((_differences_from(trial, config) for config in wanted), key=len)


def _differences_from(trial: Mapping[str, Any], config: Config) -> dict[str, tuple[str, str]]:
    differences = {}
    for field, wanted in flatten(config).items():
        value = trial.get(f"params.{field}")
        if isinstance(value, str) and parameter_text(value) != plain_text(wanted):
            differences[field] = (parameter_text(value), plain_text(wanted))
    return differences


def parameter_text(parameter: str) -> str:
    """A parameter as the sweep records it (text as it is, else JSON), for people: '["CF", "SS"]' -> "CF, SS"."""
    try:
        return plain_text(json.loads(parameter))
    except ValueError:
        return parameter
