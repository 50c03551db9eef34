"""A storage in an S3 bucket, with a local folder that also caches what has been read.

    <stage>/<digest>/<sha256>/...        an artifact's files; the sha256 (16 digits) is that of its manifest
    manifests/<stage>/<digest>.json      the manifest: put last, and only if there is none
    checkpoints/   leases/   roots/   damaged/    as in a folder (`folder`)

Who sees a manifest can read its files, since they were there before it. Files that two publishers upload at the same
time do not meet, since their manifests differ. The local folder has the files under the same names.

A process that is killed while it uploads a large file leaves parts of it that no listing shows: have a lifecycle rule
of the bucket abort unfinished uploads after a day.

Endpoint, region and credentials are taken from the usual places of AWS's own tools (AWS_ENDPOINT_URL, AWS_PROFILE,
an instance's role ...). One client, boto3, does everything: it knows all of those places, puts on condition, and tells
the server's clock.
"""

import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from semformer.errors import MachineError, StoreError, UserError
from semformer.keys import StageKey
from semformer.machine import cache_folder
from semformer.store.artifact import MANIFEST, Artifact, DamagedArtifact, aside, check_contents, check_size
from semformer.store.cache import Cache
from semformer.store.local import Local
from semformer.store.storage import PARTIAL, Entry, Storage, StorageUnreachable, T, patiently

try:
    import boto3
    from boto3.exceptions import Boto3Error, RetriesExceededError
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError, IncompleteReadError
except ImportError as error:
    raise UserError("a store on S3 needs boto3: pip install 'semformer-sweeps[s3]'") from error

log = logging.getLogger(__name__)


