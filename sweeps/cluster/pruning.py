"""A pruner of Optuna as a scheduler of Tune."""

from collections.abc import Callable
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from sweeps.cluster.trial import EPOCH


class ByPruner(FIFOScheduler):
    """Stops what the pruner would: should_stop(trial key, score, epoch) asks it for each `metric` that is reported."""

    def __init__(self, metric: str, should_stop: Callable[[str, float, int], bool]):
        super().__init__()
        self.score, self.should_stop = metric, should_stop

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if self.score in result and self.should_stop(trial.config["key"], result[self.score], result[EPOCH]):
            return TrialScheduler.STOP
        return TrialScheduler.CONTINUE

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its scheduler, but a sweep goes on from the store, not from Tune's snapshot."""
        return {}
