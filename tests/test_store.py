"""Publishing and finding artifacts: many publishers, full disks and forbidden folders."""

import errno
import logging
import os
import subprocess
import threading
from pathlib import Path

import pytest

from semformer.errors import StoreError
from semformer.keys import StageKey
from semformer.store import DamagedArtifact, Store, open_store
from semformer.store.processes import machine
from tests.artifacts import (
    build,
    caae,
    damage,
    fill,
    flip_a_bit,
    make_weights,
    outputs,
    publish,
    segmentor,
    visible,
)

# Publish and find


def test_publish_then_find_returns_the_same_files_and_info(either):
    key = caae()
    assert either.find(key) is None
    checkpoints = either.checkpoints(key)
    (checkpoints / "epoch.pt").write_bytes(b"state")
    published = build(either, key, make_weights)

    found = open_store(either.location).find(key)
    assert found == published
    assert found.key.spec == key.spec
    assert found.info["metrics"] == {"caae/val/loss": 0.25}
    assert {"created", "host"} <= found.info.keys()
    assert found.file("maps/0.bin").read_bytes() == bytes(range(256)) * 40
    assert found.file("weights.bin").read_bytes() == b"weights" * 1000
    with pytest.raises(DamagedArtifact, match=r"no file other\.bin"):
        found.file("other.bin")
    assert not checkpoints.exists()
    assert list((either.root / "tmp").iterdir()) == []
    assert visible(either) == [str(key)]


def test_a_second_build_makes_nothing(either):
    first = build(either, caae(), make_weights)
    assert build(either, caae(), lambda *_: pytest.fail("built again")) == first


def test_workspaces_of_dead_processes_are_removed_on_this_machine_alone(tmp_path):
    store = Store(tmp_path / "store")
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = [f"caae-0123456789ab.{host}.{pid}.x" for host in (machine(), "another") for pid in (dead.pid, os.getpid())]
    for name in names:
        (store.root / "tmp" / name).mkdir()
    Store(tmp_path / "store")
    assert {path.name for path in (store.root / "tmp").iterdir()} == set(names[1:])


def test_checkpoints_stay_until_what_they_led_to_is_published(either, monkeypatch):
    (either.checkpoints(caae()) / "epoch").write_text("1")
    either.save_checkpoints(caae())
    workspace = either.workspace(caae())
    make_weights(workspace, None, None)
    with monkeypatch.context() as full:
        full.setattr(either, "_install", raise_full)
        with pytest.raises(StoreError):
            either.publish(caae(), workspace, {})
    assert (open_store(either.location).checkpoints(caae()) / "epoch").read_text() == "1"


def raise_full(*arguments, **options):
    raise StoreError("the store is full")


def test_a_store_that_must_not_wait_takes_no_lease_with_patience(either):
    hasty = either.patient(0.0)
    assert (hasty.storage.patience, hasty.leases.storage.patience) == (0.0, 0.0)
    assert either.storage.patience > 0


def test_an_unpublished_workspace_is_invisible(either):
    workspace = either.workspace(caae())
    make_weights(workspace, None, None)
    assert either.find(caae()) is None
    assert visible(either) == []


def test_a_clock_of_another_user_is_replaced(store, monkeypatch):
    real = Path.touch

    def forbidden_once(path, *arguments):
        if path.name == "clock":
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        real(path, *arguments)

    before = (store.root / "clock").stat().st_ino
    monkeypatch.setattr(Path, "touch", forbidden_once)
    assert store.holder(caae()) is None
    store.lease(caae()).release()
    assert (store.root / "clock").stat().st_ino != before


def test_a_store_that_is_away_while_it_is_published_into_is_waited_for(tmp_path):
    store = Store(tmp_path / "store", patience=20)
    workspace = store.workspace(caae())
    info = make_weights(workspace, None, None)
    real = store.storage.publish

    def away_for_a_moment(*arguments):
        os.rename(store.root, tmp_path / "away")
        threading.Timer(0.5, lambda: os.rename(tmp_path / "away", store.root)).start()
        return real(*arguments)

    store.storage.publish = away_for_a_moment
    store.publish(caae(), workspace, info)
    assert store.find(caae())


