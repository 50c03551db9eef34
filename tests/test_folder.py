"""A sweep's folder: one driver at a time, how it was started, and which of several is meant."""

import os
import subprocess
import sys
import time

import pytest

from semformer.errors import UserError
from sweeps.tracking.folder import SweepFolder, find_sweep, new_sweep
from tests.workplace import ROOT

DRIVER = """
import sys, time
from pathlib import Path
from sweeps.tracking.folder import SweepFolder
folder = SweepFolder(Path(sys.argv[1]))
with folder.drive(["run", "table03"]):
    print("driving", flush=True)
    while not folder.asked_to_stop():
        time.sleep(0.05)
"""


@pytest.fixture
def driver(tmp_path):
    """A process that drives `tmp_path/"mine"` until it is asked to stop."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "mine")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "driving\n"
    yield process
    process.kill()
    process.communicate()


def test_one_process_drives_a_sweep_and_says_who_it_is(driver, tmp_path):
    folder = SweepFolder(tmp_path / "mine")
    assert folder.driver().startswith(f"process {driver.pid} on ")
    assert folder.started() == (os.getcwd(), ["run", "table03"])
    with pytest.raises(UserError, match=f"mine is driven already, by process {driver.pid} on "), folder.drive([]):
        pass
    assert folder.started()[1] == ["run", "table03"]
    assert new_sweep(tmp_path, "mine").name == "mine-2"
    assert new_sweep(tmp_path, "other").name == "other"


def test_a_driver_ends_when_it_is_asked_to(driver, tmp_path):
    folder = SweepFolder(tmp_path / "mine")
    assert not folder.wait_for_driver(0.1)
    folder.ask_to_stop()
    assert folder.wait_for_driver(10)
    assert folder.driver() == ""
    with folder.drive(["run", "table04"]):
        assert not folder.asked_to_stop()
        assert folder.started()[1] == ["run", "table04"]


def test_a_killed_driver_drives_no_more(driver, tmp_path):
    driver.kill()
    driver.wait()
    assert SweepFolder(tmp_path / "mine").driver() == ""
    assert new_sweep(tmp_path, "mine").name == "mine"


def test_the_state_is_that_of_the_driver_of_now(tmp_path):
    folder = SweepFolder(tmp_path / "mine")
    with folder.drive([]):
        assert folder.state() is None
        folder.save({"trials": []})
        assert folder.state() == {"trials": []}
    assert folder.state() == {"trials": []}
    with folder.drive([]):
        assert folder.state() is None


def test_the_sweep_started_last_is_meant_unless_one_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no sweep in "):
        find_sweep(tmp_path, None)
    for name in ("first", "second"):
        with SweepFolder(tmp_path / name).drive([]):
            pass
        os.utime(tmp_path / name / "sweep.json", times=(0, time.time() if name == "second" else 0))
    assert find_sweep(tmp_path, None).name == "second"
    assert find_sweep(tmp_path, "first").name == "first"
    with pytest.raises(UserError, match=r"there is no sweep 'third' in .*: there are first, second"):
        find_sweep(tmp_path, "third")


def test_a_damaged_file_is_named(tmp_path):
    folder = SweepFolder(tmp_path / "mine")
    with folder.drive([]):
        (folder.path / "sweep.json").write_text('{"cwd": ')
    with pytest.raises(UserError, match=r"cannot read .*sweep\.json"):
        folder.started()
