"""Content-addressed artifacts: found by key, published atomically, built once.

    root/<stage>/<digest>/               a published artifact: its files, and manifest.json written last
    root/checkpoints/<stage>/<digest>/   resumable state of an unfinished stage
    root/leases/<digest>.<generation>    who is building it now (`semformer.leases`)
    root/tmp/   root/damaged/            workspaces; artifacts that failed verification (nothing is thrown away)

A published artifact never changes, so readers need no lock. The lease only saves work: should two processes ever
build the same key, the first to publish wins and both end up with the same artifact.
"""

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from semformer.errors import UserError
from semformer.keys import RESERVED, StageKey, canonical_sha256, differences, plain
from semformer.leases import Lease, LeaseHeld, LeaseHolder, Leases, is_alive, machine

MANIFEST = "manifest.json"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
log = logging.getLogger(__name__)


class DamagedArtifact(Exception):
    """A published artifact is not what its manifest says."""


@dataclass(frozen=True)
class Artifact:
    """A published result; `info` is what its maker noted (seconds, metrics...), with `created` and `host`."""

    key: StageKey
    path: Path
    info: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]  # name -> {"size": bytes, "sha256": hex}

    def file(self, name: str) -> Path:
        """Path of one file; raises DamagedArtifact if the manifest does not list it."""
        if name not in self.files:
            raise DamagedArtifact(f"{self.key} in {self.path} has no file {name}, only {sorted(self.files)}")
        return self.path / name


