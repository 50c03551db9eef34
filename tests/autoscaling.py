"""A Ray cluster that grows and shrinks by Ray's own autoscaler; its nodes are raylets of this machine.

Each new node may be another machine as far as a sweep can see: started in a folder of its own, with an environment of
its own.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)

from tests.servers import free_port

ROOT = Path(__file__).parents[1]


class Provider(FakeMultiNodeProvider):
    """Starts the nth node in the folder and with the environment that the configuration lists for it; the last of them
    is for all further ones. Its ids differ from the start, as Ray's own do."""

    def _next_hex_node_id(self) -> str:
        self._next_node_id += 1
        return f"{self._next_node_id:08x}" + "0" * 48

    def _create_node_with_resources_and_labels(self, node_config, tags, count, resources, labels):
        machines = self.provider_config["machines"]
        machine = machines[min(self._next_node_id, len(machines) - 1)]
        before = dict(os.environ)
        os.environ.update(machine.get("env", {}))
        os.chdir(machine["folder"])
        try:
            super()._create_node_with_resources_and_labels(node_config, tags, count, resources, labels)
        finally:
            os.environ.clear()
            os.environ.update(before)


class Grown(NamedTuple):
    """The cluster's address, the environment of its head, where drivers run, and its log folder."""

    address: str
    env: dict[str, str]
    logs: Path

    def launched(self) -> int:
        """How many nodes were launched so far."""
        told = (self.logs / "monitor.log").read_text() if (self.logs / "monitor.log").exists() else ""
        return told.count("Launched 1 nodes")


@contextmanager
def autoscaling(
    env: Mapping[str, str], machines: Sequence[Mapping[str, Any]], *, most: int = 3, idle_minutes: float = 10.0
) -> Iterator[Grown]:
    """A head without CPUs in the first machine's folder, and workers of one CPU from zero to `most`."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # a socket's path must be short
    port = free_port()
    kinds = {
        FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0},
        "cpu": {
            "resources": {"CPU": 1, "object_store_memory": 80 * 2**20},
            "node_config": {},
            "min_workers": 0,
            "max_workers": most,
        },
    }
    provider = {
        "type": "external",
        "module": "tests.autoscaling.Provider",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
        "gcs_address": f"{_own_address()}:{port}",
        "machines": list(machines),
    }
    lists = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    config = {
        "cluster_name": "grows",
        "max_workers": most,
        "idle_timeout_minutes": idle_minutes,
        "provider": provider,
        "auth": {},
        "available_node_types": kinds,
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "upscaling_speed": 1.0,
        "docker": {},
        **{f"{name}_commands": [] for name in lists},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
    }
    path = folder / "cluster.json"
    path.write_text(json.dumps(config))
    (Path(env["HOME"]) / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(config))  # where `ray up` leaves it
    started = {
        **env,
        "PYTHONPATH": f"{ROOT}",
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        # as `ray up` starts a head
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE,
    }
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", f"--port={port}", "--num-cpus=0"]
    command += [f"--temp-dir={folder}", f"--autoscaling-config={path}", "--include-dashboard=false"]
    command += [f"--object-store-memory={80 * 2**20}", "--dashboard-agent-listen-port=0"]
    told = subprocess.run(command, env=started, cwd=machines[0]["folder"], capture_output=True, text=True)
    try:
        assert told.returncode == 0, told.stdout + told.stderr
        yield Grown(f"{_own_address()}:{port}", {**env, "RAY_TMPDIR": str(folder)}, folder / "session_latest" / "logs")
    finally:
        end_processes_of(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _own_address() -> str:
    from ray._private.services import get_node_ip_address

    return get_node_ip_address()


def end_processes_of(folder: Path) -> None:
    """Every process that was started below a temporary folder of Ray."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        found = [
            p for p in psutil.process_iter(["cmdline"]) if any(str(folder) in part for part in p.info["cmdline"] or ())
        ]
        if not found:
            return
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.2)
