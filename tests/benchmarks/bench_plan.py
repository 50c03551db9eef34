"""Ten thousand trials on thirty thousand stages: how long planning, pricing and `status` take, and a lease among many.

`python -m tests.benchmarks.bench_plan` (minutes) with a store in a folder, and with one in a bucket: moto's, in this
process, each request to which takes `LATENCY` longer.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from semformer.keys import StageKey
from semformer.store import Store, open_store
from semformer.store.artifact import MANIFEST, make_manifest
from semformer.store.folder import Folder
from semformer.store.reasons import reasons
from sweeps.plan.price import price
from sweeps.plan.table import load_table
from sweeps.plan.trials import distinct_stages, make_plan
from sweeps.tracking.folder import SweepFolder
from sweeps.tracking.state import SweepState
from tests.servers import S3Server

T = TypeVar("T")
TRIALS = 10_000
LATENCY = 0.005
"""Seconds."""
REQUIRED = {
    "folder: plan an empty store": 10.0,
    "folder: plan a full store": 10.0,
    "folder: status": 1.0,
    "bucket: plan a full store": 60.0,
}
"""Seconds."""


def write_table(path: Path) -> None:
    """A table with a row for each trial, which all share one CAAE."""
    rows = [
        f"  - {{id: r{i}, label: r{i}, paper: {{miou: null}}, set: {{segmentor.sigma: {(i + 1) / TRIALS}}}}}\n"
        for i in range(TRIALS)
    ]
    head = "name: many\ntitle: many\nmetrics: [{name: miou, header: mIoU}]\nrows:\n"
    path.write_text(head + "".join(rows))


def fill(store: Store, keys: Iterable[StageKey], empty: Path) -> None:
    """Publishes artifacts without files: by their manifests alone, which is quick. `empty` is a folder."""

    def put(key: StageKey) -> None:
        manifest = make_manifest(key, empty, {"seconds": 60.0})
        if isinstance(store.storage, Folder):
            folder = store.root / key.stage / key.digest
            folder.mkdir(parents=True)
            (folder / MANIFEST).write_bytes(manifest)
        else:
            store.storage.write(f"manifests/{key.stage}/{key.digest}.json", manifest)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(put, keys))


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


def plan_with(store: Store, folder: Path) -> dict[str, float]:
    """Seconds of planning the table in `folder` with an empty store, which is then filled, and with the full one."""
    table, seconds = load_table(folder / "many.yaml"), {}

    def plan():
        return make_plan([table], "micro", {}, (0,), None, store)

    seconds["plan an empty store"], empty = timed(plan)
    keys = distinct_stages(empty.trials)
    assert len(keys) == 3 * TRIALS + 1
    seconds["price it"], _ = timed(lambda: price(empty.trials, empty.cached, store, gpus=4))
    fill(store, keys, folder / "empty")
    if not isinstance(store.storage, Folder):
        store.storage._client.meta.events.register("before-send.s3", lambda **request: time.sleep(LATENCY))
    seconds["plan a full store"], full = timed(plan)
    assert len(full.cached) == len(keys)
    seconds["price what is there"], _ = timed(lambda: price(full.trials, full.cached, store, gpus=4))
    other = make_plan([table], "micro", {"caae.merge": "max"}, (0,), None, store)
    assert not other.cached
    seconds["price what is not there"], _ = timed(lambda: price(other.trials, other.cached, store, gpus=4))
    seconds["why all is to be made"], why = timed(lambda: reasons(store, distinct_stages(other.trials)))
    assert why[other.trials[0].keys["caae"]] == "caae.merge sum -> max"
    return seconds


def lease_in(store: Store) -> dict[str, float]:
    """Seconds to take and release a lease among as many others, and to look who holds it."""
    key, *others = (StageKey("caae", {"n": n}) for n in range(3 * TRIALS + 1))
    for other in others:
        store.storage.create(f"leases/{other.digest}/1.released", b"")
    seconds = {}
    seconds["take and release a lease"], _ = timed(lambda: store.lease(key).release())
    seconds["look for its holder"], _ = timed(lambda: store.holder(key))
    seconds["list what is being made"], _ = timed(store.leases.live)
    return seconds


def commands(store: Store, folder: Path) -> dict[str, float]:
    """Seconds of the whole commands."""
    table, seconds = folder / "many.yaml", {}
    told = ["--preset", "micro", "--store", store.location, "--json"]
    seconds["the whole command `plan --json`"], out = command("plan", str(table), *told)
    assert json.loads(out)["trials"] == TRIALS
    sweep = SweepFolder(folder / "sweeps" / "many")
    state = SweepState(make_plan([load_table(table)], "micro", {}, (0,), None, store))
    with sweep.drive(["run", "many.yaml"]):
        seconds["write the state"], _ = timed(lambda: sweep.save(state.as_json()))
        seconds["status"], _ = command("status", "--sweeps", str(sweep.path.parent))
    return seconds


def run(folder: Path) -> dict[str, float]:
    """Seconds of each part."""
    (folder / "empty").mkdir()
    write_table(folder / "many.yaml")
    store = Store(folder / "store")
    parts = {"folder": plan_with(store, folder) | lease_in(store) | commands(store, folder)}
    server = S3Server()
    os.environ |= {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    try:
        parts["bucket"] = plan_with(open_store("s3://tests/many", cache=folder / "cache"), folder)
    finally:
        server.stop()
    return {f"{name}: {what}": value for name, part in parts.items() for what, value in part.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        seconds = run(Path(folder))
    for name, value in seconds.items():
        limit = f"; required: {REQUIRED[name]:g} s" if name in REQUIRED else ""
        print(f"{name}: {value:.3f} s{limit}")
    if slow := [name for name, limit in REQUIRED.items() if seconds[name] > limit]:
        raise SystemExit(f"too slow: {', '.join(slow)}")


if __name__ == "__main__":
    main()
