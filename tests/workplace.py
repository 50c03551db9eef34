"""Sweeps by their command line, in a folder of a test's own."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import ray
from mlflow import MlflowClient

from semformer.store import Artifact, Store
from sweeps import cli

ROOT = Path(__file__).parents[1]
ROW = "  - {{id: {id}, label: {id}, set: {{{set}}}, paper: {{miou: null}}}}\n"


def table_text(name: str, **rows: str) -> str:
    """A table file whose rows set the given fields."""
    head = f"name: {name}\ntitle: {name}\nmetrics: [{{name: miou, header: mIoU}}]\nrows:\n"
    return head + "".join(ROW.format(id=row, set=fields) for row, fields in rows.items())


class Answer(NamedTuple):
    """Of a command: its exit status and what it printed."""

    status: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """The one object that `--json` promises on standard output."""
        assert self.status == 0, self.out + self.err
        told = json.loads(self.out)
        assert isinstance(told, dict)
        return told


class Workplace:
    """A folder with a store, an MLflow database and studies, and sweeps run in it by their command line."""

    def __init__(self, folder: Path, uri: str = ""):
        self.folder, self.uri = folder, uri or f"sqlite:///{folder / 'mlflow.db'}"
        self.store = Store(folder / "store")

    def arguments(self, command: str, *options: str | Path) -> list[str]:
        """The command line, with the places of this folder."""
        store = ["--store", str(self.store.root)]
        sweeps = ["--sweeps", str(self.folder / "sweeps")]
        tracking = ["--tracking-uri", self.uri]
        storage = ["--storage", f"sqlite:///{self.folder / 'studies.db'}"]
        preset = ["--preset", "micro"]
        places = {
            "plan": [*preset, *store],
            "run": [*preset, *store, *tracking, *sweeps],
            "search": [*preset, *store, *tracking, *sweeps, *storage],
            "gc": store,
        }
        return [command, *places.get(command, sweeps), *map(str, options)]

    def call(self, command: str, *options: str | Path) -> Answer:
        """The command in this process; options of one's own go over those of this folder."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = cli.main(self.arguments(command, *options))
            except SystemExit as refused:  # by argparse
                status = refused.code
        assert not ray.is_initialized()
        return Answer(status, out.getvalue(), err.getvalue())

    def sweep(self, table: str | Path, *options: str) -> tuple[int, str]:
        """Exit status and output of `run`."""
        answer = self.call("run", table, *options)
        return answer.status, answer.out

    def start(self, command: str, *options: str | Path) -> subprocess.Popen[str]:
        """The command in a process of its own, at the head of a process group; its output is for reading."""
        return subprocess.Popen(
            [sys.executable, "-m", "sweeps.cli", *self.arguments(command, *options)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )

    def table(self, name: str, **rows: str) -> Path:
        """A table whose rows set the given fields."""
        path = self.folder / f"{name}.yaml"
        path.write_text(table_text(name, **rows))
        return path

    def artifacts(self) -> list[Artifact]:
        """Of the stages; packs of images are not counted as such."""
        return [artifact for artifact in self.store.artifacts() if artifact.key.stage != "pack"]

    def runs(self, experiment: str, kind: str) -> list:
        client = MlflowClient(self.uri)
        runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
        return [run for run in runs if run.data.tags["semformer.kind"] == kind]

    def steps(self, run, metric: str) -> list[int]:
        return [point.step for point in MlflowClient(self.uri).get_metric_history(run.info.run_id, metric)]
