"""What one Ray Tune trial does: run the pipeline for one config, and report to the driver.

A report is a flat dict whose "event" tells its kind:

    start                                                        the process is at work
    progress  stage step steps epoch epochs images_per_second seconds_left note values    about one a second
    epoch     the same, at the end of an epoch                   values: the means of the epoch
    waiting   stage, holder                                      another sweep is making the stage
    stage     stage key found seconds                            a stage is in the store
    finished  metrics                                            the final ones, "cam/val/miou" ...
    failed    stage error message traceback final                the exception is raised afterwards

Trials never write to MLflow: the driver does, from these reports and from the store.
"""

import math
import os
import time
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune

if TYPE_CHECKING:  # torch takes seconds to import, which is for the trials' processes to do
    from semformer.pipeline import Data, StageRun
    from semformer.stages.context import Progress
    from sweeps.plan import Trial

EVERY = 1.0
"""Seconds between two reports of progress."""


def payload(trial: "Trial", *, store: Path, cpus: int, gpus: float) -> dict[str, Any]:
    """The Tune config of a trial, in plain JSON values."""
    return {
        "config": trial.config.model_dump(mode="json"),
        "keys": {name: key.digest for name, key in trial.keys.items()},
        "data": str(trial.data),
        "store": str(store),
        "cpus": cpus,
        "gpus": gpus,
    }


def run_trial(config: dict[str, Any]) -> None:
    """The function trainable: finds or makes every stage of `config` (see `payload`). Raises what a stage raises."""
    tune.report({"event": "start"})
    stages = iter(config["keys"])
    stage = next(stages)
    try:
        for run in _stage_runs(config):
            tune.report({"event": "stage", "stage": stage, "key": run.key, "found": run.found, "seconds": run.seconds})
            stage = next(stages, stage)
        tune.report({"event": "finished", "metrics": dict(run.artifact.info["metrics"])})
    except Exception as error:
        from semformer.errors import UserError
        from semformer.stages.training import TrainingDiverged

        report = {"stage": stage, "error": type(error).__name__, "message": str(error)}
        final = isinstance(error, UserError | TrainingDiverged)
        tune.report({"event": "failed", **report, "traceback": traceback.format_exc(), "final": final})
        raise


def _stage_runs(config: dict[str, Any]) -> "Iterator[StageRun]":
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(config["cpus"])
    import torch

    from semformer import pipeline
    from semformer.config import Config
    from semformer.errors import UserError
    from semformer.store import Store

    torch.set_num_threads(config["cpus"])
    options = Config.model_validate(config["config"])
    data = _open_data(config["data"])
    keys = {name: key.digest for name, key in pipeline.stage_keys(options, data).items()}
    if keys != config["keys"]:
        raise UserError(
            f"the data in {config['data']}, a weights file, or the code is not what the sweep was planned with: "
            "start the sweep again"
        )
    yield from pipeline.run(
        options,
        data,
        Store(Path(config["store"])),
        device=torch.device("cuda" if config["gpus"] else "cpu"),
        progress=_Reports().progress,
        waiting=lambda key, holder: tune.report({"event": "waiting", "stage": key.stage, "holder": str(holder)}),
        workers=config["cpus"] - 1 if config["gpus"] else 0,
    )
    if config["gpus"]:
        torch.cuda.empty_cache()


@cache
def _open_data(folder: str) -> "Data":
    """Read once per process, which runs several trials."""
    from semformer.data.voc import open_devkit
    from semformer.pipeline import Data

    return Data(open_devkit(folder))


class _Reports:
    """Forwards the pipeline's progress: every end of an epoch, and otherwise not more than one in EVERY seconds."""

    def __init__(self):
        self.last = -math.inf

    def progress(self, told: "Progress") -> None:
        if not told.end_of_epoch and time.monotonic() - self.last < EVERY:
            return
        tune.report(
            {
                "event": "epoch" if told.end_of_epoch else "progress",
                "stage": told.stage,
                "step": told.done,
                "steps": told.total,
                "epoch": told.epoch,
                "epochs": told.epochs,
                "images_per_second": told.images_per_second,
                "seconds_left": told.seconds_left,
                "note": told.note,
                "values": dict(told.values),
            }
        )
        self.last = time.monotonic()
