"""A trial that sleeps instead of training; in a file of its own, because importing PyTorch would take too long."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune

from semformer.keys import StageKey
from semformer.store import Store


def work(config: Mapping[str, Any], seconds: Mapping[str, float], specs: Mapping[str, Any], share: bool) -> None:
    """A trial that sleeps instead of training; tells how long it held its GPU, and how long of that it waited.

    `config` is that of `sweeps.cluster.trial.payload`; `seconds` and `specs` of all stages, by digest.
    """
    tune.report({"event": "start"})
    started, waited = time.monotonic(), 0.0
    store = Store(Path(config["store"]), heartbeat=0.2, expiry=60)
    for stage, digest in config["keys"].items():
        key = StageKey(stage, specs[digest])
        if not share:
            time.sleep(seconds[digest])
            continue
        began = time.monotonic()
        if not store.find(key):
            with store.lease(key, wait=lambda holder: None):
                waited += time.monotonic() - began
                if not store.find(key):
                    workspace = store.workspace(key)
                    time.sleep(seconds[digest])
                    store.publish(key, workspace, {"seconds": seconds[digest]})
        tune.report({"event": "stage", "stage": stage, "key": digest, "found": False, "seconds": 0.0})
    tune.report({"event": "finished", "metrics": {}, "held": time.monotonic() - started, "waited": waited})
