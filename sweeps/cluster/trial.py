"""What one Ray Tune trial does: run the pipeline for one config, and report to the driver.

Trials never write to MLflow: the driver does, from their reports and from the store.
"""

import itertools
import math
import os
import socket
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from semformer.errors import MachineError, StoreError, UserError
from semformer.store.leases import LeaseLost
from sweeps.cluster.board import Pin
from sweeps.cluster.system import sample
from sweeps.cluster.versions import difference
from sweeps.reports import (
    EpochEnded,
    Failure,
    Finished,
    Progress,
    Raised,
    Report,
    Sampled,
    Scope,
    StageDone,
    Started,
    Waiting,
)

if TYPE_CHECKING:  # torch takes seconds to import, which is for the trials' processes to do
    from semformer.pipeline import StageRun
    from semformer.stages.context import Progress as StageProgress
    from semformer.store import Store
    from sweeps.plan.trials import Trial

EVERY = 1.0
"""Seconds between two reports of a kind that is only to be seen."""
PATIENCE = 300.0
"""Seconds for which a trial waits for a store that cannot be reached."""
SAMPLE_EVERY = 10.0
"""Seconds between two samples of what the machine does."""
EPOCH = "epoch"
"""In Tune's results, beside the scores that a scheduler looks at: the epoch that they belong to."""


def payload(
    trial: "Trial",
    *,
    store: "Store",
    share: Mapping[str, float],
    board: str = "",
    versions: Mapping[str, str] | None = None,
    probe: bool = False,
) -> dict[str, Any]:
    """The Tune config of a trial, in plain JSON values.

    `board`: the name of a `board.Board`. `versions`: what other machines must have. `probe`: measure the maps after
    every segmentation epoch.
    """
    return {
        "key": trial.key,
        "config": trial.config.model_dump(mode="json"),
        "keys": {name: key.digest for name, key in trial.keys.items()},
        "data": str(trial.data or ""),
        "store": store.location,
        "cpus": max(1, int(share["cpu"])),
        "gpus": share["gpu"],
        "board": board,
        "versions": dict(versions or {}),
        "probe": probe,
    }


class Reporter:
    """A trial's way to the driver. `stage` is the one in hand, which a failure is about; "" before the first."""

    def __init__(self, board: str):
        context = ray.get_runtime_context()
        self.stage, self.node = "", context.get_node_id()
        self._pin = Pin(board, tune.get_context().get_trial_id(), EVERY) if board else None
        gpus = context.get_accelerator_ids().get("GPU", [])
        self.tell(Started(socket.gethostname(), os.getpid(), ",".join(gpus), self.node))

    def tell(self, report: Report) -> None:
        """Epochs, stages and ends wait until the driver has taken them; what is only to be seen does not."""
        if isinstance(report, Progress | Sampled | Waiting) and not isinstance(report, EpochEnded):
            if self._pin:
                self._pin.put(report)
            return
        scores = {EPOCH: report.epoch, **report.probe} if isinstance(report, EpochEnded) and report.probe else {}
        tune.report({"report": report, **scores})

    def failed(self, error: Exception) -> None:
        name, scope = type(error).__name__, scope_of(error, self.stage)
        message, told = _printable(str(error) or name), _printable(traceback.format_exc())
        self.tell(Raised(Failure(scope, self.stage, name, message, told, self.node)))


@contextmanager
def reporting(config: Mapping[str, Any]) -> Iterator[Reporter]:
    """Wraps the work of a trainable: tells that it is at work, and why it failed."""
    reporter = Reporter(config["board"])
    try:
        yield reporter
    except Exception as error:
        reporter.failed(error)
        raise


def _printable(text: str) -> str:
    """Also of a file's name that is no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def scope_of(error: Exception, stage: str) -> Scope:
    """Whose fault an exception is that was raised in `stage`, or ("") before the first."""
    if isinstance(error, LeaseLost):
        return Scope.TRIAL
    if isinstance(error, StoreError):
        return Scope.STORE
    if isinstance(error, MachineError | OSError | MemoryError | ImportError) or _is_of_gpu(error):
        return Scope.NODE
    if isinstance(error, UserError):
        return Scope.STAGE if stage else Scope.NODE  # the driver had no such error when it planned
    return Scope.TRIAL


def _is_of_gpu(error: Exception) -> bool:
    told = str(error)
    return isinstance(error, RuntimeError) and any(part in told for part in ("CUDA", "cuDNN", "NVIDIA", "HIP error"))


def run_trial(config: dict[str, Any]) -> None:
    """The function trainable: finds or makes every stage of `config` (see `payload`). Raises what a stage raises."""
    with reporting(config) as reporter:
        following = dict(itertools.pairwise(config["keys"]))
        artifacts = []
        for run in _stage_runs(config, reporter):
            artifacts.append(run.artifact)
            reporter.tell(StageDone(run.stage, run.key, run.found, run.seconds))
            reporter.stage = following.get(run.stage, run.stage)
        from semformer.pipeline import scores

        reporter.tell(Finished(scores(artifacts)))


def _stage_runs(config: dict[str, Any], reporter: Reporter) -> "Iterator[StageRun]":
    if told := difference(config["versions"]):
        raise MachineError(f"{socket.gethostname()} {told}")
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(config["cpus"])
    import torch

    from semformer import pipeline
    from semformer.config import Config
    from semformer.stages.segmentor import map_probe
    from semformer.store import open_store

    torch.set_num_threads(config["cpus"])
    options = Config.model_validate(config["config"])
    data = pipeline.open_data(options, config["data"])
    stages = tuple(config["keys"])
    keys = {name: key.digest for name, key in pipeline.stage_keys(options, data, stages).items()}
    if keys != config["keys"]:
        raise MachineError(
            f"on {socket.gethostname()}, the data ({config['data'] or 'the embedded data set'}), a weights file or the "
            "code is not what the sweep was planned with: make them the same there"
        )
    store = open_store(config["store"], patience_at_opening=PATIENCE)
    shown = _Shown(reporter)
    reporter.stage = next(iter(keys))
    yield from pipeline.run(
        options,
        data,
        store,
        device=torch.device("cuda" if config["gpus"] else "cpu"),
        until=stages,
        progress=shown.progress,
        probe=map_probe(data[options.data.eval_split], options) if config["probe"] else None,
        waiting=lambda key, holder: reporter.tell(Waiting(key.stage, str(holder))),
    )


class _Shown:
    """Passes the pipeline's progress on, with samples of the machine."""

    def __init__(self, reporter: Reporter):
        self.reporter, self.sampled = reporter, -math.inf

    def progress(self, told: "StageProgress") -> None:
        now = time.monotonic()
        if now - self.sampled >= SAMPLE_EVERY:
            self.reporter.tell(Sampled(sample()))
            self.sampled = now
        report = Progress(
            told.stage,
            told.done,
            told.total,
            told.epoch,
            told.epochs,
            dict(told.values),
            told.images_per_second,
            told.seconds_left,
            told.note,
        )
        self.reporter.tell(EpochEnded(**asdict(report), probe=dict(told.probe)) if told.end_of_epoch else report)
