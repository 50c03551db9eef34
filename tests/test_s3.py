"""What is particular to a store in a bucket: its cache, other nodes, outages, and buckets that cannot be used."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import boto3
import pytest
import torch
from botocore.exceptions import ClientError

from semformer import cli, pipeline
from semformer.config import load_config
from semformer.data.shapes import make_shapes
from semformer.errors import MachineError, StoreError, UserError
from semformer.store import StorageUnreachable, open_store
from semformer.store.cache import IN_USE, Cache
from tests.artifacts import build, caae, eventually, fill, make_weights, visible


@pytest.fixture
def node(bucket, tmp_path):
    """node("a") opens the store as another node would: with a cache of its own."""
    return lambda name, **options: open_store(bucket, cache=tmp_path / name, **options)


def cached(store) -> set[str]:
    files = (path.relative_to(store.root) for path in (store.root / "caae").rglob("*") if path.is_file())
    return {"/".join(file.parts[3:]) for file in files} - {"manifest.json"}


# Other nodes and the cache


def test_another_node_fetches_what_it_reads_and_no_more(node):
    made = build(node("a"), caae(), make_weights)
    other = node("b")
    found = other.find(caae(), verify=False)
    assert (found.info, found.files) == (made.info, made.files)
    assert cached(other) == set()
    assert found.file("weights.bin").read_bytes() == b"weights" * 1000
    assert cached(other) == {"weights.bin"}
    assert other.find(caae()).path == found.path
    assert cached(other) == {"weights.bin", "maps/0.bin"}


def test_a_damaged_file_in_the_cache_is_fetched_again(node, caplog):
    store = node("a")
    path = build(store, caae(), make_weights).file("weights.bin")
    path.write_bytes(b"WEIGHTS" * 1000)
    assert store.find(caae()).file("weights.bin").read_bytes() == b"weights" * 1000
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("gone", ["all", "files and workspaces"])
def test_a_cache_that_was_removed_is_made_again_and_nothing_counts_as_damaged(node, caplog, gone):
    store = node("a")
    build(store, caae(), make_weights)
    shutil.rmtree(store.root if gone == "all" else store.root / "tmp")
    shutil.rmtree(store.root / "caae", ignore_errors=True)
    assert store.find(caae()).file("weights.bin").read_bytes() == b"weights" * 1000
    assert "damaged" not in caplog.text
    shutil.rmtree(store.root)
    assert build(store, caae(decoder_depth=4), make_weights)


def test_the_least_recently_used_files_leave_a_full_cache_and_come_back_when_read(node):
    keys = [caae(decoder_depth=n) for n in range(4)]
    store = node("a", cache_bytes=40_000)  # room for two of 17 kB
    artifacts = [build(store, key, make_weights) for key in keys[:3]]
    assert all((a.path / "weights.bin").exists() for a in artifacts), "all in use a moment ago"
    for age, artifact in zip((3, 1, 2), artifacts, strict=True):  # the second was used last
        then = time.time() - IN_USE - 60 * age
        for path in artifact.path.rglob("*.*"):
            os.utime(path, (then, then))
    build(store, keys[3], make_weights)
    assert [(a.path / "weights.bin").exists() for a in artifacts] == [False, True, False]
    assert artifacts[0].file("weights.bin").read_bytes() == b"weights" * 1000
    assert visible(store) == sorted(map(str, keys))
    assert list((store.root / "tmp").iterdir()) == []


def test_a_cache_with_room_is_not_looked_through_for_each_file(node, monkeypatch):
    store, other = node("a"), node("b")
    artifacts = [build(store, caae(decoder_depth=n), make_weights) for n in range(3)]
    looks, real = [], Cache._files
    monkeypatch.setattr(Cache, "_files", lambda self: looks.append(self.root) or real(self))
    for artifact in artifacts:
        found = other.find(artifact.key, verify=False)
        for name in artifact.files:
            found.file(name)
    assert looks == [other.root]


def test_checkpoints_saved_on_one_node_are_resumed_from_on_another(node):
    first = node("a")

    def killed_after_two_epochs(workspace, checkpoints, lease):
        for epoch in (1, 2):
            (checkpoints / "epoch").write_text(str(epoch))
            first.save_checkpoints(caae())
        (checkpoints / "epoch").write_text("3, which was not saved")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build(first, caae(), killed_after_two_epochs)
    second = node("b")
    assert (second.checkpoints(caae()) / "epoch").read_text() == "2"
    build(second, caae(), make_weights)
    assert second.storage.entries("checkpoints/") == {}
    assert list(second.checkpoints(caae()).iterdir()) == []


def test_checkpoints_are_uploaded_in_the_order_in_which_they_were_written(node, monkeypatch):
    store, uploaded = node("a"), []
    folder = store.checkpoints(caae())
    for then, name in enumerate(("best", "checkpoint", "best.0123.partial", "a-later-one")):
        (folder / name).write_text(name)
        os.utime(folder / name, (then, then))
    monkeypatch.setattr(store.storage, "upload", lambda path, name: uploaded.append(path.name))
    store.save_checkpoints(caae())
    assert uploaded == ["best", "checkpoint", "a-later-one"], "and none that is half written"


def test_the_pipeline_goes_on_from_the_last_epoch_on_another_node(node, tmp_path):
    config, epochs = load_config("micro"), []
    data = pipeline.open_data(config, make_shapes(tmp_path / "shapes", train=6, val=2, size=32))

    def run(store, progress):
        options = {"device": torch.device("cpu"), "progress": progress, "until": "caae"}
        return list(pipeline.run(config, data, store, **options))

    def stop_in_the_last_epoch(told):
        if told.epoch == config.caae.epochs:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(node("a"), stop_in_the_last_epoch)
    (resumed,) = run(node("b"), lambda told: epochs.append(told.epoch))
    assert set(epochs) == {config.caae.epochs}
    assert len(resumed.artifact.info["history"]["total"]) == config.caae.epochs
    assert resumed.artifact.file("caae.safetensors").exists()


# Publishers and holders that die


def test_a_publisher_killed_before_its_manifest_leaves_nothing_visible(node, bucket, start, tmp_path):
    code = f"""
