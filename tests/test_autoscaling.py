"""Sweeps on clusters that start from zero workers and grow by Ray's own autoscaler, as `ray up` starts them."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from semformer.data.shapes import make_shapes
from semformer.store import Store
from tests.autoscaling import Grown, autoscaling
from tests.test_cluster import environment
from tests.workplace import ROOT, table_text

pytestmark = pytest.mark.timeout(400)


def sweep(grown: Grown, folder: Path, command: str, *options: str) -> subprocess.CompletedProcess[str]:
    """On the cluster's head, in the folder of its machine."""
    call = [sys.executable, "-m", "sweeps.cli", command, *options, "--preset", "micro", "--address", grown.address]
    env = {**grown.env, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(call, env=env, cwd=folder, capture_output=True, text=True, timeout=300)


def test_a_table_and_a_search_start_from_no_worker_at_all(tmp_path):
    env = environment(tmp_path / "home")
    with autoscaling(env, [{"folder": str(tmp_path)}], most=2) as grown:
        done = sweep(grown, tmp_path, "run", "table04")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "2 trials: 2 finished" in done.stdout
        done = sweep(grown, tmp_path, "search", "--trials", "4", "--axes", "final_map,U=3:4", "--max-concurrent", "2")
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(re.findall(r"trial-\d: finished|found", done.stdout)) >= 3


class Machines:
    """Folders of machines that have one path in common: /proc/self/cwd leads each to its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        make_shapes(folder / "images", train=16, val=6, size=48)
        Store(folder / "artifacts")

    def add(self, name: str, *, data: bool = True, **env: str) -> dict:
        folder = self.folder / name
        folder.mkdir()
        (folder / "store").symlink_to(self.folder / "artifacts")
        if data:
            (folder / "data").symlink_to(self.folder / "images")
        return {"folder": str(folder), "env": env}


@contextmanager
def full_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def test_machines_that_join_late_and_cannot_do_it_are_named_and_avoided(tmp_path):
    """One without the data, one with other code, one whose disk is full; the fourth is sound, and does all the work."""
    machines, env = Machines(tmp_path), environment(tmp_path / "home")
    for package in ("semformer", "sweeps"):
        shutil.copytree(ROOT / package, tmp_path / "changed" / package)
    with (tmp_path / "changed" / "semformer" / "losses.py").open("a") as file:
        file.write("# changed\n")
    with full_disk(tmp_path / "full") as full:
        joining = [
            machines.add("without-data", data=False),
            machines.add("other-code", PYTHONPATH=str(tmp_path / "changed")),
            machines.add("full-disk", SEMFORMER_CACHE=str(full)),
            machines.add("sound"),
        ]
        head = Path(joining[-1]["folder"])
        (head / "mine.yaml").write_text(table_text("mine", a="cams.final_map: activation", b="cams.last_blocks: 1"))
        here = "/proc/self/cwd"
        with autoscaling(env, joining, most=4) as grown:
            done = sweep(grown, head, "run", "mine.yaml", "--data", f"{here}/data", "--store", f"{here}/store")
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "2 trials: 2 finished" in told
    unfit = re.findall(r"no work any more for node .*", told)
    assert len(unfit) == 3, told
    for reason in ("data does not exist", "has code ", "GiB of free disk"):
        assert sum(reason in line for line in unfit) == 1, unfit
    store = Store(tmp_path / "artifacts")
    assert Counter(artifact.key.stage for artifact in store.artifacts()) == {
        "pack": 3,
        "caae": 1,
        "segmentor": 1,
        "cams": 2,
        "evaluate": 2,
    }
    for stage in ("caae", "segmentor"):
        (one,) = (artifact for artifact in store.artifacts() if artifact.key.stage == stage)
        assert store.leases.newest(one.key).number == 1  # made once
