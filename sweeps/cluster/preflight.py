"""Whether the nodes of the connected Ray can run a sweep: each is asked once, at the start or when it joins."""

import logging
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from semformer.config import ShapesConfig
from semformer.data.shapes import cached_shapes
from semformer.data.voc import open_devkit
from semformer.errors import UserError
from semformer.machine import cache_folder
from semformer.store import Store, open_store
from sweeps.cluster.nodes import Node, Share, may_hold, nodes
from sweeps.cluster.versions import difference, versions
from sweeps.schedule.faults import Places

log = logging.getLogger(__name__)
ANSWER = 120.0
"""Seconds in which a node must answer."""
SEEN = 30.0
"""Seconds until a file that another node wrote must be seen: network folders list a file late."""
_SHARE_STORE = "give a folder that all nodes share, or s3://BUCKET/PREFIX"


@dataclass(frozen=True)
class Images:
    """What a sweep reads: a devkit's folder, or the parameters of the embedded data set, which each node then makes;
    and the `Split.digest` of its splits by name."""

    data: Path | ShapesConfig
    digests: Mapping[str, str]


@dataclass(frozen=True)
class NodeReport:
    """What a node answered. `gpu_memory`: bytes of each GPU."""

    node: Node
    gpu_memory: tuple[int, ...] = ()
    faults: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.node}: {'; '.join(self.faults) or 'fit'}"


class Watch:
    """The nodes that can hold a trial's `share`: who lives, and who is fit.

    A fit node has the versions and the code of this machine, the same images, the same `store` (its location),
    min_free bytes of disk, and, where the share has GPUs, those that Ray counts. With `ask` false, all are taken for
    fit: on this machine alone there is nothing to compare.
    """

    def __init__(
        self,
        share: Share,
        images: Sequence[Images] = (),
        store: str = "",
        *,
        ask: bool = True,
        min_free: int = 2**30,
    ):
        self.share, self.ask = share, ask
        self.living: dict[str, Node] = {}
        self.reports: dict[str, NodeReport] = {}
        self.potential = may_hold(share) if ask else 0
        """Trials that nodes can hold which the autoscaler may launch."""
        self._asked: dict[ray.ObjectRef, tuple[Node, float]] = {}
        self._unseen: dict[str, tuple[NodeReport, float]] = {}  # nodes whose mark in the store is not seen yet
        self._listener: Callable[[NodeReport], None] = lambda report: None
        self._run = f"preflight-{secrets.token_hex(4)}"
        self._store: Store | None = None
        if ask:
            self._store = open_store(store, patience=0.0)  # a look must not wait
            _mark(self._store, f"{self._run}-driver")
            self._question = (self._run, versions(), tuple(images), store, dict(share), min_free)
        self.look()

    def look(self) -> None:
        """Ask the nodes that are new, and take the answers that have come; never waits for one."""
        self.living = {node.id: node for node in nodes() if node.holds(self.share)}
        if not self.ask:
            return
        pending = {node.id for node, _ in self._asked.values()} | self._unseen.keys()
        for node in self.living.values():
            if node.id not in self.reports and node.id not in pending:
                pinned = NodeAffinitySchedulingStrategy(node.id, soft=False)
                self._asked[_ask.options(scheduling_strategy=pinned).remote(node, *self._question)] = (
                    node,
                    time.monotonic() + ANSWER,
                )
        if self._asked:
            for ref in ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)[0]:
                self._take(ref)
        for ref, (node, until) in list(self._asked.items()):
            if time.monotonic() > until:
                del self._asked[ref]
                ray.cancel(ref, force=True)
                self._note(NodeReport(node, faults=(f"did not answer within {ANSWER:g} s",)))
        self._look_for_marks()

    def wait(self) -> None:
        """Until every node that lives now has answered. Raises one UserError that names the faults, where no node is
        fit and none can be launched."""
        while self._asked or self._unseen:
            time.sleep(0.1)
            self.look()
        reports = self.reports.values()
        if self.ask and not self.potential and all(report.faults for report in reports):
            told = "".join(f"\n{r.node}:" + "".join(f"\n  - {fault}" for fault in r.faults) for r in reports)
            raise UserError(f"{len(reports)} of {len(reports)} nodes cannot run this sweep.{told}")

    def listen(self, unfit: Callable[[NodeReport], None]) -> None:
        """unfit(report) hears of each node that is not fit, now and later."""
        self._listener = unfit
        for report in self.reports.values():
            if report.faults:
                unfit(report)

    def places(self) -> Places:
        """For `schedule.faults`."""
        names = {node.id: str(node) if self.ask else "this machine" for node in self.living.values()}
        return Places(names, may_grow=self.potential > 0)

    def room(self) -> int:
        """Trials that the living nodes hold at once, without those that are unfit."""
        bad = {node_id for node_id, report in self.reports.items() if report.faults}
        return sum(node.holds(self.share) for node in self.living.values() if node.id not in bad)

    def gpu_memory(self) -> tuple[int, ...]:
        """Bytes of each GPU of the nodes that have answered, or of this machine."""
        if not self.ask:
            return gpu_memory()
        return tuple(size for report in self.reports.values() for size in report.gpu_memory)

    def close(self) -> None:
        if self._store:
            for name in _marks(self._store):
                if name.startswith(self._run):
                    self._store.storage.remove(f"tmp/{name}")

    # Helpers

    def _take(self, ref: ray.ObjectRef) -> None:
        node, _ = self._asked.pop(ref)
        try:
            report = ray.get(ref)
        except Exception as error:  # whatever becomes of a node that lacks the code, or dies
            if node.id in self.living:
                told = (str(error).strip() or repr(error)).splitlines()[-1]
                self._note(NodeReport(node, faults=(f"cannot answer: {told}",)))
            return
        if report.faults:
            self._note(report)
        else:
            self._unseen[node.id] = report, time.monotonic() + SEEN

    def _look_for_marks(self) -> None:
        """A store that is no shared one would keep a node's results to itself."""
        if not self._unseen or not self._store:
            return
        marks = _marks(self._store)
        for node_id, (report, until) in list(self._unseen.items()):
            if f"{self._run}-{node_id}" in marks:
                del self._unseen[node_id]
                self._note(report)
            elif time.monotonic() > until:
                del self._unseen[node_id]
                fault = f"what it writes into the store {self._store.location} is not seen here: {_SHARE_STORE}"
                self._note(replace(report, faults=(fault,)))

    def _note(self, report: NodeReport) -> None:
        self.reports[report.node.id] = report
        if report.faults:
            self._listener(report)