class Bucket(Storage):
    """The objects of a bucket below a prefix: "s3://bucket/prefix".

    The local folder is below `cache` (default: $SEMFORMER_CACHE or ~/.cache/semformer). When the artifacts' files in it
    take more than `cache_bytes`, those that were not used for the longest time go, and are fetched again when needed.
    Raises UserError for what is no such location, StoreError if the bucket cannot be used, StorageUnreachable (which is
    one) if it cannot be reached within `patience_at_opening` seconds, and MachineError if the folder cannot be used.
    """

    BELOW_DIGEST = "/[0-9a-f]{16}"

    def __init__(
        self, location: str, patience: float, cache: Path | None, cache_bytes: float, patience_at_opening: float
    ):
        match = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]+)((?:/[^/]+)*)/?", location)
        if not match:
            raise UserError(f"cannot use {location} as the store: give a folder, or s3://BUCKET/PREFIX")
        location = location.rstrip("/")
        folder = cache or cache_folder() / "stores"
        name = re.sub("[^A-Za-z0-9.-]+", "-", location.removeprefix("s3://"))
        name += f"-{hashlib.sha256(location.encode()).hexdigest()[:8]}"
        local = Local((folder / name).absolute(), "the cache", "another one with SEMFORMER_CACHE", MachineError)
        super().__init__(location, patience, local)
        self.bucket, self.prefix = match[1], f"{match[2][1:]}/" if match[2] else ""
        options = Config(connect_timeout=5, read_timeout=30, retries={"total_max_attempts": 1}, max_pool_connections=32)
        try:
            self._client = boto3.session.Session().client("s3", config=options)
        except (BotoCoreError, ValueError) as error:
            raise self._explain(error) from error
        local.open()
        self._cache = Cache(local.root, cache_bytes)
        self.patient(patience_at_opening)._check()

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

    # Artifacts: in the local folder, files have the same names

    def place(self, stage: str, digest: str, sha256: str) -> str:
        return f"{stage}/{digest}/{sha256[:16]}"

    @patiently
    def stages(self) -> list[str]:
        pages = self._pages("manifests/", Delimiter="/")
        return [item["Prefix"].split("/")[-2] for page in pages for item in page.get("CommonPrefixes", [])]

    def digests(self, stage: str) -> Iterable[str]:
        return self.ages(stage)

    def ages(self, stage: str) -> dict[str, float]:
        listed = self.entries(f"manifests/{stage}/")
        return {Path(name).stem: entry.age for name, entry in listed.items()}

    def manifest(self, stage: str, digest: str) -> bytes:
        return self.read(_manifest(stage, digest))[0]

    def publish(self, workspace: Path, artifact: Artifact, manifest: bytes) -> bool:
        for name in artifact.files:
            self.upload(workspace / name, self._name(artifact, name))
        if not self.create(_manifest(artifact.key.stage, artifact.key.digest), manifest):
            return False
        shutil.rmtree(artifact.path, ignore_errors=True)  # left by one that was damaged and otherwise the same
        artifact.path.parent.mkdir(parents=True, exist_ok=True)
        os.rename(workspace, artifact.path)
        self._cache.added([artifact.path / name for name in artifact.files])
        return True

    def withdraw(self, artifact: Artifact) -> None:
        self.remove_folder(self._name(artifact))

    def set_aside(self, key: StageKey, manifest: bytes | None) -> str | None:
        """Moves the manifest; the files stay where they are, and `collection` removes them."""
        with suppress(FileNotFoundError):
            if manifest is not None and self.manifest(key.stage, key.digest) == manifest:
                name = aside(key)
                self.write(f"{name}/{MANIFEST}", manifest)
                self.remove(_manifest(key.stage, key.digest))
                return f"{self.location}/{name}"
        return None

    def sizes(self, artifact: Artifact) -> dict[str, int]:
        place = f"{self._name(artifact)}/"
        return {name.removeprefix(place): entry.size for name, entry in self.entries(place).items()}

    def have(self, artifact: Artifact, name: str, *, verify: bool = False) -> None:
        path, told = artifact.path / name, artifact.files[name]
        if not self._cache.has(path, told, verify=verify):
            self._fetch(artifact.key, self._name(artifact, name), path, told)
            self._cache.added([path])

    def workspace(self, key: StageKey) -> Path:
        """Also in a cache that somebody has removed."""
        try:
            return self.local.workspace(key)
        except FileNotFoundError:
            self.local.open()
            return self.local.workspace(key)

    def checkpoints(self, key: StageKey) -> Path:
        name = f"checkpoints/{key.stage}/{key.digest}"
        folder = self.local.root / name
        folder.mkdir(parents=True, exist_ok=True)
        for saved in self.entries(f"{name}/"):
            with suppress(DamagedArtifact):  # removed meanwhile: what it led to is published
                self._fetch(key, saved, self.local.root / saved)
        return folder

    def save_checkpoints(self, key: StageKey) -> None:
        """In the order in which they were written: no newer one is there without an older. Not those half written."""
        files = (self.local.root / "checkpoints" / key.stage / key.digest).rglob("*")
        whole = [path for path in files if path.is_file() and path.suffix != PARTIAL]
        for path in sorted(whole, key=lambda path: path.stat().st_mtime_ns):
            self.upload(path, path.relative_to(self.local.root).as_posix())

    def remove_checkpoints(self, key: StageKey) -> None:
        name = f"checkpoints/{key.stage}/{key.digest}"
        shutil.rmtree(self.local.root / name, ignore_errors=True)
        try:
            self.remove_folder(name)
        except StorageUnreachable as error:  # what matters is published
            log.warning("the checkpoints of %s stay in the store: %s", key, error)

    def _fetch(self, key: StageKey, name: str, path: Path, told: Mapping[str, Any] | None = None) -> None:
        """Whole or not at all; raises DamagedArtifact if it is not there, or not as `told`."""
        workspace = self.workspace(key)
        partial = workspace / path.name
        try:
            try:
                self.download(name, partial)
            except FileNotFoundError as error:
                raise DamagedArtifact(f"{path.name} is missing") from error
            if told:
                check_size(path.name, partial.stat().st_size, told)
                check_contents(path.name, partial, told)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial, path)
        finally:
            shutil.rmtree(workspace, ignore_errors=True)

    def _name(self, artifact: Artifact, *file: str) -> str:
        """Of an artifact's file, or of the folder of its files."""
        return artifact.path.joinpath(*file).relative_to(self.local.root).as_posix()

    # Helpers

    def _check(self) -> None:
        """Raises UserError if the bucket cannot be reached or written, or lets two processes take one lease."""
        probe = f"tmp/probe-{secrets.token_hex(8)}"
        exclusive = self.create(probe, b"1") and probe in self.entries(probe) and not self.create(probe, b"2")
        self.remove(probe)
        if not exclusive:
            raise UserError(
                f"cannot use {self.location} as the store: its server does not honour conditional writes "
                "(If-None-Match), without which two processes would build the same stage. Use a newer server."
            )

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


def _code(error: BaseException | None) -> str | None:
    return error.response["Error"].get("Code") if isinstance(error, ClientError) else None


def _status(error: BaseException | None) -> int | None:
    return error.response["ResponseMetadata"].get("HTTPStatusCode") if isinstance(error, ClientError) else None


def _is_away(error: BaseException | None) -> bool:
    if isinstance(error, ClientError):
        busy = {"RequestTimeout", "SlowDown", "Throttling", "ConditionalRequestConflict", "OperationAborted"}
        return _code(error) in busy or _status(error) in {500, 502, 503, 504}
    return isinstance(error, ConnectionError | HTTPClientError | IncompleteReadError)


def _manifest(stage: str, digest: str) -> str:
    return f"manifests/{stage}/{digest}.json"