class Store:
    """Artifacts in a local (or network) folder.

    `heartbeat` and `expiry` are seconds: a lease not renewed for `expiry` may be taken over. Opening a store removes
    the workspaces of processes that died on this host. Raises UserError if the folder cannot be made or written.
    """

    def __init__(self, root: Path, *, heartbeat: float = 5.0, expiry: float = 60.0):
        self.root = Path(root).absolute()
        self.leases = Leases(self.root / "leases", heartbeat, expiry)
        self._specs: dict[str, Mapping[str, Any]] = {}  # of every key seen, by digest, for `why`
        try:
            for name in RESERVED:
                (self.root / name).mkdir(parents=True, exist_ok=True)
            probe = self.root / "tmp" / f"probe-{secrets.token_hex(4)}"
            probe.write_bytes(b"probe")
            probe.unlink()
            self.leases.now()
        except OSError as error:
            raise UserError(
                f"cannot use {self.root} as the store: {error.strerror or error}. "
                "Make it a writable folder with free space, or choose another folder."
            ) from error
        self._remove_orphaned_workspaces()

    # Reading

    def find(self, key: StageKey, *, verify: bool = True) -> Artifact | None:
        """The complete, intact artifact of `key`, or None if it must be built.

        Checks the manifest and every file's size, and with `verify` its sha256. A damaged artifact is moved
        to `damaged/` with a warning. Raises UserError if the files may not be read or moved.
        """
        self._specs[key.digest] = key.spec
        folder = self._folder(key)
        try:
            seen = folder.stat().st_ino
            artifact = _read(folder)
            _check_files(artifact, contents=verify)
            return artifact
        except FileNotFoundError:
            return None
        except DamagedArtifact as error:
            with self._storage_errors(f"reading {key}"):
                self._quarantine(key, folder, seen, str(error))
            return None
        except OSError as error:
            raise UserError(f"cannot read {key} in {folder}: {error.strerror or error}") from error

    def artifacts(self) -> Iterator[Artifact]:
        """Everything published, by stage; contents unverified, bad manifests skipped with a warning."""
        for stage in sorted(p.name for p in self.root.iterdir() if p.is_dir() and p.name not in RESERVED):
            for folder in sorted((self.root / stage).iterdir()):
                try:
                    yield _read(folder)
                except DamagedArtifact as error:
                    log.warning("skipping damaged artifact %s: %s", folder, error)

    def why(self, key: StageKey) -> str:
        """Why `key` must be computed, beside the published artifact of the same stage that differs least.

        "caae.decoder_depth 8 -> 4", "input caae changed (decoder_depth 8 -> 4)" (published -> wanted); what
        changed inside an input is told as far as its keys have passed through this Store or are published.
        """
        if self.find(key, verify=False):
            return "already published"
        damaged = sorted((self.root / "damaged").glob(f"{key.stage}-{key.short}-*"))
        if damaged:
            return f"the published artifact was damaged (moved to {damaged[-1]})"
        published = [p for p in (self.root / key.stage).glob("*") if self._spec(p.name)]
        if not published:
            return "nothing published for this stage yet"
        published.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        specs = [self._specs[path.name] for path in published]
        found = [differences(key.stage, spec, key.spec, self._spec, prefix=f"{key.stage}.") for spec in specs]
        return min(found, key=lambda counted: counted[0])[1]

    # Building

    def workspace(self, key: StageKey) -> Path:
        """A fresh folder on the store's file system to build `key` in; `publish` makes it the artifact."""
        name = f"{key.stage}-{key.short}.{machine()}.{os.getpid()}.{secrets.token_hex(4)}"
        with self._storage_errors(f"writing {key}"):
            (self.root / "tmp" / name).mkdir()
        return self.root / "tmp" / name

    def checkpoints(self, key: StageKey) -> Path:
        """The folder for resumable state of an unfinished `key`: survives failure, removed by `publish`."""
        folder = self.root / "checkpoints" / key.stage / key.digest
        with self._storage_errors(f"writing {key}"):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextmanager
    def writing(self, key: StageKey, workspace: Path) -> Iterator[None]:
        """Wrap what fills `workspace` and the checkpoints: any failure removes the workspace, never the
        checkpoints; a full disk, or one that may not be written, becomes a UserError."""
        try:
            yield
        except BaseException as error:
            written = sum(p.stat().st_size for p in workspace.rglob("*") if p.is_file())
            shutil.rmtree(workspace, ignore_errors=True)
            if cause := self._storage_error(error):
                raise self._explain(cause, f"writing {key}", written) from error
            raise

    def publish(self, key: StageKey, folder: Path, info: Mapping[str, Any]) -> Artifact:
        """Make the files in `folder` (from `workspace`) the artifact of `key`, all at once or not at all.

        If another process has published `key` meanwhile, theirs is kept and returned. `info` must be JSON (no
        NaN). Raises UserError if the disk is full or not writable; any failure removes `folder`.
        """
        if folder.parent != self.root / "tmp":
            raise ValueError(f"{folder} is not a workspace of this store")
        with self.writing(key, folder):
            created = datetime.now(UTC).isoformat(timespec="seconds")
            info = plain({"created": created, "host": socket.gethostname(), **info}, "info")
            files = {}
            for path in sorted(folder.rglob("*")):
                if path.is_dir() and not path.is_symlink():
                    continue
                if path.is_symlink() or not path.is_file():
                    raise ValueError(f"{path} is not a regular file, and cannot be published")
                _sync(path)
                name = path.relative_to(folder).as_posix()
                files[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
            if MANIFEST in files:
                raise ValueError(f"a stage may not write {MANIFEST}: the store does")
            body = {"stage": key.stage, "spec": key.spec, "info": info, "files": files}
            manifest = {**body, "sha256": canonical_sha256(body)}
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            _sync(folder / MANIFEST)
            for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
                _sync(path)
            artifact = self._install(key, folder)
        shutil.rmtree(self.root / "checkpoints" / key.stage / key.digest, ignore_errors=True)
        return artifact

    def _install(self, key: StageKey, folder: Path) -> Artifact:
        target = self._folder(key)
        if not target.parent.exists():
            target.parent.mkdir(exist_ok=True)
            _sync(self.root)
        while True:
            try:
                os.rename(folder, target)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                if theirs := self.find(key):
                    log.info("another process has published %s first; keeping theirs", key)
                    shutil.rmtree(folder, ignore_errors=True)
                    return theirs
            else:
                _sync(target.parent)
                return _read(target)

    # Single flight

    def lease(self, key: StageKey, *, wait: Callable[[LeaseHolder], None] | None = None) -> Lease:
        """Become the only one to build `key`; use as a context manager and call `find` again inside.

        While a live process holds the lease: raises LeaseHeld, or with `wait` calls `wait(holder)` at every
        poll until the holder releases (which it does right after publishing), dies or stops renewing.
        """
        while True:
            with self._storage_errors(f"taking the lease on {key}"):
                lease = self.leases.take(key)
            if lease is not None:
                return lease
            if (holder := self.holder(key)) is not None:
                if wait is None:
                    raise LeaseHeld(key, holder)
                wait(holder)
                time.sleep(min(self.leases.heartbeat, 0.5))

    def holder(self, key: StageKey) -> LeaseHolder | None:
        """Who is building `key` now; None if nobody, or their lease has expired or their process is gone."""
        return self.leases.holder(key)

    # Helpers

    def _folder(self, key: StageKey) -> Path:
        return self.root / key.stage / key.digest

    def _quarantine(self, key: StageKey, folder: Path, seen: int, reason: str) -> None:
        target = self.root / "damaged" / f"{key.stage}-{key.short}-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
        try:
            if folder.stat().st_ino != seen:  # already moved away and rebuilt by another process
                return
            os.rename(folder, target)
        except FileNotFoundError:
            return
        log.warning("artifact %s is damaged (%s): moved to %s, to be rebuilt", key, reason, target)

    def _remove_orphaned_workspaces(self) -> None:
        for folder in (self.root / "tmp").iterdir():
            _, *owner = folder.name.split(".")
            if len(owner) == 3 and owner[0] == machine() and not is_alive(int(owner[1])):
                shutil.rmtree(folder, ignore_errors=True)

    def _spec(self, digest: str) -> Mapping[str, Any] | None:
        """The spec of a key that has been seen or is published, else None."""
        if digest not in self._specs:
            for folder in self.root.glob(f"*/{digest}"):
                with suppress(DamagedArtifact, OSError):
                    self._specs[digest] = _read(folder).key.spec
        return self._specs.get(digest)

    @contextmanager
    def _storage_errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if cause := self._storage_error(error):
                raise self._explain(cause, doing) from error
            raise

    def _storage_error(self, error: BaseException) -> OSError | None:
        """The full disk or missing permission behind `error`, unless it is about a file outside the store."""
        if isinstance(error, UserError):
            return None
        if not isinstance(error, OSError) or error.errno is None:
            if told := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors
                error = OSError(int(told[1]), os.strerror(int(told[1])))
            else:  # torch.save into an open file raises a RuntimeError in the context of the true one
                behind = error.__cause__ or error.__context__
                return self._storage_error(behind) if behind else None
        inside = error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(self.root)
        return error if inside and error.errno in FULL | FORBIDDEN else None

    def _explain(self, cause: OSError, doing: str, written: int = 0) -> UserError:
        free = shutil.disk_usage(self.root).free
        size = f" (which takes at least {written / 1e6:.1f} MB)" if written else ""
        advice = (
            f"{free / 1e6:.1f} MB are free there now: free more (or raise the quota or the file-size limit)"
            if cause.errno in FULL
            else "Make the folder writable"
        )
        return UserError(
            f"{doing}{size} failed in the store {self.root}: {cause.strerror}. {advice}, or choose another "
            "store; then run again. Published stages stay, an unfinished one resumes from its checkpoints."
        )


def _read(folder: Path) -> Artifact:
    """The artifact in `folder` by its manifest alone; raises DamagedArtifact if missing or altered."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        told = manifest.pop("sha256")
        if canonical_sha256(manifest) != told:
            raise DamagedArtifact(f"{MANIFEST} was altered")
        key = StageKey(manifest["stage"], manifest["spec"])
        if folder.name != key.digest:
            raise DamagedArtifact(f"{MANIFEST} belongs to {key}")
        for name in manifest["files"]:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise DamagedArtifact(f"{MANIFEST} lists {name}, which is outside the artifact")
        return Artifact(key, folder, manifest["info"], manifest["files"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedArtifact(f"no {MANIFEST}: it is half-written") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedArtifact(f"{MANIFEST} is unreadable: {error!r}") from error


def _check_files(artifact: Artifact, *, contents: bool) -> None:
    for name, told in artifact.files.items():
        path = artifact.path / name
        if not path.is_file():
            raise DamagedArtifact(f"{name} is missing")
        if path.stat().st_size != told["size"]:
            raise DamagedArtifact(f"{name} has {path.stat().st_size} bytes instead of {told['size']}")
        if contents and _sha256(path) != told["sha256"]:
            raise DamagedArtifact(f"{name} was altered: its sha256 is not the published one")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
