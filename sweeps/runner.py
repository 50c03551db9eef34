"""Runs trials on a Ray of this machine, and passes on what they report."""

import logging
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ray import tune

from semformer.store import Store
from sweeps.cluster import connect, trial_share
from sweeps.gate import Gate
from sweeps.plan import Trial
from sweeps.trial import payload, run_trial

log = logging.getLogger(__name__)


@contextmanager
def local_ray(cpus: int = 1, gpus: float | None = None) -> Iterator[dict[str, float]]:
    """A Ray of our own on this machine; yields a trial's share of it. Raises UserError as `trial_share`."""
    with connect(None):
        yield trial_share(cpus, gpus)


def run_trials(
    trials: Sequence[Trial],
    store: Store,
    tell: Callable[[Trial, Mapping[str, Any]], None],
    *,
    share: Mapping[str, float],
    max_concurrent: int | None = None,
) -> None:
    """Run `trials` to their ends inside `local_ray`, as many at once as fit by their `share` of it.

    tell(trial, report) hears, in this thread, every report of `sweeps.trial` and `sweeps.gate`. Raises
    KeyboardInterrupt on SIGINT or SIGTERM; a second signal acts as usual.
    """
    relay = _Relay(tell)
    relay.gate = Gate(
        trials,
        store,
        lambda trial: payload(trial, store=store.root, cpus=share["cpu"], gpus=share["gpu"]),
        tell,
        explain=relay.explain,
        max_concurrent=max_concurrent,
    )
    with (
        _interruptible(relay.interrupt),
        tempfile.TemporaryDirectory(prefix="semformer-sweep-", ignore_cleanup_errors=True) as folder,
    ):
        tune.Tuner(
            tune.with_resources(run_trial, dict(share)),
            tune_config=tune.TuneConfig(
                search_alg=relay.gate,
                num_samples=-1,
                reuse_actors=True,  # a new process would import torch again
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


class _Relay(tune.Callback):
    """Passes reports on, and ends the sweep at a safe point when it was interrupted. Never raises anything else."""

    gate: Gate

    def __init__(self, tell: Callable[[Trial, Mapping[str, Any]], None]):
        self.tell, self.interrupted = tell, False
        self.tune_trials: dict[str, Any] = {}

    def interrupt(self) -> None:
        """End the sweep at the end of Tune's current step."""
        self.interrupted = True
        self.gate.stop()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, as with `Gate`."""
        return {}

    def on_trial_start(self, iteration, trials, trial, **info) -> None:
        self.tune_trials[trial.trial_id] = trial

    def on_trial_result(self, iteration, trials, trial, result, **info) -> None:
        ours = self.gate.live.get(trial.trial_id)
        if ours is None or result.get("event") == "failed":  # the gate tells whether it is tried again
            return
        try:
            self.tell(ours, result)
        except Exception:
            log.exception("a report of a trial could not be handled")

    def on_step_end(self, iteration, trials, **info) -> None:
        if self.interrupted:
            raise KeyboardInterrupt

    def explain(self, trial_id: str) -> str:
        """Why the process of a trial died, in Ray's words."""
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
