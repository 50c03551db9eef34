"""Real Ray clusters: each node is a raylet of its own on this machine; clusters and drivers are processes too."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config

from semformer.data.shapes import make_shapes
from semformer.data.voc import open_devkit
from semformer.errors import MachineError, UserError
from semformer.store import Store
from sweeps.cluster.connect import connect
from sweeps.cluster.file import check_cluster_file

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
from semformer.config import ShapesConfig
from semformer.errors import UserError
from sweeps.cluster import preflight
from sweeps.cluster.connect import connect
from sweeps.cluster.nodes import nodes, trial_share

address, told = sys.argv[1], json.loads(sys.argv[2])
try:
    with connect(address, timeout=told.pop("connect_timeout", 20)):
        if gpus := told.pop("gpus", None):
            print(json.dumps(trial_share(1, gpus, address=address)))
        elif told:
            data = told.pop("data")
            where = ShapesConfig(**data) if isinstance(data, dict) else Path(data)
            images = preflight.Images(where, told.pop("digests"))
            preflight.ANSWER = told.pop("timeout", preflight.ANSWER)
            watch = preflight.Watch(told.pop("share"), [images], told.pop("store"), **told)
            try:
                watch.wait()
                for report in watch.reports.values():
                    print(json.dumps([report.node.address, report.faults]))
            finally:
                watch.close()
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
    ours |= {"RAY_worker_niceness": "0"}
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
        process.communicate(timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


def drive(env: dict[str, str], address: str, folder: Path, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", DRIVER, address, json.dumps(options)]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=400)


def raylets(folder: Path) -> list[psutil.Process]:
    """The process of the node that was started in `folder`."""
    everything = psutil.process_iter(["name", "cwd"])
    found = [p for p in everything if (p.info["name"], p.info["cwd"]) == ("raylet", str(folder))]
    assert found
    return found


# Connecting


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_ray_that_does_not_come_up_is_started_once_more(monkeypatch, failures):
    tries = []

    def init(**options):
        tries.append(options)
        if len(tries) <= failures:
            raise Exception("The current node timed out during startup. The GCS may be overloaded.")

    monkeypatch.setattr("ray.init", init)
    if failures < 2:
        with connect(None):
            assert len(tries) == 1 + failures
    else:
        with pytest.raises(MachineError, match=r"Ray does not start .*timed out .*too busy: run again"), connect(None):
            pass


def test_another_error_of_ray_s_start_is_told_as_it_is(monkeypatch):
    def init(**options):
        raise ValueError("no such resource")

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(ValueError, match="no such resource"), connect(None):
        pass


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


def test_an_open_cluster_is_told_even_to_a_driver_that_has_a_token(three, guarded, tmp_path):
    told = "asks for no token: whoever reaches it can run code there"
    assert told in drive(environment(tmp_path / "home", "a" * 64), three.address, tmp_path).stderr
    assert told in drive(environment(tmp_path / "home"), three.address, tmp_path).stderr
    assert told not in drive(guarded.env, guarded.address, tmp_path).stderr


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


def test_a_cluster_without_a_node_on_this_machine_is_told_in_time(tmp_path):
    env = environment(tmp_path / "home")
    with cluster(env, [{"folder": str(tmp_path), "num_cpus": 1}]) as address:
        for raylet in raylets(tmp_path):
            raylet.kill()
        driver = drive(env, address, tmp_path, connect_timeout=6)
    assert driver.returncode == 2
    assert "no living node of the cluster is on this machine" in driver.stderr


def test_a_cluster_of_another_ray_is_told(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import ray\nray.__version__ = '2.0.0'\n")
    env = environment(tmp_path / "home")
    other = env | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with cluster(other, [{"folder": str(tmp_path), "num_cpus": 1}]) as address:
        driver = drive(env, address, ROOT)
    assert driver.returncode == 2
    assert "the cluster runs ray 2.0.0 (here " in driver.stderr


# Preflight


class Site:
    """The folders that nodes are started in: each holds `data` and `store`, links to the common ones.

    A path under /proc/self/cwd leads each process to the folder that its node was started in. So the nodes have one
    path in common and what is there may differ, as between real machines.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        make_shapes(folder / "data", train=3, val=2, size=48)
        make_shapes(folder / "other-images", train=3, val=2, size=48, seed=1)
        Store(folder / "store")
        devkit, here = open_devkit(folder / "data"), Path("/proc/self/cwd")
        self.options = {
            "data": str(here / "data"),
            "store": str(here / "store"),
            "digests": {name: devkit.split(name).digest for name in ("train", "val")},
            "share": {"cpu": 1, "gpu": 0},
        }

    def node(self, name: str, ip: str = "", *, data: str = "data", store: str = "store", **options) -> dict:
        """Arguments of a node with links to these folders. "" for `data` or `store`: there is nothing."""
        folder = self.folder / name
        folder.mkdir()
        for link, target in (("data", data), ("store", store)):
            if target:
                (folder / link).symlink_to(self.folder / target)
        address = {"node_ip_address": ip} if ip else {}
        return {"folder": str(folder), "num_cpus": 1, **address, **options}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return Site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def three(site, tmp_path_factory):
    """Three sound nodes; ask(**options) runs `preflight` on them."""
    env = environment(tmp_path_factory.mktemp("home")) | {"RAY_health_check_failure_threshold": "100"}
    nodes = [site.node("head"), site.node("second", "127.0.0.2"), site.node("third", "127.0.0.3", num_gpus=99)]
    with cluster(env, nodes) as address:
        yield SimpleNamespace(
            address=address,
            env=env,
            ask=lambda **options: drive(env, address, site.folder / "head", **{**site.options, **options}),
        )


