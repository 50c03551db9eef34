"""Trials that wait to be started: in which order, and what holds one back."""

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from semformer.keys import StageKey, to_make
from sweeps.plan.trials import Trial

Seconds = Callable[[StageKey], float]
"""How long a stage takes on one GPU."""
Rank = tuple[int, float, int]


class Queue:
    """Gives trials none of whose stages is being made.

    First come the builders of the stages that most other trials wait for, then the trials with most work left
    (longest processing time first), then those that were added first.

    What may start is kept up to date, not searched for. A heap holds the candidates; one that turns out to need a stage
    that is being made is parked there until that stage is released. Ranks in the heap may be too good, since stages
    become ready and trials leave; such a candidate is ranked anew when its turn comes.

    `published`: digests of stages that are believed to be in the store, until `lacks` tells that one is not.
    """

    def __init__(self, trials: Iterable[Trial] = (), seconds: Seconds = lambda key: 1.0, published: Iterable[str] = ()):
        self._seconds, self._published = seconds, set(published)
        self._trials: dict[str, Trial] = {}  # by trial key
        self._numbers: dict[str, int] = {}  # trial key -> place in the order of adding
        self._last = 0
        self._ready: set[str] = set()
        self._makers: dict[str, str] = {}  # stage digest -> who makes it
        self._users: defaultdict[str, set[str]] = defaultdict(set)  # stage digest -> keys of queued trials
        self._heap: list[tuple[Rank, str]] = []
        self._parked: defaultdict[str, set[str]] = defaultdict(set)  # what is waited for -> trial keys
        self._parked_at: dict[str, str] = {}
        trials = list(trials)
        for trial in trials:
            self._enter(trial)
        for trial in trials:
            self._push(trial.key)

    def __len__(self) -> int:
        return len(self._trials)

    def __iter__(self) -> Iterator[Trial]:
        return iter(list(self._trials.values()))

    def add(self, trial: Trial) -> None:
        """One that comes back has its old place among those that are wanted as much and have as much work left."""
        self._enter(trial)
        wanted_more = {key for stage in self.missing(trial) for key in self._users[stage.digest]}
        for key in {trial.key} | (wanted_more - self._parked_at.keys()):
            self._push(key)

    def pop(self) -> Trial | None:
        """The next trial that may start, taken out of the queue; None where all are held back."""
        while self._heap:
            rank, key = heapq.heappop(self._heap)
            if key not in self._trials or key in self._parked_at:
                continue
            if (now := self._rank(key)) > rank:
                heapq.heappush(self._heap, (now, key))
                continue
            trial = self._trials[key]
            if held := next((stage.digest for stage in self.missing(trial) if stage.digest in self._makers), None):
                self._park(key, held)
                continue
            self.remove(trial)
            return trial
        return None

    def park(self, trial: Trial, waits_for: str) -> None:
        """Put a trial (back) into the queue, to be held until `release(waits_for)`."""
        self._enter(trial)
        self._park(trial.key, waits_for)

    def parked(self, waits_for: str) -> Trial | None:
        """The first of the trials that wait for this."""
        key = min(self._parked.get(waits_for, ()), key=self._numbers.__getitem__, default=None)
        return self._trials[key] if key else None

    def remove(self, trial: Trial) -> None:
        del self._trials[trial.key]
        for key in trial.keys.values():
            self._users[key.digest].discard(trial.key)
        if place := self._parked_at.pop(trial.key, None):
            self._parked[place].discard(trial.key)

    # Stages

    def missing(self, trial: Trial) -> list[StageKey]:
        """The stages that must be made for a trial, in order, by what is known of the store."""
        return to_make(trial.keys, lambda key: key.digest in self._ready or key.digest in self._published)

    def is_ready(self, digest: str) -> bool:
        return digest in self._ready

    def ready(self, digest: str) -> None:
        """The stage is in the store."""
        self._ready.add(digest)
        self.release(digest)

    def lacks(self, digest: str) -> None:
        """The stage is not in the store."""
        self._published.discard(digest)

    def hold(self, digest: str, maker: str) -> None:
        """The stage is being made by `maker`: trials that need it are held back."""
        self._makers[digest] = maker

    def release(self, waits_for: str) -> None:
        """Nobody makes the stage any more, or what else was waited for is there."""
        self._makers.pop(waits_for, None)
        for key in self._parked.pop(waits_for, ()):
            del self._parked_at[key]
            self._push(key)

    def waits_for(self, trial: Trial) -> tuple[str, str]:
        """The stage that a queued trial waits for, and who makes it; ("", "") where only a free place is missing."""
        for key in self.missing(trial):
            if key.digest in self._makers:
                return key.stage, self._makers[key.digest]
        return "", ""

    def needing(self, digest: str) -> list[Trial]:
        """The queued trials for which a stage must be made, in the order in which they were added."""
        users = [self._trials[key] for key in sorted(self._users[digest], key=self._numbers.__getitem__)]
        return [trial for trial in users if any(key.digest == digest for key in self.missing(trial))]

    # Helpers

    def _enter(self, trial: Trial) -> None:
        self._trials[trial.key] = trial
        if trial.key not in self._numbers:
            self._last += 1
            self._numbers[trial.key] = self._last
        for key in trial.keys.values():
            self._users[key.digest].add(trial.key)

    def _park(self, key: str, waits_for: str) -> None:
        self._parked[waits_for].add(key)
        self._parked_at[key] = waits_for

    def _push(self, key: str) -> None:
        heapq.heappush(self._heap, (self._rank(key), key))

    def _rank(self, key: str) -> Rank:
        missing = self.missing(self._trials[key])
        others = sum(len(self._users[stage.digest]) - 1 for stage in missing)
        return -others, -sum(map(self._seconds, missing)), self._numbers[key]
