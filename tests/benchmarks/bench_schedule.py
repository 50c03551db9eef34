"""`python -m tests.benchmarks.bench_schedule`: what sharing and the gate save, on Ray with 4 fake GPUs.

Every stage of the whole plan (all tables, preset paper) lasts in proportion to its counted FLOPs, and is slept through;
the rest is real: Tune, the gate, the store and its leases. Three ways to run the plan:

    naive   every row trains all that it needs
    lock    a trial makes the stages that it lacks, and waits, GPU in hand, for those that another one makes
    ours    the gate starts a trial only when it has nothing to wait for
"""

import argparse
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import ray
from ray import tune

from semformer.flops import Images, stage_work
from semformer.keys import StageKey
from semformer.pipeline import STAGES
from semformer.store import Store
from sweeps.cluster import runner
from sweeps.cluster.connect import ENVIRONMENT
from sweeps.cluster.trial import payload
from sweeps.plan.price import PIXELS_PER_SECOND, TFLOPS, list_schedule
from sweeps.plan.table import load_all_tables
from sweeps.plan.trials import Trial, distinct_stages, make_plan
from sweeps.reports import Finished, Report
from tests.benchmarks.sleeper import work
from tests.devkits import paper_splits

GPUS = 4
WAYS = ("naive", "lock", "ours")


VOC = {
    "train_split": Images(count=10_582, width=500, height=375, classes_per_image=2.5, n_classes=21),
    "eval_split": Images(count=1_464, width=500, height=375, classes_per_image=2.5, n_classes=21),
}


def paper_hours(key: StageKey, trial: Trial) -> float:
    """Of a stage on VOC, as a price counts it."""
    split = next(stage.split for stage in STAGES if stage.name == key.stage)
    work = stage_work(key.stage, trial.config, VOC[split])
    return (work.flops / (TFLOPS * 1e12) + work.pixels / PIXELS_PER_SECOND) / 3600


def measure(way: str, trials: Sequence[Trial], seconds: Mapping[str, float], folder: Path) -> dict[str, float]:
    """Wall time, and the GPU-seconds held and waited, of one way to run `trials`."""
    store, share = Store(folder / way, heartbeat=0.2, expiry=60), {"cpu": 0.5, "gpu": 1}
    specs = {key.digest: key.spec for trial in trials for key in trial.keys.values()}
    trainable = tune.with_parameters(work, seconds=seconds, specs=specs, share=way != "naive")
    results: list[Mapping[str, float]] = []
    started = time.monotonic()
    if way == "ours":

        def tell(trial: Trial, report: Report) -> None:
            if isinstance(report, Finished):
                results.append(report.metrics)

        order = {"seconds": lambda key: seconds[key.digest]}
        runner.run_trials(trials, store, tell, share=share, trainable=trainable, **order)
    else:
        grid = [payload(trial, store=store, share=share) for trial in trials]
        tuned = tune.Tuner(
            tune.with_resources(trainable, share),
            param_space=tune.grid_search(grid),
            run_config=tune.RunConfig(name=way, storage_path=str(folder / "tune"), verbose=0),
        ).fit()
        results = [result.metrics["report"].metrics for result in tuned]
    wall = time.monotonic() - started
    held, waited = (sum(result[part] for result in results) for part in ("held", "waited"))
    return {"wall": wall, "held": held, "waited": waited}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--naive-seconds", type=float, default=1200.0, help="of wall time, to which all is scaled")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="semformer-schedule-") as name:
        folder = Path(name)
        plan = make_plan(load_all_tables(), "paper", {}, [0], paper_splits(folder / "voc"), Store(folder / "plan"))
        hours = {key.digest: paper_hours(key, trial) for trial in plan.trials for key in trial.keys.values()}
        rows = [trial for trial in plan.trials for _ in trial.cells]
        total = sum(hours[key.digest] for trial in rows for key in trial.keys.values())
        scale = options.naive_seconds * GPUS / total
        seconds = {digest: value * scale for digest, value in hours.items()}
        bound = list_schedule(distinct_stages(plan.trials), lambda key: seconds[key.digest], gpus=GPUS)
        os.environ.update(ENVIRONMENT)
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "critical"}
        ray.init(address="local", num_gpus=GPUS, num_cpus=GPUS, **quiet)
        measured = {way: measure(way, rows if way == "naive" else plan.trials, seconds, folder) for way in options.ways}
        ray.shutdown()
    print(f"{len(rows)} rows, {len(plan.trials)} trials; {1 / scale:.3g} GPU-hours of preset paper pass in a second")
    print("| way | GPU-seconds held | of naive | waiting with a GPU | wall time | of the list-scheduling bound |")
    print("|---|---:|---:|---:|---:|---:|")
    for way, one in measured.items():
        share = one["held"] / (options.naive_seconds * GPUS)
        told = (
            f"{one['held']:.0f} | {share:.2f} | {one['waited']:.1f} | {one['wall']:.0f} s | {one['wall'] / bound:.2f}"
        )
        print(f"| {way} | {told} |")
    if "ours" not in measured:
        return
    ours = measured["ours"]
    assert ours["held"] <= 0.40 * options.naive_seconds * GPUS
    assert ours["waited"] < 0.01 * ours["held"]
    assert ours["wall"] <= 1.10 * bound


if __name__ == "__main__":
    main()
