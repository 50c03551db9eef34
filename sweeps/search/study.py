"""Optuna over the axes: suggestions become trials, their scores go back into the study.

The study is a plain Optuna study in a database, which any number of drivers with one store may share, and which
optuna-dashboard opens. What the store has already is told to the study at once, without a run. A database that is away
delays nothing but suggestions: results are kept, and told when it is back.

A driver holds a lease in the store as long as it lives. So one that was killed is recognised, and its unfinished
trials are closed and put back into the queue.
"""

import argparse
import itertools
import json
import logging
import re
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from semformer import pipeline
from semformer.config import Config, flatten, load_config
from semformer.errors import UserError
from semformer.keys import StageKey, differences
from semformer.leases import Lease, LeaseHeld, LeaseHolder
from semformer.secrets import without_password
from semformer.store import Artifact, Store
from sweeps.plan.table import Table
from sweeps.plan.trials import Cell, Count, Trial
from sweeps.plan.weights import Weights
from sweeps.search.algorithms import Named, Pruning, make_sampler
from sweeps.search.space import PROBED, own_value, read_axes, read_objectives

log = logging.getLogger(__name__)
NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]*"
"""Of a study, which is a table's name in turn."""
SPEC = "semformer"
"""The study's attribute that says what is searched; a trial's are named in `Search`."""
HELD = "held_seconds:"
"""What the study's attributes begin with that say how long each driver's trials have held their places."""
HELD_EVERY = 30.0
"""Seconds after which that is written again."""
OPENING = 120.0
"""Seconds for which other drivers may have the study to themselves when a search starts."""
TRIED = 12
"""Suggestions that are drawn from a sampler of the user's to see whether it can: most begin with ten random ones."""
TRAINING = {stage.name for stage in pipeline.STAGES if stage.split == "train_split"}


@dataclass(frozen=True)
class _Result:
    """What a trial came to, to be told to the study."""

    trial: Trial
    metrics: Mapping[str, float] | None
    reason: str
    state: TrialState


