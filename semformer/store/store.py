"""Artifacts by key, and single flight: a stage is found, or made by one process while the others wait.

The lease only saves work: should two processes ever build the same key, the first to publish wins and both end up with
the same artifact.
"""

import copy
import logging
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from semformer.errors import StoreError, UserError
from semformer.keys import StageKey
from semformer.store.artifact import (
    MANIFEST,
    Artifact,
    DamagedArtifact,
    check_size,
    make_manifest,
    read_manifest,
    write_manifest,
)
from semformer.store.folder import Folder
from semformer.store.leases import Lease, LeaseHeld, LeaseHolder, Leases
from semformer.store.roots import Roots
from semformer.store.storage import Storage, at_once

TRIES = 20
"""To publish where something damaged is found again and again."""
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

    `cache` and `cache_bytes` are about buckets alone, see `bucket.Bucket`. `patience` is for how many seconds a
    storage that is away is tried again. Raises UserError if it cannot be used, and StorageUnreachable (which is one)
    if a bucket cannot be reached within `patience_at_opening`.
    """
    storage: Path | Storage = Path(location)
    if re.match("[a-z][a-z0-9+]+:/", str(location)):
        from semformer.store.bucket import Bucket

        storage = Bucket(str(location), patience, cache, cache_bytes, patience_at_opening)
    return Store(storage, heartbeat=heartbeat, expiry=expiry, patience=patience)


class Store:
    """The artifacts in a storage, or in the folder of this path.

    `heartbeat` and `expiry` are seconds: a lease not renewed for `expiry` may be taken over. A storage that is away (a
    folder of a file server, say) is tried again for `patience` seconds before StorageUnreachable is raised; that of a
    `storage` is its own. Opening a store removes the workspaces of processes that died on this host. Where `root` is
    full or forbidden, every method raises an error that says what to do: StoreError, or MachineError where it is the
    cache of a bucket.
    """

    def __init__(
        self, storage: Path | Storage, *, heartbeat: float = 5.0, expiry: float = 60.0, patience: float = 300.0
    ):
        self.storage = storage if isinstance(storage, Storage) else Folder(Path(storage), patience)
        self.leases = Leases(self.storage, heartbeat, expiry)
        self.roots = Roots(self.storage)

    def patient(self, seconds: float) -> Self:
        """The same store, which waits for so long where its storage is away."""
        other = copy.copy(self)
        other.storage = self.storage.patient(seconds)
        other.leases = self.leases.patient(seconds)
        other.roots = Roots(other.storage)
        return other

    @property
    def location(self) -> str:
        """What `open_store` takes to open the same store in another process."""
        return self.storage.location

    @property
    def root(self) -> Path:
        """The folder on this machine in which artifacts are made and read."""
        return self.storage.local.root

    # Reading

    def find(self, key: StageKey, *, verify: bool = True) -> Artifact | None:
        """The complete, intact artifact of `key`, or None if it must be built.

        Checks the manifest and every file's size, and with `verify` its sha256. A damaged artifact is moved
        to `damaged/` with a warning. Raises UserError if the files may not be read or moved.
        """
        try:
            return self.storage.retry(lambda: self._find(key, verify))
        except OSError as error:
            text = f"cannot read {key} in {self.root / key.stage / key.digest}: {error.strerror or error}"
            raise self.storage.local.fault(text) from error

    def find_many(self, keys: Iterable[StageKey], *, verify: bool = False) -> dict[StageKey, Artifact]:
        """`find` for many at once; what must be built is left out."""
        keys = list(keys)
        found = at_once(lambda key: self.find(key, verify=verify), keys)
        return {key: artifact for key, artifact in zip(keys, found, strict=True) if artifact}

    def published(self, stages: Iterable[str] | None = None) -> set[str]:
        """The digests of all published artifacts (of some stages), by their names alone: nothing is read or checked."""
        wanted = self.storage.stages() if stages is None else stages
        return {digest for stage in wanted for digest in self.storage.digests(stage)}

    def newest_first(self, stage: str) -> list[str]:
        """The digests of a stage's published artifacts, by their names and ages alone."""
        ages = self.storage.ages(stage)
        return sorted(ages, key=ages.__getitem__)

    def artifacts(self) -> Iterator[Artifact]:
        """Everything published, by stage; contents unverified, bad manifests skipped with a warning."""
        stages = {digest: stage for stage in self.storage.stages() for digest in sorted(self.storage.digests(stage))}
        for digest, found in self.read_many((stage, digest) for digest, stage in stages.items()).items():
            if isinstance(found, Artifact):
                yield found
            else:
                log.warning("skipping damaged artifact %s %s: %s", stages[digest], digest, found)

    def read(self, stage: str, digest: str) -> Artifact:
        """A published artifact by its manifest alone; raises FileNotFoundError or DamagedArtifact."""
        with self._errors(f"reading {stage} {digest[:12]}"):
            return self._parse(self.storage.manifest(stage, digest), stage, digest)

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

    # Building

    def workspace(self, key: StageKey) -> Path:
        """A fresh folder in `root` to build `key` in; `publish` makes it the artifact."""
        with self._errors(f"writing {key}"):
            return self.storage.workspace(key)

    def checkpoints(self, key: StageKey) -> Path:
        """The folder for resumable state of an unfinished `key`: survives failure, removed by `publish`.

        In a bucket's cache, it has the files of whoever saved them last.
        """
        with self._errors(f"writing {key}"):
            return self.storage.checkpoints(key)

    def save_checkpoints(self, key: StageKey) -> None:
        """Make the present `checkpoints` of `key` last beyond this host: nothing to do where they are in the store."""
        self.storage.save_checkpoints(key)

    def publish(self, key: StageKey, folder: Path, info: Mapping[str, Any]) -> Artifact:
        """Make the files in `folder` (from `workspace`) the artifact of `key`, all at once or not at all.

        If another process has published `key` meanwhile, theirs is kept and returned. `info` must be JSON (no NaN).
        Any failure removes `folder`.
        """
        if folder.parent != self.root / "tmp":
            raise ValueError(f"{folder} is not a workspace of this store")
        with self.storage.local.writing(key, folder):
            manifest = self.storage.retry(lambda: make_manifest(key, folder, info))
            self.storage.retry(lambda: write_manifest(folder, manifest))
            artifact = self._install(key, folder, manifest)
        self.storage.remove_checkpoints(key)
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
            with self.storage.local.writing(key, workspace), _not_lost(lease):
                info = make(workspace, lease)
            return self.publish(key, workspace, info), False

    def lease(self, key: StageKey, *, wait: Callable[[LeaseHolder], None] | None = None) -> Lease:
        """Become the only one to build `key`; use as a context manager and call `find` again inside.

        While a live process holds the lease: raises LeaseHeld, or with `wait` calls `wait(holder)` at every
        poll until the holder releases (which it does right after publishing), dies or stops renewing.
        """
        while True:
            with self._errors(f"taking the lease on {key}"):
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
        with self._errors(f"reading the lease on {key}"):
            return self.leases.holder(key)

    # Helpers

    def _find(self, key: StageKey, verify: bool) -> Artifact | None:
        try:
            manifest = self.storage.manifest(key.stage, key.digest)
        except FileNotFoundError:
            self._set_aside(key, None, f"no {MANIFEST}: it is half-written")
            return None
        try:
            artifact = self._parse(manifest, key.stage, key.digest)
            sizes = self.storage.sizes(artifact)
            for name, told in artifact.files.items():
                check_size(name, sizes.get(name), told)
            for name in artifact.files if verify else ():
                self._have(artifact, name, verify=True)
            return artifact
        except DamagedArtifact as error:
            self._set_aside(key, manifest, str(error))
            return None

    def _set_aside(self, key: StageKey, manifest: bytes | None, reason: str) -> None:
        with self._errors(f"reading {key}"):
            if moved := self.storage.set_aside(key, manifest):
                log.warning("artifact %s is damaged (%s): moved to %s, to be rebuilt", key, reason, moved)

    def _parse(self, manifest: bytes, stage: str, digest: str) -> Artifact:
        artifact, sha256 = read_manifest(manifest, digest)
        return replace(artifact, path=self.root / self.storage.place(stage, digest, sha256), have=self._have)

    def _have(self, artifact: Artifact, name: str, *, verify: bool = False) -> None:
        with self._errors(f"fetching {artifact.key}"):
            self.storage.have(artifact, name, verify=verify)

    def _install(self, key: StageKey, folder: Path, manifest: bytes) -> Artifact:
        artifact = self._parse(manifest, key.stage, key.digest)
        for _ in range(TRIES):
            if self.storage.publish(folder, artifact, manifest):
                return artifact
            if theirs := self.find(key):
                log.info("another process has published %s first; keeping theirs", key)
                self.storage.withdraw(artifact)
                shutil.rmtree(folder, ignore_errors=True)
                return theirs
        raise StoreError(f"{key} cannot be published: remove what is in its place, {artifact.path}, then run again")

    def _errors(self, doing: str) -> AbstractContextManager[None]:
        """See `local.Local.errors`."""
        return self.storage.local.errors(doing)


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
