"""`semformer-sweep ui`: MLflow's pages of a sweep."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from mlflow import MlflowClient

from sweeps.cli import main
from tests.servers import free_port, mlflow_server


def make_experiments(uri, folder):
    """An older sweep, a newer one, and runs that are no sweep; the id of the newer one's experiment."""
    client = MlflowClient(uri)
    ids = {name: client.create_experiment(name, artifact_location=f"{folder}/{name}") for name in ("old", "new", "own")}
    for start, (name, kind) in enumerate([("old", "sweep"), ("new", "sweep"), ("own", "trial")], 1):
        client.create_run(ids[name], start_time=1000 * start, tags={"semformer.kind": kind})
    return ids


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM])
def test_of_a_database_the_newest_sweep_is_shown_until_ctrl_c(tmp_path, ended_by):
    uri, port = f"sqlite:///{tmp_path}/mlflow.db", free_port()
    ids = make_experiments(uri, tmp_path)
    command = [sys.executable, "-m", "sweeps.cli", "ui", "--tracking-uri", uri, "--port", str(port)]
    browser = tmp_path / "browser"
    browser.write_text('#!/bin/sh\necho "opened: $1"\n')
    browser.chmod(0o755)
    environment = os.environ | {"BROWSER": str(browser)}
    environment |= {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True) as ui:
        try:
            address = ui.stdout.readline().strip()
            assert address.startswith(f"http://127.0.0.1:{port}/#/experiments/{ids['new']}/runs?")
            assert "viewStateShareKey=semformer" in address
            with urllib.request.urlopen(address.partition("#")[0], timeout=10) as page:
                assert b"<html" in page.read()
            assert ui.stdout.readline().strip() == f"opened: {address}"
            os.killpg(ui.pid, ended_by)
            assert ui.wait(timeout=60) == 0
        finally:
            if ui.poll() is None:
                os.killpg(ui.pid, signal.SIGKILL)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)), "the server has ended too"


def test_of_a_server_its_own_address_is_told(tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    with mlflow_server(tmp_path) as server:
        ids = make_experiments(server.uri, tmp_path)
        assert main(["ui", "--tracking-uri", server.uri, "--experiment", "old", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)["url"]
        assert re.match(rf"{server.uri}/#/experiments/{ids['old']}/runs\?", told)
        assert opened == [told]
        assert main(["ui", "--tracking-uri", server.uri, "--experiment", "none"]) == 2
        assert "has no experiment 'none': its experiments are" in " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_shown_is_told(tmp_path, capsys):
    assert main(["ui", "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]) == 2
    assert "there is no MLflow database" in " ".join(capsys.readouterr().err.split())
    assert not [*tmp_path.iterdir()]
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    MlflowClient(uri).create_experiment("empty", artifact_location=str(tmp_path))
    assert main(["ui", "--tracking-uri", uri]) == 2
    assert "has no sweep: its experiments are" in " ".join(capsys.readouterr().err.split())
    make_experiments(uri, tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["ui", "--tracking-uri", uri, "--port", str(taken.getsockname()[1])]) == 2
        assert "is taken by another program" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("port", ["0", "many"])
def test_a_port_is_a_number(port, capsys):
    with pytest.raises(SystemExit):
        main(["ui", "--port", port])
    assert "--port" in capsys.readouterr().err
