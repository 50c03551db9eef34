"""Sweeps as jobs of a Ray cluster that asks for a token: `ray job submit`, as the README shows it."""

import importlib.util
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.artifacts import eventually
from tests.autoscaling import end_processes_of
from tests.servers import free_port
from tests.test_cluster import environment
from tests.workplace import Workplace

PROGRAMS = Path(sys.executable).parent
PATIENT = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})

if not importlib.util.find_spec("aiohttp_cors"):
    pytest.skip(
        "ray[default], which has the job server, is not installed: pip install '.[cluster]'", allow_module_level=True
    )


class Head:
    """A cluster of one node, started in `place.folder` as a user would; its job server is at `address`."""

    def __init__(self, place: Workplace):
        self.place, self.address = place, f"http://127.0.0.1:{free_port()}"
        self.temporary = Path(tempfile.mkdtemp(prefix="ray-"))  # a socket's path must be short
        self.env = environment(place.folder / "home", secrets.token_hex(32))
        self.env |= {"PATH": f"{PROGRAMS}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}

    def start(self) -> None:
        port = self.address.rpartition(":")[2]
        options = {
            "port": free_port(),
            "dashboard-host": "127.0.0.1",
            "dashboard-port": port,
            "dashboard-agent-listen-port": free_port(),
            "ray-client-server-port": free_port(),
            "temp-dir": self.temporary,
            "num-cpus": 1,
            "object-store-memory": 80 * 2**20,
        }
        told = self.ray("start", "--head", "--disable-usage-stats", *(f"--{k}={v}" for k, v in options.items()))
        assert told.returncode == 0, told.stdout + told.stderr

    def ray(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """`ray ...` to its end, in the folder of the sweeps; `changes` are of the environment."""
        env = {**self.env, **changes}
        command = [str(PROGRAMS / "ray"), *arguments]
        return subprocess.run(command, env=env, cwd=self.place.folder, capture_output=True, text=True, timeout=400)

    def job(self, verb: str, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return self.ray("job", verb, f"--address={self.address}", *arguments, **changes)

    def submit(self, name: str, command: list[str], *options: str) -> subprocess.CompletedProcess[str]:
        return self.job("submit", f"--submission-id={name}", *options, "--", "semformer-sweep", *command)

    def close(self) -> None:
        end_processes_of(self.temporary)
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    head = Head(Workplace(tmp_path_factory.mktemp("jobs")))
    try:
        head.start()
        yield head
    finally:
        head.close()


@pytest.mark.timeout(900)
def test_a_sweep_as_a_job_can_be_stopped_and_the_same_job_again_goes_on(head):
    place = head.place
    table = place.table("mine", a="", b="cams.last_blocks: 1")
    run = place.arguments("run", table, "--address", "auto", "--set", "segmentor.epochs=60")
    told = head.submit("first", run, "--no-wait", f"--runtime-env-json={PATIENT}")
    assert told.returncode == 0, told.stdout + told.stderr
    eventually(lambda: "a: segmentor epoch 3/60" in head.job("logs", "first").stdout, 300)
    assert "Job 'first' was stopped" in head.job("stop", "first").stdout
    first = head.job("logs", "first").stdout
    assert "stopped; the same command, or resume, goes on from the last epochs" in first
    assert [run.info.status for run in place.runs("mine micro", "sweep")] == ["KILLED"]
    assert re.search(r"nobody drives it any more; semformer-sweep resume mine-micro-\w+", place.call("status").out)

    second = head.submit("second", run).stdout
    assert "Job 'second' succeeded" in second
    assert "2 trials: 2 finished" in second
    assert "asks for no token" not in first + second
    epochs = re.findall(r"segmentor epoch (\d+)/60, total", first + second)
    assert len(set(epochs)) == len(epochs) >= 59  # one may have ended that the first did not hear of any more
    runs = place.runs("mine micro", "trial")
    assert [run.info.status for run in runs] == ["FINISHED"] * 2
    for run in runs:
        assert sorted(place.steps(run, "segmentor/loss/total")) == list(range(1, 61))


def test_whoever_has_no_token_submits_nothing(head):
    told = head.job("submit", "--no-wait", "--submission-id=foreign", "--", "true", RAY_AUTH_MODE="disabled")
    assert told.returncode != 0
    assert "authentication is enabled" in told.stderr
    assert "foreign" not in head.job("list").stdout
