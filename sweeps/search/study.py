"""An Optuna study in a database, which any number of drivers with one store share, and which optuna-dashboard opens.

A driver holds a lease in the store as long as it lives. So one that was killed is recognised, and its unfinished
trials are closed and put back into the queue.
"""

import logging
import secrets
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState

from semformer.errors import UserError, first_line
from semformer.keys import StageKey, differences
from semformer.secrets import without_password
from semformer.store import Store
from semformer.store.leases import Lease, LeaseHeld, LeaseHolder
from sweeps.search.algorithms import Named, make_sampler

log = logging.getLogger(__name__)
SPEC = "semformer"
"""The study's attribute that says what is searched; a trial's are named in `search.Search`."""
HELD = "held_seconds:"
"""What the study's attributes begin with that say how long each driver's trials have held their places."""
HELD_EVERY = 30.0
"""Seconds after which that is written again."""
OPENING = 120.0
"""Seconds for which other drivers may have the study to themselves when a search starts."""
TRIED = 12
"""Suggestions that are drawn from a sampler of the user's to see whether it can: most begin with ten random ones."""


class SharedStudy:
    """At most `most` suggestions of all drivers, from `axes` (distributions by name); the first is `start`.

    `objectives` are directions by name; `spec` is what makes two searches the same one. `study` is Optuna's own.
    Raises UserError for a database that cannot be used, a sampler that cannot search this, and a study that was begun
    with another `spec`; LeaseHeld while other drivers have it to themselves.
    """

    def __init__(
        self,
        name: str,
        storage: str,
        store: Store,
        *,
        axes: Mapping[str, BaseDistribution],
        start: Mapping[str, Any],
        objectives: Mapping[str, Literal["maximize", "minimize"]],
        spec: Mapping[str, Any],
        most: int,
        sampler: Named | None,
        sampler_seed: int,
        pruner: BasePruner | None,
    ):
        self.name, self.store, self.axes, self.most = name, store, dict(axes), most
        self.driver = secrets.token_hex(8)
        self._directions, self._sampler = list(objectives.values()), sampler
        self._exhausted = False  # the sampler has suggested all there is
        self._held_written = -HELD_EVERY
        self._lease = store.lease(self._driver_key(self.driver))
        try:
            with self._alone(OPENING):
                with _storage_errors(storage):
                    self.study = self._open(storage, sampler_seed, start, list(objectives), spec)
                    if pruner:
                        self.study.pruner = pruner
                self._close_orphans()
        except BaseException:
            self._lease.release()
            raise

    def trials(self) -> list[FrozenTrial]:
        """As they are in the database; not to be changed."""
        return self.study.get_trials(deepcopy=False)

    def ask(self) -> optuna.Trial | None:
        """The next suggestion; None when all were asked. Raises what the database raises, and LeaseHeld while another
        driver asks."""
        with self._alone():  # so that no driver asks too many, and each sees what the others are at
            if self._exhausted or self._count() >= self.most:
                return None
            with quiet():
                asked = self.study.ask(self.axes)
            asked.set_user_attr("driver", self.driver)
        return asked

    def tell(
        self, asked: optuna.Trial, state: TrialState, values: Sequence[float] | None, attributes: Mapping[str, Any]
    ) -> None:
        """What came of a suggestion; telling it twice does no harm. Raises what the database raises."""
        with quiet(), closed_by_others(asked), self._noting_exhaustion():
            for name, value in attributes.items():
                asked.set_user_attr(name, value)
            self.study.tell(asked, values, state, skip_if_finished=True)

    def requeue(self, number: int, params: Mapping[str, Any]) -> None:
        """Close a trial that was not finished, and put what it was to try back into the queue."""
        with quiet():
            if not any(trial.user_attrs.get("retry_of") == number for trial in self.trials()):
                self.study.enqueue_trial(dict(params), user_attrs={"retry_of": number})
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def spent(self, held: float) -> float:
        """Seconds for which the trials of all drivers have held their places, whatever came of them.

        `held` is this driver's share, which is kept in the study from time to time. May raise what the database does.
        """
        now = time.monotonic()
        if now - self._held_written > HELD_EVERY:
            self.write_held(held)
            self._held_written = now
        others = (value for name, value in self.study.user_attrs.items() if name.startswith(HELD))
        return sum(others) - self.study.user_attrs.get(HELD + self.driver, 0.0) + held

    def write_held(self, held: float) -> None:
        self.study.set_user_attr(HELD + self.driver, held)

    def close(self) -> None:
        self._lease.release()

    # Helpers

    def _count(self) -> int:
        """Trials that were asked, but for those that had to be put back into the queue."""
        trials = self.trials()
        again = {trial.user_attrs.get("retry_of") for trial in trials}
        return sum(trial.state != TrialState.WAITING and trial.number not in again for trial in trials)

    def _open(
        self, url: str, seed: int, start: Mapping[str, Any], metrics: list[str], spec: Mapping[str, Any]
    ) -> optuna.Study:
        database = _open_database(url)
        known = self.name in optuna.study.get_all_study_names(database)
        study = optuna.create_study(
            storage=database, study_name=self.name, directions=self._directions, load_if_exists=True
        )
        if known:
            _check_same(self.name, study.user_attrs.get(SPEC), spec)
        else:
            study.set_metric_names(metrics)
            study.enqueue_trial(dict(start))
            study.set_user_attr(SPEC, spec)
        drivers = study.user_attrs.get("drivers", 0)
        study.set_user_attr("drivers", drivers + 1)
        # Every driver draws from a stream of its own, else it would repeat the suggestions of the one before
        own_seed = int(np.random.SeedSequence([seed, drivers]).generate_state(1)[0])
        study.sampler = self._make_sampler(own_seed)
        if self._sampler:
            self._try_sampler(self._sampler.name, own_seed)
        return study

    def _make_sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        return make_sampler(self._sampler, objectives=len(self._directions), trials=self.most, seed=seed)

    def _try_sampler(self, name: str, seed: int) -> None:
        """Raises UserError for one that cannot search these axes and objectives, before anything depends on it."""
        study = optuna.create_study(directions=self._directions, sampler=self._make_sampler(seed))
        try:
            for value in range(TRIED):
                with self._noting_exhaustion():
                    asked = study.ask(self.axes)
                    study.tell(asked, [float(value)] * len(self._directions))
        except Exception as error:  # each sampler has its own
            raise UserError(f"--sampler {name} cannot search this: {first_line(error)}") from error
        finally:
            self._exhausted = False

    @contextmanager
    def _noting_exhaustion(self) -> Iterator[None]:
        """A sampler that has suggested everything (brute_force) calls `stop`, which is for Optuna's own loop."""
        try:
            yield
        except RuntimeError as error:
            if "Study.stop" not in str(error):
                raise
            self._exhausted = True

    def _close_orphans(self) -> None:
        for trial in self.trials():
            if trial.state != TrialState.RUNNING:
                continue
            driver = trial.user_attrs.get("driver")
            if driver is None or self.store.holder(self._driver_key(driver)) is None:
                log.info("trial %d of %s belonged to a driver that is gone: once more", trial.number, self.name)
                self.requeue(trial.number, trial.params)

    def _driver_key(self, driver: str) -> StageKey:
        return StageKey("search", {"study": self.name, "driver": driver})

    def _alone(self, seconds: float = 1.0) -> Lease:
        """Makes this driver the only one of the study's, for a moment. Raises LeaseHeld after so many seconds."""
        key, until = StageKey("search", {"study": self.name}), time.monotonic() + seconds

        def wait(holder: LeaseHolder) -> None:
            if time.monotonic() > until:
                raise LeaseHeld(key, holder)

        return self.store.lease(key, wait=wait)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's remarks on what is experimental and what was reported twice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def closed_by_others(asked: optuna.Trial) -> Iterator[None]:
    """Another driver may have closed a trial, when this one was taken for dead (its machine slept, say)."""
    try:
        yield
    except optuna.exceptions.UpdateFinishedTrialError:
        log.warning("trial %d was closed by another driver, which runs it once more", asked.number)