class Search:
    """`trials` suggestions in all, those of earlier runs of the study included; the first is the preset's own config.

    For those who run it, it is a sweep like a plan (`sweeps.plan.trials.Sweep`), whose trials become known as it goes.
    A trial of the study has the attributes trial_key and stage_keys, missing (the stages that the store did not have
    when it was asked), stage_seconds, metrics, reason, driver and retry_of (the trial of a killed driver
    that it repeats), as far as they are known.

    `folder` is that of `data` where it is a devkit of the user's; `sampler` and `pruning` are from `algorithms`.
    `found` hears of trials that were told from the store, without a run. Raises UserError for axes, objectives and
    algorithms that make no sense together, a database that cannot be used, and a study that was begun with something
    else.
    """

    tables: tuple[Table, ...] = ()
    trials: tuple[Trial, ...] = ()
    cached: frozenset[str] = frozenset()

    def __init__(
        self,
        study_name: str,
        preset: str,
        overrides: Mapping[str, Any],
        data: pipeline.Data,
        store: Store,
        *,
        axes: Sequence[str],
        objectives: Sequence[str],
        most: int,
        storage: str,
        sampler: Named | None = None,
        sampler_seed: int = 0,
        pruning: Pruning | None = None,
        folder: Path | None = None,
        weights: Weights | None = None,
        found: Callable[[Trial], None] = lambda trial: None,
    ):
        if not re.fullmatch(NAME, study_name):
            raise UserError(f"--study {study_name!r}: a name is letters, digits and any of . _ + - after the first")
        if most < 1:
            raise UserError(f"--trials {most}: a search needs at least one")
        self.own, self.axes = read_axes(axes, preset, overrides)
        self.objectives = read_objectives(objectives, self.own)
        fixed = {name: value for axis in self.axes.values() for name, value in axis.fixed.items()}
        self.name, self.preset, self.overrides = study_name, preset, {**overrides, **fixed}
        self.title = f"search for {' and '.join(self.objectives)} over {', '.join(self.axes)}"
        self.seeds = (self.own.seed,)
        self.data, self.folder, self.store, self.most, self.found = data, folder, store, most, found
        self.pruning, self.sampler, self.weights = pruning, sampler, weights or Weights()
        self.weights.check_used(self._at_ends())
        if pruning:
            self._check_probed()
            self.scheduler()
        self.driver = secrets.token_hex(8)
        self._live: dict[str, list[optuna.Trial]] = {}  # by trial key: asked and not told yet
        self._exhausted = False  # the sampler has suggested all there is
        self._unplaced: optuna.Trial | None = None  # asked, and an error came between
        self._untold: list[_Result] = []
        self._held_written = -HELD_EVERY
        self.start_key = self.trial_of(self.own).key
        self._lease = store.lease(self._driver_key(self.driver))
        try:
            with self._alone(OPENING):
                with _storage_errors(storage):
                    self.study = self._open(storage, sampler_seed)
                self._close_orphans()
        except BaseException:
            self._lease.release()
            raise

    # What the gate calls

    def ask(self) -> Trial | None:
        """The next suggestion that has to be run; None when all were asked.

        A config that makes no sense fails at once. One that is being run waits for that run's result. May raise what
        the store and the database raise, and LeaseHeld while another driver asks; the next call goes on with the same
        suggestion.
        """
        self.flush()
        while (asked := self._unplaced or self._ask()) is not None:
            self._unplaced, trial = asked, None
            with _closed_by_others(asked):
                trial = self._place(asked)
            self._unplaced = None
            if trial:
                return trial
        return None

    # What the driver calls

    def tell(
        self,
        trial: Trial,
        metrics: Mapping[str, float] | None,
        reason: str = "",
        pruned: bool = False,
    ) -> None:
        """The final metrics of stage evaluate, or None and the reason why there are none. Never raises: what cannot be
        told now is told by `flush`."""
        state = TrialState.PRUNED if pruned else TrialState.FAIL if metrics is None else TrialState.COMPLETE
        self._untold.append(_Result(trial, metrics, reason, state))
        try:
            self.flush()
        except Exception as error:
            if len(self._untold) == 1:
                log.warning("the study cannot be told of %s now, which is done later: %s", trial.name, _first(error))

    def flush(self) -> None:
        """Tell the study what it could not be told before. Raises what the store and the database raise."""
        while self._untold:
            result = self._untold[0]
            artifacts = self._artifacts(result.trial)
            for asked in self._live.get(result.trial.key, ()):
                self._tell(asked, artifacts, result.metrics, result.reason, result.state)
            self._live.pop(result.trial.key, None)  # not before: what was told twice does no harm
            self._untold.pop(0)

    @property
    def untold(self) -> int:
        """Results that the study does not know yet."""
        return len(self._untold)

    def report(self, trial: Trial, epoch: int, scores: Mapping[str, float]) -> None:
        """The scores of the maps after a segmentation epoch, of which the objective's is kept."""
        (objective, *others) = self.objectives
        if objective in scores and not others:
            self._report(trial.key, scores[objective], epoch)

    def should_stop(self, trial_key: str, score: float, epoch: int) -> bool:
        """What the study's pruner says of a trial whose objective is `score` after a segmentation epoch; not while
        the database is away."""
        try:
            self._report(trial_key, score, epoch)
            with _quiet():
                return any(asked.should_prune() for asked in self._live.get(trial_key, ()))
        except Exception as error:
            log.warning("the pruner cannot be asked now: %s", _first(error))
            return False

    def scheduler(self) -> Any:
        """Of Tune, that stops poor trials; None where none was asked for."""
        if not self.pruning:
            return None
        ((objective, direction),) = self.objectives.items()
        mode = "max" if direction == "maximize" else "min"
        return self.pruning.scheduler(objective, mode, self.own.segmentor.epochs, self.should_stop)

    def spent(self, held: float) -> float:
        """Seconds for which the trials of all drivers have held their places, whatever came of them.

        `held` is this driver's share, which is kept in the study from time to time. May raise what the database does.
        """
        now = time.monotonic()
        if now - self._held_written > HELD_EVERY:
            self._write_held(held)
            self._held_written = now
        others = (value for name, value in self.study.user_attrs.items() if name.startswith(HELD))
        return sum(others) - self.study.user_attrs.get(HELD + self.driver, 0.0) + held

    def close(self, held: float | None = None) -> None:
        """Tell what is untold, and put what is still running back into the queue, for when the study goes on."""
        try:
            self.flush()
            if held is not None:
                self._write_held(held)
            for asked in (*itertools.chain(*self._live.values()), *filter(None, [self._unplaced])):
                self._requeue(asked.number, asked.params)
            self._live.clear()
        finally:
            self._lease.release()

    # As a sweep

    @property
    def documents(self) -> dict[str, str]:
        """File name -> text of what the search was started from."""
        return {"search.json": json.dumps(self._spec(), indent=1)}

    @property
    def stages(self) -> dict[str, Count]:
        return {}

    def summary(self) -> dict[str, Any]:
        return {"study": self.name, "trials": self.most}

    def as_json(self) -> dict[str, Any]:
        return {**self.summary(), "preset": self.preset, "overrides": dict(self.overrides), **self._spec()}

    def name_of(self, trial: Trial) -> str:
        return trial.name.removeprefix(f"{self.name}/")

    @cached_property
    def samples(self) -> tuple[Trial, ...]:
        """Of what may be run: the config that the search starts from, and that with each axis at each of its ends."""
        return tuple({trial.key: trial for trial in map(self.trial_of, self._at_ends())}.values())

    # What people want to know

    def saving(self) -> dict[str, float]:
        """Of all finished stages: seconds spent in this search, seconds had every trial made all of its own, and how
        many trials needed no training of a network. Unfinished stages of stopped trials are not counted."""
        trials = [trial for trial in self._all() if "stage_keys" in trial.user_attrs]
        seconds: dict[str, float] = {}
        for trial in trials:
            measured = trial.user_attrs.get("stage_seconds", {})
            seconds |= {trial.user_attrs["stage_keys"][stage]: value for stage, value in measured.items()}
        seen: set[str] = set()
        spent = unshared = 0.0
        inference_only = 0
        for trial in trials:
            keys, missing = trial.user_attrs["stage_keys"], trial.user_attrs.get("missing", ())
            made = {stage for stage in missing if keys[stage] not in seen}
            seen.update(keys[stage] for stage in made)
            spent += sum(seconds.get(keys[stage], 0.0) for stage in made)
            unshared += sum(trial.user_attrs.get("stage_seconds", {}).values())
            inference_only += trial.state == TrialState.COMPLETE and not made & TRAINING
        return {"spent_seconds": spent, "unshared_seconds": unshared, "trials_inference_only": inference_only}

    def best(self) -> list[FrozenTrial]:
        """The best trial, or with several objectives those of the Pareto front; none before a trial is complete."""
        if not any(trial.state == TrialState.COMPLETE for trial in self._all()):
            return []
        best = [self.study.best_trial] if len(self.objectives) == 1 else self.study.best_trials
        distinct: dict[str, FrozenTrial] = {}
        for trial in best:
            distinct.setdefault(trial.user_attrs["trial_key"], trial)
        return list(distinct.values())

    def reached(self) -> set[str]:
        """Digests of the stages that the study's trials need, which must not be removed from the store."""
        return {digest for trial in self._all() for digest in trial.user_attrs.get("stage_keys", {}).values()}

    def fields(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The config fields that a suggestion stands for, as a table's row would set them."""
        return {self.axes[name].field: _clean(value, self.axes[name].distribution) for name, value in params.items()}

    # Helpers

    def _ask(self) -> optuna.Trial | None:
        with self._alone():  # so that no driver asks too many, and each sees what the others are at
            if self._exhausted or self._count() >= self.most:
                return None
            with _quiet():
                asked = self.study.ask({name: axis.distribution for name, axis in self.axes.items()})
            asked.set_user_attr("driver", self.driver)
        return asked

    def _place(self, asked: optuna.Trial) -> Trial | None:
        """The trial, where it has to be run."""
        try:
            trial = self._trial(asked)
        except UserError as error:
            self._tell(asked, {}, None, str(error), TrialState.FAIL)
            return None
        artifacts = self._artifacts(trial)
        asked.set_user_attr("missing", [stage for stage, artifact in artifacts.items() if artifact is None])
        scored = artifacts["evaluate"]
        if scored and all(artifacts.values()):
            self._tell(asked, artifacts, scored.info["metrics"], "", TrialState.COMPLETE)
            self.found(trial)
            return None
        same = self._live.setdefault(trial.key, [])
        same.append(asked)
        return trial if len(same) == 1 else None

    def _trial(self, asked: optuna.Trial) -> Trial:
        """Raises UserError for values that make no sound config together."""
        config = load_config(self.preset, {**self.overrides, **self.fields(asked.params)}, source="--axes")
        trial = self.trial_of(config)
        keys = trial.keys
        asked.set_user_attr("trial_key", trial.key)
        asked.set_user_attr("stage_keys", {stage: key.digest for stage, key in keys.items()})
        same = (other.number for other in self._all() if other.user_attrs.get("trial_key") == trial.key)
        return replace(trial, cells=tuple(Cell(self.name, f"trial-{number}", config.seed) for number in same))

    def trial_of(self, config: Config) -> Trial:
        """Of a config of this search, without cells. Raises UserError for one that is not sound."""
        config = self.weights.of(config)
        keys = pipeline.stage_keys(config, self.data)
        return Trial(config, self.folder, self.data.describe(config.data.eval_split), keys, ())

    def _at_ends(self) -> Iterator[Config]:
        """The config that the search starts from, and that with each axis at each of its ends, where it is sound."""
        yield self.own
        for name, axis in self.axes.items():
            for end in _ends(axis.distribution):
                with suppress(UserError):
                    config = load_config(self.preset, {**self.overrides, **self.fields({name: end})})
                    pipeline.check(config)
                    yield config

    def _check_probed(self) -> None:
        """Raises UserError for objectives by which poor trials cannot be stopped."""
        if len(self.objectives) > 1:
            raise UserError(
                f"--scheduler: with several objectives ({', '.join(self.objectives)}) no trial is worse than another "
                "early on: name one, or search without --scheduler"
            )
        (name,) = self.objectives
        if name.rpartition("/")[2] not in PROBED:
            raise UserError(
                f"--scheduler: {name} is not known before a trial has ended: search for one of "
                f"{', '.join(PROBED)} of the maps, or without --scheduler"
            )

    def _tell(
        self,
        asked: optuna.Trial,
        artifacts: Mapping[str, Artifact | None],
        metrics: Mapping[str, float] | None,
        reason: str,
        state: TrialState,
    ) -> None:
        seconds = {stage: artifact.info["seconds"] for stage, artifact in artifacts.items() if artifact}
        attributes = {"stage_seconds": seconds, "metrics": metrics, "reason": reason}
        values = None
        if state == TrialState.COMPLETE:
            measured = {**(metrics or {}), "gpu_hours": sum(seconds.values()) / 3600}
            values = [measured[name] for name in self.objectives]
        with _quiet(), _closed_by_others(asked), self._noting_exhaustion():
            for name, value in attributes.items():
                if value:
                    asked.set_user_attr(name, dict(value) if isinstance(value, Mapping) else value)
            self.study.tell(asked, values, state, skip_if_finished=True)

    def _artifacts(self, trial: Trial) -> dict[str, Artifact | None]:
        return {stage: self.store.find(key, verify=False) for stage, key in trial.keys.items()}

    def _all(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _count(self) -> int:
        """Trials that were asked, but for those that had to be put back into the queue."""
        trials = self._all()
        again = {trial.user_attrs.get("retry_of") for trial in trials}
        return sum(trial.state != TrialState.WAITING and trial.number not in again for trial in trials)

    # Opening a study

    def _open(self, storage: str, sampler_seed: int) -> optuna.Study:
        name, spec = self.name, self._spec()
        database = _open_database(storage)
        known = name in optuna.study.get_all_study_names(database)
        study = optuna.create_study(
            storage=database, study_name=name, directions=list(self.objectives.values()), load_if_exists=True
        )
        if known:
            _check_same(name, study.user_attrs.get(SPEC), spec)
        else:
            study.set_metric_names(list(self.objectives))
            study.enqueue_trial({axis: own_value(self.own, self.axes[axis].field) for axis in self.axes})
            study.set_user_attr(SPEC, spec)
        drivers = study.user_attrs.get("drivers", 0)
        study.set_user_attr("drivers", drivers + 1)
        # Every driver draws from a stream of its own, else it would repeat the suggestions of the one before
        seed = int(np.random.SeedSequence([sampler_seed, drivers]).generate_state(1)[0])
        study.sampler = make_sampler(self.sampler, objectives=len(self.objectives), trials=self.most, seed=seed)
        if self.sampler:
            self._try_sampler(seed)
        if self.pruning and (pruner := self.pruning.pruner()):
            study.pruner = pruner
        return study

    def _try_sampler(self, seed: int) -> None:
        """Raises UserError for one that cannot search these axes and objectives, before anything depends on it."""
        assert self.sampler
        sampler = make_sampler(self.sampler, objectives=len(self.objectives), trials=self.most, seed=seed)
        study = optuna.create_study(directions=list(self.objectives.values()), sampler=sampler)
        try:
            for value in range(TRIED):
                with self._noting_exhaustion():
                    asked = study.ask({name: axis.distribution for name, axis in self.axes.items()})
                    study.tell(asked, [float(value)] * len(self.objectives))
        except Exception as error:  # each sampler has its own
            raise UserError(f"--sampler {self.sampler.name} cannot search this: {_first(error)}") from error
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

    def _spec(self) -> dict[str, Any]:
        """What makes two searches the same one."""
        options = self.own.data
        return {
            "preset": self.preset,
            "objectives": list(self.objectives),
            "axes": {name: str(axis) for name, axis in self.axes.items()},
            "images": {split: self.data.describe(split) for split in (options.train_split, options.eval_split)},
            "config": flatten(self.own)
            | {f"weights of {name}": digest for name, digest in self.weights.digests(self._at_ends()).items()},
        }

    def _close_orphans(self) -> None:
        for trial in self._all():
            if trial.state != TrialState.RUNNING:
                continue
            driver = trial.user_attrs.get("driver")
            if driver is None or self.store.holder(self._driver_key(driver)) is None:
                log.info("trial %d of %s belonged to a driver that is gone: once more", trial.number, self.name)
                self._requeue(trial.number, trial.params)

    def _requeue(self, number: int, params: Mapping[str, Any]) -> None:
        with _quiet():
            if not any(trial.user_attrs.get("retry_of") == number for trial in self._all()):
                self.study.enqueue_trial(dict(params), user_attrs={"retry_of": number})
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def _driver_key(self, driver: str) -> StageKey:
        return StageKey("search", {"study": self.name, "driver": driver})

    def _alone(self, seconds: float = 1.0) -> Lease:
        """Makes this driver the only one of the study's, for a moment. Raises LeaseHeld after so many seconds."""
        key, until = StageKey("search", {"study": self.name}), time.monotonic() + seconds

        def wait(holder: LeaseHolder) -> None:
            if time.monotonic() > until:
                raise LeaseHeld(key, holder)

        return self.store.lease(key, wait=wait)

    def _report(self, trial_key: str, score: float, epoch: int) -> None:
        for asked in self._live.get(trial_key, ()):
            with _quiet(), _closed_by_others(asked):
                asked.report(score, step=epoch)

    def _write_held(self, held: float) -> None:
        self.study.set_user_attr(HELD + self.driver, held)


def make_search(options: argparse.Namespace, overrides: Mapping[str, Any], store: Store) -> Search:
    """From `space.add_arguments`, --preset, --data and --weights."""
    sampler = Named.read("--sampler", options.sampler) if options.sampler else None
    pruning = Pruning(Named.read("--scheduler", options.scheduler)) if options.scheduler else None
    data = pipeline.open_data(load_config(options.preset, overrides), options.data)
    return Search(
        options.study or f"search-{options.preset}",
        options.preset,
        overrides,
        data,
        store,
        axes=options.axes,
        objectives=options.objectives,
        most=options.trials,
        storage=options.storage,
        sampler=sampler,
        sampler_seed=options.sampler_seed,
        pruning=pruning,
        folder=options.data,
        weights=Weights(options.weights),
    )


def _ends(distribution: optuna.distributions.BaseDistribution) -> tuple[Any, ...]:
    match distribution:
        case CategoricalDistribution(choices=choices):
            return tuple(choices)
        case IntDistribution(low=low, high=high) | FloatDistribution(low=low, high=high):
            return low, high
    return ()


def _clean(value: Any, distribution: optuna.distributions.BaseDistribution) -> Any:
    """0.15 instead of 0.15000000000000002, where the values have a step."""
    stepped = isinstance(distribution, FloatDistribution) and distribution.step is not None
    return round(value, 6) if stepped else value


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
    if told := ", ".join(text for count, text in parts if count):
        raise UserError(
            f"--study {name}: it was begun with something else ({told}): search with the same options, or give "
            "another name"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's remarks on what is experimental and what was reported twice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _storage_errors(url: str) -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with _quiet():
            yield
    except UserError:
        raise
    except Exception as error:  # whatever SQLAlchemy and the database's driver raise
        told = f"--storage {url}: no study can be kept there: {type(error).__name__}: {_first(error)}"
        raise UserError(without_password(told, url)) from error


@contextmanager
def _closed_by_others(asked: optuna.Trial) -> Iterator[None]:
    """Another driver may have closed a trial, when this one was taken for dead (its machine slept, say)."""
    try:
        yield
    except optuna.exceptions.UpdateFinishedTrialError:
        log.warning("trial %d was closed by another driver, which runs it once more", asked.number)


def _first(error: Exception) -> str:
    """The first line of what was at the bottom of an error: Optuna speaks of commits where a server does not answer."""
    while error.__cause__ and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return str(error).strip().partition("\n")[0]
