"""What may happen to a sweep. Each case takes a fresh Scene's arguments, and checks that nothing was lost.

All of them check that every cell is filled in the end, that each published stage was made once, that at most one epoch
was trained again, and that MLflow has one run for each trial and series without a gap.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.faults.scene import TABLE, Scene, Site
from tests.servers import MlflowServer

STAGES = {"caae": 1, "segmentor": 2, "cams": 3, "evaluate": 3}


class Outcome(NamedTuple):
    """What was lost: epochs trained again, artifacts that are missing or were made twice, faults in MLflow."""

    redone: int
    stages: str
    mlflow: str
    remark: str = ""


def worker_killed(stage: str) -> Callable[[Path, Site], Outcome]:
    def case(folder: Path, site: Site) -> Outcome:
        scene = Scene(folder, site)
        driver = scene.start()
        os.kill(scene.maker(stage), signal.SIGKILL)
        assert scene.finish(driver) == 0, scene.output()
        assert f"tried again after {stage}: WorkerDied" in scene.output()
        return outcome(scene)

    return case


def node_killed(folder: Path, site: Site) -> Outcome:
    """The node that trains, with all its processes. Another one comes, as from an autoscaler."""
    scene = Scene(folder, site)
    driver = scene.start()
    pid = scene.maker("segmentor")
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
    """The store's disk fills up while a network is trained; later there is room again."""
    disk = folder / "disk"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    try:
        scene = Scene(folder, site, store=str(disk / "store"))
        driver = scene.start()
        scene.after_epoch("segmentor", 1)
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(b"0" * 4096):
                    pass
            except OSError:
                pass
        assert scene.finish(driver) == 1, scene.output()
        assert "free more" in scene.output()
        filler.unlink()
        assert scene.finish(scene.start(command="resume")) == 0, scene.output()
        return outcome(scene, "told, and resumed when there was room")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


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
    pid = scene.maker("segmentor")
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
    missing = {stage: n - made[stage] for stage, n in STAGES.items() if made[stage] != n}
    twice = {stage: n - made[stage] for stage, n in times.items() if n > made[stage]}
    wrong = [text for text in scene.gaps() if not text.startswith(failed)] if failed else scene.gaps()
    told = [f"{n} {stage} missing" for stage, n in missing.items()]
    told += [f"{n} {stage} made twice" for stage, n in twice.items()]
    result = Outcome(scene.redone(), "; ".join(told) or "each once", "; ".join(wrong) or "complete", remark)
    assert (result.stages, result.mlflow) == ("each once", "complete"), f"{result}\n{scene.output()}"
    assert result.redone <= 1, f"{result}\n{scene.output()}"
    return result


CASES: dict[str, Callable[[Path, Site], Outcome]] = {
    **{f"worker killed in {stage}": worker_killed(stage) for stage in STAGES},
    "node killed": node_killed,
    "driver killed, then resume": driver_killed,
    "MLflow server away for 60 s": tracking_down(60),
    "store (S3) unreachable for 30 s": store_unreachable(30),
    "disk full, then resume": disk_full,
    "a trial raises": trial_raises,
    "a trial hangs": trial_hangs,
    "two drivers, one table, one store": two_drivers,
}