@ray.remote(num_cpus=0, max_retries=0, max_calls=1)
def _ask(
    node: Node,
    run: str,
    here: Mapping[str, str],
    images: Sequence[Images],
    store: str,
    share: Share,
    min_free: int,
) -> NodeReport:
    """On the node; `here` are the versions of the driver."""
    faults = [told] if (told := difference(here)) else []
    for one in images:
        faults += _compare(one)
    try:
        opened = open_store(store)
        if f"{run}-driver" not in _marks(opened):
            faults.append(f"does not see what the driver wrote into the store {store}: {_SHARE_STORE}")
        else:
            _mark(opened, f"{run}-{node.id}")
    except (UserError, OSError) as error:
        faults.append(str(error))
    memory = gpu_memory() if share["gpu"] else ()
    if share["gpu"] and node.gpus > len(memory):
        faults.append(
            f"Ray counts {node.gpus:g} GPUs, PyTorch can use {len(memory)} there: mend the driver (CUDA or ROCm), or "
            "start Ray there with the right --num-gpus"
        )
    cache = cache_folder()
    disk = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if (free := shutil.disk_usage(disk).free) < min_free:
        faults.append(f"has {free / 2**30:.1f} GiB of free disk in {disk}; needed are {min_free / 2**30:.1f}")
    return NodeReport(node, memory, tuple(faults))


def _compare(images: Images) -> list[str]:
    """What is wrong with a node's images."""
    try:
        devkit = open_devkit(images.data if isinstance(images.data, Path) else cached_shapes(images.data))
        found = {name: devkit.split(name).digest for name in images.digests}
    except (UserError, OSError) as error:
        return [str(error)]
    return [
        f"split {name!r} in {devkit.folder} has digest {found[name][:8]} (driver: {digest[:8]})"
        for name, digest in images.digests.items()
        if found[name] != digest
    ]


def gpu_memory() -> tuple[int, ...]:
    """Bytes of each GPU that PyTorch can use in this process: NVIDIA's, and AMD's by ROCm."""
    import torch  # which takes seconds to import

    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))


# Marks in a store: files in its tmp/


def _mark(store: Store, name: str) -> None:
    store.storage.create(f"tmp/{name}", b"")


def _marks(store: Store) -> set[str]:
    return {name.removeprefix("tmp/") for name in store.storage.entries("tmp/")}
