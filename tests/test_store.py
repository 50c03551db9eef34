"""Publishing and finding artifacts: damage, many publishers, full disks and forbidden folders."""

import errno
import hashlib
import json
import logging
import os
from pathlib import Path

import pytest

from semformer import store as store_module
from semformer.errors import UserError
from semformer.store import DamagedArtifact, Store
from tests.artifacts import build, caae, flip_a_bit, make_weights, outputs, visible

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
