"""Files that runs keep in MLflow."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

from sweeps.tracking.connection import connecting, reading_client

AT_ONCE = 16


def fetch(tracking_uri: str, wanted: Iterable[tuple[str, str]], folder: Path) -> dict[tuple[str, str], Path]:
    """The files among `wanted` (run id, name) that are there: where each now lies, in `folder` if it is not on this
    machine anyway. Raises UserError if MLflow or its artifacts cannot be read."""
    client = reading_client(tracking_uri)
    asked = list(dict.fromkeys(wanted))
    folders = list(dict.fromkeys((run_id, name.rpartition("/")[0]) for run_id, name in asked))

    def names_in(run_id: str, name: str) -> set[str]:
        return {file.path for file in client.list_artifacts(run_id, name or None)}

    def load(run_id: str, name: str) -> Path:
        own = folder / run_id
        own.mkdir(parents=True, exist_ok=True)
        return Path(client.download_artifacts(run_id, name, str(own)))

    with connecting(tracking_uri), ThreadPoolExecutor(AT_ONCE) as threads:
        names = dict(zip(folders, threads.map(lambda one: names_in(*one), folders), strict=True))
        there = [(run_id, name) for run_id, name in asked if name in names[run_id, name.rpartition("/")[0]]]
        return dict(zip(there, threads.map(lambda one: load(*one), there), strict=True))
