import errno
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from semformer import store as store_module
from semformer.errors import UserError
from semformer.store import DamagedArtifact, LeaseHeld, LeaseLost, StageKey, Store

REPOSITORY = Path(__file__).resolve().parents[1]
SPEC = {
    "stage": "caae",
    "version": 1,
    "params": {"decoder_depth": 8, "merge": "sum", "lr": 0.1},
    "inputs": {},
    "data": {"train": "d0"},
    "seed": 0,
}


def caae(**params) -> StageKey:
    return StageKey("caae", {**SPEC, "params": {**SPEC["params"], **params}})


def segmentor(source: StageKey, *, sigma: float = 0.1, **changes) -> StageKey:
    spec = {"stage": "segmentor", "version": 1, "params": {"sigma": sigma}, "inputs": {"caae": source.digest}}
    return StageKey("segmentor", {**spec, "data": {"train": "d0"}, "seed": 0, **changes})


def build(store: Store, key: StageKey, make, wait=None):
    """Single flight, as the pipeline composes it from the store's pieces."""
    if found := store.find(key):
        return found
    with store.lease(key, wait=wait) as lease:
        if found := store.find(key):
            return found
        workspace = store.workspace(key)
        with store.writing(key, workspace):
            info = make(workspace, store.checkpoints(key), lease)
            lease.check()
        return store.publish(key, workspace, info)


def make_weights(workspace: Path, checkpoints: Path, lease) -> dict:
    (workspace / "maps").mkdir()
    (workspace / "maps" / "0.bin").write_bytes(bytes(range(256)) * 40)
    (workspace / "weights.bin").write_bytes(b"weights" * 1000)
    return {"seconds": 1.5, "metrics": {"caae/val/loss": 0.25}}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store", heartbeat=0.05, expiry=20)


@pytest.fixture
def hasty(store) -> Store:
    """The same store, where leases expire soon."""
    return Store(store.root, heartbeat=0.05, expiry=0.3)


@pytest.fixture
def start():
    """Start a Python process that runs the given code with this module's names and `root`, `key` at hand."""
    processes = []

    def start(root: Path, code: str) -> subprocess.Popen:
        head = "from test_store import *\nkey = caae()\n" + f"root = Path({str(root)!r})\n"
        path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
        command = [sys.executable, "-c", head + code]
        processes.append(
            subprocess.Popen(command, text=True, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path})
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def outputs(processes: list[subprocess.Popen]) -> list[list[str]]:
    texts = [process.communicate(timeout=30)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return texts


def eventually(condition, seconds: float = 10.0):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
    return result


def visible(store: Store) -> list[str]:
    return [str(artifact.key) for artifact in store.artifacts()]


# Keys


def test_digest_is_the_sha256_of_canonical_json():
    key = StageKey("caae", {"stage": "caae", "seed": 0, "params": {"b": (1, 2.5), "a": None}})
    text = '{"params":{"a":null,"b":[1,2.5]},"seed":0,"stage":"caae"}'
    assert key.digest == hashlib.sha256(text.encode()).hexdigest()
    assert key.short == key.digest[:12]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"x": 1, "y": {"p": 2, "q": 3}}, {"y": {"q": 3, "p": 2}, "x": 1}),
        ({"x": (1, (2, 3))}, {"x": [1, [2, 3]]}),
        ({"x": 0.1}, {"x": 0.1000000000000000055}),
        ({"x": 1e-3}, {"x": 0.001}),
        ({"x": "é"}, {"x": "\u00e9"}),
    ],
)
def test_equal_values_have_equal_keys(a, b):
    assert StageKey("caae", a) == StageKey("caae", b)
    assert len({StageKey("caae", a), StageKey("caae", b)}) == 1


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"x": 0.1}, {"x": 0.1 + 1e-17 + 1.4e-17}),
        ({"x": 1}, {"x": True}),
        ({"x": "1"}, {"x": 1}),
        ({"x": None}, {}),
        ({"x": [1, 2]}, {"x": [2, 1]}),
        ({"x": {"y": 1}}, {"y": {"x": 1}}),
        ({"x": "a,b"}, {"x": ["a", "b"]}),
    ],
)
def test_different_values_have_different_keys(a, b):
    assert StageKey("caae", a) != StageKey("caae", b)


def test_the_stage_is_part_of_the_key():
    assert StageKey("caae", {"x": 1}) != StageKey("cams", {"x": 1})
    with pytest.raises(ValueError, match="says stage caae"):
        StageKey("cams", SPEC)
    for name in ("tmp", "leases", "../up", "", "A"):
        with pytest.raises(ValueError, match="cannot name a stage"):
            StageKey(name, {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), Path("x"), {1: 2}, {1, 2}, b"x"])
