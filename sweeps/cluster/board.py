"""What is only to be seen of running trials: their latest reports, on a board that the driver looks at.

A trial puts a report up without waiting for anybody; Tune's own reports wait until the driver has taken them.
"""

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sweeps.reports import Report


class _Board:
    """The actor: of each trial, the latest report of each kind."""

    def __init__(self) -> None:
        self.latest: dict[str, dict[type, Report]] = {}

    def put(self, trial_id: str, report: Report) -> None:
        self.latest.setdefault(trial_id, {})[type(report)] = report

    def take(self) -> dict[str, list[Report]]:
        latest, self.latest = self.latest, {}
        return {trial_id: list(reports.values()) for trial_id, reports in latest.items()}


class Board:
    """The driver's end. `name` is what trials give to `Pin`."""

    def __init__(self, name: str):
        self.name = name
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here, "name": name}
        self._actor: Any = ray.remote(_Board).options(**options).remote()
        self._coming: ray.ObjectRef | None = None

    def look(self, hear: Callable[[str, Report], None]) -> None:
        """Calls hear(trial_id, report) for what has come since the last look; never waits."""
        if self._coming is None:
            self._coming = self._actor.take.remote()
        if not ray.wait([self._coming], timeout=0)[0]:
            return
        coming, self._coming = self._coming, self._actor.take.remote()
        try:
            latest = ray.get(coming)
        except ray.exceptions.RayActorError:  # it starts again, empty
            return
        for trial_id, reports in latest.items():
            for report in reports:
                hear(trial_id, report)

    def close(self) -> None:
        ray.kill(self._actor)


class Pin:
    """A trial's end: puts up reports, at most one in `every` seconds."""

    def __init__(self, board: str, trial_id: str, every: float):
        self.trial_id, self.every = trial_id, every
        self._actor = ray.get_actor(board)
        self._sent: ray.ObjectRef | None = None
        self._last: dict[type, float] = {}

    def put(self, report: Report) -> None:
        now = time.monotonic()
        if now - self._last.get(type(report), -self.every) < self.every:
            return
        if self._sent is None or ray.wait([self._sent], timeout=0)[0]:  # else the one before is still on its way
            self._sent = self._actor.put.remote(self.trial_id, report)
            self._last[type(report)] = now