def test_planning_checks_sizes_but_reads_no_contents(either, tmp_path):
    artifact = build(either, caae(), make_weights)
    damage(artifact, flip_a_bit, tmp_path / "scratch")
    assert either.find(caae(), verify=False) == artifact
    damage(artifact, lambda folder: os.truncate(folder / "weights.bin", 10), tmp_path / "again")
    assert either.find(caae(), verify=False) is None


def test_listing_skips_a_damaged_manifest_with_a_warning(either, tmp_path, caplog):
    build(either, caae(), make_weights)
    other = build(either, caae(decoder_depth=4), make_weights)
    damage(other, lambda folder: os.truncate(folder / "manifest.json", 50), tmp_path / "scratch")
    assert visible(either) == [str(caae())]
    assert f"skipping damaged artifact caae {other.key.digest}: manifest.json is unreadable" in caplog.text
    assert either.published() == {caae().digest, other.key.digest}, "which nobody has read"


def test_what_is_published_is_told_by_names_alone(either):
    source = caae()
    assert either.published() == set()
    build(either, source, make_weights)
    build(either, segmentor(source), make_weights)
    either.workspace(caae(decoder_depth=4))
    assert either.published() == {source.digest, segmentor(source).digest}
    assert either.published(["segmentor", "cams"]) == {segmentor(source).digest}


def test_the_newest_are_told_first_by_names_and_ages_alone(store):
    artifacts = [publish(store, caae(decoder_depth=n)) for n in range(5)]
    for age, artifact in enumerate(artifacts):
        os.utime(artifact.path / "manifest.json", (1e9 - age, 1e9 - age))
    assert store.newest_first("caae") == [artifact.key.digest for artifact in artifacts]
    assert store.newest_first("segmentor") == []


def test_many_are_found_at_once_without_what_is_missing_or_damaged(either, tmp_path):
    keys = [caae(decoder_depth=n) for n in range(4)]
    good, short, flipped = (build(either, key, make_weights) for key in keys[:3])
    damage(short, lambda folder: os.truncate(folder / "weights.bin", 10), tmp_path / "short")
    damage(flipped, flip_a_bit, tmp_path / "flipped")
    assert either.find_many(keys) == {keys[0]: good, keys[2]: flipped}
    assert either.find_many(keys, verify=True) == {keys[0]: good}
    assert len({name.split("/")[1] for name in either.storage.entries("damaged/")}) == 2


def test_an_artifact_is_read_with_all_that_it_was_made_from(either):
    source = caae()
    maps = StageKey("cams", {"inputs": {"segmentor": segmentor(source).digest}})
    for key in (source, segmentor(source), maps, caae(decoder_depth=4)):
        publish(either, key)
    gone = StageKey("cams", {"inputs": {"segmentor": segmentor(caae(decoder_depth=2)).digest}})
    publish(either, gone)
    found = either.read_with_inputs([("cams", maps.digest), ("cams", gone.digest)])
    assert {artifact.key for artifact in found.values()} == {maps, segmentor(source), source, gone}
    found = either.read_with_inputs([("cams", maps.digest)], but={segmentor(source).digest})
    assert list(found) == [maps.digest]


def test_publish_refuses_what_it_cannot_keep_and_removes_the_workspace(either, tmp_path):
    def publish(info=None, fill=lambda workspace: None):
        workspace = either.workspace(caae())
        fill(workspace)
        either.publish(caae(), workspace, info or {})

    with pytest.raises(ValueError, match="info, miou: nan"):
        publish({"miou": float("nan")})
    with pytest.raises(ValueError, match="not a regular file"):
        publish(fill=lambda workspace: (workspace / "link").symlink_to(tmp_path))
    with pytest.raises(ValueError, match=r"may not write manifest\.json"):
        publish(fill=lambda workspace: (workspace / "manifest.json").write_text("{}"))
    with pytest.raises(ValueError, match="not a workspace"):
        either.publish(caae(), tmp_path, {})
    assert tmp_path.exists()
    assert list((either.root / "tmp").iterdir()) == []
    assert visible(either) == []


# Many processes


