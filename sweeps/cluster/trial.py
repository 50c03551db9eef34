"""What one Ray Tune trial does: run the pipeline for one config, and report to the driver.

A report is a flat dict whose "event" tells its kind:

    start     host pid gpu                                       the process is at work; gpu: the ids of its share
    progress  stage step steps epoch epochs images_per_second seconds_left note values    about one a second
    epoch     the same, at the end of an epoch                   values: the means of the epoch; for ASHA also
                                                                 segmentation_epoch and probe_miou
    system    values                                             every ten seconds, by MLflow's names
    waiting   stage, holder                                      another sweep is making the stage
    stage     stage key found seconds                            a stage is in the store
    finished  metrics                                            the final ones, "cam/val/miou" ...
    failed    stage error message traceback final                the exception is raised afterwards

Trials never write to MLflow: the driver does, from these reports and from the store.
"""

import math
import os
import socket
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from sweeps.cluster.system import sample

if TYPE_CHECKING:  # torch takes seconds to import, which is for the trials' processes to do
    from semformer.pipeline import StageRun
    from semformer.stages.context import Progress
    from semformer.store import Store
    from sweeps.plan.trials import Trial

EVERY = 1.0
"""Seconds between two reports of progress."""
PATIENCE = 300.0
"""Seconds for which a trial waits for a store that cannot be reached."""
SAMPLE_EVERY = 10.0
"""Seconds between two samples of what the machine does."""


def payload(trial: "Trial", *, store: "Store", share: Mapping[str, float], probe: bool = False) -> dict[str, Any]:
    """The Tune config of a trial, in plain JSON values. `probe`: measure the maps after every segmentation epoch."""
    return {
        "config": trial.config.model_dump(mode="json"),
        "keys": {name: key.digest for name, key in trial.keys.items()},
        "data": str(trial.data or ""),
        "store": store.location,
        "cpus": max(1, int(share["cpu"])),
        "gpus": share["gpu"],
        "probe": probe,
    }


def run_trial(config: dict[str, Any]) -> None:
    """The function trainable: finds or makes every stage of `config` (see `payload`). Raises what a stage raises."""
    gpus = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    tune.report({"event": "start", "host": socket.gethostname(), "pid": os.getpid(), "gpu": ",".join(gpus)})
    stages = iter(config["keys"])
    stage = next(stages)
    try:
        for run in _stage_runs(config):
            tune.report({"event": "stage", "stage": stage, "key": run.key, "found": run.found, "seconds": run.seconds})
            stage = next(stages, stage)
        tune.report({"event": "finished", "metrics": dict(run.artifact.info["metrics"])})
    except Exception as error:
        from semformer.errors import UserError
        from semformer.storage import StorageUnreachable

        report = {"stage": stage, "error": type(error).__name__, "message": str(error)}
        final = isinstance(error, UserError) and not isinstance(error, StorageUnreachable)
        tune.report({"event": "failed", **report, "traceback": traceback.format_exc(), "final": final})
        raise


def _stage_runs(config: dict[str, Any]) -> "Iterator[StageRun]":
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(config["cpus"])
    import torch

    from semformer import pipeline
    from semformer.config import Config
    from semformer.errors import UserError
    from semformer.stages.segmentor import map_probe
    from semformer.store import open_store

    torch.set_num_threads(config["cpus"])
    options = Config.model_validate(config["config"])
    data = pipeline.open_data(options, config["data"])
    keys = {name: key.digest for name, key in pipeline.stage_keys(options, data).items()}
    if keys != config["keys"]:
        raise UserError(
            f"on {socket.gethostname()}, the data ({config['data'] or 'the embedded data set'}), a weights file or the "
            "code is not what the sweep was planned with: make them the same, and start the sweep again"
        )
    yield from pipeline.run(
        options,
        data,
        open_store(config["store"], patience_at_opening=PATIENCE),
        device=torch.device("cuda" if config["gpus"] else "cpu"),
        progress=_Reports().progress,
        probe=map_probe(data[options.data.eval_split], options.precision) if config["probe"] else None,
        waiting=lambda key, holder: tune.report({"event": "waiting", "stage": key.stage, "holder": str(holder)}),
        workers=config["cpus"] - 1 if config["gpus"] else 0,
    )


class _Reports:
    """Forwards the pipeline's progress: every end of an epoch, and otherwise not more than one in EVERY seconds."""

    def __init__(self):
        self.last = self.sampled = -math.inf

    def progress(self, told: "Progress") -> None:
        now = time.monotonic()
        if now - self.sampled >= SAMPLE_EVERY:
            tune.report({"event": "system", "values": sample()})
            self.sampled = now
        if not told.end_of_epoch and now - self.last < EVERY:
            return
        report = {
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
        if "probe_miou" in told.values:
            report |= {"segmentation_epoch": told.epoch, "probe_miou": told.values["probe_miou"]}
        tune.report(report)
        self.last = time.monotonic()
