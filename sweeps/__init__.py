"""Many runs: a table of the paper becomes trials, Ray Tune runs them, MLflow records them.

`run` is the entry for Python: trials with shared stages, and a trainable of one's own.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch and Ray take seconds to import
    from semformer.store import Store
    from sweeps.plan.trials import Trial
    from sweeps.reports import Report

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# `sweeps.tracking` repeats what failed. MLflow would repeat every call for minutes, and make a run twice when only the
# answer was lost.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")


def run(
    trials: "Sequence[Trial]",
    store: "Store",
    *,
    trainable: Callable[[dict[str, Any]], None] | None = None,
    tell: "Callable[[Trial, Report], None]" = lambda trial, report: None,
    address: str | None = None,
    cpus_per_trial: int = 1,
    gpus_per_trial: float | None = None,
    max_concurrent: int | None = None,
    silence: float = 600.0,
) -> "dict[str, Report]":
    """Run trials on Ray, each distinct stage once; returns how each ended, by trial key: Finished, Found or Failed.

    `trainable(config)` is run in a process of its own for every trial that has something to make; by default it is the
    pipeline, `cluster.trial.run_trial`. Another one does its work inside `cluster.trial.reporting(config)`: it finds or
    makes the stages in config["keys"] (stage -> digest) in the store at config["store"], tells `reports.StageDone` of
    each, `EpochEnded` if it likes, and at last `Finished`. A key's spec["inputs"] (stage -> digest) tells what a stage
    reads, so that what is there needs nothing before it; without it, a stage is taken to read all before it. Nothing
    else need be said: who waits for whom, retries, nodes that are unfit and what is only to be seen are taken care of.
    docs/own_trainable.py is an example.

    tell(trial, report) hears every report. `address` and the rest are as in `semformer-sweep run`. Raises UserError
    where the cluster cannot be used, and KeyboardInterrupt when the sweep is ended by a signal.
    """
    from sweeps.cluster.connect import connect
    from sweeps.cluster.nodes import trial_share
    from sweeps.cluster.preflight import Watch
    from sweeps.cluster.runner import run_trials
    from sweeps.cluster.trial import run_trial
    from sweeps.reports import Failed, Finished, Found

    ends: dict[str, Report] = {}

    def hear(trial: "Trial", report: "Report") -> None:
        if isinstance(report, Finished | Found | Failed):
            ends[trial.key] = report
        tell(trial, report)

    with connect(address):
        share = trial_share(cpus_per_trial, gpus_per_trial, address=address)
        with closing(Watch(share, store=store.location, ask=address is not None)) as watch:
            watch.wait()
            run_trials(
                trials,
                store,
                hear,
                share=share,
                watch=watch,
                max_concurrent=max_concurrent,
                silence=silence,
                trainable=trainable or run_trial,
            )
    return ends