def cause(error: Exception) -> str:
    """The first line of what was at the bottom of an error: Optuna speaks of commits where a server does not answer."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return first_line(error)


def _open_database(url: str) -> optuna.storages.RDBStorage:
    """SQLAlchemy's; the folder of an sqlite file is made."""
    local = url.startswith("sqlite:///")
    if local:
        Path(url.removeprefix("sqlite:///").partition("?")[0]).absolute().parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"connect_args": {"timeout": 60}} if local else {"pool_pre_ping": True}
    if url.startswith("postgresql"):
        options["connect_args"] = {"connect_timeout": 10}
    return optuna.storages.RDBStorage(url, engine_kwargs=options)


def _check_same(name: str, old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> None:
    if old is None:
        raise UserError(f"--study {name}: this study is none of this program's: give another name")
    parts = (differences("search", {part: old[part]}, {part: new[part]}, lambda digest: None) for part in new)
    if told := ", ".join(filter(None, parts)):
        raise UserError(
            f"--study {name}: it was begun with something else ({told}): search with the same options, or give "
            "another name"
        )


@contextmanager
def _storage_errors(url: str) -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with quiet():
            yield
    except UserError:
        raise
    except Exception as error:  # whatever SQLAlchemy and the database's driver raise
        told = f"--storage {url}: no study can be kept there: {type(error).__name__}: {cause(error)}"
        raise UserError(without_password(told, url)) from error
