"""Another method under the same sweep: six trials that share two encoders, each trained once.

    python docs/own_trainable.py

What a trainable must do is in `sweeps.run`. This one fits polynomials instead of networks, so that it ends soon.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import sweeps
from semformer.config import load_config
from semformer.keys import StageKey
from semformer.store import Artifact, Store, open_store
from semformer.store.leases import Lease
from sweeps.cluster.trial import reporting
from sweeps.plan.trials import Cell, Trial
from sweeps.reports import Finished, Report, StageDone

DEGREES, RIDGES = (3, 9), (0.0, 0.1, 1.0)


def make_trials() -> list[Trial]:
    """A trial for each pair; the last stage, whose digest is the trial's identity, is always called evaluate."""
    trials = []
    for degree in DEGREES:
        features = StageKey("features", {"degree": degree})
        for ridge in RIDGES:
            inputs = {"features": features.digest}
            evaluate = StageKey("evaluate", {"ridge": ridge, "inputs": inputs})
            cell = Cell("polynomials", f"degree-{degree}-ridge-{ridge}", seed=0)
            keys = {"features": features, "evaluate": evaluate}
            trials.append(Trial(load_config("micro"), None, "a sine", keys, (cell,)))
    return trials


def fit(config: dict[str, Any]) -> None:
    """The trainable: `config` has the store's location and the digests of the stages."""
    with reporting(config) as reporter:
        store = open_store(config["store"])
        specs = {key.digest: key for trial in make_trials() for key in trial.keys.values()}
        artifacts: dict[str, Artifact] = {}
        for stage, digest in config["keys"].items():
            reporter.stage = stage
            make = functools.partial(MAKE[stage], specs[digest].spec, artifacts)
            artifacts[stage], found = store.find_or_make(specs[digest], make)
            reporter.tell(StageDone(stage, digest, found))
        reporter.tell(Finished(artifacts["evaluate"].info["metrics"]))


def make_features(spec: Any, inputs: Any, workspace: Path, lease: Lease) -> dict[str, Any]:
    x = np.linspace(-1, 1, 40)
    np.save(workspace / "features.npy", np.vander(x, spec["degree"] + 1))
    return {}


def make_scores(spec: Any, inputs: Any, workspace: Path, lease: Lease) -> dict[str, Any]:
    features = np.load(inputs["features"].file("features.npy"))
    target = np.sin(3 * np.linspace(-1, 1, 40))
    gram = features.T @ features + spec["ridge"] * np.eye(features.shape[1])
    error = float(np.abs(features @ np.linalg.solve(gram, features.T @ target) - target).mean())
    (workspace / "scores.json").write_text(json.dumps({"error": error}))
    return {"metrics": {"error": error}}


MAKE = {"features": make_features, "evaluate": make_scores}


def main(folder: str = "runs/polynomials") -> None:
    store, trials = Store(Path(folder)), make_trials()

    def tell(trial: Trial, report: Report) -> None:
        if isinstance(report, StageDone) and not report.found:
            print(f"{trial.name} made {report.stage}")

    ends = sweeps.run(trials, store, trainable=fit, tell=tell)
    for trial in trials:
        print(trial.name, ends[trial.key])


if __name__ == "__main__":
    main(*sys.argv[1:])
