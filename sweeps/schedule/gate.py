"""Starts a trial only when no running trial is making a stage that it needs.

A trial whose missing stages nobody makes claims them and starts; the others are held back, so that none ever sits on
a GPU waiting for another's stage. A claim ends when its stage is in the store, or with the trial that held it. The
trials are those of a plan, or those that a search suggests while it goes on.
"""

import heapq
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from semformer.errors import StoreError, UserError, first_line
from semformer.keys import StageKey, to_make
from semformer.store import StorageUnreachable, Store
from sweeps.plan.trials import Trial
from sweeps.reports import (
    EpochEnded,
    Failed,
    Failure,
    Finished,
    Found,
    Pruned,
    Raised,
    Report,
    Retried,
    Scope,
    StageDone,
    Started,
)
from sweeps.schedule.faults import Faults, digest_of
from sweeps.schedule.queue import Queue, Seconds

log = logging.getLogger(__name__)
LOOK_AGAIN = 2.0
"""Seconds after which a stage that another sweep is making is looked up again."""
LOOKING = 0.2
"""Seconds after which looking into the store is interrupted, to go on the next time."""
NO_NODE = "a fit node"
"""What trials wait for that have failed on all nodes that live."""

Tell = Callable[[Trial, Report], None]


@dataclass
class Live:
    """A trial that was started, under the runner's id, to make the stages in `claims` (digests)."""

    trial: Trial
    claims: set[str]
    avoids: bool = False
    since: float = 0.0
    node: str = ""
    """Where its process is at work; "" before that."""
    finished: bool = False
    raised: Failure | None = None


