"""Who may build a key: single flight among threads and processes that are killed, stopped or late."""

import json
import os
import signal
import time

import pytest

from semformer.leases import LeaseHeld, LeaseLost
from semformer.store import Store
from tests.artifacts import build, caae, eventually, flip_a_bit, make_weights, outputs

HOLD = """
store = Store(root, heartbeat=0.05, expiry={expiry})
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


def test_one_process_asking_twice_is_told_who_holds_the_lease(store):
    assert store.holder(caae()) is None
    with store.lease(caae()) as lease:
        with pytest.raises(LeaseHeld, match=f"process {os.getpid()} on") as held:
            store.lease(caae())
        assert held.value.holder.pid == os.getpid()
        assert abs(held.value.holder.since - time.time()) < 5
        store.lease(caae(decoder_depth=4)).release()
        lease.check()
    assert store.holder(caae()) is None
    store.lease(caae()).release()


def test_an_exception_releases_the_lease_and_keeps_the_checkpoints(store):
    def make(workspace, checkpoints, lease):
        (checkpoints / "epoch.pt").write_bytes(b"state")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build(store, caae(), make)
    assert store.holder(caae()) is None
    assert list((store.root / "tmp").iterdir()) == []
    assert (store.checkpoints(caae()) / "epoch.pt").read_bytes() == b"state"


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


def test_a_killed_holder_on_this_host_is_replaced_at_once(store, start):
    process = start(store.root, HOLD.format(expiry=1000) + "time.sleep(60)")
    assert process.stdout.readline() == "held\n"
    patient = Store(store.root, heartbeat=0.05, expiry=1000)
    assert patient.holder(caae()).pid == process.pid
    mine = patient.workspace(caae())
    assert len(list((store.root / "tmp").iterdir())) == 2
    with pytest.raises(LeaseHeld):
        patient.lease(caae())

    process.kill()
    process.wait()
    assert patient.holder(caae()) is None
    with patient.lease(caae()):
        assert patient.holder(caae()).pid == os.getpid()

    reopened = Store(store.root)
    assert list((store.root / "tmp").iterdir()) == [mine]
    assert (reopened.checkpoints(caae()) / "epoch.pt").read_bytes() == b"state"


def test_a_killed_holder_elsewhere_is_replaced_after_expiry(store, start):
    process = start(store.root, HOLD.format(expiry=1.0) + "time.sleep(60)")
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.wait()
    (note,) = (store.root / "leases").glob(f"{caae().digest}.*")
    written = time.monotonic()  # which counts as a last heartbeat
    note.write_text(note.read_text().replace(json.loads(note.read_text())["machine"], "elsewhere"))

    patient = Store(store.root, heartbeat=0.05, expiry=1.0)
    ages = []
    with patient.lease(caae(), wait=lambda holder: ages.append(holder.age)):
        assert time.monotonic() - written > 1.0
    assert ages == sorted(ages)
    assert len(ages) > 3


def test_a_superseded_holder_notices_and_cannot_disturb_its_successor(store, hasty, start):
    code = (
        HOLD.format(expiry=0.3)
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
    process = start(store.root, code)
    assert process.stdout.readline() == "held\n"
    os.kill(process.pid, signal.SIGSTOP)
    eventually(lambda: hasty.holder(caae()) is None)
    assert store.holder(caae()).pid == process.pid  # by a longer expiry it may still live
    with hasty.lease(caae()) as lease:
        os.kill(process.pid, signal.SIGCONT)
        assert process.stdout.readline() == "lost\n"
        workspace = store.workspace(caae())
        store.publish(caae(), workspace, make_weights(workspace, None, lease))
        (store.root / "built").touch()
        assert outputs([process]) == [["7000"]]
        assert not lease.lost
        assert store.holder(caae()).pid == os.getpid()


def test_a_lease_number_of_the_past_is_not_taken_again(store, monkeypatch):
    other, taken = Store(store.root), []

    def two_generations_pass_meanwhile(key):
        monkeypatch.undo()
        other.lease(key).release()
        taken.append(other.lease(key))

    monkeypatch.setattr(store.leases, "holder", two_generations_pass_meanwhile)
    with pytest.raises(LeaseHeld):
        store.lease(caae())
    assert taken[0].generation == 2
    assert not (store.root / "leases" / f"{caae().digest}.1").exists()
    taken[0].release()


def test_a_lease_whose_file_is_gone_is_lost(store):
    with store.lease(caae()) as lease:
        next((store.root / "leases").glob(f"{caae().digest}.*")).unlink()
        eventually(lambda: lease.lost)
        with pytest.raises(LeaseLost, match="caae"):
            lease.check()


def test_an_unfinished_lease_note_counts_as_held_until_it_expires(store, hasty):
    (store.root / "leases" / f"{caae().digest}.7").touch()
    assert store.holder(caae()).host == "an unknown host"
    eventually(lambda: hasty.holder(caae()) is None)
    with hasty.lease(caae()) as lease:
        assert lease.generation == 8


@pytest.mark.parametrize("damaged_before", [False, True])
def test_processes_wanting_one_stage_build_it_once(store, start, damaged_before):
    if damaged_before:
        flip_a_bit(build(store, caae(), make_weights).path)
    code = """
def make(workspace, checkpoints, lease):
    with open(root / "builds", "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(0.4)
    return make_weights(workspace, checkpoints, lease)
store = Store(root, heartbeat=0.05, expiry=20)
waited_for = set()
(root / f"ready-{os.getpid()}").touch()
eventually(lambda: len(list(root.glob("ready-*"))) == 3)
artifact = build(store, key, make, wait=lambda holder: waited_for.add(holder.pid))
print(artifact.key.digest, *waited_for)
"""
    processes = [start(store.root, code) for _ in range(3)]
    results = outputs(processes)
    (builder,) = (store.root / "builds").read_text().split()
    for process, (digest, *waited_for) in zip(processes, results, strict=True):
        assert digest == caae().digest
        if str(process.pid) == builder:
            assert waited_for == []
        else:
            assert builder in waited_for
    assert store.find(caae()) is not None


def test_leases_exclude_each_other_when_taken_and_released_at_full_speed(store, start):
    code = """
store = Store(root, heartbeat=0.02, expiry=20)
counter = root / "counter"
for _ in range(15):
    with store.lease(key, wait=lambda holder: None) as lease:
        count = int(counter.read_text())
        time.sleep(0.002)
        counter.write_text(str(count + 1))
        assert not lease.lost
"""
    (store.root / "counter").write_text("0")
    outputs([start(store.root, code) for _ in range(3)])
    assert (store.root / "counter").read_text() == "45"
    assert len(list((store.root / "leases").glob(f"{caae().digest}.*"))) == 1
