"""A sweep on a real Ray cluster of three nodes on this machine, to which something bad happens.

The sweep's driver is a process of its own, the commands are those of a user. What was trained is counted from the
driver's lines and from the store, never from memory.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from semformer.keys import StageKey
from semformer.store import Store, open_store
from sweeps.plan.table import load_tables
from sweeps.plan.trials import Plan, make_plan
from tests.servers import S3Server

ROOT = Path(__file__).parents[2]
EPOCHS = 5
STAGES = {"caae": 1, "segmentor": 2, "cams": 3, "evaluate": 3}
"""That TABLE needs."""
TABLE = """
name: faults
title: Two networks on one CAAE, and one more way to use the first
metrics: [{name: miou, header: mIoU}]
baseline:
  data.shapes: {train: 64, val: 24, size: 48}
  caae.epochs: 5
  segmentor.epochs: 5
rows:
  - {id: all, label: all, set: {}, paper: {miou: null}}
  - {id: CF, label: CF, set: {segmentor.losses: "CF,SS"}, paper: {miou: null}}
  - {id: U1, label: U1, set: {cams.last_blocks: 1}, paper: {miou: null}}
"""
LINE = re.compile(r"^ *\d+ s  (?P<row>[\w, +-]+): (?P<stage>\w+) epoch (?P<epoch>\d+)/\d+, (?!step)", re.M)
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "OMP_NUM_THREADS": "1",
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
}


class Site:
    """A Ray cluster of a head without work and two nodes that hold one trial each; and an S3 server."""

    def __init__(self):
        self.s3 = S3Server()
        os.environ.update(ENVIRONMENT, AWS_ENDPOINT_URL=self.s3.url)
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 * 2**20})
        for _ in range(2):
            self.add_node()
        self.cluster.wait_for_nodes()

    def add_node(self) -> None:
        self.cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)

    def close(self) -> None:
        self.cluster.shutdown()
        self.s3.stop()


@contextmanager
def three_nodes() -> Iterator[Site]:
    before = dict(os.environ)
    site = Site()
    try:
        yield site
    finally:
        site.close()
        os.environ.clear()
        os.environ.update(before)


class Maker(NamedTuple):
    pid: int
    key: StageKey


class Scene:
    """One sweep of TABLE, in a folder of its own."""

    stages = STAGES

    def __init__(
        self,
        folder: Path,
        site: Site,
        *,
        store: str = "",
        uri: str = "",
        text: str = TABLE,
        sweeps: Path | None = None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.site, self.sweeps = folder, site, sweeps or folder / "sweeps"
        self.location, self.uri = store or str(folder / "store"), uri or f"sqlite:///{folder / 'mlflow.db'}"
        self.table = folder / "faults.yaml"
        self.table.write_text(text)
        self.outputs: list[Path] = []
        self.drivers: list[subprocess.Popen] = []

    def start(self, *options: str, command: str = "run") -> subprocess.Popen:
        """A driver. `command` resume goes on with the sweep that there is."""
        arguments = [command, "--sweeps", str(self.sweeps)]
        if command == "run":
            arguments = [*self.command(), *arguments[1:], "--preset", "micro", "--store", self.location]
            arguments += ["--tracking-uri", self.uri, "--address", self.site.cluster.address, *options]
        self.outputs.append(self.folder / f"output-{len(self.outputs)}.txt")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
        with self.outputs[-1].open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "sweeps.cli", *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
            )
        self.drivers.append(process)
        return process

    def command(self) -> list[str]:
        return ["run", str(self.table)]

    def finish(self, driver: subprocess.Popen, seconds: float = 240) -> int:
        """The exit status of a driver; one that does not end is killed."""
        try:
            return driver.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(driver.pid, signal.SIGKILL)
            raise AssertionError(f"the driver did not end within {seconds} s:\n{self.output()}") from None

    def close(self) -> None:
        for driver in self.drivers:
            if driver.poll() is None:
                os.killpg(driver.pid, signal.SIGKILL)
                driver.wait()

    def output(self) -> str:
        return "\n".join(path.read_text() for path in self.outputs)

    # What is going on

    @cached_property
    def plan(self) -> Plan:
        return make_plan(load_tables([str(self.table)]), "micro", {}, [0], None, self.store())

    def store(self) -> Store:
        return open_store(self.location)

    def maker(self, stage: str, key: StageKey | None = None, *, but: int = 0, seconds: float = 120) -> Maker:
        """Waits until some process makes a stage of that kind, or of that key, other than the process `but`."""
        keys = {key} if key else {trial.keys[stage] for trial in self.plan.trials}
        store = self.store()

        def look() -> Maker | None:
            held = ((store.holder(key), key) for key in keys)
            return next((Maker(holder.pid, key) for holder, key in held if holder and holder.pid != but), None)

        return eventually(look, seconds)

    def after_epoch(self, stage: str, epoch: int, seconds: float = 120) -> None:
        """Waits until the driver has told the end of that epoch, of any row."""
        self.after(rf": {stage} epoch {epoch}/\d+, (?!step)", seconds)

    def after(self, pattern: str, seconds: float) -> None:
        """Waits until the driver has told something that matches."""
        told = re.compile(pattern)
        eventually(lambda: told.search(self.output()), seconds)

    # What came of it

    def epochs_trained(self) -> Counter[tuple[str, int]]:
        """How often each epoch of each stage, by its digest, was trained."""
        plan = self.plan
        digests = {
            (row, stage): key.digest
            for trial in plan.trials
            for row in [plan.name_of(trial)]
            for stage, key in trial.keys.items()
        }
        found = LINE.finditer(self.output())
        return Counter((digests[match["row"], match["stage"]], int(match["epoch"])) for match in found)

    def redone(self) -> int:
        return sum(n - 1 for n in self.epochs_trained().values())

    def made(self) -> Counter[str]:
        """Artifacts of each stage; packs of images are none."""
        return Counter(a.key.stage for a in self.store().artifacts() if a.key.stage != "pack")

    def times_made(self) -> Counter[str]:
        """How often drivers told that a kind of stage was made."""
        return Counter(re.findall(r": (\w+) made in ", self.output()))

    def gaps(self) -> list[str]:
        """What is wrong with the runs in MLflow: twice the same trial, a series with a gap or a step twice."""
        client = MlflowClient(self.uri)
        runs = client.search_runs([e.experiment_id for e in client.search_experiments() if e.name != "Default"])
        trials = [run for run in runs if run.data.tags.get("semformer.kind") == "trial"]
        counted = Counter(run.data.tags["semformer.trial_key"] for run in trials)
        wrong = [f"{n} runs of trial {key[:8]}" for key, n in counted.items() if n > 1]
        for run in trials:
            row = run.data.tags["semformer.rows"]
            if run.info.status != "FINISHED":
                wrong.append(f"{row} is {run.info.status}")
            for name in ("caae/loss/total", "segmentor/loss/total"):
                steps = [point.step for point in client.get_metric_history(run.info.run_id, name)]
                if sorted(steps) != list(range(1, EPOCHS + 1)):
                    wrong.append(f"{row}: {name} has steps {steps}")
        return wrong


class Whole(Scene):
    """A sweep of two rows to their segmentations, which share all that comes before the walk."""

    AFTER_MAPS = (
        *("train_cams", "affinity_labels", "affinity", "walk", "pseudo_masks"),
        *("evaluate_masks", "deeplab", "segmentation", "evaluate_seg"),
    )
    TABLE = (
        TABLE[: TABLE.index("rows:")].replace("metrics: [", "metrics: [{name: seg/miou, header: seg}, ")
        + "rows:\n  - {id: own, label: own}\n  - {id: near, label: near, set: {walk.beta: 4.0}}\n"
    )
    stages = {  # noqa: RUF012
        **dict.fromkeys((*STAGES, *AFTER_MAPS[:3]), 1),
        **dict.fromkeys(AFTER_MAPS[3:], 2),
    }

    def __init__(self, folder: Path, site: Site):
        super().__init__(folder, site, text=self.TABLE)


class Search(Scene):
    """A search over U on the same networks, with its study in a database at `storage`."""

    TRIALS = 4
    stages = {"caae": 1, "segmentor": 1, "cams": TRIALS, "evaluate": TRIALS}  # noqa: RUF012

    def __init__(self, folder: Path, site: Site, *, storage: str):
        super().__init__(folder, site)
        self.storage = storage

    def command(self) -> list[str]:
        fields = {"data.shapes.train": 64, "data.shapes.val": 24, "caae.epochs": EPOCHS, "segmentor.epochs": EPOCHS}
        sets = [part for field, value in fields.items() for part in ("--set", f"{field}={value}")]
        search = ["search", "--trials", str(self.TRIALS), "--axes", f"U=1:{self.TRIALS}", "--sampler", "brute_force"]
        return [*search, "--storage", self.storage, *sets]

    def epochs_trained(self) -> Counter[tuple[str, int]]:
        return Counter((match["stage"], int(match["epoch"])) for match in LINE.finditer(self.output()))


def eventually(look: Callable[[], object], seconds: float):
    """What `look` gives as soon as it is true. Raises AssertionError when it never is."""
    until = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > until:
            raise AssertionError(f"waited {seconds} s for nothing")
        time.sleep(0.02)
    return found
