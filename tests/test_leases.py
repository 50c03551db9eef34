"""Who may build a key: single flight among threads and processes that are killed, stopped or late."""

import json
import os
import signal
import threading
import time

import pytest

from semformer.store import Store, open_store
from semformer.store.leases import LeaseHeld, LeaseLost, is_alive
from semformer.store.storage import StorageUnreachable
from tests.artifacts import build, caae, damage, eventually, flip_a_bit, make_weights, outputs, segmentor

HOLD = """
store = open_store({location!r}, heartbeat=0.05, expiry={expiry})
lease = store.lease(key)
workspace = store.workspace(key)
(workspace / "weights.bin").write_bytes(b"half")
(store.checkpoints(key) / "epoch.pt").write_bytes(b"state")
print("held", flush=True)
"""


@pytest.fixture
def hasty(store) -> Store:
    """The same store, where leases expire soon."""
    return Store(store.root, heartbeat=0.05, expiry=0.3)


def test_a_process_of_another_user_is_alive(monkeypatch):
    def kill(pid, number):
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert is_alive(1)


def test_one_process_asking_twice_is_told_who_holds_the_lease(either):
    assert either.holder(caae()) is None
    with either.lease(caae()) as lease:
        with pytest.raises(LeaseHeld, match=f"process {os.getpid()} on") as held:
            either.lease(caae())
        assert held.value.holder.pid == os.getpid()
        assert abs(held.value.holder.since - time.time()) < 5
        either.lease(caae(decoder_depth=4)).release()
        lease.check()
    assert either.holder(caae()) is None
    either.lease(caae()).release()


def test_an_exception_releases_the_lease_and_keeps_the_checkpoints(either):
    def make(workspace, checkpoints, lease):
        (checkpoints / "epoch.pt").write_bytes(b"state")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build(either, caae(), make)
    assert either.holder(caae()) is None
    assert list((either.root / "tmp").iterdir()) == []
    assert (either.checkpoints(caae()) / "epoch.pt").read_bytes() == b"state"


def test_heartbeats_keep_a_lease_beyond_its_expiry(tmp_path):
    store = Store(tmp_path, heartbeat=0.05, expiry=1.0)
    with store.lease(caae()):
        time.sleep(1.3)
        assert store.holder(caae()).age < 1.0
        with pytest.raises(LeaseHeld):
            store.lease(caae())


def test_clocks_of_hosts_need_not_agree(store, monkeypatch):
    with store.lease(caae()):
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + 86_400)
        assert store.holder(caae()).age < 10


def test_a_killed_holder_on_this_host_is_replaced_at_once(either, start):
    process = start(either.root, HOLD.format(location=either.location, expiry=1000) + "time.sleep(60)")
    assert process.stdout.readline() == "held\n"
    patient = open_store(either.location, heartbeat=0.05, expiry=1000)
    assert patient.holder(caae()).pid == process.pid
    mine = patient.workspace(caae())
    assert len(list((either.root / "tmp").iterdir())) == 2
    with pytest.raises(LeaseHeld):
        patient.lease(caae())

    process.kill()
    process.wait()
    assert patient.holder(caae()) is None
    with patient.lease(caae()):
        assert patient.holder(caae()).pid == os.getpid()

    reopened = open_store(either.location)
    assert list((either.root / "tmp").iterdir()) == [mine]
    assert (reopened.checkpoints(caae()) / "epoch.pt").read_bytes() == b"state"


def test_a_killed_holder_elsewhere_is_replaced_after_expiry(store, start):
    process = start(store.root, HOLD.format(location=store.location, expiry=1.0) + "time.sleep(60)")
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.wait()
    (note,) = (store.root / "leases" / caae().digest).iterdir()
    written = time.monotonic()  # which counts as a last heartbeat
    note.write_text(note.read_text().replace(json.loads(note.read_text())["machine"], "elsewhere"))

    patient = Store(store.root, heartbeat=0.05, expiry=1.0)
    ages = []
    with patient.lease(caae(), wait=lambda holder: ages.append(holder.age)):
        assert time.monotonic() - written > 1.0
    assert ages == sorted(ages)
    assert len(ages) > 3


def test_a_superseded_holder_notices_and_cannot_disturb_its_successor(either, start):
    expiry = 0.3 if either.location.startswith("/") else 3.0  # a bucket tells ages in whole seconds
    hasty = open_store(either.location, heartbeat=0.05, expiry=expiry)
    code = (
        HOLD.format(location=either.location, expiry=expiry)
        + """
eventually(lambda: lease.lost)
try:
    lease.check()
except LeaseLost as error:
    print("lost", flush=True)
eventually(lambda: (root / "built").exists())
artifact = store.publish(key, workspace, {})
lease.release()
print(artifact.file("weights.bin").stat().st_size)
"""
    )
    process = start(either.root, code)
    assert process.stdout.readline() == "held\n"
    os.kill(process.pid, signal.SIGSTOP)
    eventually(lambda: hasty.holder(caae()) is None)
    assert either.holder(caae()).pid == process.pid  # by a longer expiry it may still live
    with hasty.lease(caae()) as lease:
        os.kill(process.pid, signal.SIGCONT)
        assert process.stdout.readline() == "lost\n"
        workspace = hasty.workspace(caae())
        hasty.publish(caae(), workspace, make_weights(workspace, None, lease))
        (either.root / "built").touch()
        assert outputs([process]) == [["7000"]]
        assert not lease.lost
        assert either.holder(caae()).pid == os.getpid()


