"""Servers that a test starts for itself: MLflow, its databases, and S3."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class MlflowServer:
    """`mlflow server` on an sqlite database in `folder`; may be stopped and started again at the same address."""

    def __init__(self, folder: Path):
        self.folder, self.port, self.process = folder, free_port(), None
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
                *("--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"),
                *("--artifacts-destination", str(self.folder / "artifacts")),
            ],
            cwd=self.folder,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / "server.log").open("ab"),
            start_new_session=True,
        )
        end = time.monotonic() + 120
        while not self.answers():
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < end, "the MLflow server did not start"
            time.sleep(0.1)

    def answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=1).status == 200
        except OSError:
            return False

    def stop(self) -> None:
        """Kill it with its workers, in the middle of whatever they do."""
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextmanager
def mlflow_server(folder: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def _postgres_programs() -> Path | None:
    """The folder of PostgreSQL's own programs: on the path, or where Debian keeps its versions, the newest first."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: -float(path.parts[-3]))
    return versions[0].parent if versions else None


class Postgres:
    """An empty PostgreSQL database, at a URI of SQLAlchemy; may be stopped and started again."""

    def __init__(self, programs: Path, folder: str):
        self.programs, self.folder, self.port, self.running = programs, folder, free_port(), False
        self.as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []  # it refuses to be root's
        if self.as_user:
            shutil.chown(folder, "postgres")
        self._run("initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "postgres", "--no-sync")
        self.start()
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres", "mlflow")

    @property
    def uri(self) -> str:
        return f"postgresql+psycopg2://postgres@127.0.0.1:{self.port}/mlflow"

    def guard(self, user: str, password: str) -> None:
        """From now on there is `user`, who owns the database "studies", too, and has to give the password."""
        quoted = password.replace("'", "''")
        for command in (
            f"CREATE ROLE {user} SUPERUSER LOGIN PASSWORD '{quoted}'",
            f"CREATE DATABASE studies OWNER {user}",
        ):
            self._run("psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres", "-c", command, "mlflow")
        rules = Path(self.folder) / "data" / "pg_hba.conf"
        rules.write_text(f"host all {user} 127.0.0.1/32 scram-sha-256\n{rules.read_text()}")
        self._run("pg_ctl", "-D", f"{self.folder}/data", "reload")

    def start(self) -> None:
        options = f"-c listen_addresses=127.0.0.1 -p {self.port} -k {self.folder} -c fsync=off"
        self._run("pg_ctl", "-D", f"{self.folder}/data", "-o", options, "-w", "-l", f"{self.folder}/log", "start")
        self.running = True

    def stop(self) -> None:
        """At once, with all connections."""
        if self.running:
            self._run("pg_ctl", "-D", f"{self.folder}/data", "-m", "immediate", "stop")
        self.running = False

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self.as_user, str(self.programs / program), *arguments]
        subprocess.run(command, cwd=self.folder, check=True, stdout=subprocess.DEVNULL, timeout=60)


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Skips the test where PostgreSQL is missing."""
    programs = _postgres_programs()
    if not programs:
        pytest.skip("PostgreSQL's programs (initdb, pg_ctl) are not installed")
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        server = Postgres(programs, folder)
        try:
            yield server
        finally:
            server.stop()


class S3Server:
    """moto's server, which enforces conditional puts, with the bucket "tests"; what is in it survives `stop`."""

    def __init__(self):
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._moto = ThreadedMotoServer
        self._server, self.port = None, 0
        self.start()
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/tests", method="PUT")).close()

    def start(self) -> None:
        self._server = self._moto(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        self._server.stop()

    def require_permission(self, required: bool) -> None:
        """Whether to refuse credentials that the server has not given out itself."""
        body = b"0" if required else b"1000000000"
        request = urllib.request.Request(f"{self.url}/moto-api/reset-auth", body, {"Content-Type": "text/plain"})
        urllib.request.urlopen(request).close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"
