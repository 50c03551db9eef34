"""What a store tells people, and what it records for them: faults, warnings, roots; and who is told in a race."""

import errno
import hashlib
import os
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from boto3.exceptions import RetriesExceededError, S3UploadFailedError
from botocore.exceptions import ClientError, EndpointConnectionError

from semformer.errors import MachineError, StoreError, UserError
from semformer.keys import StageKey
from semformer.store import Store, open_store
from semformer.store.cache import Cache
from semformer.store.collection import collect
from semformer.store.processes import is_alive
from semformer.store.storage import Entry
from tests.artifacts import build, caae, damage, flip_a_bit, make_weights, publish, segmentor

DIGEST = "a" * 64


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def test_a_root_tells_when_it_was_written_and_what_for(either):
    before = datetime.now(UTC) - timedelta(seconds=1)
    either.roots.keep("mine", [DIGEST])
    root = either.roots.kept("mine")
    assert before <= datetime.fromisoformat(root.kept) <= datetime.now(UTC)
    assert root.about == {}
    either.roots.keep("mine", [], {"preset": "tiny"})
    assert either.roots.kept("mine").about == {"preset": "tiny"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        either.roots.keep("mine", [], {"sigma": float("nan")})


def test_a_root_that_cannot_be_written_says_whose_it_is(store, monkeypatch):
    monkeypatch.setattr(store.storage, "write", full)
    with pytest.raises(UserError, match="recording what mine needs failed in"):
        store.roots.keep("mine", [DIGEST])


def test_roots_are_told_though_one_goes_meanwhile(store, monkeypatch):
    for name in ("a", "b"):
        store.roots.keep(name, [DIGEST])
    read = store.storage.read

    def gone(name):
        if name == "roots/a.json":
            raise FileNotFoundError(name)
        return read(name)

    monkeypatch.setattr(store.storage, "read", gone)
    assert list(store.roots.all()) == ["b"]


def test_a_sweep_that_has_no_root_is_told_whose_there_are(store):
    with pytest.raises(UserError, match="keeps nothing for 'mine', only for nobody"):
        store.roots.drop("mine")


def test_a_patient_store_keeps_roots_in_the_same_place(either):
    either.patient(1.0).roots.keep("mine", [DIGEST])
    assert either.roots.kept("mine").digests == {DIGEST}


@pytest.mark.parametrize("written", [0, 2_500_000])
def test_a_full_disk_says_how_much_was_written_and_how_much_is_free(store, monkeypatch, written):
    free = 12_340_000
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))

    def make(workspace, checkpoints, lease):
        (workspace / "weights.bin").write_bytes(bytes(written))
        full()

    with pytest.raises(UserError) as told:
        build(store, caae(), make)
    size = " (which takes at least 2.5 MB)" if written else ""
    assert f"writing {caae()}{size} failed in" in str(told.value)
    assert "12.3 MB are free there now" in str(told.value)


def refusal(code: str, status: int) -> ClientError:
    answer = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "PutObject")


@pytest.mark.parametrize(
    ("error", "kind", "advice"),
    [
        (refusal("NoSuchBucket", 404), StoreError, "Make the bucket tests, or check its name"),
        (refusal("InvalidRequest", 400), StoreError, "Check the credentials"),
        (refusal("InvalidAccessKeyId", 401), StoreError, "Check the credentials"),
        (refusal("AccessDenied", 403), StoreError, "Check the credentials"),
        (ValueError("Unable to locate credentials"), MachineError, "Check the credentials"),
        (refusal("Teapot", 418), StoreError, "Check the endpoint (AWS_ENDPOINT_URL)"),
        (ValueError("bad proxy"), MachineError, "Check the endpoint (AWS_ENDPOINT_URL)"),
    ],
)
def test_what_a_bucket_refuses_comes_with_what_to_do(bucket, error, kind, advice):
    told = open_store(bucket).storage._explain(error)
    assert type(told) is kind
    assert advice in str(told)


def test_what_is_withdrawn_from_a_bucket_leaves_none_of_its_files(bucket):
    store = open_store(bucket)
    store.storage.withdraw(publish(store, caae()))
    assert [name for name in store.storage.entries("") if name.startswith("caae/")] == []


# Collecting


def test_what_is_published_has_no_use_for_its_checkpoints(either):
    build(either, caae(), make_weights)
    either.roots.keep("mine", [caae().digest])
    either.storage.write(f"checkpoints/caae/{caae().digest}", b"1234")
    (found,) = [item for item in collect(either, grace=-1) if item.stage]
    assert (found.why, found.bytes) == ("checkpoints of what is published", 4)


def test_a_bucket_loses_manifests_before_the_files_that_they_name(bucket, monkeypatch):
    store = open_store(bucket)
    build(store, caae(), make_weights)
    store.roots.keep("mine", [])
    removed, remove = [], store.storage.remove
    monkeypatch.setattr(store.storage, "remove", lambda name: (removed.append(name), remove(name)))
    collect(store, apply=True, grace=-1)
    manifests = [name.startswith("manifests/") for name in removed]
    assert sorted(manifests, reverse=True) == manifests
    assert set(manifests) == {True, False}


def test_the_bytes_of_what_is_left_are_those_of_its_files(store):
    store.roots.keep("mine", [])
    publish(store, caae())
    folder = store.root / "caae" / caae().digest
    (found,) = [item for item in collect(store, grace=-1) if item.stage == "caae"]
    assert found.bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_keys_without_data_are_collected_like_the_others(store):
    bare = StageKey("caae", {"stage": "caae", "inputs": {}})
    publish(store, bare)
    store.roots.keep("mine", [bare.digest])
    assert collect(store, grace=-1) == []


