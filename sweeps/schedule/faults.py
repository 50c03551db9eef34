"""What follows from a failure: whether the trial is tried again and where, and who else fails with it.

| whose fault | what follows |
|---|---|
| node  | tried on another; a stage that fails so on several nodes, or has no other to go to, is at fault itself |
| stage | all trials that need it fail, now or when they are added |
| store | one trial at a time tries whether it works again, until the patience ends |
| trial | tried again, until TRIES of one stage have failed without getting further |

A node that goes away takes its trials with it: that is nobody's fault, and hardly counts (spot machines); nor does a
process that died before it told where it was. A node on which several stages fail, or two trials before their first
stage, and nothing works in between, is kept away from all work.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from semformer.keys import StageKey
from semformer.store.storage import StorageUnreachable
from sweeps.plan.trials import Trial
from sweeps.reports import Failure, Scope

TRIES = 3
"""Of a stage, that fail for reasons of their own and get no further than the one before."""
NODES = 3
"""On which a stage fails by the node's fault before it is the stage's; and stages that fail on a node before it is
unfit for all."""
STARTS = 2
"""Trials that fail on a node before their first stage before it is unfit for all."""
LOSSES = 10
"""Nodes that go away under a stage before it gets further."""
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 60.0
"""Seconds until a store that failed is tried again."""


@dataclass(frozen=True)
class Places:
    """The living nodes that can hold a trial, their names by Ray's id; and whether the cluster may get more."""

    names: Mapping[str, str]
    may_grow: bool = False


