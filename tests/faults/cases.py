"""What may happen to a sweep. Each case takes a fresh Scene's arguments, and checks that nothing was lost.

All of them check that every cell is filled in the end, that each published stage was made once, that no epoch that had
ended was trained again, and that MLflow has one run for each trial and series without a gap.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import optuna
import psutil

from tests.faults.scene import ROOT, STAGES, TABLE, Scene, Search, Site, Whole
from tests.servers import MlflowServer, postgres


class Outcome(NamedTuple):
    """What was lost: epochs trained again, artifacts that are missing or were made twice, faults in MLflow."""

    redone: int
    stages: str
    mlflow: str
    remark: str = ""


def worker_killed_twice(stage: str) -> Callable[[Path, Site], Outcome]:
    """Whoever makes a stage, and then whoever makes it after that."""

    def case(folder: Path, site: Site) -> Outcome:
        scene = Scene(folder, site)
        driver = scene.start()
        killed = scene.maker(stage)
        os.kill(killed.pid, signal.SIGKILL)
        again = scene.maker(stage, killed.key, but=killed.pid)
        os.kill(again.pid, signal.SIGKILL)
        assert scene.finish(driver) == 0, scene.output()
        assert scene.output().count(f"tried again after {stage}: WorkerDied") == 2
        return outcome(scene)

    return case


def worker_killed_in_each_stage(folder: Path, site: Site) -> Outcome:
    """Whoever makes a stage after the maps for the first time, one stage after the other."""
    scene = Whole(folder, site)
    driver = scene.start()
    for stage in scene.AFTER_MAPS:
        os.kill(scene.maker(stage).pid, signal.SIGKILL)
        scene.after(f"tried again after {stage}: WorkerDied", 60)
    assert scene.finish(driver) == 0, scene.output()
    return outcome(scene)


def node_killed(folder: Path, site: Site) -> Outcome:
    """The node that trains, with all its processes. Another one comes, as from an autoscaler."""
    scene = Scene(folder, site)
    driver = scene.start()
    pid = scene.maker("segmentor").pid
    scene.after_epoch("segmentor", 1)
    raylet = next(parent.pid for parent in psutil.Process(pid).parents() if "raylet" in parent.name())
    node = next(n for n in site.cluster.worker_nodes if any(p.process.pid == raylet for p in raylets(n)))
    site.cluster.remove_node(node, allow_graceful=False)
    site.add_node()
    assert scene.finish(driver) == 0, scene.output()
    return outcome(scene)


def raylets(node) -> list:
    return node.all_processes.get("raylet", [])


def driver_killed(folder: Path, site: Site) -> Outcome:
    scene = Scene(folder, site)
    driver = scene.start()
    scene.after_epoch("segmentor", 2)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert scene.finish(scene.start(command="resume")) == 0, scene.output()
    return outcome(scene)


def tracking_down(seconds: float) -> Callable[[Path, Site], Outcome]:
    def case(folder: Path, site: Site) -> Outcome:
        folder.mkdir()
        server = MlflowServer(folder)
        scene = Scene(folder, site, uri=server.uri)
        server.start()
        try:
            driver = scene.start()
            scene.after_epoch("caae", 1)
            server.stop()
            time.sleep(seconds)
            server.start()
            assert scene.finish(driver) == 0, scene.output()
            return outcome(scene)
        finally:
            server.stop()

    return case


def store_unreachable(seconds: float) -> Callable[[Path, Site], Outcome]:
    """On S3, while a network is trained; the server comes back with all that it held."""

    def case(folder: Path, site: Site) -> Outcome:
        scene = Scene(folder, site, store=f"s3://tests/{folder.name}/store")
        driver = scene.start()
        scene.after_epoch("segmentor", 1)
        site.s3.stop()
        time.sleep(seconds)
        site.s3.start()
        assert scene.finish(driver) == 0, scene.output()
        return outcome(scene)

    return case


def disk_full(folder: Path, site: Site) -> Outcome:
    """The store's disk fills up while a network is trained, and has room again half a minute later."""
    with small_disk(folder / "disk", megabytes=64) as disk:
        scene = Scene(folder, site, store=str(disk / "store"))
        driver = scene.start()
        scene.after_epoch("segmentor", 1)
        filler = fill(disk)
        scene.after("StoreError", 120)
        time.sleep(30)
        filler.unlink()
        assert scene.finish(driver) == 0, scene.output()
        assert "free more" in scene.output()
        return outcome(scene, "waited until there was room")


def journal_disk_full(folder: Path, site: Site) -> Outcome:
    """The disk of the sweep's own folder, where its journal is, fills up for ten seconds."""
    with small_disk(folder / "disk", megabytes=16) as disk:
        scene = Scene(folder, site, sweeps=disk / "sweeps")
        driver = scene.start()
        scene.after_epoch("caae", 2)
        filler = fill(disk)
        time.sleep(10)
        filler.unlink()
        assert scene.finish(driver) == 0, scene.output()
        return outcome(scene)


@contextmanager
def small_disk(folder: Path, *, megabytes: int) -> Iterator[Path]:
    """Needs root."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(disk: Path) -> Path:
    """To the last byte; the file that does it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"0" * 512):
            pass
    return filler


