"""Content-addressed artifacts: keys, atomic publish, single flight.

    root/<stage>/<digest>/          a published artifact: its files, and manifest.json written last
    root/checkpoints/<stage>/<digest>/   resumable state of an unfinished stage
    root/leases/<digest>.<generation>    who is building it now
    root/tmp/   root/damaged/       workspaces; artifacts that failed verification (nothing is thrown away)

A published artifact never changes, so readers need no lock. The lease only saves work: should two processes
ever build the same key, the first to publish wins and both end up with the same artifact.
"""

import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Self

from semformer.errors import UserError

MANIFEST = "manifest.json"
RESERVED = {"tmp", "leases", "damaged", "checkpoints"}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
log = logging.getLogger(__name__)


class DamagedArtifact(Exception):
    """A published artifact is not what its manifest says."""


class LeaseHeld(Exception):
    """Another live process (or another part of this one) is building the key; see `.holder`."""

    def __init__(self, key: "StageKey", holder: "LeaseHolder"):
        super().__init__(f"{key} is being built by {holder}")
        self.holder = holder


class LeaseLost(Exception):
    """The lease expired and another process has taken it over."""


@dataclass(frozen=True, eq=False)
class StageKey:
    """What a stage's result depends on, and nothing else; equal digests mean equal results.

    `spec` is copied in plain JSON types (tuples become lists). 1 and 1.0 are different values: let the config
    class settle the type. Raises TypeError for what JSON cannot hold and ValueError for NaN or infinity.
    """

    stage: str
    spec: Mapping[str, Any]

    def __post_init__(self):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.stage) or self.stage in RESERVED:
            raise ValueError(f"{self.stage!r} cannot name a stage")
        if self.spec.get("stage", self.stage) != self.stage:
            raise ValueError(f"the spec of stage {self.stage} says stage {self.spec['stage']}")
        object.__setattr__(self, "spec", _plain(self.spec, f"key of {self.stage}"))

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(_canonical({**self.spec, "stage": self.stage})).hexdigest()

    @property
    def short(self) -> str:
        return self.digest[:12]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StageKey) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        return f"{self.stage} {self.short}"


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


@dataclass(frozen=True)
class LeaseHolder:
    host: str
    pid: int
    since: float  # seconds since the epoch, by the holder's clock
    age: float  # seconds since its last heartbeat, by the store's clock

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (last heartbeat {self.age:.0f} s ago)"


