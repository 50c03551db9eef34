"""Artifacts and their manifests: what a published result consists of, and whether it still does."""

import hashlib
import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from semformer.keys import StageKey, canonical_sha256, plain

MANIFEST = "manifest.json"


class DamagedArtifact(Exception):
    """A published artifact is not what its manifest says."""


@dataclass(frozen=True)
class Artifact:
    """A published result; `info` is what its maker noted (seconds, metrics...), with `created` and `host`.

    `path` is in the store's folder on this machine: where the store is a bucket, `file` fetches what is not there.
    """

    key: StageKey
    path: Path
    info: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]  # name -> {"size": bytes, "sha256": hex}
    have: Callable[["Artifact", str], None] = field(default=lambda artifact, name: None, compare=False, repr=False)

    def file(self, name: str) -> Path:
        """Path of one file; raises DamagedArtifact if the manifest does not list it, or it cannot be fetched intact."""
        if name not in self.files:
            raise DamagedArtifact(f"{self.key} in {self.path} has no file {name}, only {sorted(self.files)}")
        self.have(self, name)
        return self.path / name


def make_manifest(key: StageKey, folder: Path, info: Mapping[str, Any]) -> bytes:
    """The manifest of the files in `folder`, which are synced to disk. Raises ValueError for what cannot be kept."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    info = plain({"created": created, "host": socket.gethostname(), **info}, "info")
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path} is not a regular file, and cannot be published")
        sync(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    if MANIFEST in files:
        raise ValueError(f"a stage may not write {MANIFEST}: the store does")
    body = {"stage": key.stage, "spec": key.spec, "info": info, "files": files}
    return (json.dumps({**body, "sha256": canonical_sha256(body)}, indent=1) + "\n").encode()


def write_manifest(folder: Path, manifest: bytes) -> None:
    """After this, `folder` survives a power failure as it is."""
    (folder / MANIFEST).write_bytes(manifest)
    sync(folder / MANIFEST)
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        sync(path)


def read_manifest(content: bytes, digest: str) -> tuple[Artifact, str]:
    """The artifact that a manifest describes, with an empty path, and the manifest's own sha256.

    Raises DamagedArtifact if the manifest is unreadable, altered, or not that of the key with this digest.
    """
    try:
        manifest = json.loads(content)
        told = manifest.pop("sha256")
        if canonical_sha256(manifest) != told:
            raise DamagedArtifact(f"{MANIFEST} was altered")
        key = StageKey(manifest["stage"], manifest["spec"])
        if digest != key.digest:
            raise DamagedArtifact(f"{MANIFEST} belongs to {key}")
        for name in manifest["files"]:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise DamagedArtifact(f"{MANIFEST} lists {name}, which is outside the artifact")
        return Artifact(key, Path(), manifest["info"], manifest["files"]), told
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedArtifact(f"{MANIFEST} is unreadable: {error!r}") from error


def check_size(name: str, size: int | None, told: Mapping[str, Any]) -> None:
    """Raises DamagedArtifact unless a file has the `size` (None: there is none) that the manifest tells."""
    if size is None:
        raise DamagedArtifact(f"{name} is missing")
    if size != told["size"]:
        raise DamagedArtifact(f"{name} has {size} bytes instead of {told['size']}")


def check_contents(name: str, path: Path, told: Mapping[str, Any]) -> None:
    """Raises DamagedArtifact unless the file at `path` has the sha256 that the manifest tells."""
    if sha256(path) != told["sha256"]:
        raise DamagedArtifact(f"{name} was altered: its sha256 is not the published one")


def aside(key: StageKey) -> str:
    """A name for the artifact of `key` where damaged ones are kept."""
    return f"damaged/{key.stage}-{key.short}-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
