"""MLflow's pages of a sweep: of the server that has it, or of one that is started for its database."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from semformer.errors import UserError
from sweeps.tracking import views
from sweeps.tracking.connection import TAG, connecting, reading_client

HOST = "127.0.0.1"
STARTING = 120.0
"""Seconds that MLflow has to answer."""
ENDING = 5.0
"""Seconds that it has to end."""


def experiment_of(uri: str, name: str = "") -> str:
    """The id of an experiment, by default of the newest sweep's. Raises UserError if there is none."""
    with connecting(uri):
        client = reading_client(uri)
        page = client.search_experiments()
        known = {one.experiment_id: one.name for one in page}
        while page.token:
            page = client.search_experiments(page_token=page.token)
            known |= {one.experiment_id: one.name for one in page}
        if name:
            found = [i for i, other in known.items() if other == name]
        else:
            query = f"tags.`{TAG}kind` = 'sweep'"
            runs = client.search_runs([*known], query, max_results=1, order_by=["attributes.start_time DESC"])
            found = [run.info.experiment_id for run in runs]
    if not found:
        there = ", ".join(sorted(repr(other) for other in known.values())) or "none"
        raise UserError(f"{uri} has no {f'experiment {name!r}' if name else 'sweep'}: its experiments are {there}")
    return found[0]


@contextmanager
def page(uri: str, experiment: str, port: int) -> Iterator[str]:
    """The address of the sweep's runs with the columns that tell its story.

    A server of one's own lives as long as this context. Raises UserError if it cannot start.
    """
    if address := views.url(uri, experiment):
        yield address
        return
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            raise UserError(f"--port {port} is taken by another program: choose another")
    own = f"http://{HOST}:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    environment = {
        "MLFLOW_BACKEND_STORE_URI": uri,  # a password shows in no `ps`
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.DEVNULL, start_new_session=True
    ) as server:
        try:
            _wait(server, own)
            yield views.url(own, experiment) or own
        finally:
            _end(server)


def _end(server: subprocess.Popen) -> None:
    """With its workers, also those that do not end by themselves."""
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(ENDING)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)


def _wait(server: subprocess.Popen, address: str) -> None:
    end = time.monotonic() + STARTING
    while server.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=1):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    raise UserError(f"MLflow's server did not start at {address}: it says why above")
