"""Files that runs keep in MLflow."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

from mlflow import MlflowClient

from sweeps.tracking.connection import connecting

AT_ONCE = 16


def fetch(tracking_uri: str, wanted: Iterable[tuple[str, str]], folder: Path) -> dict[tuple[str, str], Path]:
    """The files among `wanted` (run id, name) that are there: where each now lies, in `folder` if it is not on this
    machine anyway. Raises UserError if MLflow or its artifacts cannot be read."""
    client = MlflowClient(tracking_uri)

    def load(run_id: str, name: str) -> Path | None:
        there = {file.path for file in client.list_artifacts(run_id, name.rpartition("/")[0] or None)}
        if name not in there:
            return None
        own = folder / run_id
        own.mkdir(parents=True, exist_ok=True)
        return Path(client.download_artifacts(run_id, name, str(own)))

    asked = list(dict.fromkeys(wanted))
    with connecting(tracking_uri), ThreadPoolExecutor(AT_ONCE) as threads:
        found = threads.map(lambda one: load(*one), asked)
        return {one: path for one, path in zip(asked, found, strict=True) if path is not None}