def faults(driver: subprocess.CompletedProcess) -> dict[str, str]:
    """Address of a node -> what was found wrong there, one line each; of those that are told where none is fit."""
    if driver.returncode == 2:
        parts = re.split(r"^node (\S+) \(\w{8}\):$", driver.stderr, flags=re.MULTILINE)
        return dict(zip(parts[1::2], parts[2::2], strict=True))
    assert driver.returncode == 0, driver.stderr
    reports = [json.loads(line) for line in driver.stdout.splitlines()]
    return {address: "".join(f"\n  - {fault}" for fault in found) for address, *_, found in reports if found}


def test_sound_nodes_pass_and_leave_no_mark(three, site):
    driver = three.ask()
    assert driver.returncode == 0, driver.stderr
    reports = [json.loads(line) for line in driver.stdout.splitlines()]
    assert len(reports) == 3
    assert {"127.0.0.2", "127.0.0.3"} < {address for address, _ in reports}
    assert not any(found for _, found in reports)
    assert not list((site.folder / "store" / "tmp").iterdir())


def test_every_node_makes_the_embedded_data(three, tmp_path):
    parameters = {"train": 2, "val": 1, "size": 48}
    devkit = open_devkit(make_shapes(tmp_path / "shapes", **parameters))
    driver = three.ask(data=parameters, digests={"val": devkit.split("val").digest})
    assert driver.returncode == 0, driver.stderr
    assert list((Path(three.env["HOME"]) / ".cache" / "semformer").glob("shapes-*-train-2-val-1-size-48-seed-0"))


def test_a_full_disk_and_gpus_that_are_not_there_are_told(three):
    found = faults(three.ask(min_free=2**60))
    assert len(found) == 3
    assert all("GiB of free disk" in told for told in found.values())
    found = faults(three.ask(share={"cpu": 1, "gpu": 1}))
    assert list(found) == ["127.0.0.3"]  # the others hold no trial
    assert "Ray counts 99 GPUs, PyTorch can use 0 there" in found["127.0.0.3"]


def test_a_share_that_no_node_can_hold_is_told(three, tmp_path):
    driver = drive(three.env, three.address, tmp_path, gpus=100)
    assert driver.returncode == 2
    assert "--gpus-per-trial 100: no node can hold that" in driver.stderr


def test_gpus_that_the_autoscaler_may_launch_count(three, tmp_path):
    env = environment(tmp_path)
    kinds = {
        "head": {"resources": {"CPU": 0}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 8, "GPU": 128}, "max_workers": 4},
    }
    (tmp_path / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump({"available_node_types": kinds}))
    driver = drive(env, three.address, tmp_path, gpus=100)
    assert json.loads(driver.stdout) == {"cpu": 1, "gpu": 100}


def test_each_node_at_fault_is_named_with_its_fault(site, tmp_path):
    installed = tmp_path / "old" / "timm-0.9.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.9.0\n")
    for package in ("semformer", "sweeps"):
        shutil.copytree(ROOT / package, tmp_path / "changed" / package)
    with (tmp_path / "changed" / "semformer" / "losses.py").open("a") as file:
        file.write("# changed\n")
    (site.folder / "another-store").mkdir()
    (site.folder / "a-file").touch()
    nodes = [
        site.node("sound"),
        site.node("old", "127.0.0.2", env_vars={"PYTHONPATH": f"{installed.parent}:{ROOT}"}, data=""),
        site.node("changed", "127.0.0.3", env_vars={"PYTHONPATH": str(tmp_path / "changed")}),
        site.node("strange", "127.0.0.4", data="other-images", store="another-store"),
        site.node("barred", "127.0.0.5", store="a-file"),
    ]
    env = environment(tmp_path / "home")
    with cluster(env, nodes) as address:
        found = faults(drive(env, address, site.folder / "sound", **site.options))
    expected = {
        "127.0.0.2": ["has timm 0.9.0 (driver: ", "data does not exist"],
        "127.0.0.3": ["has code "],
        "127.0.0.4": ["split 'train' in ", "split 'val' in ", "does not see what the driver wrote into the store"],
        "127.0.0.5": ["cannot use /proc/self/cwd/store as the store"],
    }
    assert found.keys() == expected.keys()
    for address, told in expected.items():
        lines = found[address].split("\n  - ")[1:]
        assert len(lines) == len(told)
        assert all(part in line for part, line in zip(told, lines, strict=True))


