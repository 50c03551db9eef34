"""The Tune searcher that starts a trial only when no running trial is making a stage that it needs.

Tune asks `suggest` for the next trial whenever it has room. A trial whose missing stages are all unclaimed claims them
and starts; the others are held back, so that none ever sits on a CPU or GPU waiting for another's stage. A claim ends
when its stage is in the store, or with the trial that held it.
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
from sweeps.plan import Trial

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """Why a trial failed: exception class `error` in `stage`. `final` where trying again must fail again."""

    stage: str
    error: str
    message: str
    traceback: str = ""
    final: bool = False

    @property
    def reason(self) -> str:
        return f"{self.stage}: {self.error}: {self.message}" if self.stage else f"{self.error}: {self.message}"


class Gate(Searcher):
    """Starts `trials` in their order as far as the gate allows, each as payload(trial), a Tune config.

    A stage that failed is tried `retries` times more, from its last epoch, unless the failure is final; after that
    every trial that needs it fails with the same reason. tell(trial, {"event": "retry" | "failed", ...}) hears of
    both; `explain(trial_id)` says why a process died that could not report it. At most `max_concurrent` at once.

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
        explain: Callable[[str], str] = lambda trial_id: "the process died",
        max_concurrent: int | None = None,
        retries: int = 1,
        patience: float = 60.0,
    ):
        super().__init__()
        self.store, self.payload, self.tell, self.explain = store, payload, tell, explain
        self.max_concurrent, self.retries, self.patience = max_concurrent, retries, patience
        self.queue = list(trials)
        self.live: dict[str, Trial] = {}  # by Tune's trial id
        self.claims: dict[str, str] = {}  # stage digest -> Tune's id of the trial that makes it
        self.ready: set[str] = set()  # digests of stages known to be in the store
        self.attempts: Counter[str] = Counter()  # failures by stage digest
        self.broken: dict[str, Failure] = {}  # stages that will not be tried again
        self.stopped = False
        self._reported: dict[str, Failure] = {}
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
        """Hears every report of `sweeps.trial`."""
        if result.get("event") == "stage":
            self.ready.add(result["key"])
            self.claims.pop(result["key"], None)
        elif result.get("event") == "failed":
            names = Failure.__dataclass_fields__
            self._reported[trial_id] = Failure(**{name: value for name, value in result.items() if name in names})

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self.live.pop(trial_id, None)
        if trial is None:
            return
        self.claims = {digest: owner for digest, owner in self.claims.items() if owner != trial_id}
        if error:
            try:
                self._failed(trial, self._reported.pop(trial_id, None) or self._died(trial, trial_id))
            except Exception:
                log.exception("the failure of %s could not be handled", trial.rows)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its searcher, but a sweep goes on from the store, not from Tune's snapshot."""
        return {}

    # How it decides

    def stop(self) -> None:
        """Start no more trials."""
        self.stopped = True

    def _next(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.stopped or not self.queue:
            return None if self.live else Searcher.FINISHED
        if self.max_concurrent and len(self.live) >= self.max_concurrent:
            return None
        if not self.live and self.claims:
            log.warning("dropping the claims of trials that are gone: %s", self.claims)
            self.claims.clear()
        for index, trial in enumerate(self.queue):
            missing = [key for key in trial.keys.values() if key.digest not in self.ready]
            if any(key.digest in self.claims for key in missing):
                continue
            missing = [key for key in missing if not self._in_store(key)]
            if any(self.store.holder(key) for key in missing):
                continue  # another sweep on this store makes it; should that one die, its lease expires
            payload = self.payload(trial)
            self.claims.update({key.digest: trial_id for key in missing})
            self.live[trial_id] = self.queue.pop(index)
            return payload
        return None

    def _in_store(self, key: StageKey) -> bool:
        if self.store.find(key, verify=False) is None:
            return False
        self.ready.add(key.digest)
        return True

    def _died(self, trial: Trial, trial_id: str) -> Failure:
        stage = next((name for name, key in trial.keys.items() if key.digest not in self.ready), "")
        return Failure(stage, "WorkerDied", self.explain(trial_id))

    def _failed(self, trial: Trial, failure: Failure) -> None:
        digest = (trial.keys.get(failure.stage) or trial.keys["evaluate"]).digest
        self.attempts[digest] += 1
        if not failure.final and self.attempts[digest] <= self.retries:
            self.queue.insert(0, trial)
            self._tell(trial, "retry", failure)
            return
        self.broken[digest] = failure
        self._tell(trial, "failed", failure)
        dependents = [other for other in self.queue if any(key.digest == digest for key in other.keys.values())]
        self.queue = [other for other in self.queue if other not in dependents]
        shared = replace(failure, message=f"{failure.message} (in the trial of row {', '.join(trial.rows)})")
        for other in dependents:
            self._tell(other, "failed", shared)

    def _give_up(self, error: Exception) -> None:
        remaining, self.queue = self.queue, []
        for trial in remaining:
            self._tell(trial, "failed", Failure("", type(error).__name__, str(error)))

    def _tell(self, trial: Trial, event: str, failure: Failure) -> None:
        try:
            self.tell(trial, {"event": event, "reason": failure.reason, **asdict(failure)})
        except Exception:
            log.exception("could not tell of the failure of %s", trial.rows)
