"""In which order trials start: the rule of the gate."""

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator

from semformer.keys import StageKey
from sweeps.plan.trials import Trial

Seconds = Callable[[StageKey], float]
"""How long a stage takes on one GPU."""


class Queue:
    """Trials that wait to be started.

    First come the builders of the stages that most other trials wait for, then the trials with most work left
    (longest processing time first), then those that were added first.
    """

    def __init__(self, trials: Iterable[Trial] = (), seconds: Seconds = lambda key: 1.0):
        self._seconds = seconds
        self._trials: dict[str, Trial] = {}
        self._wanted: Counter[str] = Counter()  # queued trials by stage digest
        for trial in trials:
            self.add(trial)

    def __len__(self) -> int:
        return len(self._trials)

    def __iter__(self) -> Iterator[Trial]:
        return iter(list(self._trials.values()))

    def add(self, trial: Trial, *, first: bool = False) -> None:
        """`first`: before all others that are wanted as much and have as much work left."""
        self._trials[trial.key] = trial
        if first:
            self._trials = {trial.key: trial, **self._trials}
        self._wanted.update(key.digest for key in trial.keys.values())

    def remove(self, trial: Trial) -> None:
        del self._trials[trial.key]
        self._wanted.subtract(key.digest for key in trial.keys.values())

    def next(
        self, ready: Collection[str], claimed: Collection[str], held: Callable[[Trial], bool] = lambda trial: False
    ) -> Trial | None:
        """The first trial none of whose stages is being made by another, or None. It stays in the queue.

        `ready` and `claimed` hold digests of stages: those in the store, and those that running trials make.
        `held(trial)` may hold more trials back; it is asked only for those that would be next.
        """
        ranked = []
        for index, trial in enumerate(self._trials.values()):
            missing = [key for key in trial.keys.values() if key.digest not in ready]
            if not any(key.digest in claimed for key in missing):
                others = sum(self._wanted[key.digest] - 1 for key in missing)
                ranked.append((-others, -sum(map(self._seconds, missing)), index, trial))
        heapq.heapify(ranked)
        while ranked:
            trial = heapq.heappop(ranked)[-1]
            if not held(trial):
                return trial
        return None