class Faults:
    """`places()` tells where trials may run now; unfit(why) hears of each node that gets no more work.

    After `patience` seconds in which the store did not work, or no fit node was there, `hopeless` says so.
    """

    def __init__(
        self,
        places: Callable[[], Places],
        *,
        patience: float,
        unfit: Callable[[str], None] = lambda why: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.places, self.patience, self.clock, self.tell_unfit = places, patience, clock, unfit
        self.broken: dict[str, Failure] = {}  # by digest: stages that will not be tried again
        self.unfit: dict[str, str] = {}  # by node: why no trial is to run there
        self._failed_on: defaultdict[str, dict[str, str]] = defaultdict(dict)  # stage -> node -> why
        self._against: defaultdict[str, set[str]] = defaultdict(set)  # node -> stages that failed there in a row
        self._starts: Counter[str] = Counter()  # node -> trials that failed there in a row, before their first stage
        self._tries: Counter[str] = Counter()
        self._losses: Counter[str] = Counter()
        self._epochs: dict[str, int] = {}  # the furthest of unfinished stages
        self._outage: _Outage | None = None
        self._no_place_since = clock()

    # What is heard

    def epoch_ended(self, digest: str, epoch: int, node: str) -> None:
        self._works(node)
        if epoch > self._epochs.get(digest, 0):
            self._epochs[digest] = epoch
            del self._tries[digest], self._losses[digest]

    def stage_made(self, digest: str, node: str) -> None:
        self._works(node)
        for counted in (self._tries, self._losses, self._epochs, self._failed_on):
            counted.pop(digest, None)

    def store_answers(self) -> None:
        """It can be read, which says nothing about room in it."""
        if self._outage and self._outage.failure.error == StorageUnreachable.__name__:
            self._outage = None

    def node_is_unfit(self, node: str, why: str) -> None:
        """Keep all work away from it."""
        if node not in self.unfit:
            self.unfit[node] = why
            self.tell_unfit(why)

    def store_failed(self, failure: Failure) -> None:
        self._outage = self._outage or _Outage(self.clock())
        self._outage.again(failure, self.clock())

    def trial_failed(self, trial: Trial, failure: Failure) -> Failure | None:
        """What fails the trial and all that need the same stage; None where it is to be tried again."""
        digest = digest_of(trial, failure)
        final = self._judge(digest, failure)
        if final:
            self.broken[digest] = final
        return final

    # What is asked

    def broken_in(self, missing: Iterable[StageKey]) -> Failure | None:
        """Why stages need not be tried: one of them will not be tried again."""
        return next((self.broken[key.digest] for key in missing if key.digest in self.broken), None)

    def avoided_by(self, missing: Iterable[StageKey]) -> dict[str, str]:
        """The living nodes on which stages must not be made, with the reasons."""
        stages = (self._failed_on.get(key.digest, {}) for key in missing)
        why = {node: told for nodes in stages for node, told in nodes.items()} | self.unfit
        return {node: why[node] for node in self.places().names if node in why}

    def pause(self) -> str:
        """Why nothing is to be started now, or "": then one trial may be, which tries a store that did not work."""
        outage = self._outage
        return f"waits for the store: {outage.failure.message}" if outage and not outage.may_try(self.clock()) else ""

    def hopeless(self) -> Failure | None:
        """Why nothing can be started any more."""
        now, places = self.clock(), self.places()
        if self._outage and self._outage.lasted > self.patience:
            return self._outage.failure
        all_gone = not places.names and not self.unfit
        if places.names.keys() - self.unfit.keys() or (all_gone and places.may_grow):
            self._no_place_since = now
        elif now - self._no_place_since > self.patience or not (all_gone or places.may_grow):
            why = "Ray has lost all its nodes: its logs tell why" if all_gone else _listed(self.unfit)
            return Failure(Scope.NODE, "", "NoFitNode", f"no node can run this sweep: {why}")
        return None

    # Helpers

    def _works(self, node: str) -> None:
        self._against.pop(node, None)
        self._starts.pop(node, None)
        self._outage = None

    def _judge(self, digest: str, failure: Failure) -> Failure | None:
        if failure.scope == Scope.STAGE:
            return failure
        if failure.scope == Scope.STORE:
            self.store_failed(failure)
            return None
        places = self.places()
        if failure.node not in places.names:
            self._losses[digest] += 1
            return failure if self._losses[digest] >= LOSSES else None
        self._count_against(digest, failure, places)
        if failure.scope == Scope.NODE:
            return self._node_failed(digest, failure, places)
        self._tries[digest] += 1
        return failure if self._tries[digest] >= TRIES else None

    def _count_against(self, digest: str, failure: Failure, places: Places) -> None:
        """A fault before the first stage is about the node alone; others are, when they add up."""
        node, others = failure.node, len(places.names) > 1 or places.may_grow
        if failure.scope == Scope.NODE and not failure.stage:
            self._starts[node] += 1
        else:
            self._against[node].add(digest)
        if self._starts[node] >= STARTS or (others and len(self._against[node]) >= NODES):
            self.node_is_unfit(node, f"{places.names[node]}: {failure.reason}")

    def _node_failed(self, digest: str, failure: Failure, places: Places) -> Failure | None:
        if not failure.stage:
            return None
        tried = self._failed_on[digest]
        tried[failure.node] = f"{places.names[failure.node]}: {failure.message}"
        others = places.names.keys() - tried.keys() - self.unfit.keys()
        if len(tried) < NODES and (others or places.may_grow):
            return None
        return replace(failure, message=_listed(tried)) if len(tried) > 1 else failure


class _Outage:
    """A store that does not work: since when, and when one trial may try it again."""

    failure: Failure
    lasted = 0.0
    """From its first failure to its latest: whoever tries it after that may still succeed."""

    def __init__(self, now: float):
        self.since, self._pause, self._next = now, FIRST_PAUSE, now

    def again(self, failure: Failure, now: float) -> None:
        self.failure, self.lasted, self._next = failure, now - self.since, now + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def may_try(self, now: float) -> bool:
        """Once for each pause."""
        if now < self._next:
            return False
        self._next = now + self._pause
        return True


def digest_of(trial: Trial, failure: Failure) -> str:
    """Of the stage that a failure is about; where it came before the first one, of the trial itself."""
    key = trial.keys.get(failure.stage)
    return key.digest if key else trial.key


def _listed(reasons: Mapping[str, str]) -> str:
    told = list(dict.fromkeys(reasons.values()))
    return "; ".join(told[:3]) + (f"; and {len(told) - 3} more" if len(told) > 3 else "")
