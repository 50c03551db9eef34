"""The Ray that trials run on: one of this machine, or a cluster; and whether every node of it can run a sweep.

`python -m sweeps.cluster FILE` checks a cluster file for `ray up`: its form, and that every placeholder is filled.
"""

import argparse
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import ray
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import semformer
from semformer.data.shapes import cached_shapes
from semformer.data.voc import open_devkit
from semformer.errors import UserError
from semformer.store import open_store

log = logging.getLogger(__name__)
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths in a config are relative to where the sweep was started
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # only some reports carry what a scheduler looks at
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # the store holds all state; Tune's own snapshots are not used
}
"""Of the driver and the trials' processes."""
OBJECT_STORE = 100 * 2**20
"""Bytes. Trials exchange nothing through Ray's object store."""
PACKAGES = ("ray", "semformer-sweeps", "torch", "torchvision", "timm", "numpy", "pillow")
"""What must be the same everywhere."""
LAUNCHABLE = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` leaves, on the head, what the autoscaler may launch."""
PATIENCE = 30.0
"""Seconds until a file that another node wrote must be seen: network folders list a file late."""
_SHARE_STORE = "give a folder that all nodes share, or s3://BUCKET/PREFIX"
PLACEHOLDER = re.compile(r"\S*CHANGE_ME\S*")

# Connecting


@contextmanager
def connect(address: str | None, *, timeout: float = 20.0) -> Iterator[None]:
    """A quiet connection to Ray: a Ray of our own on this machine (None), or the cluster at "HOST:PORT" or "auto".

    "auto" is the cluster that `ray start` noted on this machine, or $RAY_ADDRESS. Raises UserError within `timeout`
    seconds if there is no such cluster, it is no Ray, it refuses the token, or it runs another Ray or Python.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("ray", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address is None:
        ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE, **quiet)
    else:
        address = _resolve(address)
        _check_head(address, timeout)
        try:
            ray.init(address=address, runtime_env={"env_vars": ENVIRONMENT}, **quiet)
        except Exception as error:
            raise UserError(
                f"--address {address}: {_last_line(error)}. A sweep must be started on a node of the cluster: "
                "on its head (ray attach), or with ray job submit."
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _resolve(address: str) -> str:
    if address == "auto":
        from ray._private.utils import read_ray_address

        address = os.environ.get("RAY_ADDRESS") or read_ray_address() or ""
        if not address:
            raise UserError(
                "--address auto: no Ray cluster was started on this machine. Start one (ray start --head), give "
                "HOST:PORT, or leave --address out to run on this machine alone."
            )
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"--address {address}: write HOST:PORT, such as 10.0.0.1:6379, or auto")
    return address


_ASK_HEAD = """
import json, sys
from ray._common.usage.usage_lib import get_cluster_metadata
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._raylet import GcsClient

ensure_token_if_auth_enabled(create_token_if_missing=False)
print(json.dumps(get_cluster_metadata(GcsClient(address=sys.argv[1]))))
"""


def _check_head(address: str, timeout: float) -> None:
    """Ask the head for its versions; in a process of its own, as Ray's client does not give up in time."""
    deadline = time.monotonic() + timeout
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout).close()
    except OSError as error:
        raise UserError(
            f"--address {address}: nothing answers there ({error.strerror or error}). Start the cluster "
            "(ray up, or ray start --head), or correct the address."
        ) from error
    command = [sys.executable, "-c", _ASK_HEAD, address]
    try:
        left = max(0.0, deadline - time.monotonic())
        asked = subprocess.run(command, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"--address {address}: something answers there, but in {timeout:g} s not as the head of a Ray cluster. "
            "The head's port is 6379 unless `ray start --port` says otherwise."
        ) from None
    if asked.returncode:
        raise UserError(f"--address {address}: {_explain_refusal(asked.stderr)}")
    theirs = json.loads(asked.stdout.splitlines()[-1])
    ours = {"ray": ray.__version__, "python": platform.python_version()}
    if wrong := [
        f"{name} {theirs[f'{name}_version']} (here {v})" for name, v in ours.items() if theirs[f"{name}_version"] != v
    ]:
        raise UserError(f"--address {address}: the cluster runs {', '.join(wrong)}: install the same everywhere")
    if os.environ.get("RAY_AUTH_MODE") != "token":
        log.warning("%s asks for no token: whoever reaches it can run code there (RAY_AUTH_MODE=token)", address)


def _explain_refusal(stderr: str) -> str:
    if "AuthenticationError" not in stderr:
        return f"the head cannot be asked: {_last_line(stderr)}"
    copy = "copy ~/.ray/auth_token of the head to ~/.ray/auth_token here (chmod 600)"
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return f"the cluster asks for a token, but RAY_AUTH_MODE is not set: export RAY_AUTH_MODE=token, and {copy}"
    if "no authentication token was found" in stderr:
        return f"RAY_AUTH_MODE=token is set, but there is no token here: {copy}"
    return f"the token here is not the cluster's: {copy}"


# Nodes


@dataclass(frozen=True)
class Node:
    """A living node, as Ray counts it."""

    id: str
    address: str
    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"node {self.address} ({self.id[:8]})"


@dataclass(frozen=True)
class NodeReport:
    """What `preflight` found on a node. Memory and disk in bytes; `gpu_memory` has one entry a GPU."""

    node: Node
    versions: Mapping[str, str] = field(default_factory=dict)
    gpu_memory: tuple[int, ...] = ()
    free_disk: int = 0
    faults: tuple[str, ...] = ()


def nodes() -> list[Node]:
    """The living nodes of the connected Ray."""
    return [
        Node(n["NodeID"], n["NodeManagerAddress"], n["Resources"].get("CPU", 0.0), n["Resources"].get("GPU", 0.0))
        for n in ray.nodes()
        if n["Alive"]
    ]


def trial_share(cpus: int, gpus: float | None, *, address: str | None = None) -> dict[str, float]:
    """A trial's share of a node, {"cpu": ..., "gpu": ...}; `gpus` is by default 1 where there are any.

    `address` is what was given to `connect`. Raises UserError when no node can hold a trial, nor any that the
    cluster's autoscaler may launch.
    """
    there = [(node.cpus, node.gpus) for node in nodes()] + (_launchable() if address else [])
    if gpus is None:
        gpus = min(1.0, max(g for _, g in there))
    if not any(cpus <= c and gpus <= g for c, g in there):
        option = f"--gpus-per-trial {gpus:g}" if gpus > max(g for _, g in there) else f"--cpus-per-trial {cpus}"
        known = ", ".join(sorted({f"{c:g} CPUs and {g:g} GPUs" for c, g in there}))
        raise UserError(f"{option}: no node can hold that; there are nodes with {known}")
    return {"cpu": cpus, "gpu": gpus}


def places(share: Mapping[str, float]) -> int:
    """How many trials of such a share the living nodes hold at once."""
    wanted = {kind: part for kind, part in share.items() if part}
    return sum(int(min(getattr(node, f"{kind}s") / part for kind, part in wanted.items()) + 1e-9) for node in nodes())


def _launchable() -> list[tuple[float, float]]:
    """CPUs and GPUs of the node types that the autoscaler of this head may launch."""
    try:
        types = yaml.safe_load(LAUNCHABLE.expanduser().read_text(encoding="utf-8"))["available_node_types"].values()
        resources = [t["resources"] for t in types if t.get("max_workers", 0) > 0]
    except FileNotFoundError:
        return []
    return [(r.get("CPU", 0), r.get("GPU", 0)) for r in resources]


# Preflight


def preflight(
    *,
    data: Path | Mapping[str, int],
    digests: Mapping[str, str],
    store: str,
    share: Mapping[str, float],
    timeout: float = 120.0,
    min_free: int = 2**30,
) -> list[NodeReport]:
    """Ask every living node, all at once, whether it can run the sweep.

    `data` is a devkit's folder, or the parameters of the embedded data set, which each node then makes; `digests` are
    the `Split.digest` of the splits that the sweep reads. A node must have the versions and the code of this machine,
    the same data, the same `store` (a folder or "s3://..."), `min_free` bytes of disk, and, where the `share` of a
    trial has GPUs, the GPUs that Ray counts. Raises one UserError that names every node at fault.

    Nodes that an autoscaler launches later are not asked; their trials compare data and code by the stages' keys.
    """
    here, run, reports = _versions(), f"preflight-{secrets.token_hex(4)}", []
    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    with _marking(store, run) as marks:
        asked = {}
        for node in nodes():
            pinned = look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))
            asked[pinned.remote(node, run, here, data, digests, store, share, min_free)] = node
        deadline = time.monotonic() + timeout
        for ref, node in asked.items():
            try:
                reports.append(ray.get(ref, timeout=max(0.1, deadline - time.monotonic())))
            except ray.exceptions.GetTimeoutError:
                ray.cancel(ref, force=True)
                reports.append(NodeReport(node, faults=(f"did not answer within {timeout:g} s",)))
            except Exception as error:  # whatever becomes of a node that lacks the code, or dies
                reports.append(NodeReport(node, faults=(f"cannot answer: {_last_line(error)}",)))
        seen = marks({report.node.id for report in reports if not report.faults})
    unseen = f"what it writes into the store {store} is not seen here: {_SHARE_STORE}"
    reports = [r if r.faults or r.node.id in seen else replace(r, faults=(unseen,)) for r in reports]
    if bad := [report for report in reports if report.faults]:
        told = "".join(f"\n{r.node}:" + "".join(f"\n  - {fault}" for fault in r.faults) for r in bad)
        raise UserError(f"{len(bad)} of {len(reports)} nodes cannot run this sweep.{told}")
    return reports


def _look(
    node: Node,
    run: str,
    here: Mapping[str, str],
    data: Path | Mapping[str, int],
    digests: Mapping[str, str],
    store: str,
    share: Mapping[str, float],
    min_free: int,
) -> NodeReport:
    """`preflight`'s part on the node; `here` are the versions of the driver."""
    versions, gpus, free = _versions(), gpu_memory(), shutil.disk_usage(Path.home()).free
    faults = []
    if different := [f"{name} {versions[name]} (driver: {v})" for name, v in here.items() if versions[name] != v]:
        faults.append(f"has {', '.join(different)}: install the same everywhere (constraints.txt)")
    try:
        devkit = open_devkit(cached_shapes(**data) if isinstance(data, Mapping) else data)
        for name, digest in digests.items():
            found = devkit.split(name).digest
            if found != digest:
                faults.append(f"split {name!r} in {devkit.folder} has digest {found[:8]} (driver: {digest[:8]})")
    except (UserError, OSError) as error:
        faults.append(str(error))
    try:
        if f"{run}-driver" not in _marks(store):
            faults.append(f"does not see what the driver wrote into the store {store}: {_SHARE_STORE}")
        else:
            _mark(store, f"{run}-{node.id}")
    except (UserError, OSError) as error:
        faults.append(str(error))
    if share["gpu"] and node.gpus != len(gpus):
        faults.append(
            f"Ray counts {node.gpus:g} GPUs, nvidia-smi shows {len(gpus)}: "
            "mend the driver, or start Ray there with the right --num-gpus"
        )
    if free < min_free:
        faults.append(f"has {free / 2**30:.1f} GiB of free disk in {Path.home()}; needed are {min_free / 2**30:.1f}")
    return NodeReport(node, versions, gpus, free, tuple(faults))


def _versions() -> dict[str, str]:
    """Of Python, of `PACKAGES`, and the start of the sha256 over this project's own code."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    digest = hashlib.sha256()
    for package in (Path(semformer.__file__).parent, Path(__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(f"{package.name}/{path.relative_to(package)}\n".encode() + path.read_bytes())
    return versions | {"code": digest.hexdigest()[:12]}


def gpu_memory() -> tuple[int, ...]:
    """Bytes of each GPU, whichever of them Ray lets this process use."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(int(line) * 2**20 for line in told.split())


# Marks in a store: files in its tmp/


def _mark(store: str, name: str) -> None:
    open_store(store).storage.create(f"tmp/{name}", b"")


def _marks(store: str) -> set[str]:
    return {name.removeprefix("tmp/") for name in open_store(store).storage.entries("tmp/")}


@contextmanager
def _marking(store: str, run: str) -> Iterator[Callable[[set[str]], set[str]]]:
    """Marks the store for the driver; yields a function that waits for nodes' marks and tells which there are."""
    _mark(store, f"{run}-driver")

    def marked(wanted: set[str]) -> set[str]:
        deadline = time.monotonic() + PATIENCE
        while True:
            seen = {name.removeprefix(f"{run}-") for name in _marks(store)}
            if wanted <= seen or time.monotonic() > deadline:
                return seen
            time.sleep(0.5)

    try:
        yield marked
    finally:
        for name in _marks(store):
            if name.startswith(run):
                open_store(store).storage.remove(f"tmp/{name}")


# A cluster file


def check_cluster_file(path: Path) -> None:
    """Raises UserError if `ray up` would refuse the file, or for placeholders that are still in it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        text = path.read_text(encoding="utf-8")
        validate_config(prepare_config(yaml.safe_load(text)))
    except Exception as error:  # Ray's own checks raise whatever they meet
        raise UserError(f"{path} is no cluster file: {_first_line(error)}") from error
    lines = enumerate((line.partition("#")[0] for line in text.splitlines()), start=1)
    if left := [f"{path}:{n}: {found[0]}" for n, line in lines if (found := PLACEHOLDER.search(line))]:
        raise UserError("fill in these placeholders; the comments beside them say with what:\n" + "\n".join(left))


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0]


def _last_line(error: object) -> str:
    return str(error).strip().rpartition("\n")[2].strip()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sweeps.cluster", description=__doc__, allow_abbrev=False)
    parser.add_argument("file", type=Path, help="a cluster file for `ray up`")
    try:
        check_cluster_file(parser.parse_args(arguments).file)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
