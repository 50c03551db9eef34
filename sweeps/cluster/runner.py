"""Runs trials on the connected Ray, and passes on what they report."""

import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray import tune

from semformer.store import Store
from sweeps.cluster.trial import payload, run_trial
from sweeps.plan.trials import Trial
from sweeps.schedule.gate import Gate
from sweeps.schedule.queue import Seconds

log = logging.getLogger(__name__)


def run_trials(
    trials: Sequence[Trial],
    store: Store,
    tell: Callable[[Trial, Mapping[str, Any]], None],
    *,
    share: Mapping[str, float],
    more: Callable[[], Trial | None] | None = None,
    ahead: int = 16,
    seconds: Seconds = lambda key: 1.0,
    max_concurrent: int | None = None,
    silence: float = 600.0,
    every_second: Callable[[Gate], bool] = lambda gate: False,
    asha: tune.schedulers.AsyncHyperBandScheduler | None = None,
    trainable: Callable[[dict[str, Any]], None] = run_trial,
) -> None:
    """Run `trials`, and those that `more` gives, to their ends, as many at once as fit by their `share` of Ray.

    `ahead`, `seconds` and `max_concurrent` are the gate's. tell(trial, report) hears, in this thread, every report of
    trials and of the gate. A trial that says nothing for `silence` seconds is killed and counts as died.
    `every_second(gate)` is called about so often; true ends the sweep. Raises KeyboardInterrupt then, and on SIGINT or
    SIGTERM; a second signal acts as usual.
    """
    relay = _Relay(tell, every_second, silence)
    relay.gate = Gate(
        trials,
        store,
        lambda trial: payload(trial, store=store, share=share, probe=asha is not None),
        tell,
        more=more,
        ahead=ahead,
        seconds=seconds,
        explain=relay.explain,
        max_concurrent=max_concurrent,
    )
    # Tune asks for one trial ahead; an autoscaling cluster grows by what is asked for.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(max_concurrent or 1)
    with (
        _interruptible(relay.interrupt),
        tempfile.TemporaryDirectory(prefix="semformer-sweep-", ignore_cleanup_errors=True) as folder,
    ):
        tune.Tuner(
            tune.with_resources(trainable, dict(share)),
            tune_config=tune.TuneConfig(
                search_alg=relay.gate,
                scheduler=asha,
                num_samples=-1,
                reuse_actors=False,  # a process for each trial, so that all its memory is given back
                trial_name_creator=lambda trial: trial.trial_id,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=folder,
                callbacks=[relay],
                failure_config=tune.FailureConfig(max_failures=0),  # the gate retries
                verbose=0,
            ),
        ).fit()


def asha(epochs: int) -> tune.schedulers.ASHAScheduler:
    """Stops the worse trials of a search early, by the maps that they give after each of `epochs` segmentation epochs.

    A trial that found its segmentation network in the store reports no epochs, and is never stopped.
    """
    return tune.schedulers.ASHAScheduler(
        time_attr="segmentation_epoch", metric="probe_miou", mode="max", max_t=epochs, stop_last_trials=False
    )


class _Relay(tune.Callback):
    """Passes reports on, kills what is silent, and ends the sweep at a safe point. Never raises anything else."""

    gate: Gate

    def __init__(
        self,
        tell: Callable[[Trial, Mapping[str, Any]], None],
        every_second: Callable[[Gate], bool],
        silence: float,
    ):
        self.tell, self.every_second, self.silence, self.interrupted = tell, every_second, silence, False
        self.tune_trials: dict[str, Any] = {}
        self.spoke: dict[str, float] = {}  # when each running trial was heard last, by Tune's id
        self.killed: set[str] = set()
        self.looked = 0.0

    def interrupt(self) -> None:
        """End the sweep at the end of Tune's current step."""
        self.interrupted = True
        self.gate.stop()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, as with `Gate`."""
        return {}

    def on_trial_start(self, iteration, trials, trial, **info) -> None:
        self.tune_trials[trial.trial_id] = trial
        self.spoke[trial.trial_id] = time.monotonic()

    def on_trial_result(self, iteration, trials, trial, result, **info) -> None:
        self.spoke[trial.trial_id] = time.monotonic()
        ours = self.gate.live.get(trial.trial_id)
        if ours is None or result.get("event") == "failed":  # the gate tells whether it is tried again
            return
        try:
            self.tell(ours, result)
        except Exception:
            log.exception("a report of a trial could not be handled")

    def on_trial_complete(self, iteration, trials, trial, **info) -> None:
        """Also of a trial that the scheduler stopped."""
        self.spoke.pop(trial.trial_id, None)

    def on_trial_error(self, iteration, trials, trial, **info) -> None:
        self.spoke.pop(trial.trial_id, None)

    def on_step_end(self, iteration, trials, **info) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        now = time.monotonic()
        if now - self.looked < 1.0:
            return
        self.looked = now
        for trial_id in [name for name, spoke in self.spoke.items() if now - spoke > self.silence]:
            del self.spoke[trial_id]
            self.killed.add(trial_id)
            if actor := self.tune_trials[trial_id].temporary_state.ray_actor:
                ray.kill(actor)
        try:
            if self.every_second(self.gate):
                self.interrupt()
        except Exception:
            log.exception("the state of the sweep could not be kept")

    def explain(self, trial_id: str) -> str:
        """Why the process of a trial died, in Ray's words."""
        if trial_id in self.killed:
            return f"it said nothing for {self.silence:g} s (--silence), and was killed"
        try:
            lines = str(self.tune_trials[trial_id].get_pickled_error()).splitlines()
            told = [line.strip() for line in lines if "died" in line or "kill" in line.lower() or "memory" in line]
            return " ".join(dict.fromkeys(told)) or lines[-1]
        except Exception:
            return "the process died"


@contextmanager
def _interruptible(interrupt: Callable[[], None]) -> Iterator[None]:
    """Calls `interrupt` on the first SIGINT or SIGTERM; a second one acts as usual.

    Signals reach only a program's main thread; elsewhere nothing is changed.
    """
    before = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        restore()
        interrupt()

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        restore()
