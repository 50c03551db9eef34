"""The nodes of the connected Ray, those that its autoscaler may launch, and how many trials they hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml

from semformer.errors import UserError

LAUNCHABLE = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` leaves, on the head, what the autoscaler may launch."""
Share = Mapping[str, float]
"""Of a node, for one trial: {"cpu": ..., "gpu": ...}."""


@dataclass(frozen=True)
class Node:
    """A living node, as Ray counts it."""

    id: str
    address: str
    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"node {self.address} ({self.id[:8]})"

    def holds(self, share: Share) -> int:
        """How many trials at once."""
        return _holds(self.cpus, self.gpus, share)


def nodes() -> list[Node]:
    """The living nodes of the connected Ray."""
    return [
        Node(n["NodeID"], n["NodeManagerAddress"], n["Resources"].get("CPU", 0.0), n["Resources"].get("GPU", 0.0))
        for n in ray.nodes()
        if n["Alive"]
    ]


@dataclass(frozen=True)
class Launchable:
    """A type of node that the autoscaler may launch, `most` times at once."""

    cpus: float
    gpus: float
    most: int


def launchable() -> list[Launchable]:
    """What the autoscaler of this head may launch; nothing where there is none. Raises UserError for a damaged file."""
    path = LAUNCHABLE.expanduser()
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        types: dict[str, Any] = config["available_node_types"]
        most = config.get("max_workers")
        found = []
        for name, kind in types.items():
            count = min(n for n in (kind.get("max_workers"), most, 10**6) if n is not None)
            if name != config.get("head_node_type") and count > 0:
                resources = kind.get("resources", {})
                found.append(Launchable(resources.get("CPU", 0), resources.get("GPU", 0), count))
        return found
    except FileNotFoundError:
        return []
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}, where `ray up` tells what may be launched, cannot be read: {error!r}") from error


def may_hold(share: Share) -> int:
    """How many trials the cluster can grow to hold by its autoscaler."""
    return sum(kind.most * _holds(kind.cpus, kind.gpus, share) for kind in launchable())


def trial_share(cpus: int, gpus: float | None, *, address: str | None = None) -> dict[str, float]:
    """A trial's share of a node; `gpus` is by default 1 where there are any.

    `address` is what was given to `connect`. Raises UserError when no node can hold a trial, nor any that the
    cluster's autoscaler may launch.
    """
    there = [(node.cpus, node.gpus) for node in nodes()]
    there += [(kind.cpus, kind.gpus) for kind in launchable()] if address else []
    if gpus is None:
        gpus = min(1.0, max(g for _, g in there))
    if not any(cpus <= c and gpus <= g for c, g in there):
        option = f"--gpus-per-trial {gpus:g}" if gpus > max(g for _, g in there) else f"--cpus-per-trial {cpus}"
        known = ", ".join(sorted({f"{c:g} CPUs and {g:g} GPUs" for c, g in there}))
        raise UserError(f"{option}: no node can hold that; there are nodes with {known}")
    return {"cpu": cpus, "gpu": gpus}


def _holds(cpus: float, gpus: float, share: Share) -> int:
    there = {"cpu": cpus, "gpu": gpus}
    return min((int(there[kind] / part + 1e-9) for kind, part in share.items() if part), default=0)