def test_two_processes_publishing_the_same_keys_at_once_agree_on_one_winner(either, start, tmp_path):
    code = f"""
store = open_store({either.location!r})
keys = [caae(decoder_depth=n) for n in range(10)]
folders = []
for key in keys:
    folders.append(store.workspace(key))
    (folders[-1] / "weights.bin").write_bytes(os.urandom(50_000))
(root / f"ready-{{os.getpid()}}").touch()
eventually(lambda: len(list(root.glob("ready-*"))) == 2)
for key, folder in zip(keys, folders, strict=True):
    artifact = store.publish(key, folder, {{"by": os.getpid()}})
    assert store.find(key) == artifact
    print(artifact.info["by"])
"""
    processes = [start(tmp_path, code) for _ in range(2)]
    ours, theirs = outputs(processes)
    assert ours == theirs
    assert set(ours) <= {str(process.pid) for process in processes}
    assert len(ours) == 10
    assert list((either.root / "tmp").iterdir()) == []
    assert either.storage.entries("damaged/") == {}


def test_a_late_publisher_keeps_the_first_artifact(either, caplog):
    late = either.workspace(caae())
    (late / "weights.bin").write_bytes(b"late")
    first = build(either, caae(), make_weights)
    with caplog.at_level(logging.INFO):
        assert either.publish(caae(), late, {}) == first
    assert "keeping theirs" in caplog.text
    assert not late.exists()


def test_a_late_publisher_replaces_a_damaged_first_artifact(either, tmp_path):
    late = either.workspace(caae())
    (late / "weights.bin").write_bytes(b"late")
    damage(build(either, caae(), make_weights), flip_a_bit, tmp_path / "scratch")
    either.publish(caae(), late, {})
    assert either.find(caae()).file("weights.bin").read_bytes() == b"late"


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
    with pytest.raises(StoreError) as told:
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


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 6])
def test_a_file_server_that_fails_for_a_moment_while_publishing_is_waited_for(store, monkeypatch, caplog, call):
    build(store, caae(decoder_depth=4), make_weights)
    fail_fsync_at(monkeypatch, call, errno.ESTALE)
    artifact = build(store, caae(), make_weights)
    assert "cannot be reached, trying again" in caplog.text
    assert store.find(caae()) == artifact


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
except StoreError as error:
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


@pytest.mark.parametrize("when", ["before the lease", "while it is made", "while it is published"])
def test_a_disk_that_is_really_full_is_the_stores_fault_and_can_be_emptied(small_disk, when):
    store, fillers = Store(small_disk / "store"), []

    def make(workspace, checkpoints, lease):
        if when == "while it is made":
            fillers.append(fill(small_disk))
        info = make_weights(workspace, checkpoints, lease)
        if when == "while it is published":
            fillers.append(fill(small_disk))
        return info

    if when == "before the lease":
        fillers.append(fill(small_disk))
    with pytest.raises(StoreError, match=rf"{caae()}.* failed in the store {store.root}: No space left .* free more"):
        build(store, caae(), make)
    assert visible(store) == []
    fillers[0].unlink()
    assert build(store, caae(), make_weights)


def test_a_disk_that_is_really_read_only_is_the_stores_fault(small_disk):
    store = Store(small_disk / "store")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for act in (
        lambda: store.workspace(caae()),
        lambda: store.checkpoints(caae()),
        lambda: store.lease(caae()),
        lambda: store.holder(caae()),
        lambda: Store(store.root),
    ):
        with pytest.raises(StoreError, match=f"{store.root}.*Read-only file system.*writable"):
            act()


def test_a_full_disk_hidden_behind_another_error_is_told(store):
    def make(workspace, checkpoints, lease):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            raise RuntimeError("unexpected pos 576 vs 534")

    with pytest.raises(StoreError, match="No space left"):
        build(store, caae(), make)


def test_errors_that_are_not_the_stores_pass_unchanged(store, tmp_path):
    def make(workspace, checkpoints, lease):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "data" / "1.jpg"))

    with pytest.raises(PermissionError):
        build(store, caae(), make)


def test_a_root_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match=f"cannot use {root} as the store"):
            Store(root)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_forbidden_root_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="Permission denied"):
        Store(tmp_path / "store")
