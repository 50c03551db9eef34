"""Optuna over the axes: suggestions become trials, their scores go back into the study.

The study is a plain Optuna study in a database, which any number of drivers with one store may share, and which
optuna-dashboard opens. What the store has already is told to the study at once, without a run.

A driver holds a lease in the store as long as it lives. So one that was killed is recognised, and its unfinished
trials are closed and put back into the queue.
"""

import argparse
import itertools
import json
import logging
import re
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from semformer import pipeline
from semformer.config import flatten, load_config
from semformer.errors import UserError
from semformer.keys import StageKey, differences
from semformer.store import Artifact, Store
from sweeps.plan.trials import Cell, Plan, Trial
from sweeps.search.space import own_value, read_axes, read_objectives

log = logging.getLogger(__name__)
NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]*"
"""Of a study, which is a table's name in turn."""
SPEC = "semformer"
"""The study's attribute that says what is searched; a trial's are named in `Search`."""
PROBE = "probe_miou"
TRAINING = {stage.name for stage in pipeline.STAGES if stage.split == "train_split"}


class Search:
    """`trials` suggestions in all, those of earlier runs of the study included; the first is the preset's own config.

    A trial of the study has the attributes trial_key and stage_keys, missing (the stages that the store did not have
    when it was asked), stage_seconds, metrics, reason, driver and retry_of (the trial of a killed driver
    that it repeats), as far as they are known.

    `folder` is that of `data` where it is a devkit of the user's. `found` hears of trials that were told from the
    store, without a run. Raises UserError for axes and objectives that make no sense, a database that cannot be used,
    and a study that was begun with something else.
    """

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
        trials: int,
        storage: str,
        sampler_seed: int = 0,
        folder: Path | None = None,
        found: Callable[[Trial], None] = lambda trial: None,
    ):
        if not re.fullmatch(NAME, study_name):
            raise UserError(f"--study {study_name!r}: a name is letters, digits and any of . _ + - after the first")
        if trials < 1:
            raise UserError(f"--trials {trials}: a search needs at least one")
        self.own, self.axes = read_axes(axes, preset, overrides)
        self.objectives = read_objectives(objectives, self.own)
        self.data, self.folder, self.store, self.trials, self.found = data, folder, store, trials, found
        fixed = {name: value for axis in self.axes.values() for name, value in axis.fixed.items()}
        title = f"search for {' and '.join(self.objectives)} over {', '.join(self.axes)}"
        self.plan = Plan(study_name, title, (), preset, {**overrides, **fixed}, (self.own.seed,), (), frozenset())
        self.driver = secrets.token_hex(8)
        self._live: dict[str, list[optuna.Trial]] = {}  # by trial key: asked and not told yet
        self._unplaced: optuna.Trial | None = None  # asked, and an error came between
        self.start_key = pipeline.stage_keys(self.own, data)["evaluate"].digest
        self._lease = store.lease(self._driver_key(self.driver))
        try:
            with self._alone():
                with _storage_errors(storage):
                    self.study = self._open(storage, sampler_seed)
                self._close_orphans()
        except BaseException:
            self._lease.release()
            raise

    # What the searcher calls

    def ask(self) -> Trial | None:
        """The next suggestion that has to be run; None when all were asked.

        A config that makes no sense fails at once. One that is being run waits for that run's result. May raise what
        the store and the database raise; the next call goes on with the same suggestion.
        """
        while (asked := self._unplaced or self._ask()) is not None:
            self._unplaced, trial = asked, None
            with _closed_by_others(asked):
                trial = self._place(asked)
            self._unplaced = None
            if trial:
                return trial
        return None

    def tell(
        self,
        trial: Trial,
        metrics: Mapping[str, float] | None,
        reason: str = "",
        pruned: bool = False,
    ) -> None:
        """The final metrics of stage evaluate, or None and the reason why there are none."""
        state = TrialState.PRUNED if pruned else TrialState.FAIL if metrics is None else TrialState.COMPLETE
        artifacts = self._artifacts(trial)
        for asked in self._live[trial.key]:
            self._tell(asked, artifacts, metrics, reason, state)
        del self._live[trial.key]  # not before: where the database was away, the caller may tell again

    def report(self, trial: Trial, epoch: int, values: Mapping[str, float]) -> None:
        """The values of a segmentation epoch, of which the probe's is kept. Several objectives have no such series."""
        if PROBE in values and len(self.objectives) == 1:
            for asked in self._live.get(trial.key, ()):
                with _quiet(), _closed_by_others(asked):
                    asked.report(values[PROBE], step=epoch)

    def close(self) -> None:
        """Put what is still running back into the queue, for when the study goes on."""
        try:
            for asked in (*itertools.chain(*self._live.values()), *filter(None, [self._unplaced])):
                self._requeue(asked.number, asked.params)
            self._live.clear()
        finally:
            self._lease.release()

    # What people want to know

    @property
    def documents(self) -> dict[str, str]:
        """File name -> text of what the search was started from."""
        return {"search.json": json.dumps(self._spec(), indent=1)}

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

    def write_report(self, folder: Path) -> list[Path]:
        """The best configs as a table file that can be run, and pictures of the study; see `sweeps.search.report`."""
        from sweeps.search.report import write  # matplotlib takes a while to import

        with _quiet():
            return write(self, Path(folder))

    # Helpers

    def _ask(self) -> optuna.Trial | None:
        with self._alone():  # so that no driver asks too many, and each sees what the others are at
            if self._count() >= self.trials:
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
        if all(artifacts.values()):
            self._tell(asked, artifacts, artifacts["evaluate"].info["metrics"], "", TrialState.COMPLETE)
            self.found(trial)
            return None
        same = self._live.setdefault(trial.key, [])
        same.append(asked)
        return trial if len(same) == 1 else None

    def _trial(self, asked: optuna.Trial) -> Trial:
        """Raises UserError for values that make no sound config together."""
        config = load_config(self.plan.preset, {**self.plan.overrides, **self.fields(asked.params)}, source="--axes")
        keys = pipeline.stage_keys(config, self.data)
        name = self.data.describe(config.data.eval_split)
        trial = Trial(config, self.folder, name, keys, ())
        asked.set_user_attr("trial_key", trial.key)
        asked.set_user_attr("stage_keys", {stage: key.digest for stage, key in keys.items()})
        same = (other.number for other in self._all() if other.user_attrs.get("trial_key") == trial.key)
        return replace(trial, cells=tuple(Cell(self.plan.name, f"trial-{number}", config.seed) for number in same))

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
            measured = {**metrics, "gpu_hours": sum(seconds.values()) / 3600}
            values = [measured[name] for name in self.objectives]
        with _quiet(), _closed_by_others(asked):
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
        name, spec = self.plan.name, self._spec()
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
        study.sampler = self._sampler(int(np.random.SeedSequence([sampler_seed, drivers]).generate_state(1)[0]))
        return study

    def _sampler(self, seed: int) -> BaseSampler:
        if len(self.objectives) == 1:
            return TPESampler(multivariate=True, constant_liar=True, seed=seed)
        # Optuna's default of 50 would leave a search of 30 trials without a second generation
        return NSGAIISampler(population_size=min(50, max(4, self.trials // 4)), seed=seed)

    def _spec(self) -> dict[str, Any]:
        """What makes two searches the same one."""
        options = self.own.data
        return {
            "preset": self.plan.preset,
            "objectives": list(self.objectives),
            "axes": {name: str(axis) for name, axis in self.axes.items()},
            "images": {split: self.data.describe(split) for split in (options.train_split, options.eval_split)},
            "config": flatten(self.own),
        }

    def _close_orphans(self) -> None:
        for trial in self._all():
            if trial.state != TrialState.RUNNING:
                continue
            driver = trial.user_attrs.get("driver")
            if driver is None or self.store.holder(self._driver_key(driver)) is None:
                log.info("trial %d of %s belonged to a driver that is gone: once more", trial.number, self.plan.name)
                self._requeue(trial.number, trial.params)

    def _requeue(self, number: int, params: Mapping[str, Any]) -> None:
        with _quiet():
            if not any(trial.user_attrs.get("retry_of") == number for trial in self._all()):
                self.study.enqueue_trial(dict(params), user_attrs={"retry_of": number})
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def _driver_key(self, driver: str) -> StageKey:
        return StageKey("search", {"study": self.plan.name, "driver": driver})

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Among the drivers of this study."""
        with self.store.lease(StageKey("search", {"study": self.plan.name}), wait=lambda holder: None):
            yield


def make_search(
    options: argparse.Namespace,
    overrides: Mapping[str, Any],
    store: Store,
    progress: Callable[[int, int], None] | None = None,
    found: Callable[[Trial], None] = lambda trial: None,
) -> Search:
    """From `space.add_arguments`, --preset and --data. `progress` is of making the embedded data set."""
    data = pipeline.open_data(load_config(options.preset, overrides), options.data, progress)
    return Search(
        options.study or f"search-{options.preset}",
        options.preset,
        overrides,
        data,
        store,
        axes=options.axes,
        objectives=options.objectives,
        trials=options.trials,
        storage=options.storage,
        sampler_seed=options.sampler_seed,
        folder=options.data,
        found=found,
    )


def _clean(value: Any, distribution: optuna.distributions.BaseDistribution) -> Any:
    """0.15 instead of 0.15000000000000002, where the values have a step."""
    stepped = isinstance(distribution, FloatDistribution) and distribution.step is not None
    return round(value, 6) if stepped else value


def _open_database(url: str) -> optuna.storages.RDBStorage:
    """SQLAlchemy's; the folder of an sqlite file is made."""
    local = url.startswith("sqlite:///")
    if local:
        Path(url.removeprefix("sqlite:///").partition("?")[0]).absolute().parent.mkdir(parents=True, exist_ok=True)
    options = {"connect_args": {"timeout": 60}} if local else {"pool_pre_ping": True}
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
        from sweeps.tracking.tracker import without_password

        first = str(error).strip().partition("\n")[0]
        told = f"--storage {url}: no study can be kept there: {type(error).__name__}: {first}"
        raise UserError(without_password(told)) from error


@contextmanager
def _closed_by_others(asked: optuna.Trial) -> Iterator[None]:
    """Another driver may have closed a trial, when this one was taken for dead (its machine slept, say)."""
    try:
        yield
    except optuna.exceptions.UpdateFinishedTrialError:
        log.warning("trial %d was closed by another driver, which runs it once more", asked.number)