class Gate:
    """Chooses among `trials`, and those that `more` gives, in the order of `queue.Queue`.

    `more()` is asked for another trial when none that is known may start, until it returns None; at most `ahead()`
    are held back for it. At most `room()` run at once. A trial that needs nothing made is not started, only told of.
    `published`: digests of stages that are in the store as far as is known beforehand; each is looked up.

    tell(trial, report) hears Found, Retried, Failed and Pruned; what it raises is logged. While nothing runs and
    nothing can be started for an error (of the study's database, say), `next` returns None; when that has lasted
    for the patience of `faults`, what is left fails with it.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        store: Store,
        tell: Tell,
        faults: Faults,
        *,
        more: Callable[[], Trial | None] | None = None,
        ahead: Callable[[], int] = lambda: 16,
        room: Callable[[], float] = lambda: float("inf"),
        seconds: Seconds = lambda key: 1.0,
        published: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ):
        self.store, self.tell, self.faults, self.clock = store, tell, faults, clock
        self.more, self.ahead, self.room = more, ahead, room
        self.queue = Queue(trials, seconds, published)
        self.live: dict[str, Live] = {}  # by the runner's id
        self.stopped = False
        self.over: Failure | None = None
        """Why what was left has been given up."""
        self.trouble: str = ""
        """Why nothing is started though something could be, for people."""
        self._elsewhere: list[tuple[float, str, StageKey]] = []  # when to look again at stages that other sweeps make
        self._nodes: frozenset[str] = frozenset()
        self._stuck_since: float | None = None

    # What the runner calls

    def next(self, runner_id: str) -> Trial | None:
        """The trial to start now, which is live under this id from now on; None where there is none."""
        try:
            if final := self.faults.hopeless() or self._out_of_patience():
                self._give_up(final)
            trial = self._choose()
            self._stuck_since = None
        except Exception as error:
            self._note_trouble(error)
            return None
        if trial:
            claims = {key.digest for key in self.queue.missing(trial)}
            for digest in claims:
                self.queue.hold(digest, trial.key)
            self.live[runner_id] = Live(trial, claims, bool(self.avoided_by(trial)), self.clock())
        return trial

    @property
    def finished(self) -> bool:
        """Whether nothing runs and nothing will."""
        return not self.live and (self.stopped or (not self.queue and not self.more))

    def hear(self, runner_id: str, report: Report) -> None:
        """Every report of a running trial."""
        if (live := self.live.get(runner_id)) is None:
            return
        match report:
            case Started():
                live.node = report.node
            case StageDone():
                live.claims.discard(report.key)
                self.queue.ready(report.key)
                if not report.found:
                    self.faults.stage_made(report.key, live.node)
            case EpochEnded():
                self.faults.epoch_ended(live.trial.keys[report.stage].digest, report.epoch, live.node)
            case Finished():
                live.finished = True
            case Raised():
                live.raised = report.failure

    def ended(self, runner_id: str, died: Callable[[], str] | None = None) -> None:
        """A trial's process has ended. `died` tells why, where it did not end by itself."""
        live = self.live.pop(runner_id, None)
        if live is None:
            return
        for digest in live.claims:
            self.queue.release(digest)
        if not died:
            if not live.finished:
                self._tell(live.trial, Pruned())
            return
        self._failed(live.trial, live.raised or self._death(live, died()))

    def avoided_by(self, trial: Trial) -> dict[str, str]:
        """The living nodes that a trial must not run on, with the reasons."""
        return self.faults.avoided_by(self.queue.missing(trial))

    # What the driver calls

    def stop(self) -> None:
        """Start no more trials."""
        self.stopped = True

    def waiting(self) -> dict[str, tuple[str, str]]:
        """What trials that are held back wait for, by trial key: (stage, the trial key or the process that makes it).

        ("", "") where only a free place is missing, ("", why) where something else is.
        """
        return {trial.key: self._waits_for(trial) for trial in self.queue}

    # Choosing

    def _choose(self) -> Trial | None:
        if self.stopped or len(self.live) >= self.room():
            return None
        self.trouble = self.faults.pause()
        if self.trouble:
            return None
        self._look_elsewhere()
        self._look_for_nodes()
        until = time.monotonic() + LOOKING
        while time.monotonic() < until:
            trial = self.queue.pop() or self._ask()
            if trial is None:
                return self._without_place()
            try:
                missing = to_make(trial.keys, self._is_in_store)
                if not missing:
                    self._tell(trial, Found(tuple(name for name, key in trial.keys.items() if self._is_readable(key))))
                elif failure := self.faults.broken_in(missing):
                    self._tell(trial, Failed(failure))
                elif self.queue.waits_for(trial)[0]:  # for a stage that was believed to be in the store
                    self.queue.add(trial)
                elif not self._is_held(trial, missing[0]):
                    return trial
            except Exception:
                self.queue.add(trial)
                raise
        return None

    def _ask(self) -> Trial | None:
        """Another trial of the search that may start."""
        while self.more and len(self.queue) < self.ahead():
            if trial := self.more():
                self.queue.add(trial)
                if chosen := self.queue.pop():
                    return chosen
            else:
                self.more = None
        return None

    def _is_held(self, trial: Trial, first: StageKey) -> bool:
        """Puts a trial back that has no place now, or whose first missing stage another sweep on this store makes."""
        holder = self.store.holder(first)
        self.faults.store_answers()
        if holder:
            self.queue.hold(first.digest, str(holder))
            heapq.heappush(self._elsewhere, (self.clock() + LOOK_AGAIN, first.digest, first))
            self.queue.add(trial)
        elif self._lacks_place(trial):
            self.queue.park(trial, NO_NODE)
        else:
            return False
        return True

    def _is_in_store(self, key: StageKey) -> bool:
        if self.queue.is_ready(key.digest):
            return True
        there = self.store.find(key, verify=False) is not None
        (self.queue.ready if there else self.queue.lacks)(key.digest)
        return there

    def _is_readable(self, key: StageKey) -> bool:
        """As `_is_in_store`, of a stage that nothing needs."""
        try:
            return self._is_in_store(key)
        except StorageUnreachable:
            raise
        except UserError:
            return False

    def _look_elsewhere(self) -> None:
        """Is what other sweeps were making done, or given up? Should one have died, its lease expires."""
        until = time.monotonic() + LOOKING
        while self._elsewhere and self._elsewhere[0][0] <= self.clock() and time.monotonic() < until:
            _, digest, key = heapq.heappop(self._elsewhere)
            try:
                if self._is_in_store(key):
                    continue
                if holder := self.store.holder(key):
                    self.queue.hold(digest, str(holder))
                    heapq.heappush(self._elsewhere, (self.clock() + LOOK_AGAIN, digest, key))
                else:
                    self.queue.release(digest)
            except Exception:
                heapq.heappush(self._elsewhere, (self.clock() + LOOK_AGAIN, digest, key))
                raise

    # Nodes

    def _lacks_place(self, trial: Trial) -> bool:
        avoided = self.avoided_by(trial)
        return bool(avoided) and len(avoided) == len(self.faults.places().names)

    def _look_for_nodes(self) -> None:
        nodes = frozenset(self.faults.places().names)
        if nodes - self._nodes:
            self.queue.release(NO_NODE)
        self._nodes = nodes

    def _without_place(self) -> Trial | None:
        """Where nothing runs, a trial that no living node may take: a growing cluster then brings another."""
        if self.live or not (trial := self.queue.parked(NO_NODE)):
            return None
        self.queue.remove(trial)
        if self.faults.places().may_grow:
            return trial
        why = "; ".join(dict.fromkeys(self.avoided_by(trial).values()))
        self._tell(trial, Failed(Failure(Scope.NODE, "", "NoFitNode", f"no node is left for it: {why}")))
        return None

    # Failures

    def _death(self, live: Live, why: str) -> Failure:
        stage = next((key.stage for key in self.queue.missing(live.trial)), "")
        return Failure(Scope.TRIAL, stage, "WorkerDied", why, node=live.node)

    def _failed(self, trial: Trial, failure: Failure) -> None:
        final = self.faults.trial_failed(trial, failure) or self.over
        if final is None:
            self.queue.add(trial)
            self._tell(trial, Retried(failure))
            return
        self._tell(trial, Failed(final))
        shared = replace(final, message=f"{final.message} (in the trial of row {trial.name})")
        digest = digest_of(trial, final)
        self.faults.broken[digest] = shared
        for other in self.queue.needing(digest):
            self.queue.remove(other)
            self._tell(other, Failed(shared))

    def _note_trouble(self, error: Exception) -> None:
        if isinstance(error, StoreError):
            self.faults.store_failed(Failure(Scope.STORE, "", type(error).__name__, str(error)))
        told = f"{type(error).__name__}: {first_line(error)}"
        if not self.trouble:
            log.warning("no trial could be chosen, trying again: %s", told)
        self.trouble = told
        if self._stuck_since is None:
            self._stuck_since = self.clock()

    def _out_of_patience(self) -> Failure | None:
        """When nothing has run for so long, because of an error or for want of a node that is none of the unfit."""
        now, patience = self.clock(), self.faults.patience
        if any(live.node for live in self.live.values()):
            return None
        if self._stuck_since is not None and now - self._stuck_since > patience:
            return Failure(Scope.TRIAL, "", "Stuck", f"{self.trouble} (tried for {patience:g} s)")
        for live in self.live.values():
            if live.avoids and now - live.since > patience and self._lacks_place(live.trial):
                why = "; ".join(dict.fromkeys(self.avoided_by(live.trial).values()))
                return Failure(Scope.NODE, "", "NoFitNode", f"no other node came in {patience:g} s: {why}")
        return None

    def _give_up(self, failure: Failure) -> None:
        """What is left fails; so does what was started and found no node."""
        self.over, self.stopped = failure, True
        for trial in self.queue:
            self.queue.remove(trial)
            self._tell(trial, Failed(failure))
        for runner_id, live in list(self.live.items()):
            if not live.node:
                del self.live[runner_id]
                self._tell(live.trial, Failed(failure))

    # Helpers

    def _waits_for(self, trial: Trial) -> tuple[str, str]:
        stage, maker = self.queue.waits_for(trial)
        return (stage, maker) if stage else ("", self.trouble)

    def _tell(self, trial: Trial, report: Report) -> None:
        try:
            self.tell(trial, report)
        except Exception:
            log.exception("could not tell what became of %s", trial.name)
