"""What recording costs a sweep: the time of `Tracker.tell` in the driver, and how fast events reach MLflow.

A trial of preset tiny reports about 14 epochs, 4 stages and 30 samples of its machine in about 60 seconds.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from semformer.store import Store
from sweeps.plan.table import load_table
from sweeps.plan.trials import Plan, make_plan
from sweeps.tracking.tracker import Tracker
from tests.servers import mlflow_server

REPORTS_A_TRIAL, SECONDS_A_TRIAL = 50, 60.0
ALLOWED_SHARE = 0.01
EPOCHS = 1000
TABLE = """\
name: bench
title: Two rows
metrics: [{name: miou, header: mIoU}]
rows:
  - {id: a, label: a, set: {}, paper: {miou: 50}}
"""
VALUES = dict.fromkeys(("total", "CF", "CB", "AS", "AC", "lr", "images_per_second", "gpu_memory"), 0.5)


def run(uri: str, plan: Plan, store: Store, folder: Path) -> dict[str, float]:
    """Seconds of one `tell` (median and 99th percentile of 1000), and events delivered a second."""
    tracker = Tracker(uri, plan, store, folder=folder)
    (trial,) = plan.trials
    tracker.begin()
    tracker.tell(trial, {"event": "start"})
    seconds = []
    started = time.perf_counter()
    for epoch in range(1, EPOCHS + 1):
        before = time.perf_counter()
        tracker.tell(trial, {"event": "epoch", "stage": "segmentor", "epoch": epoch, "values": VALUES})
        seconds.append(time.perf_counter() - before)
    tracker.end("KILLED")
    elapsed = time.perf_counter() - started
    if tracker.errors or tracker.undelivered:
        raise SystemExit(f"{tracker.undelivered} events were not delivered: {tracker.errors}")
    return {
        "median": statistics.median(seconds),
        "slow": statistics.quantiles(seconds, n=100)[-1],
        "events_per_second": EPOCHS / elapsed,
    }


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "bench.yaml").write_text(TABLE)
        store = Store(folder / "store")
        plan = make_plan([load_table(folder / "bench.yaml")], "micro", {}, (0,), None, store)
        results = {"sqlite": run(f"sqlite:///{folder / 'mlflow.db'}", plan, store, folder / "on sqlite")}
        with mlflow_server(folder) as server:
            results["server"] = run(server.uri, plan, store, folder / "on a server")
    for name, result in results.items():
        share = REPORTS_A_TRIAL * result["median"] / SECONDS_A_TRIAL
        cost = f"{1e6 * result['median']:.0f} us (99 %: {1e6 * result['slow']:.0f} us) = {100 * share:.4f} % of a trial"
        print(f"| recording on {name}: one event; delivery | {cost} | {result['events_per_second']:.0f} events/s | |")
        if share > ALLOWED_SHARE:
            raise SystemExit(f"recording takes more than {ALLOWED_SHARE:.0%} of a trial")


if __name__ == "__main__":
    main()