class Lease:
    """The right to build one key, kept by a heartbeat thread until `release` or the end of the `with` block.

    Lease files are numbered by generation; the highest is the current one and is never removed, so a number
    is never given twice and a stale holder can only ever touch its own file. Release sets its heartbeat to 0.
    """

    def __init__(self, store: "Store", key: StageKey, generation: int):
        self.key, self.generation = key, generation
        self._store, self._path = store, store._lease_path(key, generation)
        self._lost, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease {key}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    def check(self) -> None:
        """Raises LeaseLost if another process has taken over; call it between epochs."""
        if self.lost:
            raise LeaseLost(f"the lease on {self.key} expired and another process has taken it over")

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        try:
            os.utime(self._path, (0, 0))
            self._store._remove_leases_before(self.key, self.generation)
        except OSError as error:
            if not self.lost:
                log.warning("could not release the lease on %s (%s); it will expire", self.key, error)

    def _beat(self) -> None:
        while not self._stop.wait(self._store.heartbeat):
            try:
                if max(self._store._generations(self.key), default=0) > self.generation:
                    self._lost.set()
                    return
                os.utime(self._path)
            except FileNotFoundError:
                self._lost.set()
                return
            except OSError as error:
                log.warning("heartbeat of %s failed, trying again: %s", self.key, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Store:
    """Artifacts in a local (or network) folder.

    `heartbeat` and `expiry` are seconds: a lease not renewed for `expiry` may be taken over. Opening a store
    removes the workspaces of processes that died on this host. Raises UserError if the folder cannot be made
    or written.
    """

    def __init__(self, root: Path, *, heartbeat: float = 5.0, expiry: float = 60.0):
        if not 0 < 2 * heartbeat <= expiry:
            raise ValueError(f"expiry ({expiry} s) must be at least twice the heartbeat ({heartbeat} s)")
        self.root, self.heartbeat, self.expiry = Path(root).absolute(), heartbeat, expiry
        self._specs: dict[str, Mapping[str, Any]] = {}  # of every key seen, by digest, for `why`
        try:
            for name in RESERVED:
                (self.root / name).mkdir(parents=True, exist_ok=True)
            probe = self.root / "tmp" / f"probe-{secrets.token_hex(4)}"
            probe.write_bytes(b"probe")
            probe.unlink()
            self._now()
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
        published = [p for p in (self.root / key.stage).glob("*") if self._spec(key.stage, p.name)]
        if not published:
            return "nothing published for this stage yet"
        published.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        specs = [self._specs[path.name] for path in published]
        changes = [self._changes(key.stage, spec, key.spec, f"{key.stage}.") for spec in specs]
        return _listing(min(changes, key=lambda change: change[0])[1])

    # Building

    def workspace(self, key: StageKey) -> Path:
        """A fresh folder on the store's file system to build `key` in; `publish` makes it the artifact."""
        name = f"{key.stage}-{key.short}.{_machine()}.{os.getpid()}.{secrets.token_hex(4)}"
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
            info = _plain({"created": created, "host": socket.gethostname(), **info}, "info")
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
            manifest = {**body, "sha256": hashlib.sha256(_canonical(body)).hexdigest()}
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
            if (lease := self._try_lease(key)) is not None:
                return lease
            if (holder := self.holder(key)) is not None:
                if wait is None:
                    raise LeaseHeld(key, holder)
                wait(holder)
                time.sleep(min(self.heartbeat, 0.5))

    def holder(self, key: StageKey) -> LeaseHolder | None:
        """Who is building `key` now; None if nobody, or their lease has expired or their process is gone."""
        while generation := max(self._generations(key), default=0):
            path = self._lease_path(key, generation)
            try:
                renewed, text = path.stat().st_mtime, path.read_text(encoding="utf-8")
            except FileNotFoundError:  # taken over and cleaned up between the two looks
                continue
            age = max(0.0, self._now() - renewed)
            try:
                note = json.loads(text)
            except ValueError:  # created, not yet written
                note = {"host": "an unknown host", "pid": 0, "machine": "", "since": renewed}
            gone = note["machine"] == _machine() and not _alive(note["pid"])
            if gone or age > self.expiry:
                return None
            return LeaseHolder(note["host"], note["pid"], note["since"], age)
        return None

    def _try_lease(self, key: StageKey) -> Lease | None:
        generation = max(self._generations(key), default=0) + 1
        if self.holder(key) is not None:
            return None
        path = self._lease_path(key, generation)
        note = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine(), "since": time.time()}
        with self._storage_errors(f"taking the lease on {key}"):
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return None
            try:
                with open(descriptor, "w", encoding="utf-8") as file:
                    json.dump(note, file)
            except OSError:
                os.utime(path, (0, 0))
                raise
        if max(self._generations(key), default=0) > generation:  # we looked too long ago: an old number
            path.unlink(missing_ok=True)
            return None
        self._remove_leases_before(key, generation)
        return Lease(self, key, generation)

    def _lease_path(self, key: StageKey, generation: int) -> Path:
        return self.root / "leases" / f"{key.digest}.{generation}"

    def _generations(self, key: StageKey) -> list[int]:
        return [int(p.name.rpartition(".")[2]) for p in (self.root / "leases").glob(f"{key.digest}.*")]

    def _remove_leases_before(self, key: StageKey, generation: int) -> None:
        for older in self._generations(key):
            if older < generation:
                self._lease_path(key, older).unlink(missing_ok=True)

    def _now(self) -> float:
        """The time by the file system's clock, which also stamps the heartbeats: hosts' clocks may differ."""
        clock = self.root / "leases" / "clock"
        clock.touch()
        return clock.stat().st_mtime

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
            if len(owner) == 3 and owner[0] == _machine() and not _alive(int(owner[1])):
                shutil.rmtree(folder, ignore_errors=True)

    def _spec(self, stage: str, digest: str) -> Mapping[str, Any] | None:
        if digest not in self._specs:
            try:
                self._specs[digest] = _read(self.root / stage / digest).key.spec
            except (DamagedArtifact, OSError):
                return None
        return self._specs[digest]

    def _changes(
        self, stage: str, old: Mapping[str, Any], new: Mapping[str, Any], prefix: str
    ) -> tuple[int, list[str]]:
        """How many values differ between two specs of a stage, inputs included, and one text for each."""
        count, texts = 0, []
        before, after = _flat(old), _flat(new)
        for path in sorted(before.keys() | after.keys()):
            a, b = before.get(path, "unset"), after.get(path, "unset")
            if a == b and type(a) is type(b):
                continue
            section, _, name = path.partition(".")
            if path == "inputs":  # {} on one side
                continue
            if section == "inputs":
                specs = [self._input_spec(digest) for digest in (a, b)]
                inner, inside = self._changes(name, *specs, "") if None not in specs else (1, [])
                count += inner
                texts.append(f"input {name} changed" + (f" ({_listing(inside)})" if inside else ""))
                continue
            count += 1
            if section == "data":
                texts.append(f"{path.replace('.', ' ', 1)} changed")
            elif section == "params":
                texts.append(f"{prefix}{name} {_brief(a)} -> {_brief(b)}")
            elif section == "version":
                texts.append(f"{stage} code version {_brief(a)} -> {_brief(b)}")
            else:
                texts.append(f"{path} {_brief(a)} -> {_brief(b)}")
        return count, texts

    def _input_spec(self, digest: str) -> Mapping[str, Any] | None:
        if digest not in self._specs:
            for folder in self.root.glob(f"*/{digest}"):
                if folder.parent.name not in RESERVED:
                    self._spec(folder.parent.name, digest)
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


def _plain(value: Any, where: str) -> Any:
    """A copy of `value` in JSON types; raises TypeError or ValueError naming where it cannot be one."""
    if isinstance(value, Mapping):
        if bad := [name for name in value if not isinstance(name, str)]:
            raise TypeError(f"{where}: {bad[0]!r} is no JSON field name")
        return {name: _plain(item, f"{where}, {name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}, item {i}") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: {value} is not a number that JSON can hold")
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{where}: {value!r} ({type(value).__name__}) is no JSON value")


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        parts = [_flat(item, f"{path}.{name}" if path else name) for name, item in value.items()]
        return {name: item for part in parts for name, item in part.items()}
    return {path: value}


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _listing(texts: list[str], limit: int = 4) -> str:
    more = [f"and {len(texts) - limit} more"] if len(texts) > limit else []
    return ", ".join(texts[:limit] + more)


def _read(folder: Path) -> Artifact:
    """The artifact in `folder` by its manifest alone; raises DamagedArtifact if missing or altered."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        told = manifest.pop("sha256")
        if hashlib.sha256(_canonical(manifest)).hexdigest() != told:
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


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@cache
def _machine() -> str:
    """Names the set of processes among which a pid is unique: the host, its boot and the pid namespace."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # not Linux
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
