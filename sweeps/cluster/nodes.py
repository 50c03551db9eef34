"""The nodes of the connected Ray, and what of them a trial gets."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ray
import yaml

from semformer.errors import UserError

LAUNCHABLE = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` leaves, on the head, what the autoscaler may launch."""


@dataclass(frozen=True)
class Node:
    """A living node, as Ray counts it."""

    id: str
    address: str
    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"node {self.address} ({self.id[:8]})"


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
