"""Ten thousand trials on a thousand segmentation networks: how long a plan takes, and `status` of such a sweep."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from semformer.store import Store
from sweeps.plan.price import price
from sweeps.plan.table import load_table
from sweeps.plan.trials import make_plan
from sweeps.tracking.folder import SweepFolder
from sweeps.tracking.state import SweepState

T = TypeVar("T")
NETWORKS, ON_EACH = 1000, 10
REQUIRED = {"plan": 5.0, "status": 1.0}
"""Seconds."""


def write_table(path: Path) -> None:
    """A table with a row for each trial: `ON_EACH` thresholds on each of `NETWORKS` values of sigma."""
    rows = [
        f"  - {{id: r{i}-{n}, label: r{i}-{n}, paper: {{miou: null}}, "
        f"set: {{segmentor.sigma: {(i + 1) / NETWORKS}, evaluate.fixed_threshold: {(n + 1) / 100}}}}}\n"
        for i in range(NETWORKS)
        for n in range(ON_EACH)
    ]
    head = "name: many\ntitle: many\nmetrics: [{name: miou, header: mIoU}]\nbaseline: {evaluate.rule: fixed}\nrows:\n"
    path.write_text(head + "".join(rows))


def timed(function: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def command(*arguments: str) -> tuple[float, str]:
    """Seconds and output of `semformer-sweep` in a process of its own, its start included."""

    def run() -> str:
        call = [sys.executable, "-m", "sweeps.cli", *arguments]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout

    return timed(run)


def run(folder: Path) -> dict[str, float]:
    """Seconds of each part."""
    write_table(folder / "many.yaml")
    store = Store(folder / "store")
    seconds = {}
    seconds["read the table"], table = timed(lambda: load_table(folder / "many.yaml"))
    seconds["plan"], plan = timed(lambda: make_plan([table], "micro", {}, (0,), None, store))
    assert len(plan.trials) == NETWORKS * ON_EACH
    assert plan.stages["segmentor"].distinct == NETWORKS
    seconds["price"], _ = timed(lambda: price(plan, store, gpus=4))
    places = ["--preset", "micro", "--store", str(folder / "store")]
    seconds["the whole command `plan --json`"], told = command("plan", str(folder / "many.yaml"), *places, "--json")
    assert json.loads(told)["trials"] == len(plan.trials)
    sweep = SweepFolder(folder / "sweeps" / "many")
    with sweep.drive(["run", "many.yaml"]):
        seconds["write the state"], _ = timed(lambda: sweep.save(SweepState(plan).as_json()))
        seconds["status --json"], told = command("status", "--json", "--sweeps", str(sweep.path.parent))
        seconds["status"], _ = command("status", "--sweeps", str(sweep.path.parent))
    assert len(json.loads(told)["trials"]) == len(plan.trials)
    return seconds


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        seconds = run(Path(folder))
    for name, value in seconds.items():
        limit = f"; required: {REQUIRED[name]:g} s" if name in REQUIRED else ""
        print(f"{name}: {value:.2f} s{limit}")
    if slow := [name for name, limit in REQUIRED.items() if seconds[name] > limit]:
        raise SystemExit(f"too slow: {', '.join(slow)}")


if __name__ == "__main__":
    main()
