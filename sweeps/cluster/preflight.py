"""Whether every node of the connected Ray can run a sweep: asked before the first trial, so that none fails for it."""

import hashlib
import importlib.metadata
import os
import platform
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import semformer
import sweeps
from semformer.data.shapes import cached_shapes
from semformer.data.voc import open_devkit
from semformer.errors import UserError
from semformer.store import Store, open_store
from sweeps.cluster.nodes import Node, nodes

PACKAGES = ("ray", "semformer-sweeps", "torch", "torchvision", "timm", "numpy", "pillow")
"""What must be the same everywhere."""
PATIENCE = 30.0
"""Seconds until a file that another node wrote must be seen: network folders list a file late."""
_SHARE_STORE = "give a folder that all nodes share, or s3://BUCKET/PREFIX"


@dataclass(frozen=True)
class NodeReport:
    """What `preflight` found on a node. Memory and disk in bytes; `gpu_memory` has one entry a GPU."""

    node: Node
    versions: Mapping[str, str] = field(default_factory=dict)
    gpu_memory: tuple[int, ...] = ()
    free_disk: int = 0
    faults: tuple[str, ...] = ()


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

    Nodes that an autoscaler launches later are not asked; their trials compare the data by the stages' keys.
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
                reports.append(
                    NodeReport(node, faults=(f"cannot answer: {(str(error).strip() or repr(error)).splitlines()[-1]}",))
                )
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
    versions, memory, faults = _versions(), gpu_memory(), []
    if different := [f"{k} {versions.get(k)} (driver: {v})" for k, v in here.items() if versions.get(k) != v]:
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
        opened = open_store(store)
        if f"{run}-driver" not in _marks(opened):
            faults.append(f"does not see what the driver wrote into the store {store}: {_SHARE_STORE}")
        else:
            _mark(opened, f"{run}-{node.id}")
    except (UserError, OSError) as error:
        faults.append(str(error))
    if share["gpu"] and node.gpus != len(memory):
        faults.append(
            f"Ray counts {node.gpus:g} GPUs, nvidia-smi shows {len(memory)}: "
            "mend the driver, or start Ray there with the right --num-gpus"
        )
    cache = Path(os.environ.get("SEMFORMER_CACHE") or "~").expanduser()
    disk = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if (free := shutil.disk_usage(disk).free) < min_free:
        faults.append(f"has {free / 2**30:.1f} GiB of free disk in {disk}; needed are {min_free / 2**30:.1f}")
    return NodeReport(node, versions, memory, free, tuple(faults))


def _versions() -> dict[str, str]:
    """Of Python, of `PACKAGES`, and the start of the sha256 over this project's own code."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    digest = hashlib.sha256()
    for package in (Path(semformer.__file__).parent, Path(sweeps.__file__).parent):
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


def _mark(store: Store, name: str) -> None:
    store.storage.create(f"tmp/{name}", b"")


def _marks(store: Store) -> set[str]:
    return {name.removeprefix("tmp/") for name in store.storage.entries("tmp/")}


def _unmark(store: Store, name: str) -> None:
    store.storage.remove(f"tmp/{name}")


@contextmanager
def _marking(location: str, run: str) -> Iterator[Callable[[set[str]], set[str]]]:
    """Marks the store for the driver; yields a function that waits for nodes' marks and tells which there are."""
    store = open_store(location)
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
                _unmark(store, name)
