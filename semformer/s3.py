"""A store in an S3 bucket, worked on in a local folder that also caches what has been read.

    <stage>/<digest>/<sha256>/...        an artifact's files; the sha256 (16 digits) is that of its manifest
    manifests/<stage>/<digest>.json      the manifest: put last, and only if there is none
    checkpoints/   leases/   roots/   damaged/    as in a folder (`semformer.store`)

Who sees a manifest can read its files, since they were there before it. Files that two publishers upload at the same
time do not meet, since their manifests differ. The local folder has the files under the same names.

A process that is killed while it uploads a large file leaves parts of it that no listing shows: have a lifecycle rule
of the bucket abort unfinished uploads after a day.

Endpoint, region and credentials are taken from the usual places of AWS's own tools (AWS_ENDPOINT_URL, AWS_PROFILE,
an instance's role ...). One client, boto3, does everything, because only it has the conditional put.
"""

import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from semformer.artifact import (
    MANIFEST,
    Artifact,
    DamagedArtifact,
    check_contents,
    check_size,
    read_manifest,
)
from semformer.errors import MachineError, StoreError, UserError
from semformer.keys import RESERVED, StageKey
from semformer.leases import Leases
from semformer.storage import Entry, Folder, Storage, StorageUnreachable, T, patiently
from semformer.store import Store

try:
    import boto3
    from boto3.exceptions import Boto3Error, RetriesExceededError
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError, IncompleteReadError
except ImportError as error:
    raise UserError("a store on S3 needs boto3: pip install 'semformer-sweeps[s3]'") from error

IN_USE = 600.0
"""Seconds after its last use during which a file stays in the cache, whatever the limit."""
SLACK = 0.01
"""Of the cache's limit, that a process may add before it looks at all files in the cache again."""
log = logging.getLogger(__name__)