def test_what_json_cannot_hold_is_refused_by_name(value):
    with pytest.raises((ValueError, TypeError), match="params, odd"):
        caae(odd=value)


def test_a_key_does_not_follow_later_changes_of_its_spec():
    params = {"depth": 8}
    key = StageKey("caae", {"params": params})
    params["depth"] = 4
    assert key.spec["params"]["depth"] == 8
    assert key == StageKey("caae", {"params": {"depth": 8}})


# Publish and find


def test_publish_then_find_returns_the_same_files_and_info(store):
    key = caae()
    assert store.find(key) is None
    checkpoints = store.checkpoints(key)
    (checkpoints / "epoch.pt").write_bytes(b"state")
    published = build(store, key, make_weights)

    found = Store(store.root).find(key)
    assert found == published
    assert found.key.spec == key.spec
    assert found.info["metrics"] == {"caae/val/loss": 0.25}
    assert {"created", "host"} <= found.info.keys()
    assert found.file("maps/0.bin").read_bytes() == bytes(range(256)) * 40
    assert found.file("weights.bin").read_bytes() == b"weights" * 1000
    with pytest.raises(DamagedArtifact, match=r"no file other\.bin"):
        found.file("other.bin")
    assert not checkpoints.exists()
    assert list((store.root / "tmp").iterdir()) == []
    assert visible(store) == [str(key)]


def test_a_second_build_makes_nothing(store):
    first = build(store, caae(), make_weights)
    assert build(store, caae(), lambda *_: pytest.fail("built again")) == first


def test_an_unpublished_workspace_is_invisible(store):
    workspace = store.workspace(caae())
    make_weights(workspace, None, None)
    assert store.find(caae()) is None
    assert visible(store) == []


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "weights.bin").read_bytes())
    content[1234] ^= 4
    (folder / "weights.bin").write_bytes(content)


