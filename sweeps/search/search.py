"""Optuna over the axes: suggestions become trials, their scores go back into the study (`study.SharedStudy`).

What the store has already is told to the study at once, without a run. A database that is away delays nothing but
suggestions: results are kept, and told when it is back.
"""

import argparse
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from semformer import pipeline
from semformer.config import Config, Goal, flatten, load_config
from semformer.errors import UserError
from semformer.keys import to_make
from semformer.store import Artifact, Store
from sweeps.plan import scores
from sweeps.plan.protocol import SCORED_BY_THRESHOLD
from sweeps.plan.table import Table
from sweeps.plan.trials import Cell, Count, Trial
from sweeps.plan.weights import Weights
from sweeps.reports import Found
from sweeps.search.algorithms import Named, Pruning
from sweeps.search.space import GPU_HOURS, PROBED, own_value, read_axes, read_objectives, scores_of
from sweeps.search.study import SharedStudy, cause, closed_by_others, quiet

log = logging.getLogger(__name__)
NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]*"
"""Of a study, which is a table's name in turn."""
TRAINING = {"caae", "segmentor", "affinity", "deeplab"}
"""The stages that train a network."""


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
    A trial of the study has the attributes trial_key and stage_keys, missing (the stages that had to be made
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
        until: Goal = "cams",
        folder: Path | None = None,
        weights: Weights | None = None,
        found: Callable[[Trial, Found], None] = lambda trial, report: None,
    ):
        if not re.fullmatch(NAME, study_name):
            raise UserError(f"--study {study_name!r}: a name is letters, digits and any of . _ + - after the first")
        if most < 1:
            raise UserError(f"--trials {most}: a search needs at least one")
        self.own, self.axes = read_axes(axes, preset, overrides)
        self.objectives = read_objectives(objectives, self.own)
        self.scores = scores_of(self.objectives, self.own) or (scores.MAIN[until],)
        self.until = scores.furthest([scores.goal_of(self.scores), until])
        self._check_matter()
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
        self._live: dict[str, list[optuna.Trial]] = {}  # by trial key: asked and not told yet
        self._unplaced: optuna.Trial | None = None  # asked, and an error came between
        self._untold: list[_Result] = []
        self.start_key = self.trial_of(self.own).key
        self._shared = SharedStudy(
            study_name,
            storage,
            store,
            axes={name: axis.distribution for name, axis in self.axes.items()},
            start={name: own_value(self.own, axis.field) for name, axis in self.axes.items()},
            objectives=self.objectives,
            spec=self._spec(),
            most=most,
            sampler=sampler,
            sampler_seed=sampler_seed,
            pruner=pruning.pruner() if pruning else None,
        )
        self.study = self._shared.study
        """Optuna's own."""

    # What the gate calls

    def ask(self) -> Trial | None:
        """The next suggestion that has to be run; None when all were asked.

        A config that makes no sense fails at once. One that is being run waits for that run's result. May raise what
        the store and the database raise, and LeaseHeld while another driver asks; the next call goes on with the same
        suggestion.
        """
        self.flush()
        while (asked := self._unplaced or self._shared.ask()) is not None:
            self._unplaced, trial = asked, None
            with closed_by_others(asked):
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
        """The scores of a trial, or None and the reason why there are none. Never raises: what cannot be told now is
        told by `flush`."""
        state = TrialState.PRUNED if pruned else TrialState.FAIL if metrics is None else TrialState.COMPLETE
        self._untold.append(_Result(trial, metrics, reason, state))
        try:
            self.flush()
        except Exception as error:
            if len(self._untold) == 1:
                log.warning("the study cannot be told of %s now, which is done later: %s", trial.name, cause(error))

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
            with quiet():
                return any(asked.should_prune() for asked in self._live.get(trial_key, ()))
        except Exception as error:
            log.warning("the pruner cannot be asked now: %s", cause(error))
            return False

    def scheduler(self) -> Any:
        """Of Tune, that stops poor trials; None where none was asked for."""
        if not self.pruning:
            return None
        ((objective, direction),) = self.objectives.items()
        mode = "max" if direction == "maximize" else "min"
        return self.pruning.scheduler(objective, mode, self.own.segmentor.epochs, self.should_stop)

    def spent(self, held: float) -> float:
        """See `SharedStudy.spent`."""
        return self._shared.spent(held)

    def close(self, held: float | None = None) -> None:
        """Tell what is untold, and put what is still running back into the queue, for when the study goes on."""
        try:
            self.flush()
            if held is not None:
                self._shared.write_held(held)
            for asked in (*itertools.chain(*self._live.values()), *filter(None, [self._unplaced])):
                self._shared.requeue(asked.number, asked.params)
            self._live.clear()
        finally:
            self._shared.close()

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
        trials = [trial for trial in self._shared.trials() if "stage_keys" in trial.user_attrs]
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
        if not any(trial.state == TrialState.COMPLETE for trial in self._shared.trials()):
            return []
        best = [self.study.best_trial] if len(self.objectives) == 1 else self.study.best_trials
        distinct: dict[str, FrozenTrial] = {}
        for trial in best:
            distinct.setdefault(trial.user_attrs["trial_key"], trial)
        return list(distinct.values())

    def reached(self) -> set[str]:
        """Digests of the stages that the study's trials need, which must not be removed from the store."""
        return {digest for trial in self._shared.trials() for digest in trial.user_attrs.get("stage_keys", {}).values()}

    def fields(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The config fields that a suggestion stands for, as a table's row would set them."""
        return {self.axes[name].field: self.axes[name].value_of(value) for name, value in params.items()}

    # Helpers

    def _place(self, asked: optuna.Trial) -> Trial | None:
        """The trial, where it has to be run."""
        try:
            trial = self._trial(asked)
        except UserError as error:
            self._tell(asked, {}, None, str(error), TrialState.FAIL)
            return None
        artifacts = self._artifacts(trial)
        missing = to_make(trial.keys, lambda key: artifacts[key.stage] is not None)
        asked.set_user_attr("missing", [key.stage for key in missing])
        if not missing:
            scored = pipeline.scores(filter(None, (artifacts[key.stage] for key in trial.ends)))
            self._tell(asked, artifacts, scored, "", TrialState.COMPLETE)
            self.found(trial, Found(tuple(stage for stage, artifact in artifacts.items() if artifact)))
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
        same = (other.number for other in self._shared.trials() if other.user_attrs.get("trial_key") == trial.key)
        return replace(trial, cells=tuple(Cell(self.name, f"trial-{number}", config.seed) for number in same))

    def trial_of(self, config: Config) -> Trial:
        """Of a config of this search, without cells. Raises UserError for one that is not sound."""
        config = self.weights.of(config)
        keys = pipeline.stage_keys(config, self.data, pipeline.ends(config, self.until))
        return Trial(config, self.folder, self.data.describe(config.data.eval_split), keys, ())

    def _at_ends(self) -> Iterator[Config]:
        """The config that the search starts from, and that with each axis at each of its ends, where it is sound."""
        yield self.own
        for name, axis in self.axes.items():
            for end in axis.ends():
                with suppress(UserError):
                    config = load_config(self.preset, {**self.overrides, **self.fields({name: end})})
                    stages = pipeline.needed_stages(config, pipeline.ends(config, self.until))
                    pipeline.check(config, [stage.name for stage in stages])
                    yield config

    def _check_matter(self) -> None:
        """Raises UserError for an axis that changes nothing of what is searched for."""
        names = scores_of(self.objectives, self.own)
        links = {scores.link_of(name) for name in names}
        makers = {scores.LINKS[link].made_by for link in links}
        if GPU_HOURS in self.objectives:
            makers |= {*pipeline.ends(self.own, self.until)}
        groups = {stage.group for stage in pipeline.needed_stages(self.own, [*makers])}
        groups |= {"evaluate"} if links & {*SCORED_BY_THRESHOLD} else set()
        for name, axis in self.axes.items():
            group, _, field = axis.field.partition(".")
            idle = names and GPU_HOURS not in self.objectives and all(scores.is_idle(axis.field, n) for n in names)
            if field and (idle or group not in groups):
                example = scores.recorded(scores.MAIN[scores.goal_of_field(axis.field)], self.own)
                raise UserError(
                    f"--axes: {name} ({axis.field}) changes nothing of {', '.join(self.objectives)}: name an objective "
                    f"that it changes, such as {example}, with --objectives"
                )

    def _check_probed(self) -> None:
        """Raises UserError for objectives by which poor trials cannot be stopped."""
        if len(self.objectives) > 1:
            raise UserError(
                f"--scheduler: with several objectives ({', '.join(self.objectives)}) no trial is worse than another "
                "early on: name one, or search without --scheduler"
            )
        (name,) = self.objectives
        if not set(scores_of([name], self.own)) & set(PROBED):
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
        attributes = {"stage_seconds": seconds, "metrics": dict(metrics or {}), "reason": reason}
        values, gone = None, [stage for stage, artifact in artifacts.items() if artifact is None]
        if state == TrialState.COMPLETE and gone and GPU_HOURS in self.objectives:
            state, attributes["reason"] = TrialState.FAIL, f"{GPU_HOURS}: {', '.join(gone)} has gone from the store"
        if state == TrialState.COMPLETE:
            measured = {**(metrics or {}), GPU_HOURS: sum(seconds.values()) / 3600}
            if lacking := [name for name in self.objectives if name not in measured]:
                state, attributes["reason"] = TrialState.FAIL, f"with these settings there is no {', '.join(lacking)}"
            else:
                values = [measured[name] for name in self.objectives]
        self._shared.tell(asked, state, values, {name: value for name, value in attributes.items() if value})

    def _artifacts(self, trial: Trial) -> dict[str, Artifact | None]:
        return {stage: self.store.find(key, verify=False) for stage, key in trial.keys.items()}

    def _spec(self) -> dict[str, Any]:
        """What makes two searches the same one."""
        options = self.own.data
        splits = [options.train_split, options.eval_split]
        splits += [options.mask_split] * (self.until != "cams") + [options.test_split] * (self.until == "deeplab")
        return {
            "preset": self.preset,
            "objectives": list(self.objectives),
            "axes": {name: str(axis) for name, axis in self.axes.items()},
            "images": {split: self.data.describe(split) for split in splits},
            "config": flatten(self.own)
            | ({"until": self.until} if self.until != "cams" else {})
            | {f"weights of {name}": digest for name, digest in self.weights.digests(self._at_ends()).items()},
        }

    def _report(self, trial_key: str, score: float, epoch: int) -> None:
        for asked in self._live.get(trial_key, ()):
            with quiet(), closed_by_others(asked):
                asked.report(score, step=epoch)


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
        until=options.until,
        folder=options.data,
        weights=Weights(options.weights),
    )
