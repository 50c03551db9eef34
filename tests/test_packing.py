"""Several trials on one GPU: a fake one, with trials that sleep."""

import logging

import ray
from ray import tune

from semformer.config import load_config
from semformer.keys import StageKey
from semformer.store import Store
from sweeps.cluster import runner
from sweeps.cluster.connect import ENVIRONMENT
from sweeps.plan.trials import Cell, Trial
from sweeps.reports import Finished, Started
from tests.benchmarks.sleeper import work

STAGES = ("caae", "evaluate")


def test_trials_of_a_quarter_share_a_gpu(tmp_path, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    trials = [
        Trial(
            load_config("micro"), None, "", {s: StageKey(s, {"name": f"{s} {n}"}) for s in STAGES}, (Cell("t", n, 0),)
        )
        for n in "abcde"
    ]
    specs = {key.digest: key.spec for trial in trials for key in trial.keys.values()}
    trainable = tune.with_parameters(work, seconds=dict.fromkeys(specs, 3.0), specs=specs, share=True)
    running, most = set(), 0

    def tell(trial, report):
        nonlocal most
        if isinstance(report, Started):
            running.add(trial.key)
        most = max(most, len(running))
        if isinstance(report, Finished):
            running.discard(trial.key)

    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.CRITICAL}
    ray.init(address="local", num_gpus=1, num_cpus=5, **quiet)  # not a cluster that another test started
    try:
        share = {"cpu": 1, "gpu": 0.25}
        runner.run_trials(trials, Store(tmp_path / "store"), tell, share=share, trainable=trainable)
    finally:
        ray.shutdown()
    assert 1 < most <= 4  # processes start one after another
    assert running == set()
