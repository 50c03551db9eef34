"""Runs trials on the connected Ray, and passes on what they report."""

import contextlib
import logging
import math
import os
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from semformer.store import Store
from sweeps.cluster.board import Board
from sweeps.cluster.nodes import Share
from sweeps.cluster.preflight import Watch
from sweeps.cluster.trial import payload, run_trial
from sweeps.cluster.versions import versions
from sweeps.plan.trials import Trial
from sweeps.reports import Raised, Report
from sweeps.schedule.faults import Faults
from sweeps.schedule.gate import Gate, Tell
from sweeps.schedule.queue import Seconds

log = logging.getLogger(__name__)
Trainable = Callable[[dict[str, Any]], None]
NODE_ID = "ray.io/node-id"
"""The label that Ray gives every node."""
LONGEST_LOOK = 5.0
"""Seconds by which a trial's silence grows from one look to the next at most: not by those in which nobody listened."""
STARTING = 0.5
"""Seconds after which starting trials is interrupted to hear those that run."""


def run_trials(
    trials: Sequence[Trial],
    store: Store,
    tell: Tell,
    *,
    share: Share,
    watch: Watch | None = None,
    unfit: Callable[[str], None] = lambda why: None,
    more: Callable[[], Trial | None] | None = None,
    seconds: Seconds = lambda key: 1.0,
    published: Collection[str] = (),
    max_concurrent: int | None = None,
    silence: float = 600.0,
    patience: float = 600.0,
    every_second: Callable[[Gate], bool] = lambda gate: False,
    scheduler: TrialScheduler | None = None,
    trainable: Trainable = run_trial,
) -> None:
    """Run `trials`, and those that `more` gives, to their ends, as many at once as fit by their `share` of a node.

    `watch` knows the nodes (without it, this Ray is a single machine); `seconds` and `published` are the gate's,
    `patience` and `unfit` are those of `schedule.faults`. tell(trial, report) hears, in this thread, every report
    of trials and of the gate. A trial that says nothing for `silence` seconds is killed and counts as died.
    `every_second(gate)` is called about so often; true ends the sweep. With a Tune `scheduler`, trials measure
    their maps after each segmentation epoch. Raises KeyboardInterrupt where the sweep is ended, and on SIGINT or
    SIGTERM; a second signal acts as usual.
    """
    watch = watch or Watch(share, ask=False)
    board = Board(f"semformer-{secrets.token_hex(4)}")
    faults = Faults(watch.places, patience=patience, unfit=unfit)
    gate = Gate(
        trials,
        store.patient(0.0),
        tell,
        faults,
        more=more,
        ahead=lambda: 2 * max(1, watch.room(), min(watch.potential, max_concurrent or watch.potential)),
        room=lambda: _room(watch, max_concurrent),
        seconds=seconds,
        published=published,
    )
    watch.listen(lambda report: faults.node_is_unfit(report.node.id, str(report)))

    def config_of(trial: Trial) -> dict[str, Any]:
        here = versions() if watch.ask else {}  # on one machine, there is nothing to compare
        probe = scheduler is not None
        config = payload(trial, store=store, share=share, board=board.name, versions=here, probe=probe)
        return config | {"avoid": sorted(gate.avoided_by(trial))}

    relay = _Relay(gate, board, watch, tell, every_second, silence)
    choice = _Choice(gate, config_of, relay.look)
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = "100000"  # the gate knows how many there is room for
    with (
        contextlib.closing(board),
        _interruptible(relay.interrupt),
        tempfile.TemporaryDirectory(prefix="semformer-sweep-", ignore_cleanup_errors=True) as folder,
    ):
        tuner = tune.Tuner(
            tune.with_resources(trainable, lambda config: _resources(share, config["avoid"])),
            tune_config=tune.TuneConfig(
                search_alg=choice,
                scheduler=scheduler,
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
        )
        try:
            tuner.fit()
        except KeyboardInterrupt:
            if not relay.over:
                raise


def _room(watch: Watch, max_concurrent: int | None) -> int:
    """How many trials may run, or be asked for: a growing cluster grows by one place, or to `max_concurrent`."""
    room = watch.room()
    if watch.potential:
        room = max(room, min(max_concurrent or room + 1, room + watch.potential))
    return min(room, max_concurrent or room)


def _resources(share: Share, avoid: Sequence[str]) -> tune.PlacementGroupFactory:
    bundle = {kind.upper(): part for kind, part in share.items()}
    if not avoid:
        return tune.PlacementGroupFactory([bundle])
    return tune.PlacementGroupFactory([bundle], bundle_label_selector=[{NODE_ID: f"!in({','.join(avoid)})"}])


class _Choice(Searcher):
    """The gate as Tune asks it. Never raises, because Tune would end the whole sweep."""

    def __init__(self, gate: Gate, config_of: Callable[[Trial], dict[str, Any]], look: Callable[[], None]):
        super().__init__()
        self.gate, self.config_of, self.look = gate, config_of, look
        self._until = math.inf

    def suggest(self, trial_id: str) -> Any:
        """Tune asks in each of its steps until it gets None; while nothing runs, every second in one long step."""
        self.look()
        self._until = min(self._until, time.monotonic() + STARTING)
        if time.monotonic() < self._until and (trial := self.gate.next(trial_id)):
            return self.config_of(trial)
        self._until = math.inf
        return Searcher.FINISHED if self.gate.finished else None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The relay hears it."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its searcher, but a sweep goes on from the store, not from Tune's snapshot."""
        return {}


class _Relay(tune.Callback):
    """Passes reports on, kills what is silent, and ends the sweep at a safe point. Never raises anything else."""

    def __init__(
        self,
        gate: Gate,
        board: Board,
        watch: Watch,
        tell: Tell,
        every_second: Callable[[Gate], bool],
        silence: float,
    ):
        self.gate, self.board, self.watch, self.tell = gate, board, watch, tell
        self.every_second, self.silence = every_second, silence
        self.interrupted = self.over = False
        self._silent: dict[str, float] = {}  # how long running trials have said nothing, in seconds of listening
        self._actors: dict[str, Any] = {}
        self._killed: set[str] = set()
        self._looked = time.monotonic()

    def interrupt(self) -> None:
        """End the sweep at the end of Tune's current step."""
        self.interrupted = True
        self.gate.stop()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, as with `_Choice`."""
        return {}

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._actors[trial.trial_id] = trial.temporary_state.ray_actor
        self._silent[trial.trial_id] = 0.0

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if report := result.get("report"):
            self._hear(trial.trial_id, report)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Also of a trial that the scheduler stopped."""
        self._end(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._end(trial.trial_id, lambda: self._explain(trial))

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        self.look()
        self.over = self.gate.finished and not all(trial.is_finished() for trial in trials)  # they found no node
        if self.interrupted or self.over:
            raise KeyboardInterrupt

    def look(self) -> None:
        """About once a second, what is to be done then."""
        now = time.monotonic()
        if self.interrupted or now - self._looked < 1.0:
            return
        elapsed, self._looked = min(now - self._looked, LONGEST_LOOK), now
        try:
            self._look(elapsed)
        except Exception:
            log.exception("the state of the sweep could not be kept")

    # Helpers

    def _look(self, elapsed: float) -> None:
        self.watch.look()
        self.board.look(self._hear)
        for trial_id in self._silent:
            self._silent[trial_id] += elapsed
        for trial_id in [name for name, silent in self._silent.items() if silent > self.silence]:
            del self._silent[trial_id]
            self._killed.add(trial_id)
            if actor := self._actors.get(trial_id):
                ray.kill(actor)
        if self.every_second(self.gate):
            self.interrupt()

    def _hear(self, trial_id: str, report: Report) -> None:
        if trial_id in self._silent:
            self._silent[trial_id] = 0.0
        live = self.gate.live.get(trial_id)
        if live is None:
            return
        self.gate.hear(trial_id, report)
        if isinstance(report, Raised):  # the gate tells whether it is tried again
            return
        try:
            self.tell(live.trial, report)
        except Exception:
            log.exception("a report of %s could not be handled", live.trial.name)

    def _end(self, trial_id: str, died: Callable[[], str] | None = None) -> None:
        self._silent.pop(trial_id, None)
        self._actors.pop(trial_id, None)
        try:
            self.gate.ended(trial_id, died)
        except Exception:
            log.exception("the end of a trial could not be handled")

    def _explain(self, trial: Any) -> str:
        """Why the process of a trial died, in Ray's words."""
        if trial.trial_id in self._killed:
            return f"it said nothing for {self.silence:g} s (--silence), and was killed"
        try:
            lines = str(trial.get_pickled_error()).splitlines()
            told = [line.strip() for line in lines if "died" in line or "kill" in line.lower() or "memory" in line]
            return " ".join(dict.fromkeys(told)) or lines[-1]
        except Exception:
            return "the process died"


@contextlib.contextmanager
def _interruptible(interrupt: Callable[[], None]) -> Iterator[None]:
    """Calls `interrupt` on the first SIGINT or SIGTERM; a second one acts as usual.

    Signals reach only a program's main thread; elsewhere nothing is changed.
    """
    before: dict[signal.Signals, Any] = {}

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
