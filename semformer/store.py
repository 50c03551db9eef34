"""Content-addressed artifacts: found by key, published atomically, built once.

    root/<stage>/<digest>/               a published artifact: its files, and manifest.json written last
    root/checkpoints/<stage>/<digest>/   resumable state of an unfinished stage
    root/leases/<digest>/<number>        who is building it now (`semformer.leases`)
    root/roots/<name>.json               what a sweep reaches (`semformer.collection`)
    root/tmp/   root/damaged/            workspaces; artifacts that failed verification (nothing is thrown away)

A published artifact never changes, so readers need no lock. The lease only saves work: should two processes ever
build the same key, the first to publish wins and both end up with the same artifact. `semformer.s3` keeps a store in
a bucket.
"""

import copy
import errno
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from semformer import collection
from semformer.artifact import (
    MANIFEST,
    Artifact,
    DamagedArtifact,
    check_contents,
    check_size,
    make_manifest,
    read_manifest,
    sync,
    write_manifest,
)
from semformer.collection import Collected, Root
from semformer.errors import StoreError, UserError
from semformer.keys import DIGEST, RESERVED, StageKey
from semformer.leases import Lease, LeaseHeld, LeaseHolder, Leases, is_alive, machine
from semformer.reasons import reasons
from semformer.storage import Folder, Storage, at_once

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
log = logging.getLogger(__name__)


def open_store(
    location: str | Path,
    *,
    cache: Path | None = None,
    cache_bytes: float = 50e9,
    heartbeat: float = 5.0,
    expiry: float = 60.0,
    patience: float = 300.0,
    patience_at_opening: float = 10.0,
) -> "Store":
    """The store in a folder, or in a bucket ("s3://bucket/prefix").

    `cache` and `cache_bytes` are about buckets alone, see `semformer.s3.S3Store`. `patience` is for how many seconds a
    storage that is away is tried again. Raises UserError if it cannot be used, and StorageUnreachable (which is one)
    if a bucket cannot be reached within `patience_at_opening`.
    """
    if re.match("[a-z][a-z0-9+]+:/", str(location)):
        from semformer.s3 import S3Store

        return S3Store(
            str(location),
            cache,
            cache_bytes=cache_bytes,
            heartbeat=heartbeat,
            expiry=expiry,
            patience=patience,
            patience_at_opening=patience_at_opening,
        )
    return Store(Path(location), heartbeat=heartbeat, expiry=expiry, patience=patience)