def change_a_metric(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    assert "0.25" in text
    (folder / "manifest.json").write_text(text.replace("0.25", "0.26"))


def list_a_file_outside(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../x"] = manifest["files"]["weights.bin"]
    del manifest["sha256"]
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGES = {
    "bit flipped": (flip_a_bit, "sha256"),
    "truncated": (lambda folder: os.truncate(folder / "weights.bin", 10), "10 bytes instead of 7000"),
    "file missing": (lambda folder: (folder / "maps" / "0.bin").unlink(), "maps/0.bin is missing"),
    "manifest missing": (lambda folder: (folder / "manifest.json").unlink(), "half-written"),
    "manifest truncated": (lambda folder: os.truncate(folder / "manifest.json", 50), "unreadable"),
    "manifest emptied": (lambda folder: (folder / "manifest.json").write_text("[]"), "unreadable"),
    "metric changed": (change_a_metric, "altered"),
    "path outside": (list_a_file_outside, "outside the artifact"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_artifact_is_reported_kept_aside_and_rebuilt(store, caplog, name):
    damage, reason = DAMAGES[name]
    key = caae()
    good = build(store, key, make_weights)
    damage(good.path)

    assert store.find(key) is None
    assert f"artifact {key} is damaged" in caplog.text
    assert reason in caplog.text
    (aside,) = (store.root / "damaged").iterdir()
    assert aside.name.startswith(f"caae-{key.short}-")
    assert list(aside.iterdir())
    assert store.why(key) == f"the published artifact was damaged (moved to {aside})"

    rebuilt = build(store, key, make_weights)
    assert rebuilt.files == good.files
    assert store.find(key) == rebuilt
    assert store.why(key) == "already published"


def test_a_slow_reader_of_damage_leaves_the_rebuilt_artifact_alone(store, monkeypatch):
    key, other, real = caae(), Store(store.root), store_module._check_files
    flip_a_bit(build(store, key, make_weights).path)

    def rebuilt_by_another_meanwhile(artifact, *, contents):
        monkeypatch.setattr(store_module, "_check_files", real)
        build(other, key, make_weights)
        real(artifact, contents=contents)
        raise DamagedArtifact("as it was before")

    monkeypatch.setattr(store_module, "_check_files", rebuilt_by_another_meanwhile)
    assert store.find(key) is None
    assert store.find(key) is not None
    assert len(list((store.root / "damaged").iterdir())) == 1


def test_planning_checks_sizes_but_reads_no_contents(store):
    artifact = build(store, caae(), make_weights)
    flip_a_bit(artifact.path)
    assert store.find(caae(), verify=False) == artifact
    os.truncate(artifact.file("weights.bin"), 10)
    assert store.find(caae(), verify=False) is None


def test_listing_skips_a_damaged_manifest_with_a_warning(store, caplog):
    build(store, caae(), make_weights)
    other = build(store, caae(decoder_depth=4), make_weights)
    (other.path / "manifest.json").unlink()
    assert visible(store) == [str(caae())]
    assert "skipping damaged artifact" in caplog.text
    assert other.path.exists()


def test_publish_refuses_what_it_cannot_keep_and_removes_the_workspace(store, tmp_path):
    def publish(info=None, fill=lambda workspace: None):
        workspace = store.workspace(caae())
        fill(workspace)
        store.publish(caae(), workspace, info or {})

    with pytest.raises(ValueError, match="info, miou: nan"):
        publish({"miou": float("nan")})
    with pytest.raises(ValueError, match="not a regular file"):
        publish(fill=lambda workspace: (workspace / "link").symlink_to(tmp_path))
    with pytest.raises(ValueError, match=r"may not write manifest\.json"):
        publish(fill=lambda workspace: (workspace / "manifest.json").write_text("{}"))
    with pytest.raises(ValueError, match="not a workspace"):
        store.publish(caae(), tmp_path, {})
    assert tmp_path.exists()
    assert list((store.root / "tmp").iterdir()) == []
    assert visible(store) == []


# Many processes


def test_two_processes_publishing_the_same_keys_at_once_agree_on_one_winner(store, start):
    code = """
store = Store(root)
keys = [caae(decoder_depth=n) for n in range(10)]
folders = []
for key in keys:
    folders.append(store.workspace(key))
    (folders[-1] / "weights.bin").write_bytes(os.urandom(50_000))
(root / f"ready-{os.getpid()}").touch()
eventually(lambda: len(list(root.glob("ready-*"))) == 2)
for key, folder in zip(keys, folders, strict=True):
    artifact = store.publish(key, folder, {"by": os.getpid()})
    assert store.find(key) == artifact
    print(artifact.info["by"])
"""
    processes = [start(store.root, code) for _ in range(2)]
    ours, theirs = outputs(processes)
    assert ours == theirs
    assert set(ours) <= {str(process.pid) for process in processes}
    assert len(ours) == 10
    assert list((store.root / "tmp").iterdir()) == []
    assert list((store.root / "damaged").iterdir()) == []


def test_a_late_publisher_keeps_the_first_artifact(store, caplog):
    late = store.workspace(caae())
    (late / "weights.bin").write_bytes(b"late")
    first = build(store, caae(), make_weights)
    with caplog.at_level(logging.INFO):
        assert store.publish(caae(), late, {}) == first
    assert "keeping theirs" in caplog.text
    assert not late.exists()


def test_a_late_publisher_replaces_a_damaged_first_artifact(store):
    late = store.workspace(caae())
    (late / "weights.bin").write_bytes(b"late")
    flip_a_bit(build(store, caae(), make_weights).path)
    store.publish(caae(), late, {})
    assert store.find(caae()).file("weights.bin").read_bytes() == b"late"


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


# Leases

HOLD = """
store = Store(root, heartbeat=0.05, expiry={expiry})
lease = store.lease(key)
workspace = store.workspace(key)
(workspace / "weights.bin").write_bytes(b"half")
(store.checkpoints(key) / "epoch.pt").write_bytes(b"state")
print("held", flush=True)
"""


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

    monkeypatch.setattr(store, "holder", two_generations_pass_meanwhile)
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


# Full disks, forbidden folders


def fail_fsync_at(monkeypatch, call: int, code: int) -> None:
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_fails_while_publishing_changes_nothing_visible(store, monkeypatch, call, code):
    def make(workspace, checkpoints, lease):
        (checkpoints / "epoch.pt").write_bytes(b"state")
        return make_weights(workspace, checkpoints, lease)

    kept = build(store, caae(decoder_depth=4), make)
    fail_fsync_at(monkeypatch, call, code)
    with pytest.raises(UserError) as told:
        build(store, caae(), make)
    for word in (
        str(store.root),
        os.strerror(code),
        str(caae()),
        "0.0 MB" if call == 1 else "MB",
        "checkpoints",
    ):
        assert word in str(told.value)
    assert store.find(caae()) is None
    assert visible(store) == [str(kept.key)]
    assert list((store.root / "tmp").iterdir()) == []
    assert (store.checkpoints(caae()) / "epoch.pt").read_bytes() == b"state"

    monkeypatch.undo()
    assert build(store, caae(), make).files == kept.files


@pytest.mark.parametrize("writer", ["bytes", "safetensors"])
def test_a_real_file_size_limit_while_making_a_stage_is_told(store, start, writer):
    code = f"""
import resource
import numpy
from safetensors.numpy import save_file
def make(workspace, checkpoints, lease):
    (checkpoints / "epoch.pt").write_bytes(b"state")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    if "{writer}" == "bytes":
        (workspace / "weights.bin").write_bytes(bytes(1_000_000))
    else:
        save_file(dict(w=numpy.zeros(1_000_000, "uint8")), workspace / "weights.safetensors")
try:
    build(Store(root), key, make)
except UserError as error:
    print(error)
"""
    (words,) = outputs([start(store.root, code)])
    text = " ".join(words)
    size = " (which takes at least 0.1 MB)" if writer == "bytes" else ""  # safetensors removes its half file
    assert f"writing {caae()}{size} failed in the store {store.root}" in text
    assert os.strerror(errno.EFBIG) in text
    assert visible(store) == []
    assert store.find(caae()) is None
    assert list((store.root / "tmp").iterdir()) == []
    assert (store.checkpoints(caae()) / "epoch.pt").read_bytes() == b"state"


def test_a_full_disk_hidden_behind_another_error_is_told(store):
    def make(workspace, checkpoints, lease):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            raise RuntimeError("unexpected pos 576 vs 534")

    with pytest.raises(UserError, match="No space left"):
        build(store, caae(), make)


def test_errors_that_are_not_the_stores_pass_unchanged(store, tmp_path):
    def make(workspace, checkpoints, lease):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "data" / "1.jpg"))

    with pytest.raises(PermissionError):
        build(store, caae(), make)


def test_a_root_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"cannot use {root} as the store"):
            Store(root)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_forbidden_root_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        Store(tmp_path / "store")


# Why


def test_why_names_what_changed_since_the_nearest_artifact(store):
    assert store.why(caae()) == "nothing published for this stage yet"
    build(store, caae(), make_weights)
    build(store, caae(decoder_depth=2, merge="max"), make_weights)
    assert store.why(caae()) == "already published"
    assert store.why(caae(decoder_depth=8.0)) == "caae.decoder_depth 8 -> 8.0"
    assert store.why(caae(decoder_depth=4)) == "caae.decoder_depth 8 -> 4"
    assert store.why(caae(merge="max", decoder_depth=3)) == "caae.decoder_depth 2 -> 3"
    assert store.why(caae(lr=0.2, merge="mean")) == "caae.lr 0.1 -> 0.2, caae.merge sum -> mean"
    assert store.why(caae(extra=[1, 2])) == "caae.extra unset -> [1, 2]"
    assert store.why(StageKey("caae", {**SPEC, "seed": 1})) == "seed 0 -> 1"
    assert store.why(StageKey("caae", {**SPEC, "version": 2})) == "caae code version 1 -> 2"
    assert store.why(StageKey("caae", {**SPEC, "data": {"train": "d1"}})) == "data train changed"
    assert store.why(caae(a=1, b=1, c=1, d=1, e=1, f=1)).endswith("caae.d unset -> 1, and 2 more")
    assert visible(Store(store.root)) != []


def test_why_looks_into_changed_inputs(store):
    build(store, caae(), make_weights)
    build(store, segmentor(caae()), make_weights)
    changed = caae(decoder_depth=4)

    assert store.why(segmentor(changed)) == "input caae changed"  # this key has not been seen yet
    store.find(changed)
    inside = "input caae changed (decoder_depth 8 -> 4)"
    assert store.why(segmentor(changed)) == inside
    assert store.why(segmentor(changed, sigma=0.2)) == f"{inside}, segmentor.sigma 0.1 -> 0.2"

    def cams(source):
        return StageKey("cams", {"stage": "cams", "params": {}, "inputs": {"segmentor": source.digest}})

    build(store, cams(segmentor(caae())), make_weights)
    build(store, changed, make_weights)
    build(store, segmentor(changed), make_weights)
    fresh = Store(store.root)
    assert fresh.why(cams(segmentor(changed))) == f"input segmentor changed ({inside})"


def test_why_compares_with_the_artifact_whose_inputs_are_nearest(store):
    near, far = caae(decoder_depth=8), caae(decoder_depth=2, merge="max", lr=0.5)
    for source in (near, far):
        build(store, source, make_weights)
        build(store, segmentor(source), make_weights)
    wanted = caae(decoder_depth=4)
    store.find(wanted)
    assert store.why(segmentor(wanted)) == "input caae changed (decoder_depth 8 -> 4)"
