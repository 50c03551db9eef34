"""Samplers, pruners and schedulers by name, with options: "tpe:n_startup_trials=20,seed=3".

A sampler is one of Optuna's. What stops poor trials early is a scheduler of Ray Tune or a pruner of Optuna; both look
at the scores of the maps after each segmentation epoch. A trial that found its segmentation network in the store
reports no epochs, and is never stopped.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna
import yaml
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from semformer.errors import UserError

if TYPE_CHECKING:  # which takes seconds to import
    from ray.tune.schedulers import TrialScheduler

WITH_OBJECTS = ("base_ga", "grid", "partial_fixed", "patient")
"""Of Optuna, that take objects which no command line can give."""
ASHA = "asha"
"""Of Ray Tune. Its others pause trials, change their configs, or count on reports that trials do not give."""


@dataclass(frozen=True)
class Named:
    """What a command line says: a name, and options for the class of that name."""

    option: str
    name: str
    options: Mapping[str, Any]

    @classmethod
    def read(cls, option: str, text: str) -> "Named":
        """From "NAME" or "NAME:OPTION=VALUE,..."; `option` is for messages. Raises UserError for any other form."""
        name, _, rest = text.partition(":")
        options = {}
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            if not equals:
                raise UserError(f"{option} {text}: write NAME:OPTION=VALUE,OPTION=VALUE")
            try:
                options[key.strip()] = yaml.safe_load(value)
            except (yaml.YAMLError, ValueError, LookupError, AttributeError):  # of yaml's own readers
                raise UserError(f"{option} {text}: the value of {key.strip()} cannot be read: {value}") from None
        return cls(option, name.strip(), options)

    def make(self, function: Callable[..., Any], fixed: Sequence[str] = (), **given: Any) -> Any:
        """Calls `function` with those of `given` that it knows, and the options, which are none of `fixed`.

        Raises UserError for an option that it does not know, and for a value that it refuses.
        """
        known = [name for name in inspect.signature(function).parameters if name not in ("self", *fixed)]
        for name in self.options:
            if name not in known:
                told = ", ".join(known)
                raise UserError(f"{self.option} {self.name}: unknown option {name!r}: there are {told}")
        try:
            taken = {name: value for name, value in given.items() if name in (*known, *fixed)}
            return function(**taken | dict(self.options))
        except Exception as error:  # whatever a class makes of values that it does not like
            raise UserError(f"{self.option} {self.name}: {type(error).__name__}: {error}") from error


def samplers() -> dict[str, type[BaseSampler]]:
    """Optuna's, by short names: "tpe", "nsgaii", "cmaes" ..."""
    return _classes(optuna.samplers, BaseSampler, "Sampler")


def pruners() -> dict[str, type[BasePruner]]:
    """Optuna's: "hyperband", "median" ..."""
    return _classes(optuna.pruners, BasePruner, "Pruner")


def make_sampler(named: Named | None, *, objectives: int, trials: int, seed: int) -> BaseSampler:
    """By default TPE, or for several objectives NSGA-II. Raises UserError."""
    if named is None and objectives == 1:
        named = Named("--sampler", "tpe", {"multivariate": True, "constant_liar": True})
    elif named is None:
        # Optuna's default of 50 would leave a search of 30 trials without a second generation
        named = Named("--sampler", "nsgaii", {"population_size": min(50, max(4, trials // 4))})
    return named.make(_choose(named, samplers()), seed=seed)


@dataclass(frozen=True)
class Pruning:
    """How poor trials are stopped: by a scheduler of Tune, or by a pruner of Optuna."""

    named: Named

    def pruner(self) -> BasePruner | None:
        """Raises UserError for an unknown name or option."""
        if self.named.name == ASHA:
            return None
        return self.named.make(_choose(self.named, pruners(), (ASHA,)))

    def scheduler(
        self, metric: str, mode: str, epochs: int, should_stop: Callable[[str, float, int], bool]
    ) -> "TrialScheduler":
        """Of Tune. metric: the score that decides, better when `mode` ("max" or "min"); epochs: of the segmentation
        network. should_stop(trial key, score, epoch) asks the pruner. Raises UserError as `pruner` does."""
        from ray.tune import schedulers

        from sweeps.cluster.pruning import ByPruner
        from sweeps.cluster.trial import EPOCH

        common = {"time_attr": EPOCH, "metric": metric, "mode": mode}
        if self.named.name == ASHA:
            given = {**common, "max_t": epochs, "stop_last_trials": False}
            return self.named.make(schedulers.ASHAScheduler, tuple(common), **given)
        return ByPruner(metric, should_stop)


def _choose(named: Named, classes: Mapping[str, Any], others: tuple[str, ...] = ()) -> Any:
    known = (*others, *classes)
    if named.name not in classes:
        near = difflib.get_close_matches(named.name, known, n=1)
        hint = f"did you mean {near[0]}? There" if near else "there"
        raise UserError(f"{named.option} {named.name}: {hint} are {', '.join(known)}")
    return classes[named.name]


def _classes(module: Any, base: type, suffix: str) -> dict[str, Any]:
    """By their names without the suffix, in snake case."""
    found = {}
    for name in sorted(module.__all__):
        kind = getattr(module, name)
        if inspect.isclass(kind) and issubclass(kind, base) and kind is not base:
            short = name.removesuffix(suffix)
            found[re.sub("(?<=[a-z])(?=[A-Z])", "_", short).lower()] = kind
    return {name: kind for name, kind in found.items() if name not in WITH_OBJECTS}