class Store:
    """Artifacts in a local (or network) folder.

    `heartbeat` and `expiry` are seconds: a lease not renewed for `expiry` may be taken over. A folder that is away (of
    a file server, say) is tried again for `patience` seconds before StorageUnreachable is raised. Opening a store
    removes the workspaces of processes that died on this host. Raises StoreError if the folder cannot be made or
    written, and so does every method if it is full or forbidden later.
    """

    storage: Storage
    leases: Leases
    BELOW_DIGEST = ""  # what follows <stage>/<digest> in the name of an artifact's folder, as a regular expression
    ROOT, INSTEAD = "the store", "another store"  # what `root` is, and what to choose where it cannot be used
    ROOT_ERROR: type[UserError] = StoreError  # whose fault that is

    def __init__(self, root: Path, *, heartbeat: float = 5.0, expiry: float = 60.0, patience: float = 300.0):
        self.root = Path(root).absolute()
        self.storage = Folder(self.root, patience)
        self.leases = Leases(self.storage, heartbeat, expiry)
        try:
            for name in ("tmp", "leases", "damaged", "checkpoints", "roots"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            self.storage.write("clock", b"")
        except OSError as error:
            raise self.ROOT_ERROR(
                f"cannot use {self.root} as {self.ROOT}: {error.strerror or error}. "
                f"Make it a writable folder with free space, or choose {self.INSTEAD}."
            ) from error
        self._remove_orphaned_workspaces()

    def patient(self, seconds: float) -> Self:
        """The same store, which waits for so long where its storage is away."""
        other = copy.copy(self)
        other.storage = self.storage.patient(seconds)
        other.leases = Leases(other.storage, self.leases.heartbeat, self.leases.expiry)
        return other

    @property
    def location(self) -> str:
        """What `open_store` takes to open the same store in another process."""
        return self.storage.location

    # Reading

    def find(self, key: StageKey, *, verify: bool = True) -> Artifact | None:
        """The complete, intact artifact of `key`, or None if it must be built.

        Checks the manifest and every file's size, and with `verify` its sha256. A damaged artifact is moved
        to `damaged/` with a warning. Raises UserError if the files may not be read or moved.
        """
        try:
            return self.storage.retry(lambda: self._find(key, verify))
        except OSError as error:
            text = f"cannot read {key} in {self._folder(key)}: {error.strerror or error}"
            raise self.ROOT_ERROR(text) from error

    def find_many(self, keys: Iterable[StageKey], *, verify: bool = False) -> dict[StageKey, Artifact]:
        """`find` for many at once; what must be built is left out."""
        keys = list(keys)
        found = at_once(lambda key: self.find(key, verify=verify), keys)
        return {key: artifact for key, artifact in zip(keys, found, strict=True) if artifact}

    def published(self, stages: Iterable[str] | None = None) -> set[str]:
        """The digests of all published artifacts (of some stages), by their names alone: nothing is read or checked."""
        return {digest for stage in (self._stages() if stages is None else stages) for digest in self._digests(stage)}

    def newest_first(self, stage: str) -> list[str]:
        """The digests of a stage's published artifacts, by their names and ages alone."""
        ages = self._ages(stage)
        return sorted(ages, key=ages.__getitem__)

    def artifacts(self) -> Iterator[Artifact]:
        """Everything published, by stage; contents unverified, bad manifests skipped with a warning."""
        stages = {digest: stage for stage in self._stages() for digest in sorted(self._digests(stage))}
        for digest, found in self.read_many((stage, digest) for digest, stage in stages.items()).items():
            if isinstance(found, Artifact):
                yield found
            else:
                log.warning("skipping damaged artifact %s %s: %s", stages[digest], digest, found)

    def read(self, stage: str, digest: str) -> Artifact:
        """A published artifact by its manifest alone; raises FileNotFoundError or DamagedArtifact."""
        folder = self.root / stage / digest
        with self._storage_errors(f"reading {stage} {digest[:12]}"):
            content = self.storage.retry((folder / MANIFEST).read_bytes)
        return replace(read_manifest(content, digest)[0], path=folder)

    def read_many(self, names: Iterable[tuple[str, str]]) -> dict[str, Artifact | DamagedArtifact]:
        """`read` for many (stage, digest) at once, by digest. What is not there is left out."""

        def read(name: tuple[str, str]) -> Artifact | DamagedArtifact | None:
            try:
                return self.read(*name)
            except DamagedArtifact as error:
                return error
            except FileNotFoundError:
                return None

        names = list(names)
        found = zip(names, at_once(read, names), strict=True)
        return {digest: one for (_, digest), one in found if one}

    def read_with_inputs(
        self, names: Iterable[tuple[str, str]], *, but: Collection[str] = ()
    ) -> dict[str, Artifact | DamagedArtifact]:
        """`read_many`, with all that it was made from, other than the inputs whose digests are in `but`."""
        found: dict[str, Artifact | DamagedArtifact] = {}
        seen, wanted = set(but), set(names)
        while wanted:
            seen |= {digest for _, digest in wanted}
            read = self.read_many(wanted)
            found |= read
            keys = [one.key for one in read.values() if isinstance(one, Artifact)]
            wanted = {name for key in keys for name in key.inputs.items() if name[1] not in seen}
        return found

    def why(self, key: StageKey) -> str:
        """Why `key` must be computed, beside the published artifact of the same stage that differs least.

        "caae.decoder_depth 8 -> 4", "input caae changed (decoder_depth 8 -> 4)" (published -> wanted).
        """
        return self.why_many([key])[key]

    def why_many(self, keys: Iterable[StageKey]) -> dict[StageKey, str]:
        """`why` for many at once. What changed inside an input is told if its key is one of them, or is published."""
        return reasons(self, keys)

    # Building

    def workspace(self, key: StageKey) -> Path:
        """A fresh folder on the store's file system to build `key` in; `publish` makes it the artifact."""
        folder = self.root / "tmp" / f"{key.stage}-{key.short}.{machine()}.{os.getpid()}.{secrets.token_hex(4)}"
        with self._storage_errors(f"writing {key}"):
            self.storage.retry(folder.mkdir)
        return folder

    def checkpoints(self, key: StageKey) -> Path:
        """The folder for resumable state of an unfinished `key`: survives failure, removed by `publish`."""
        folder = self.root / "checkpoints" / key.stage / key.digest
        with self._storage_errors(f"writing {key}"):
            self.storage.retry(lambda: folder.mkdir(parents=True, exist_ok=True))
        return folder

    def save_checkpoints(self, key: StageKey) -> None:
        """Make the present `checkpoints` of `key` last beyond this host: nothing to do where they are in the store."""

    @contextmanager
    def writing(self, key: StageKey, workspace: Path) -> Iterator[None]:
        """Wrap what fills `workspace` and the checkpoints: any failure removes the workspace, never the
        checkpoints; a full disk, or one that may not be written, becomes a StoreError (see `ROOT_ERROR`)."""
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
        NaN). Raises StoreError if the disk is full or not writable; any failure removes `folder`.
        """
        if folder.parent != self.root / "tmp":
            raise ValueError(f"{folder} is not a workspace of this store")
        with self.writing(key, folder):
            manifest = self.storage.retry(lambda: make_manifest(key, folder, info))
            self.storage.retry(lambda: write_manifest(folder, manifest))
            artifact = self._install(key, folder, manifest)
        self._remove_checkpoints(key)
        return artifact

    # Single flight

    def find_or_make(
        self,
        key: StageKey,
        make: Callable[[Path, Lease], Mapping[str, Any]],
        *,
        wait: Callable[[LeaseHolder], None] | None = lambda holder: None,
    ) -> tuple[Artifact, bool]:
        """The artifact of `key`, and whether it was found; if not, it is made here, and nowhere else meanwhile.

        make(workspace, lease) fills a folder and returns the artifact's info; it may use `checkpoints`. `wait` is as
        for `lease`. Raises what `make` raises, or LeaseLost where it fails after another process has taken over; and as
        `publish` does.
        """
        if artifact := self.find(key):
            return artifact, True
        with self.lease(key, wait=wait) as lease:
            if artifact := self.find(key):
                return artifact, True
            workspace = self.workspace(key)
            with self.writing(key, workspace), _not_lost(lease):
                info = make(workspace, lease)
            return self.publish(key, workspace, info), False

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
        with self._storage_errors(f"reading the lease on {key}"):
            return self.leases.holder(key)

    # What is needed (`semformer.collection`)

    def keep(self, name: str, digests: Iterable[str], about: Mapping[str, Any] | None = None) -> None:
        """Record that `name` needs these stages and all that they were made from: a sweep or study, or a driver of it
        with an id of its own, as "SWEEP.ID".

        Replaces what was recorded under the name. Raises ValueError for what is no digest.
        """
        collection.keep(self.storage, name, digests, about or {})

    def kept(self, name: str) -> Root | None:
        """What `keep` recorded under this very name; None if that is nothing, or, with a warning, not readable."""
        return collection.kept(self.storage, name)

    def roots(self, *, without: Iterable[str] = ()) -> dict[str, Root]:
        """Everything recorded by `keep`, by name, but for the sweeps named in `without`.

        Raises UserError for a record that cannot be read, and if nothing is recorded for one of `without`.
        """
        return collection.roots(self.storage, without)

    def drop(self, sweep: str) -> None:
        """Forget what was recorded for a sweep, by all of its drivers. Raises UserError if that is nothing."""
        collection.drop(self.storage, sweep)

    def collect(
        self, *, apply: bool = False, grace: float = 24 * 3600.0, without: Iterable[str] = ()
    ) -> list[Collected]:
        """What no root reaches and nobody has touched for `grace` seconds; removed only with `apply`.

        The roots of the sweeps named in `without` do not count. Raises UserError as `roots` does, and if nothing was
        ever recorded, for then nothing says what is needed.
        """
        return collection.collect(self, apply=apply, grace=grace, without=list(without))

    # Helpers

    def _find(self, key: StageKey, verify: bool) -> Artifact | None:
        folder = self._folder(key)
        try:
            seen = folder.stat().st_ino
        except FileNotFoundError:
            if not self.root.exists():
                raise  # it is away, which does not mean that nothing is published
            return None
        try:
            try:
                artifact = self.read(key.stage, key.digest)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise DamagedArtifact(f"no {MANIFEST}: it is half-written") from error
            for name, told in artifact.files.items():
                path = folder / name
                check_size(name, path.stat().st_size if path.is_file() else None, told)
                if verify:
                    check_contents(name, path, told)
            return artifact
        except DamagedArtifact as error:
            with self._storage_errors(f"reading {key}"):
                self._quarantine(key, folder, seen, str(error))
            return None

    def _install(self, key: StageKey, folder: Path, manifest: bytes) -> Artifact:
        target = self._folder(key)
        if not target.parent.exists():
            target.parent.mkdir(exist_ok=True)
            sync(self.root)
        while True:
            try:
                self.storage.retry(lambda: os.rename(folder, target))
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                if theirs := self.find(key):
                    log.info("another process has published %s first; keeping theirs", key)
                    shutil.rmtree(folder, ignore_errors=True)
                    return theirs
            else:
                self.storage.retry(lambda: sync(target.parent))
                return self.read(key.stage, key.digest)

    def _remove_checkpoints(self, key: StageKey) -> None:
        shutil.rmtree(self.root / "checkpoints" / key.stage / key.digest, ignore_errors=True)

    def _stages(self) -> list[str]:
        """Those of which something is published, in order."""
        return [name for name in self.storage.folders("") if name not in RESERVED]

    def _digests(self, stage: str) -> Iterable[str]:
        """Of what is published of a stage."""
        return [name for name in self.storage.folders(f"{stage}/") if re.fullmatch(DIGEST, name)]

    def _ages(self, stage: str) -> dict[str, float]:
        """Digest -> age (which orders them; by which clock does not matter) of what is published of a stage."""
        ages = {}
        for digest in self._digests(stage):
            with suppress(FileNotFoundError):
                ages[digest] = -os.stat(f"{self.root}/{stage}/{digest}/{MANIFEST}").st_mtime
        return ages

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
        """Of a full or forbidden `root`."""
        free = shutil.disk_usage(self.root).free
        size = f" (which takes at least {written / 1e6:.1f} MB)" if written else ""
        advice = (
            f"{free / 1e6:.1f} MB are free there now: free more (or raise the quota or the file-size limit)"
            if cause.errno in FULL
            else "Make the folder readable and writable"
        )
        return self.ROOT_ERROR(
            f"{doing}{size} failed in {self.ROOT} {self.root}: {cause.strerror}. {advice}, or choose {self.INSTEAD}; "
            "then run again. Published stages stay, an unfinished one resumes from its checkpoints."
        )


@contextmanager
def _not_lost(lease: Lease) -> Iterator[None]:
    """Turns an error into LeaseLost where another process has taken over, which removes what we work with."""
    try:
        yield
    except Exception:
        with suppress(OSError, UserError):
            lease.renew()
        lease.check()
        raise