class Bucket(Storage):
    """The objects of a bucket below a prefix: "s3://bucket/prefix". Raises UserError for what is no such location."""

    def __init__(self, location: str, patience: float):
        match = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]+)((?:/[^/]+)*)/?", location)
        if not match:
            raise UserError(f"cannot use {location} as the store: give a folder, or s3://BUCKET/PREFIX")
        super().__init__(location.rstrip("/"), patience)
        self.bucket, self.prefix = match[1], f"{match[2][1:]}/" if match[2] else ""
        options = Config(connect_timeout=5, read_timeout=30, retries={"total_max_attempts": 1}, max_pool_connections=32)
        try:
            self._client = boto3.session.Session().client("s3", config=options)
        except (BotoCoreError, ValueError) as error:
            raise self._explain(error) from error

    def is_away(self, error: Exception) -> bool:
        if isinstance(error, Boto3Error):  # of a transfer of a file; it hides the true one
            return isinstance(error, RetriesExceededError) or _is_away(error.__context__)
        return _is_away(error)

    def retry(self, call: Callable[[], T]) -> T:
        """As every storage; boto3's exceptions become FileNotFoundError, StoreError and MachineError."""
        try:
            return super().retry(call)
        except (BotoCoreError, ClientError, Boto3Error) as error:
            behind = error.__context__ if isinstance(error, Boto3Error) else error
            if _code(behind) in {"404", "NoSuchKey"}:
                raise FileNotFoundError(f"{self.location}: {behind}") from error
            raise self._explain(behind or error) from error

    @patiently
    def entries(self, prefix: str) -> dict[str, Entry]:
        found = {}
        for page in self._pages(prefix):
            now = _date(page)
            for item in page.get("Contents", []):
                age = (now - item["LastModified"]).total_seconds()
                found[item["Key"].removeprefix(self.prefix)] = Entry(item["Size"], age)
        return found

    @patiently
    def folders(self, prefix: str) -> list[str]:
        start = len(self.prefix + prefix)
        pages = self._pages(prefix, Delimiter="/")
        return [item["Prefix"][start:-1] for page in pages for item in page.get("CommonPrefixes", [])]

    @patiently
    def read(self, name: str) -> tuple[bytes, float]:
        found = self._client.get_object(**self._object(name))
        age = (_date(found) - found["LastModified"]).total_seconds()
        return found["Body"].read(), max(0.0, age)

    @patiently
    def create(self, name: str, content: bytes) -> bool:
        try:
            self._client.put_object(**self._object(name), Body=content, IfNoneMatch="*")
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] != 412:
                raise
            with suppress(FileNotFoundError):  # a first try may have arrived without an answer
                return self.read(name)[0] == content
            return False
        return True

    @patiently
    def write(self, name: str, content: bytes) -> None:
        self._client.put_object(**self._object(name), Body=content)

    @patiently
    def touch(self, name: str) -> None:
        """By a copy onto itself, which fails where a put would bring a removed object back."""
        self._client.copy_object(
            **self._object(name), CopySource=self._object(name), MetadataDirective="REPLACE", Metadata={}
        )

    @patiently
    def remove(self, name: str) -> None:
        self._client.delete_object(**self._object(name))

    @patiently
    def remove_folder(self, name: str) -> None:
        names = list(self.entries(f"{name}/"))
        for start in range(0, len(names), 1000):
            keys = [{"Key": self.prefix + name} for name in names[start : start + 1000]]
            told = self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": keys, "Quiet": True})
            if errors := told.get("Errors"):
                raise StoreError(f"{errors[0]['Key']} in {self.location} cannot be removed: {errors[0]['Message']}")

    @patiently
    def upload(self, path: Path, name: str) -> None:
        self._client.upload_file(str(path), self.bucket, self.prefix + name)

    @patiently
    def download(self, name: str, path: Path) -> None:
        self._client.download_file(self.bucket, self.prefix + name, str(path))

    def _pages(self, prefix: str, **options: str) -> Iterable[dict[str, Any]]:
        pages = self._client.get_paginator("list_objects_v2")
        return pages.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix, **options)

    def _object(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + name}

    def _explain(self, error: BaseException) -> UserError:
        """What the bucket's server has answered is the store's fault, what could not even be sent the machine's."""
        kind = StoreError if isinstance(error, ClientError) else MachineError
        advice = "Check the endpoint (AWS_ENDPOINT_URL) and the settings of AWS's tools"
        if _code(error) == "NoSuchBucket":
            advice = f"Make the bucket {self.bucket}, or check its name and the endpoint (AWS_ENDPOINT_URL)"
        elif _status(error) in {400, 401, 403} or "redential" in str(error):
            advice = "Check the credentials (AWS_ACCESS_KEY_ID ... or AWS_PROFILE) and what they may do in the bucket"
        return kind(f"cannot use the store {self.location}: {error}. {advice}.")


def _date(response: dict[str, Any]) -> datetime:
    """The server's time: hosts' clocks may differ."""
    return parsedate_to_datetime(response["ResponseMetadata"]["HTTPHeaders"]["date"])


def _code(error: BaseException | None) -> str:
    return error.response["Error"].get("Code", "") if isinstance(error, ClientError) else ""


def _status(error: BaseException | None) -> int:
    return error.response["ResponseMetadata"].get("HTTPStatusCode", 0) if isinstance(error, ClientError) else 0


def _is_away(error: BaseException | None) -> bool:
    if isinstance(error, ClientError):
        busy = {"RequestTimeout", "SlowDown", "Throttling", "ConditionalRequestConflict", "OperationAborted"}
        return _code(error) in busy or _status(error) in {500, 502, 503, 504}
    return isinstance(error, ConnectionError | HTTPClientError | IncompleteReadError)


