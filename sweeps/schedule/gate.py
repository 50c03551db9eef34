"""The Tune searcher that starts a trial only when no running trial is making a stage that it needs.

Tune asks `suggest` for the next trial whenever it has room. A trial whose missing stages are all unclaimed claims them
and starts; the others are held back, so that none ever sits on a CPU or GPU waiting for another's stage. A claim ends
when its stage is in the store, or with the trial that held it. The trials are those of a plan, or those that a search
suggests while it goes on.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ray.tune.search import Searcher

from semformer.keys import StageKey
from semformer.store import Store
from sweeps.plan.trials import Trial
from sweeps.schedule.queue import Queue, Seconds

log = logging.getLogger(__name__)
LOOKS = 10
"""Trials that are looked up in the store each time Tune asks; the others are held back until it asks again."""
LOOK_AGAIN = 2.0
"""Seconds after which a stage that another sweep was making is looked up again."""


@dataclass(frozen=True)
class Failure:
    """Why a trial failed: exception class `error` in `stage`. `final` where trying again must fail again."""

    stage: str
    error: str
    message: str
    traceback: str = ""
    final: bool = False

    def as_report(self) -> dict[str, Any]:
        return {"reason": self.reason, **asdict(self)}

    @property
    def reason(self) -> str:
        return f"{self.stage}: {self.error}: {self.message}" if self.stage else f"{self.error}: {self.message}"


class Gate(Searcher):
    """Starts `trials`, and those that `more` gives, in the order of `schedule.Queue`, each as payload(trial) for Tune.

    `more()` is asked for another trial when none that is known may start, until it returns None; at most `ahead` are
    held back for it. A trial that needs nothing made is not started, only told of.

    A stage that failed is tried `retries` times more, from its last epoch, unless the failure is final; after that
    every trial that needs it fails with the same reason. A process that died after it had got further than the one
    before it costs no try: on spot machines that is no fault of the stage.

    tell(trial, {"event": "found" | "pruned" | "retry" | "failed", ...}) hears what becomes of trials;
    `explain(trial_id)` says why a process died that could not report it. At most `max_concurrent` run at once.

    No method raises, because Tune would end the whole sweep: after `patience` seconds in which nothing runs and
    nothing can be started for an error (of the store, say), the remaining trials fail with it.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        store: Store,
        payload: Callable[[Trial], dict[str, Any]],
        tell: Callable[[Trial, Mapping[str, Any]], None],
        *,
        more: Callable[[], Trial | None] | None = None,
        ahead: int = 16,
        seconds: Seconds = lambda key: 1.0,
        explain: Callable[[str], str] = lambda trial_id: "the process died",
        max_concurrent: int | None = None,
        retries: int = 1,
        patience: float = 60.0,
    ):
        super().__init__()
        self.store, self.payload, self.tell, self.more, self.ahead = store, payload, tell, more, ahead
        self.explain, self.max_concurrent, self.retries, self.patience = explain, max_concurrent, retries, patience
        self.queue = Queue(trials, seconds)
        self.live: dict[str, Trial] = {}  # by Tune's trial id
        self.claims: dict[str, str] = {}  # stage digest -> Tune's id of the trial that makes it
        self.ready: set[str] = set()  # digests of stages known to be in the store
        self.attempts: Counter[str] = Counter()  # failures by stage digest
        self.broken: dict[str, Failure] = {}  # stages that will not be tried again
        self.elsewhere: dict[str, str] = {}  # stage digest -> who makes it in another sweep on this store
        self._looked = 0.0  # when `elsewhere` was emptied last
        self.stopped = False
        self._ended: set[str] = set()  # running trials that have said that they are finished
        self._reported: dict[str, Failure] = {}
        self._epochs: dict[str, int] = {}  # the furthest epoch of unfinished stages, by digest
        self._further: set[str] = set()  # stages that got further since their last failure
        self._looks = 0
        self._stuck_since: float | None = None

    # What Tune calls

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        try:
            suggestion = self._next(trial_id)
            self._stuck_since = None
            return suggestion
        except Exception as error:
            log.exception("no trial could be chosen; trying again")
            if not self.live:
                self._stuck_since = self._stuck_since or time.monotonic()
                if time.monotonic() - self._stuck_since > self.patience:
                    self._give_up(error)
            return None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Hears every report of `sweeps.cluster.trial`."""
        event = result.get("event")
        if event == "stage":
            self.ready.add(result["key"])
            self.claims.pop(result["key"], None)
        elif event == "epoch" and trial_id in self.live:
            digest = self.live[trial_id].keys[result["stage"]].digest
            if result["epoch"] > self._epochs.get(digest, 0):
                self._epochs[digest] = result["epoch"]
                self._further.add(digest)
        elif event == "finished":
            self._ended.add(trial_id)
        elif event == "failed":
            names = Failure.__dataclass_fields__
            self._reported[trial_id] = Failure(**{name: value for name, value in result.items() if name in names})

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self.live.pop(trial_id, None)
        if trial is None:
            return
        self.claims = {digest: owner for digest, owner in self.claims.items() if owner != trial_id}
        ended = trial_id in self._ended
        self._ended.discard(trial_id)
        if not error and not ended:  # by a scheduler of Tune
            self._tell(trial, {"event": "pruned"})
        if error:
            try:
                self._failed(trial, self._reported.pop(trial_id, None) or self._died(trial, trial_id))
            except Exception:
                log.exception("the failure of %s could not be handled", trial.rows)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its searcher, but a sweep goes on from the store, not from Tune's snapshot."""
        return {}

    # What the driver calls

    def stop(self) -> None:
        """Start no more trials."""
        self.stopped = True

    def waiting(self) -> dict[str, tuple[str, str]]:
        """What trials that are held back wait for, by trial key: (stage, the trial key or the process that makes it).

        ("", "") where only a free place is missing.
        """
        return {trial.key: self._waits_for(trial) for trial in self.queue}

    # How it decides

    def _next(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.max_concurrent and len(self.live) >= self.max_concurrent:
            return None
        if not self.live and self.claims:
            log.warning("dropping the claims of trials that are gone: %s", self.claims)
            self.claims.clear()
        self._looks = 0
        if time.monotonic() - self._looked > LOOK_AGAIN:
            self.elsewhere, self._looked = {}, time.monotonic()
        while not self.stopped:
            trial = self.queue.next(self.ready, self.claims, self._held)
            if trial is None:
                if self._ask():
                    continue
                break
            if missing := [key.digest for key in trial.keys.values() if key.digest not in self.ready]:
                payload = self.payload(trial)
                self.queue.remove(trial)
                self.claims.update(dict.fromkeys(missing, trial_id))
                self.live[trial_id] = trial
                return payload
            self.queue.remove(trial)
            self._tell(trial, {"event": "found"})
        idle = not self.live and (self.stopped or (not self.queue and not self.more))
        return Searcher.FINISHED if idle else None

    def _ask(self) -> bool:
        """Whether the search had another trial, which is in the queue now."""
        if not self.more or len(self.queue) >= self.ahead:
            return False
        if trial := self.more():
            self.queue.add(trial)
        else:
            self.more = None
        return trial is not None

    def _held(self, trial: Trial) -> bool:
        """Whether another sweep on this store makes a stage of it; should that one die, its lease expires."""
        if any(key.digest in self.elsewhere for key in trial.keys.values()):
            return True
        self._looks += 1
        if self._looks > LOOKS:
            return True
        missing = [key for key in trial.keys.values() if key.digest not in self.ready and not self._in_store(key)]
        for key in missing:
            if holder := self.store.holder(key):
                self.elsewhere[key.digest] = str(holder)
        return any(key.digest in self.elsewhere for key in missing)

    def _in_store(self, key: StageKey) -> bool:
        if self.store.find(key, verify=False) is None:
            return False
        self.ready.add(key.digest)
        return True

    def _waits_for(self, trial: Trial) -> tuple[str, str]:
        for name, key in trial.keys.items():
            if owner := self.live.get(self.claims.get(key.digest, "")):
                return name, owner.key
            if key.digest in self.elsewhere:
                return name, self.elsewhere[key.digest]
        return "", ""

    def _died(self, trial: Trial, trial_id: str) -> Failure:
        stage = next((name for name, key in trial.keys.items() if key.digest not in self.ready), "")
        return Failure(stage, "WorkerDied", self.explain(trial_id))

    def _failed(self, trial: Trial, failure: Failure) -> None:
        digest = (trial.keys.get(failure.stage) or trial.keys["evaluate"]).digest
        if failure.error == "WorkerDied" and digest in self._further:
            self.attempts[digest] = 0
        else:
            self.attempts[digest] += 1
        self._further.discard(digest)
        if not failure.final and self.attempts[digest] <= self.retries:
            self.queue.add(trial, first=True)
            self._tell(trial, {"event": "retry", **failure.as_report()})
            return
        self.broken[digest] = failure
        self._tell(trial, {"event": "failed", **failure.as_report()})
        shared = replace(failure, message=f"{failure.message} (in the trial of row {', '.join(trial.rows)})")
        for other in self.queue:
            if any(key.digest == digest for key in other.keys.values()):
                self.queue.remove(other)
                self._tell(other, {"event": "failed", **shared.as_report()})

    def _give_up(self, error: Exception) -> None:
        failure = Failure("", type(error).__name__, str(error))
        for trial in self.queue:
            self.queue.remove(trial)
            self._tell(trial, {"event": "failed", **failure.as_report()})

    def _tell(self, trial: Trial, report: Mapping[str, Any]) -> None:
        try:
            self.tell(trial, report)
        except Exception:
            log.exception("could not tell what became of %s", trial.rows)
