"""Passwords in the addresses of MLflow and of a study's database: shown nowhere, in no file that others may read."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import psycopg2
import pytest
from mlflow import MlflowClient

from semformer.secrets import MASK, without_password
from tests.servers import Postgres, postgres
from tests.workplace import ROOT, Answer, Workplace

USER, PASSWORD = "sweeper", "pl0ver/qua1l:sn1pe@her0n"
PARTS = ("pl0ver", "qua1l", "sn1pe", "her0n")
"""Of the password: none of them may be seen, however the rest is quoted."""
COMMAND = """
import sys
from mlflow.store.db import utils
from sweeps.cli import main

utils.MAX_RETRY_COUNT = 2  # instead of 100 s
sys.exit(main())
"""
URIS = {
    "quoted": quote(PASSWORD, safe=""),
    "as it is but for the @": PASSWORD.replace("@", "%40"),
}


def parts_in(text: str) -> set[str]:
    return {part for part in PARTS if part in text}


def assert_silent(answer: Answer) -> None:
    assert not parts_in(answer.out + answer.err), answer
    assert "Traceback" not in answer.out + answer.err


class Sweeper:
    """Commands in processes of their own, in a folder of their own; Ray's files are below `ray`."""

    def __init__(self, folder: Path, uri: str, storage: str = "", *, ray: str):
        self.place, self.ray = Workplace(folder, uri), Path(ray)
        self.storage = ["--storage", storage] if storage else []
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "RAY_TMPDIR": ray}

    def call(self, command: str, *options: str) -> Answer:
        storage = self.storage if command == "search" else []
        return self.run(*self.place.arguments(command, *options), *storage)

    def run(self, *arguments: str) -> Answer:
        line = [sys.executable, "-c", COMMAND, *arguments]
        done = subprocess.run(line, env=self.env, cwd=self.place.folder, capture_output=True, text=True, timeout=400)
        return Answer(done.returncode, done.stdout, done.stderr)

    def readable_by_others(self) -> Iterator[Path]:
        for path in (*self.place.folder.rglob("*"), *self.ray.rglob("*")):
            if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o044:
                yield path


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as server:
        server.guard(USER, PASSWORD)
        yield server


def uri(server: Postgres, password: str, database: str) -> str:
    return f"postgresql+psycopg2://{USER}:{password}@127.0.0.1:{server.port}/{database}"


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # a socket's path must be short
        yield folder


@pytest.fixture(scope="module")
def searched(server, tmp_path_factory, ray_folder) -> SimpleNamespace:
    """A search whose MLflow and study want the password; what the commands said, also while the databases were away."""
    folder = tmp_path_factory.mktemp("secrets")
    quoted, plain = URIS.values()
    sweeper = Sweeper(folder, uri(server, quoted, "mlflow"), uri(server, plain, "studies"), ray=ray_folder)
    search = ["--trials", "2", "--axes", "U"]
    answers = {"search": sweeper.call("search", *search), "status": sweeper.call("status")}
    answers |= {"status --json": sweeper.call("status", "--json"), "resume": sweeper.call("resume")}
    answers |= {"sync": sweeper.call("sync")}
    runs = all_runs(sweeper.place.uri)
    server.stop()
    answers |= {f"{name}, away": sweeper.call(name) for name in ("resume", "sync", "status")}
    answers |= {"search, away": sweeper.call("search", *search)}
    server.start()
    return SimpleNamespace(sweeper=sweeper, answers=answers, runs=runs)


def all_runs(uri: str) -> list[str]:
    client = MlflowClient(uri)
    experiments = client.search_experiments()
    runs = client.search_runs([one.experiment_id for one in experiments])
    return [str(one) for one in experiments] + [str(run.to_dictionary()) for run in runs]


def test_the_database_wants_the_password(server):
    with pytest.raises(psycopg2.OperationalError):
        psycopg2.connect(host="127.0.0.1", port=server.port, user=USER, password="wrong", dbname="mlflow")


def test_no_command_shows_a_password(searched):
    for name, answer in searched.answers.items():
        assert_silent(answer)
        assert (answer.status == 2) == (name in ("search, away", "resume, away", "sync, away")), (name, answer)
    assert f"{USER}:***@127.0.0.1" in searched.answers["resume"].out  # the command line, which is repeated
    assert f"{USER}:***@127.0.0.1" in searched.answers["search, away"].err


def test_no_file_that_others_may_read_holds_a_password(searched):
    files = list(searched.sweeper.readable_by_others())
    assert {"state.json", "best.yaml", "gcs_server.out"} <= {path.name for path in files}
    assert [path for path in files if parts_in(path.read_bytes().decode(errors="replace"))] == []
    (kept,) = searched.sweeper.place.folder.glob("sweeps/*/sweep.json")
    assert parts_in(kept.read_text()) == set(PARTS)  # for `resume`, and for its owner alone
    assert kept.stat().st_mode & 0o777 == 0o600


def test_mlflow_holds_no_password(searched):
    assert len(searched.runs) > 4
    assert not parts_in("".join(searched.runs))


@pytest.mark.parametrize("form", URIS)
@pytest.mark.parametrize("scheme", ["http", "postgresql+psycopg2", "mysql+nothing"])
def test_an_address_that_cannot_be_used_is_told_without_its_password(tmp_path, unused_port, monkeypatch, scheme, form):
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 2)
    place = Workplace(tmp_path)
    address = f"{scheme}://{USER}:{URIS[form]}@127.0.0.1:{unused_port}/x"
    for command in (["run", "table03", "--tracking-uri", address], ["search", "--storage", address]):
        answer = place.call(*command)
        assert answer.status == 2, answer
        assert_silent(answer)


def test_an_address_of_the_environment_is_told_without_its_password(tmp_path, ray_folder, unused_port, monkeypatch):
    address = f"http://{USER}:{URIS['quoted']}@127.0.0.1:{unused_port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    answer = Sweeper(tmp_path, address, ray=ray_folder).run("run", "table03", "--preset", "micro")
    assert answer.status == 2, answer
    assert f"{USER}:***@127.0.0.1" in answer.err
    assert_silent(answer)


@pytest.mark.parametrize(
    ("uri", "secret"),
    [
        ("postgresql://u:hunter22@h/db?application_name=a@b", "hunter22"),
        ("postgresql://h.invalid/db?user=u&password=SECRET99&x=1", "SECRET99"),
        ("http://u:s3cr'et99@127.0.0.1:9", "s3cr'et99"),
        ("mysql://u:a/b:c@h/db", "a/b:c"),
        ("postgresql://u:p%40ss%2Fword@h/db", "p@ss/word"),
        ("mysql://u:abcd@h/db", "abcd"),
    ],
)
def test_a_password_is_masked_wherever_an_address_holds_it(uri, secret):
    for text in (uri, f"error: {uri}: no", f"auth failed for u:{secret}@h", f"password {secret!s}"):
        told = without_password(text, uri)
        assert secret not in told
        assert quote(secret, safe="") not in told


@pytest.mark.parametrize("part", ["u:SECRET@h/db", "h/db?password=SECRET", "h/?a=b&sslpassword=SECRET", "?PWD=SECRET"])
def test_a_password_is_masked_in_an_address_that_nobody_named(part):
    told = without_password(f"error: mysql://{part}&c=d: no")
    assert "SECRET" not in told
    assert MASK in told


def test_an_address_without_a_password_is_left_as_it_is():
    for text in ("sqlite:////data/mlflow.db", "s3://bucket/prefix", "http://h:5000/#/experiments/1?a=b"):
        assert without_password(text, text) == text