class S3Store(Store):
    """A store in a bucket. `root` is its local folder, below `cache` (default: $SEMFORMER_CACHE or ~/.cache/semformer).

    When the artifacts' files in it take more than `cache_bytes`, those that were not used for the longest time go.
    `Artifact.file` marks a file as used, and fetches again what has gone. Raises StoreError if the bucket cannot be
    used, StorageUnreachable (which is one) if it cannot be reached within `patience_at_opening` seconds, and
    MachineError if the folder cannot be used.
    """

    storage: Bucket
    BELOW_DIGEST = "/[0-9a-f]{16}"
    ROOT, INSTEAD = "the cache", "another one with SEMFORMER_CACHE"
    ROOT_ERROR = MachineError

    def __init__(
        self,
        location: str,
        cache: Path | None = None,
        *,
        cache_bytes: float = 50e9,
        heartbeat: float = 5.0,
        expiry: float = 60.0,
        patience: float = 300.0,
        patience_at_opening: float = 10.0,
    ):
        bucket = Bucket(location, patience)
        cache = cache or Path(os.environ.get("SEMFORMER_CACHE") or "~/.cache/semformer").expanduser() / "stores"
        name = re.sub("[^A-Za-z0-9.-]+", "-", bucket.location.removeprefix("s3://"))
        super().__init__(cache / f"{name}-{hashlib.sha256(bucket.location.encode()).hexdigest()[:8]}")
        self.storage, self.cache_bytes = bucket, cache_bytes
        self._added = cache_bytes  # bytes since the files in the cache were looked at; at first, reason enough to look
        self.leases = Leases(bucket, heartbeat, expiry)
        self._check(bucket.patient(patience_at_opening))

    def read(self, stage: str, digest: str) -> Artifact:
        return self._parse(self.storage.read(_manifest(stage, digest))[0], stage, digest)

    def save_checkpoints(self, key: StageKey) -> None:
        """Upload them, in the order in which they were written: no newer one is there without an older."""
        folder = super().checkpoints(key)
        files = [path for path in folder.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.stat().st_mtime_ns):
            self.storage.upload(path, path.relative_to(self.root).as_posix())

    def checkpoints(self, key: StageKey) -> Path:
        """As in a folder, with the files of whoever saved them last."""
        folder = super().checkpoints(key)
        for name in self.storage.entries(f"checkpoints/{key.stage}/{key.digest}/"):
            self._download(key, name, self.root / name)
        return folder

    def _remove_checkpoints(self, key: StageKey) -> None:
        super()._remove_checkpoints(key)
        try:
            self.storage.remove_folder(f"checkpoints/{key.stage}/{key.digest}")
        except StorageUnreachable as error:  # what matters is published
            log.warning("the checkpoints of %s stay in the store: %s", key, error)

    def _find(self, key: StageKey, verify: bool) -> Artifact | None:
        try:
            manifest, _ = self.storage.read(_manifest(key.stage, key.digest))
        except FileNotFoundError:
            return None
        try:
            artifact = self._parse(manifest, key.stage, key.digest)
            place = self._place(artifact)
            there = self.storage.entries(f"{place}/")
            for name, told in artifact.files.items():
                entry = there.get(f"{place}/{name}")
                check_size(name, entry.size if entry else None, told)
            for name in artifact.files if verify else ():
                self._fetch(artifact, name, verify=True)
            return artifact
        except DamagedArtifact as error:
            self._put_aside(key, manifest, str(error))
            return None

    def _install(self, key: StageKey, folder: Path, manifest: bytes) -> Artifact:
        artifact = self._parse(manifest, key.stage, key.digest)
        place = self._place(artifact)
        for name in artifact.files:
            self.storage.upload(folder / name, f"{place}/{name}")
        while not self.storage.create(_manifest(key.stage, key.digest), manifest):
            if theirs := self.find(key):
                log.info("another process has published %s first; keeping theirs", key)
                self.storage.remove_folder(place)
                shutil.rmtree(folder, ignore_errors=True)
                return theirs
        shutil.rmtree(artifact.path, ignore_errors=True)  # left by one that was damaged and otherwise the same
        artifact.path.parent.mkdir(parents=True, exist_ok=True)
        os.rename(folder, artifact.path)
        for name in artifact.files:
            os.utime(artifact.path / name)
        self._evict(sum(told["size"] for told in artifact.files.values()))
        return artifact

    def _put_aside(self, key: StageKey, manifest: bytes, reason: str) -> None:
        """Moves the manifest; the files stay where they are, and `collect` removes them."""
        with suppress(FileNotFoundError):
            if self.storage.read(_manifest(key.stage, key.digest))[0] == manifest:  # else rebuilt by another process
                aside = f"damaged/{key.stage}-{key.short}-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
                self.storage.write(f"{aside}/{MANIFEST}", manifest)
                self.storage.remove(_manifest(key.stage, key.digest))
                log.warning(
                    "artifact %s is damaged (%s): moved to %s/%s, to be rebuilt", key, reason, self.location, aside
                )

    # The cache

    def _parse(self, manifest: bytes, stage: str, digest: str) -> Artifact:
        artifact, sha256 = read_manifest(manifest, digest)
        return replace(artifact, path=self.root / stage / digest / sha256[:16], fetch=self._fetch)

    def _place(self, artifact: Artifact) -> str:
        return artifact.path.relative_to(self.root).as_posix()

    def _fetch(self, artifact: Artifact, name: str, *, verify: bool = False) -> None:
        """Have a file in the cache; raises DamagedArtifact if that in the bucket is not what the manifest tells."""
        path, told = artifact.path / name, artifact.files[name]
        with suppress(FileNotFoundError, DamagedArtifact):
            check_size(name, path.stat().st_size, told)
            if verify:
                check_contents(name, path, told)
            os.utime(path)
            return
        try:
            self._download(artifact.key, f"{self._place(artifact)}/{name}", path, told)
        except FileNotFoundError as error:
            raise DamagedArtifact(f"{name} is missing") from error
        self._evict(told["size"])

    def _download(self, key: StageKey, name: str, path: Path, told: Mapping[str, Any] | None = None) -> None:
        """Into the local folder, whole or not at all; raises FileNotFoundError, or DamagedArtifact if not as `told`."""
        workspace = self.workspace(key)
        partial = workspace / path.name
        try:
            with self._storage_errors(f"fetching {key}"):
                self.storage.download(name, partial)
                if told:
                    check_size(path.name, partial.stat().st_size, told)
                    check_contents(path.name, partial, told)
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial, path)
        finally:
            shutil.rmtree(workspace, ignore_errors=True)

    def _evict(self, added: int) -> None:
        """Bring the cache, to which so many bytes were added, below its limit, but for what was used in the last IN_USE
        seconds."""
        self._added += added
        if self._added < SLACK * self.cache_bytes:
            return
        self._added = 0
        local = Folder(self.root, patience=0.0)
        stages = [name for name in local.folders("") if name not in RESERVED]
        files = [item for stage in stages for item in local.entries(f"{stage}/").items()]
        excess = sum(entry.size for _, entry in files) - self.cache_bytes
        for name, entry in sorted(files, key=lambda item: item[1].age, reverse=True):
            if excess <= 0 or entry.age < IN_USE:
                return
            local.remove(name)
            excess -= entry.size

    # Helpers

    def _check(self, bucket: Bucket) -> None:
        """Raises UserError if the bucket cannot be reached or written, or lets two processes take one lease."""
        probe = f"tmp/probe-{secrets.token_hex(8)}"
        exclusive = bucket.create(probe, b"1") and probe in bucket.entries(probe) and not bucket.create(probe, b"2")
        bucket.remove(probe)
        if not exclusive:
            raise UserError(
                f"cannot use {self.location} as the store: its server does not honour conditional writes "
                "(If-None-Match), without which two processes would build the same stage. Use a newer server."
            )

    def _stages(self) -> list[str]:
        return self.storage.folders("manifests/")

    def _digests(self, stage: str) -> Iterable[str]:
        return self._ages(stage)

    def _ages(self, stage: str) -> dict[str, float]:
        listed = self.storage.entries(f"manifests/{stage}/")
        return {Path(name).stem: entry.age for name, entry in listed.items()}


def _manifest(stage: str, digest: str) -> str:
    return f"manifests/{stage}/{digest}.json"
