"""A trial that sleeps instead of training; in a file of its own, because importing PyTorch would take too long."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from semformer.keys import StageKey
from semformer.store import Store
from semformer.store.leases import Lease
from sweeps.cluster.trial import reporting
from sweeps.reports import Finished, StageDone


def work(config: Mapping[str, Any], seconds: Mapping[str, float], specs: Mapping[str, Any], share: bool) -> None:
    """Its metrics are how long it held its GPU, and how long of that it waited.

    `config` is that of `sweeps.cluster.trial.payload`; `seconds` and `specs` of all stages, by digest.
    """
    with reporting(config) as reporter:
        started, waited = time.monotonic(), 0.0
        store = Store(Path(config["store"]), heartbeat=0.2, expiry=60)
        for stage, digest in config["keys"].items():
            key = StageKey(stage, specs[digest])
            if not share:
                time.sleep(seconds[digest])
                continue
            began, slept = time.monotonic(), seconds[digest]

            def make(workspace: Path, lease: Lease, slept: float = slept) -> dict[str, float]:
                time.sleep(slept)
                return {"seconds": slept}

            _, found = store.find_or_make(key, make)
            waited += time.monotonic() - began - (0.0 if found else slept)
            reporter.tell(StageDone(stage, digest, found))
        reporter.tell(Finished({"held": time.monotonic() - started, "waited": waited}))