def bad_late_node(folder: Path, site: Site) -> Outcome:
    """A node joins while the first network is trained, and has other code than the driver."""
    changed = folder / "changed"
    for package in ("semformer", "sweeps"):
        shutil.copytree(ROOT / package, changed / package)
    with (changed / "semformer" / "losses.py").open("a") as file:
        file.write("# changed\n")
    scene = Scene(folder, site)
    driver = scene.start()
    scene.after_epoch("caae", 1)
    node = site.cluster.add_node(num_cpus=4, object_store_memory=80 * 2**20, env_vars={"PYTHONPATH": str(changed)})
    try:
        assert scene.finish(driver) == 0, scene.output()
    finally:
        site.cluster.remove_node(node)
    assert re.search("no work any more for node .* has code ", scene.output()), scene.output()
    return outcome(scene, "named and avoided")


def driver_stalls(folder: Path, site: Site) -> Outcome:
    """It hears nothing for three times as long as a trial may be silent; the trials go on."""
    scene = Scene(folder, site)
    driver = scene.start("--silence", "8")
    scene.after_epoch("segmentor", 1)
    os.killpg(driver.pid, signal.SIGSTOP)
    time.sleep(24)
    os.killpg(driver.pid, signal.SIGCONT)
    assert scene.finish(driver) == 0, scene.output()
    assert "tried again" not in scene.output()
    return outcome(scene)


def foreign_lease(folder: Path, site: Site) -> Outcome:
    """Another host was making the first stage, and never comes back: only its lease's age tells."""
    scene = Scene(folder, site)
    store, key = scene.store(), scene.plan.trials[0].keys["caae"]
    note = {"host": "elsewhere", "pid": 1, "machine": "another", "since": time.time(), "inputs": []}
    store.storage.create(f"leases/{key.digest}/1", json.dumps(note).encode())
    driver = scene.start()
    assert scene.finish(driver) == 0, scene.output()
    assert store.leases.newest(key).number == 2
    return outcome(scene, "waited until it had expired")


def study_away(seconds: float) -> Callable[[Path, Site], Outcome]:
    """The database of a search, while its trials run."""

    def case(folder: Path, site: Site) -> Outcome:
        with postgres() as server:
            scene = Search(folder, site, storage=server.uri)
            driver = scene.start()
            scene.after_epoch("caae", 1)
            server.stop()
            time.sleep(seconds)
            server.start()
            assert scene.finish(driver) == 0, scene.output()
            study = optuna.load_study(study_name="search-micro", storage=server.uri)
            states = Counter(trial.state.name for trial in study.trials)
        assert states == {"COMPLETE": Search.TRIALS}, states
        return outcome(scene, "all results told")

    return case


def trial_raises(folder: Path, site: Site) -> Outcome:
    """One row diverges: it alone fails, at once, and the others are finished."""
    bad = TABLE + "  - {id: bad, label: bad, set: {segmentor.optimizer.lr: 1.0e+9}, paper: {miou: null}}\n"
    scene = Scene(folder, site, text=bad)
    assert scene.finish(scene.start()) == 1, scene.output()
    out = scene.output()
    assert "bad: failed: segmentor: TrainingDiverged" in out
    assert "tried again" not in out
    assert "3 finished" in out
    return outcome(scene, "that row failed with its reason", failed=("faults/bad",))


def trial_hangs(folder: Path, site: Site) -> Outcome:
    """Its process is stopped, but not dead."""
    scene = Scene(folder, site)
    driver = scene.start("--silence", "15")
    pid = scene.maker("segmentor").pid
    scene.after_epoch("segmentor", 1)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert scene.finish(driver) == 0, scene.output()
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert "said nothing for 15 s" in scene.output()
    return outcome(scene)


def two_drivers(folder: Path, site: Site) -> Outcome:
    scene = Scene(folder, site)
    drivers = [scene.start(), scene.start()]
    assert [scene.finish(driver) for driver in drivers] == [0, 0], scene.output()
    return outcome(scene)


def outcome(scene: Scene, remark: str = "", failed: tuple[str, ...] = ()) -> Outcome:
    made, times = scene.made(), scene.times_made()
    missing = {stage: n - made[stage] for stage, n in scene.stages.items() if made[stage] != n}
    twice = {stage: n - made[stage] for stage, n in times.items() if n > made[stage]}
    wrong = [text for text in scene.gaps() if not text.startswith(failed)] if failed else scene.gaps()
    told = [f"{n} {stage} missing" for stage, n in missing.items()]
    told += [f"{n} {stage} made twice" for stage, n in twice.items()]
    result = Outcome(scene.redone(), "; ".join(told) or "each once", "; ".join(wrong) or "complete", remark)
    assert (result.stages, result.mlflow) == ("each once", "complete"), f"{result}\n{scene.output()}"
    assert result.redone == 0, f"{result}\n{scene.output()}"
    return result


CASES: dict[str, Callable[[Path, Site], Outcome]] = {
    **{f"worker killed twice in {stage}": worker_killed_twice(stage) for stage in STAGES},
    "worker killed in each stage after the maps": worker_killed_in_each_stage,
    "a node joins with other code": bad_late_node,
    "node killed": node_killed,
    "driver killed, then resume": driver_killed,
    "MLflow server away for 60 s": tracking_down(60),
    "store (S3) unreachable for 30 s": store_unreachable(30),
    "store's disk full for 30 s": disk_full,
    "journal's disk full for 10 s": journal_disk_full,
    "a study's database away for 30 s": study_away(30),
    "driver stalls for longer than --silence": driver_stalls,
    "a lease of a host that never comes back": foreign_lease,
    "a trial raises": trial_raises,
    "a trial hangs": trial_hangs,
    "two drivers, one table, one store": two_drivers,
}