def test_a_node_that_does_not_answer_is_named(three, site):
    frozen = raylets(site.folder / "third")
    for process in frozen:
        process.suspend()
    try:
        found = faults(three.ask(timeout=90))  # the others take ten seconds, on a busy machine many more
    finally:
        for process in frozen:
            process.resume()
    assert list(found) == ["127.0.0.3"]
    assert "did not answer within 90 s" in found["127.0.0.3"]


# cluster.yaml


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """cluster.yaml with every placeholder filled in."""
    path = tmp_path_factory.mktemp("filled") / "cluster.yaml"
    path.write_text((ROOT / "cluster.yaml").read_text().replace("CHANGE_ME", "0123"))
    return path


@pytest.fixture(scope="module")
def config(filled) -> dict:
    """As `ray up` sees it, defaults filled in."""
    return prepare_config(yaml.safe_load(filled.read_text()))


def start_commands(config: dict) -> list[str]:
    return config["head_start_ray_commands"] + config["worker_start_ray_commands"]


def test_ray_up_takes_the_cluster_file_once_it_is_filled_in(filled):
    check_cluster_file(filled)
    with pytest.raises(UserError) as caught:
        check_cluster_file(ROOT / "cluster.yaml")
    told = str(caught.value)
    for name in ("ami-", "sg-", "_BUCKET/VOCdevkit", "_BUCKET/mlflow", "_HEAD_PROFILE", "_WORKER_PROFILE"):
        assert re.search(rf"cluster.yaml:\d+: .*{name}", told)
    filled_wrong = filled.with_name("wrong.yaml")
    filled_wrong.write_text(filled.read_text().replace("idle_timeout_minutes", "idle_minutes"))
    with pytest.raises(UserError, match="idle_minutes"):
        check_cluster_file(filled_wrong)


def test_the_cluster_opens_nothing_but_ssh(config):
    assert not config["provider"].get("security_group")
    for kind in config["available_node_types"].values():
        assert kind["node_config"]["SecurityGroupIds"]  # Ray would open port 22 to everybody
    commands = " ".join(start_commands(config))
    assert re.findall(r"--dashboard-host=(\S+)", commands) == ["127.0.0.1"]
    assert re.findall(r"--host[ =](\S+)", commands) == ["127.0.0.1"]
    assert "0.0.0.0" not in json.dumps(config)


def test_the_cluster_asks_for_the_token_and_holds_no_secret(config):
    starts = [command for command in start_commands(config) if "ray start" in command]
    assert len(starts) == 2
    assert all(command.startswith("export RAY_AUTH_MODE=token && ") for command in starts)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    assert not re.search(r"AKIA\w|aws_secret|password|[0-9a-f]{32}", json.dumps(config), re.IGNORECASE)


def test_the_cluster_costs_nothing_while_nobody_uses_it_but_its_head(config):
    head, gpu = (config["available_node_types"][name] for name in ("head", "gpu"))
    assert (head["resources"], head["max_workers"]) == ({"CPU": 0}, 0)
    assert "InstanceMarketOptions" not in head["node_config"]
    assert gpu["min_workers"] == 0
    assert gpu["resources"]["GPU"] > 0
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert config["idle_timeout_minutes"] <= 15


def test_every_node_gets_the_same_files_and_pinned_versions(config):
    commands = "\n".join(config["setup_commands"])
    assert re.search(r"--python 3\.11\.\d+ ", commands)
    assert "--constraint ~/semformer-sweeps/constraints.txt" in commands
    assert re.search(r"^ray==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert config["worker_setup_commands"] == config["head_setup_commands"] == config["setup_commands"]
    local = [Path(source) for source in config["file_mounts"].values() if not source.startswith("~")]
    assert all((ROOT / source).exists() for source in local)
    with (ROOT / "pyproject.toml").open("rb") as file:
        packages = tomllib.load(file)["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {package.rstrip("*") for package in packages} <= {str(source) for source in local}


def test_the_shell_commands_parse(config):
    for command in [*config["head_setup_commands"], *config["worker_setup_commands"], *start_commands(config)]:
        inside = f"true && ({command})"  # as Ray runs it
        parsed = subprocess.run(["bash", "-n"], input=inside, capture_output=True, text=True)
        assert (parsed.returncode, parsed.stderr) == (0, ""), command