# Leases


def test_a_lease_lives_until_it_is_older_than_its_expiry(store, monkeypatch):
    with store.lease(caae()):
        entries = store.storage.entries
        for age, live in ((store.leases.expiry, True), (store.leases.expiry + 0.1, False)):
            monkeypatch.setattr(
                store.storage,
                "entries",
                lambda prefix, age=age: {name: Entry(one.size, age) for name, one in entries(prefix).items()},
            )
            assert (caae().digest in store.leases.live()) == live
            assert (store.leases._holder(b"", age) is not None) == live


def test_a_lease_that_is_released_between_two_looks_is_not_live(store, monkeypatch):
    with store.lease(caae()):
        monkeypatch.setattr(store.storage, "read", raise_not_found)
        assert store.leases.live() == {}


def raise_not_found(name):
    raise FileNotFoundError(name)


def test_a_heartbeat_does_not_wait_for_a_store_that_is_away(store, monkeypatch):
    waited = []
    with store.lease(caae()) as lease:
        patient = store.storage.patient
        monkeypatch.setattr(store.storage, "patient", lambda seconds: (waited.append(seconds), patient(seconds))[1])
        lease.renew()
        assert waited == [0.0]


def test_an_artifact_that_goes_while_ages_are_read_is_left_out(store, monkeypatch):
    for key in (caae(), caae(decoder_depth=4)):
        publish(store, key)
    digests = store.storage.digests
    monkeypatch.setattr(store.storage, "digests", lambda stage: [*digests(stage), "0" * 64])
    assert set(store.storage.ages("caae")) == {caae().digest, caae(decoder_depth=4).digest}


def test_looking_whether_a_process_lives_does_not_disturb_it():
    with subprocess.Popen(["sleep", "60"]) as process:
        time.sleep(0.2)
        assert is_alive(process.pid)
        time.sleep(0.2)
        assert process.poll() is None
        process.kill()


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, UserError), (errno.EROFS, UserError), (errno.ENOENT, RuntimeError)]
)
def test_a_disk_that_safetensors_finds_full_is_told_as_such(store, number, kind):
    def make(workspace, checkpoints, lease):
        raise RuntimeError(f"I/O error: {os.strerror(number)} (os error {number})")

    with pytest.raises(kind, match=os.strerror(number)) as told:
        build(store, caae(), make)
    assert type(told.value) is not UserError or f"writing {caae()} failed in" in str(told.value)


def test_checkpoints_of_an_input_that_is_gone_stay_while_what_needs_it_does(store):
    build(store, segmentor(caae()), make_weights)
    store.roots.keep("mine", [segmentor(caae()).digest])
    (store.checkpoints(caae()) / "checkpoint").write_bytes(b"1234")
    assert [item for item in collect(store, grace=-1) if item.stage] == []


def test_what_was_damaged_goes_once_its_stage_is_no_longer_being_built(store, tmp_path):
    damage(build(store, caae(), make_weights), flip_a_bit, tmp_path)
    assert store.find(caae()) is None
    store.roots.keep("mine", [])
    with store.lease(caae()):
        store.storage.write("tmp/write-" + "0" * 16, b"x")
        assert [item.why for item in collect(store, grace=-1)] == ["left by a process that has ended"]
    assert "was damaged" in {item.why for item in collect(store, grace=-1)}


def test_a_cache_has_what_is_as_the_manifest_tells_and_knows_that_it_is_used(tmp_path):
    cache, file = Cache(tmp_path, 10**6), tmp_path / "weights.bin"
    told = {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    assert not cache.has(file, told, verify=False)
    file.write_bytes(b"abc")
    os.utime(file, (0, 0))
    assert cache.has(file, told, verify=True)
    assert file.stat().st_mtime > time.time() - 60
    assert not cache.has(file, {**told, "size": 4}, verify=False)
    file.write_bytes(b"abd")
    assert cache.has(file, told, verify=False)
    assert not cache.has(file, told, verify=True)


@pytest.mark.parametrize(
    ("error", "away"),
    [
        *[(refusal(code, 409), True) for code in ("RequestTimeout", "SlowDown", "Throttling")],
        *[(refusal(code, 409), True) for code in ("ConditionalRequestConflict", "OperationAborted")],
        *[(refusal("Other", status), True) for status in (500, 502, 503, 504)],
        *[(refusal("Other", status), False) for status in (400, 401, 403, 404, 412, 501)],
        (EndpointConnectionError(endpoint_url="http://s3"), True),
        (RetriesExceededError(ValueError("no")), True),
        (ValueError("no"), False),
    ],
)
def test_what_may_pass_is_waited_for_also_behind_a_transfer(bucket, error, away):
    storage = open_store(bucket).storage
    assert storage.is_away(error) == away
    transfer = S3UploadFailedError("no")
    transfer.__context__ = error
    assert storage.is_away(transfer) == (away and not isinstance(error, RetriesExceededError))


def test_what_is_set_aside_is_where_it_is_said_to_be(store):
    publish(store, caae())
    aside = store.storage.set_aside(caae(), store.storage.manifest("caae", caae().digest))
    assert sorted(path.name for path in Path(aside).iterdir()) == ["manifest.json", "weights.bin"]
    assert store.storage.set_aside(caae(), None) is None
