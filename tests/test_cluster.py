"""Real Ray clusters: each node is a raylet of its own on this machine; clusters and drivers are processes of their own."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from semformer.data.shapes import make_shapes
from semformer.data.voc import open_devkit
from semformer.store import Store

ROOT = Path(__file__).parents[1]
CLUSTER = """
import json, os, sys
from ray.cluster_utils import Cluster

cluster = Cluster()
for node in json.loads(sys.argv[1]):
    os.chdir(node.pop("folder"))
    cluster.add_node(object_store_memory=80 * 2**20, include_dashboard=False, **node)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
DRIVER = """
import json, sys
from pathlib import Path
from semformer.errors import UserError
from sweeps.cluster import connect, nodes, preflight, trial_share

address, told = sys.argv[1], json.loads(sys.argv[2])
try:
    with connect(address, timeout=told.pop("connect_timeout", 20)):
        if gpus := told.pop("gpus", None):
            print(json.dumps(trial_share(1, gpus, address=address)))
        elif told:
            told["data"] = told["data"] if isinstance(told["data"], dict) else Path(told["data"])
            for report in preflight(**told):
                print(json.dumps([report.node.address, report.versions, report.free_disk, report.faults]))
        else:
            print(len(nodes()))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


def environment(home: Path, token: str | None = None) -> dict[str, str]:
    """Of a machine of its own: a home with this token, and no trace of other Rays."""
    (home / ".ray").mkdir(parents=True, exist_ok=True)
    if token:
        (home / ".ray" / "auth_token").write_text(token)
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
    ours |= {"HOME": str(home), "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    return ours | ({"RAY_AUTH_MODE": "token"} if token else {"RAY_AUTH_MODE": "disabled"})


@contextmanager
def cluster(env: dict[str, str], nodes: list[dict]) -> Iterator[str]:
    """A cluster of these nodes, the first of them the head; yields its address."""
    folder = tempfile.mkdtemp(prefix="ray-")  # a socket's path must be short
    env = {**env, "RAY_TMPDIR": folder}
    command = [sys.executable, "-c", CLUSTER, json.dumps(nodes)]
    with open(Path(folder) / "log", "w") as log:
        process = subprocess.Popen(
            command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
    try:
        address = process.stdout.readline().strip()
        assert address, (Path(folder) / "log").read_text()
        yield address
    finally:
        process.communicate(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def drive(env: dict[str, str], address: str, folder: Path, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", DRIVER, address, json.dumps(options)]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=100)


# Connecting


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A cluster that asks for a token."""
    folder = tmp_path_factory.mktemp("guarded")
    env = environment(folder / "head", token="a" * 64)
    with cluster(env, [{"folder": str(folder), "num_cpus": 1}]) as address:
        yield SimpleNamespace(address=address, env=env)


def test_the_right_token_connects(guarded, tmp_path):
    driver = drive(guarded.env, guarded.address, tmp_path)
    assert driver.returncode == 0, driver.stderr
    assert driver.stdout.strip() == "1"


@pytest.mark.parametrize(
    ("token", "mode", "told"),
    [
        ("b" * 64, "token", "the token here is not the cluster's"),
        (None, "token", "there is no token here"),
        ("a" * 64, None, "export RAY_AUTH_MODE=token"),
    ],
)
def test_a_wrong_or_missing_token_is_told_at_once(guarded, tmp_path, token, mode, told):
    env = environment(tmp_path / "home", token)
    env.pop("RAY_AUTH_MODE")
    driver = drive(env | ({"RAY_AUTH_MODE": mode} if mode else {}), guarded.address, tmp_path, connect_timeout=10)
    assert driver.returncode == 2
    assert driver.stderr.startswith(f"--address {guarded.address}: ")
    assert told in driver.stderr
    assert "auth_token" in driver.stderr


@pytest.fixture
def no_ray():
    """The port of a server that is no Ray."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_what_is_no_cluster_is_told_in_time(tmp_path, no_ray):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        closed = probe.getsockname()[1]
    env = environment(tmp_path / "home") | {"RAY_TMPDIR": str(tmp_path)}
    for address, told in {
        f"127.0.0.1:{closed}": "nothing answers there (Connection refused)",
        f"127.0.0.1:{no_ray}": "not as the head of a Ray cluster",
        "auto": "no Ray cluster was started on this machine",
        "ray://127.0.0.1:10001": "write HOST:PORT",
        "somewhere": "write HOST:PORT",
    }.items():
        driver = drive(env, address, tmp_path, connect_timeout=4)
        assert driver.returncode == 2, driver.stderr
        assert driver.stderr.startswith(f"--address {address}: ")
        assert told in driver.stderr


# Preflight


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Makes the folders of nodes: each holds its own data and store, which are links to the common ones.

    A path under /proc/self/cwd leads each process to the folder that its node was started in: one path, and what
    stands there differs from node to node, as on real machines.
    """
    folder = tmp_path_factory.mktemp("nodes")
    make_shapes(folder / "data", train=3, val=2, size=48)
    Store(folder / "store")
    splits = open_devkit(folder / "data")

    def make_node(name: str) -> Path:
        (folder / name).mkdir()
        for part in ("data", "store"):
            (folder / name / part).symlink_to(folder / part)
        return folder / name

    here = Path("/proc/self/cwd")
    options = {
        "data": str(here / "data"),
        "store": str(here / "store"),
        "digests": {name: splits.split(name).digest for name in ("train", "val")},
        "share": {"cpu": 1, "gpu": 0},
    }
    return SimpleNamespace(folder=folder, node=make_node, options=options)


def test_preflight_passes_on_sound_nodes_and_names_those_at_fault(sound, tmp_path):
    env = environment(tmp_path / "home")

    def node(number: int, name: str, **more) -> dict:
        address = {"node_ip_address": f"127.0.0.{number}"} if number > 1 else {}
        return {"folder": str(sound.node(name)), "num_cpus": 1, **address, **more}

    three = [node(1, "head"), node(2, "second"), node(3, "third", num_gpus=1)]
    with cluster(env, three) as address:
        driver = drive(env, address, sound.folder / "head", **sound.options)
        assert driver.returncode == 0, driver.stderr
        reports = [json.loads(line) for line in driver.stdout.splitlines()]
        assert len(reports) == 3
        assert {"127.0.0.2", "127.0.0.3"} < {report[0] for report in reports}
        assert all(report[1] == reports[0][1] and report[2] > 0 and not report[3] for report in reports)
        print(reports)