import signal
store = open_store({bucket!r})
workspace = store.workspace(key)
info = make_weights(workspace, None, None)
store.storage.create = lambda *of_the_manifest: os.kill(os.getpid(), signal.SIGKILL)
store.publish(key, workspace, info)
"""
    process = start(tmp_path, code)
    assert process.wait(30) == -9
    store = node("a")
    assert len(store.storage.entries("caae/")) == 2
    assert store.find(caae()) is None
    assert store.published() == set()
    artifact = build(store, caae(), make_weights)
    assert node("b").find(caae()).files == artifact.files


# Outages


def test_an_outage_while_publishing_loses_nothing(node, s3_server, caplog):
    store = node("a", heartbeat=0.2, expiry=20, patience=60)
    workspace = store.workspace(caae())
    for n in range(100):
        (workspace / f"{n}.bin").write_bytes(bytes([n]) * 1000)

    def outage():
        eventually(lambda: len(store.storage.entries("caae/")) > 10)
        s3_server.stop()
        time.sleep(3)
        s3_server.start()

    with store.lease(caae()) as lease:
        thread = threading.Thread(target=outage)
        thread.start()
        artifact = store.publish(caae(), workspace, {})
        thread.join()
        assert "cannot be reached, trying again" in caplog.text
        assert "heartbeat of caae" in caplog.text
        time.sleep(0.5)
        lease.check()
        assert store.holder(caae()).age < 3
    assert node("b").find(caae()).files == artifact.files


def test_checkpoints_and_readers_wait_for_the_store_to_come_back(node, s3_server):
    store = node("a", patience=60)
    build(store, caae(), make_weights)
    (store.checkpoints(caae(decoder_depth=2)) / "epoch").write_text("1")
    other = node("b", patience=60)
    s3_server.stop()
    thread = threading.Thread(target=lambda: (time.sleep(1), s3_server.start()))
    thread.start()
    store.save_checkpoints(caae(decoder_depth=2))
    assert other.find(caae()) is not None
    assert (other.checkpoints(caae(decoder_depth=2)) / "epoch").read_text() == "1"
    thread.join()


def test_patience_ends(node, s3_server):
    store = node("a", patience=0.5)
    workspace = store.workspace(caae())
    info = make_weights(workspace, None, None)
    s3_server.stop()
    try:
        for act in (lambda: store.find(caae()), lambda: store.publish(caae(), workspace, info)):
            with pytest.raises(StorageUnreachable, match="could not be reached for 0 s"):
                act()
    finally:
        s3_server.start()
    assert build(store, caae(), make_weights)


# What cannot be used


def test_a_bucket_that_is_not_there_is_refused(bucket):
    with pytest.raises(StoreError, match=r"s3://no-such-bucket/x: .*NoSuchBucket.*Make the bucket no-such-bucket"):
        open_store("s3://no-such-bucket/x")


def test_an_endpoint_where_nothing_listens_is_refused_within_seconds(bucket, monkeypatch, unused_port):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused_port}")
    started = time.monotonic()
    with pytest.raises(StorageUnreachable, match=f"the store {bucket} could not be reached .*{unused_port}"):
        open_store(bucket, patience_at_opening=0.5)
    assert time.monotonic() - started < 30


def test_missing_credentials_are_told(bucket, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(MachineError, match=f"{bucket}: Unable to locate credentials.*Check the credentials"):
        open_store(bucket)


def test_a_forbidden_bucket_is_refused(bucket, s3_server):
    s3_server.require_permission(True)
    try:
        with pytest.raises(StoreError, match=rf"{bucket}: .*\(InvalidAccessKeyId\).*Check the credentials"):
            open_store(bucket)
    finally:
        s3_server.require_permission(False)


def test_each_store_has_a_cache_of_its_own_and_is_asked_with_little_patience(bucket, monkeypatch, tmp_path):
    monkeypatch.setenv("SEMFORMER_CACHE", str(tmp_path / "cache"))
    location = "s3://tests/Some.where/deep_er"
    store = open_store(location)
    digest = hashlib.sha256(location.encode()).hexdigest()[:8]
    assert store.root == tmp_path / "cache" / "stores" / f"tests-Some.where-deep-er-{digest}"
    assert (store.storage.bucket, store.storage.prefix) == ("tests", "Some.where/deep_er/")
    assert open_store("s3://tests").storage.prefix == ""
    options = store.storage._client.meta.config
    assert (options.connect_timeout, options.read_timeout, options.max_pool_connections) == (5, 30, 32)
    assert options.retries["total_max_attempts"] == 1, "the store has its own way to try again"


@pytest.mark.parametrize(
    ("code", "status", "advice"),
    [
        ("AuthorizationHeaderMalformed", 400, "Check the credentials"),
        ("Unauthorized", 401, "Check the credentials"),
        ("AccessDenied", 403, "Check the credentials"),
        ("NoSuchBucket", 404, "Make the bucket tests, or check its name"),
        ("MethodNotAllowed", 405, r"Check the endpoint \(AWS_ENDPOINT_URL\) and the settings of AWS's tools"),
    ],
)
def test_what_the_server_refuses_is_told_with_what_to_do(bucket, monkeypatch, code, status, advice):
    storage = open_store(bucket).storage
    answer = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}

    def refuse(**_):
        raise ClientError(answer, "GetObject")

    monkeypatch.setattr(storage._client, "get_object", refuse)
    with pytest.raises(StoreError, match=rf"cannot use the store {bucket}: .*\({code}\).*\. {advice}"):
        storage.read("x")


def test_a_server_that_ignores_conditions_is_refused(bucket, monkeypatch):
    session = boto3.session.Session()

    def ignore(request, **_):
        del request.headers["If-None-Match"]

    session.events.register("before-sign.s3.PutObject", ignore)
    monkeypatch.setattr(boto3.session, "Session", lambda: session)
    with pytest.raises(UserError, match="does not honour conditional writes"):
        open_store(bucket)


@pytest.mark.parametrize(
    "location", ["s3://", "s3:///x", "s3://Bucket_/x", "s3://bucket//x", "s3:/bucket/x", "gs://bucket/x"]
)
def test_what_is_no_location_is_refused(location):
    with pytest.raises(UserError, match=f"cannot use {location} as the store: .*s3://BUCKET/PREFIX"):
        open_store(location)


def test_without_boto3_the_extra_is_named():
    code = "import sys; sys.modules['boto3'] = None; from semformer.store import open_store; open_store('s3://bucket')"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UserError: a store on S3 needs boto3: pip install 'semformer-sweeps[s3]'" in told.stderr


def test_a_full_disk_of_the_cache_is_the_machines_fault(node, small_disk):
    build(node("a"), caae(), make_weights)
    other = node("disk")
    filler = fill(small_disk)
    with pytest.raises(MachineError, match=rf"fetching caae .* failed in the cache {other.root}: .*SEMFORMER_CACHE"):
        other.find(caae())
    with pytest.raises(MachineError, match=r"writing caae .*No space left"):
        build(other, caae(decoder_depth=4), make_weights)
    assert list((other.root / "tmp").iterdir()) == []
    filler.unlink()
    assert other.find(caae())


def test_a_cache_that_cannot_be_a_folder_is_the_machines_fault(bucket, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match=rf"cannot use {tmp_path}/file/.* as the cache: .*SEMFORMER_CACHE"):
        open_store(bucket, cache=tmp_path / "file")


def test_the_command_of_a_single_run_works_on_a_bucket_from_any_machine(bucket, tmp_path, monkeypatch, capsys):
    options = ["--preset", "micro", "--store", bucket]
    monkeypatch.chdir(tmp_path)
    for machine, first in (("a", False), ("b", True)):
        monkeypatch.setenv("SEMFORMER_CACHE", str(tmp_path / machine))
        assert cli.main(["run", *options, "--json"]) == 0
        told = capsys.readouterr()
        assert {stage["found"] for stage in json.loads(told.out)["stages"]} == {first}
        pictures = re.findall(r"^picture (.*)$", told.err, re.MULTILINE)
        assert pictures
        assert all(Path(picture).is_file() for picture in pictures)
    monkeypatch.setenv("SEMFORMER_CACHE", str(tmp_path / "c"))
    picture = str(next((tmp_path / "a").rglob("*.png")))
    assert cli.main(["predict", picture, *options, "--out", "maps"]) == 0
    assert len(list((tmp_path / "maps").iterdir())) == 1
    assert not (tmp_path / "s3:").exists()