@pytest.mark.parametrize("passed", [1, 2])
def test_a_lease_number_of_the_past_is_not_taken_again(store, monkeypatch, passed):
    other = Store(store.root)

    def some_leases_pass_meanwhile(key):
        monkeypatch.undo()
        for _ in range(passed):
            other.lease(key).release()

    monkeypatch.setattr(store.leases, "holder", some_leases_pass_meanwhile)
    assert store.leases.take(caae()) is None
    assert [path.name for path in (store.root / "leases" / caae().digest).iterdir()] == [f"{passed}.released"]
    with store.lease(caae()) as lease:
        assert lease.file.number == passed + 1


def test_taking_and_looking_up_a_lease_looks_at_no_other_key(store, monkeypatch):
    store.lease(caae(decoder_depth=4)).release()
    looked, real = set(), os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: looked.add(os.fspath(folder)) or real(folder))
    with store.lease(caae()):
        assert store.holder(caae())
    assert looked == {str(store.root / "leases" / caae().digest)}


def test_a_lease_whose_file_is_gone_is_lost_and_not_brought_back(either):
    with either.lease(caae()) as lease:
        either.storage.remove(lease.file.name)
        eventually(lambda: lease.lost)
        with pytest.raises(LeaseLost, match="caae"):
            lease.check()
        with pytest.raises(FileNotFoundError):
            either.storage.touch(lease.file.name)
    assert either.storage.entries("leases/") == {}


def test_an_unfinished_lease_note_counts_as_held_until_it_expires(store, hasty):
    store.storage.create(f"leases/{caae().digest}/7", b"")
    holder = store.holder(caae())
    assert (holder.host, holder.pid) == ("an unknown host", 0)
    assert store.leases._holder(b"", 10.0).since == pytest.approx(time.time() - 10, abs=5)
    eventually(lambda: hasty.holder(caae()) is None)
    with hasty.lease(caae()) as lease:
        assert lease.file.number == 8


@pytest.mark.parametrize("damaged_before", [False, True])
def test_processes_wanting_one_stage_build_it_once(either, start, tmp_path, damaged_before):
    if damaged_before:
        damage(build(either, caae(), make_weights), flip_a_bit, tmp_path / "scratch")
    code = f"""
def make(workspace, checkpoints, lease):
    with open(root / "builds", "a") as file:
        file.write(f"{{os.getpid()}}\\n")
    time.sleep(0.4)
    return make_weights(workspace, checkpoints, lease)
store = open_store({either.location!r}, heartbeat=0.05, expiry=20)
waited_for = set()
(root / f"ready-{{os.getpid()}}").touch()
eventually(lambda: len(list(root.glob("ready-*"))) == 3)
artifact = build(store, key, make, wait=lambda holder: waited_for.add(holder.pid))
print(artifact.key.digest, *waited_for)
"""
    processes = [start(tmp_path, code) for _ in range(3)]
    results = outputs(processes)
    (builder,) = (tmp_path / "builds").read_text().split()
    for process, (digest, *waited_for) in zip(processes, results, strict=True):
        assert digest == caae().digest
        if str(process.pid) == builder:
            assert waited_for == []
        else:
            assert builder in waited_for
    assert either.find(caae()) is not None


def test_leases_exclude_each_other_when_taken_and_released_at_full_speed(either, start, tmp_path):
    code = f"""
store = open_store({either.location!r}, heartbeat=0.02, expiry=20)
counter = root / "counter"
for _ in range(15):
    with store.lease(key, wait=lambda holder: None) as lease:
        count = int(counter.read_text())
        time.sleep(0.002)
        counter.write_text(str(count + 1))
        assert not lease.lost
"""
    (tmp_path / "counter").write_text("0")
    outputs([start(tmp_path, code) for _ in range(3)])
    assert (tmp_path / "counter").read_text() == "45"
    assert list(either.storage.entries(f"leases/{caae().digest}/")) == [f"leases/{caae().digest}/45.released"]


def test_what_is_being_built_is_told_with_its_inputs(either, monkeypatch):
    read, real = [], either.storage.read
    monkeypatch.setattr(either.storage, "read", lambda name: read.append(name) or real(name))
    with either.lease(segmentor(caae())) as lease:
        for depth in range(3):
            either.lease(caae(decoder_depth=depth)).release()
        read.clear()
        assert either.leases.live() == {segmentor(caae()).digest: [caae().digest]}
        assert read == [lease.file.name], "the others' names say that they were released"
    assert either.leases.live() == {}


# A folder that is away


def test_a_folder_that_vanishes_for_a_while_loses_nothing(tmp_path, caplog):
    store = Store(tmp_path / "store", heartbeat=0.05, expiry=20, patience=30)
    build(store, caae(), make_weights)
    away = tmp_path / "away"
    with store.lease(caae(decoder_depth=4)) as lease:
        os.rename(store.root, away)
        back = threading.Timer(0.5, lambda: os.rename(away, store.root))
        back.start()
        assert store.find(caae()) is not None, "which is not the same as not published"
        back.join()
        assert "cannot be reached, trying again" in caplog.text
        assert "heartbeat of caae" in caplog.text
        lease.check()
        eventually(lambda: store.holder(caae(decoder_depth=4)).age < 0.2)


def test_a_folder_that_stays_away_is_given_up(tmp_path):
    store = Store(tmp_path / "store", patience=0.2)
    os.rename(store.root, tmp_path / "away")
    for act in (
        lambda: store.find(caae()),
        lambda: store.find_many([caae(lr=n) for n in range(1000)]),
        lambda: store.published(["caae"]),
        lambda: store.newest_first("caae"),
        lambda: store.holder(caae()),
        lambda: store.workspace(caae()),
    ):
        with pytest.raises(StorageUnreachable, match=f"the store {store.root} could not be reached"):
            act()
