"""A storage in a folder, where artifacts are worked on and read in place.

    root/<stage>/<digest>/               a published artifact: its files, and manifest.json written last
    root/checkpoints/<stage>/<digest>/   resumable state of an unfinished stage
    root/leases/<digest>/<number>        who is building it now (`leases`)
    root/roots/<name>.json               what a sweep reaches (`roots`)
    root/tmp/   root/damaged/            workspaces; artifacts that failed verification (nothing is thrown away)

A published artifact never changes, so readers need no lock.
"""

import errno
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from semformer.errors import StoreError
from semformer.keys import DIGEST, RESERVED, StageKey
from semformer.store.artifact import MANIFEST, Artifact, DamagedArtifact, aside, check_contents, sync
from semformer.store.local import Local
from semformer.store.storage import Entry, Storage, patiently

AWAY = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH}


class Folder(Storage):
    """A folder on a disk, or one that several hosts have mounted. Raises StoreError if it cannot be used."""

    def __init__(self, root: Path, patience: float):
        local = Local(root.absolute(), "the store", "another store", StoreError)
        super().__init__(str(local.root), patience, local)
        self.root = local.root
        local.open("leases", "damaged", "checkpoints", "roots")
        self._now()

    def is_away(self, error: Exception) -> bool:
        if not isinstance(error, OSError):
            return False
        return error.errno in AWAY or (error.errno == errno.ENOENT and not self.root.exists())

    @patiently
    def entries(self, prefix: str) -> dict[str, Entry]:
        folder, _, start = prefix.rpartition("/")
        now, found = self._now(), {}
        waiting = [item for item in _children(self.root / folder) if item.name.startswith(start)]
        while waiting:
            item = waiting.pop()
            with suppress(FileNotFoundError):  # removed meanwhile
                if item.is_dir():
                    waiting += _children(item)
                else:
                    state = item.stat()
                    found[item.path.removeprefix(f"{self.root}/")] = Entry(state.st_size, now - state.st_mtime)
        return found

    @patiently
    def read(self, name: str) -> tuple[bytes, float]:
        path = self.root / name
        changed = path.stat().st_mtime
        return path.read_bytes(), max(0.0, self._now() - changed)

    @patiently
    def create(self, name: str, content: bytes) -> bool:
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
        except OSError:
            path.unlink()
            raise
        return True

    @patiently
    def write(self, name: str, content: bytes) -> None:
        partial = self.root / "tmp" / f"write-{secrets.token_hex(8)}"
        try:
            partial.write_bytes(content)
            os.replace(partial, self.root / name)
        finally:
            partial.unlink(missing_ok=True)

    @patiently
    def touch(self, name: str) -> None:
        os.utime(self.root / name)

    @patiently
    def remove(self, name: str) -> None:
        if not (self.root / name).is_dir():
            (self.root / name).unlink(missing_ok=True)

    @patiently
    def remove_folder(self, name: str) -> None:
        """All at once for readers: it is moved away first."""
        away = self.root / "tmp" / f"removed-{secrets.token_hex(8)}"
        with suppress(FileNotFoundError):
            os.rename(self.root / name, away)
        shutil.rmtree(away, ignore_errors=True)

    # Artifacts: <stage>/<digest>/, with its manifest.json

    def place(self, stage: str, digest: str, sha256: str) -> str:
        return f"{stage}/{digest}"

    def stages(self) -> list[str]:
        return [name for name in self._folders() if name not in RESERVED]

    def digests(self, stage: str) -> list[str]:
        return [name for name in self._folders(stage) if re.fullmatch(DIGEST, name)]

    def ages(self, stage: str) -> dict[str, float]:
        ages = {}
        for digest in self.digests(stage):
            with suppress(FileNotFoundError):
                ages[digest] = -os.stat(f"{self.root}/{stage}/{digest}/{MANIFEST}").st_mtime
        return ages

    @patiently
    def manifest(self, stage: str, digest: str) -> bytes:
        try:
            return (self.root / stage / digest / MANIFEST).read_bytes()
        except (NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(f"{stage} {digest} has no file {MANIFEST}") from error

    def publish(self, workspace: Path, artifact: Artifact, manifest: bytes) -> bool:
        stage = artifact.path.parent

        def move() -> None:
            if not stage.exists():
                stage.mkdir(exist_ok=True)
                sync(self.root)
            os.rename(workspace, artifact.path)

        try:
            self.retry(move)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            return False
        self.retry(lambda: sync(stage))
        return True

    def withdraw(self, artifact: Artifact) -> None:
        """Nothing is left."""

    def set_aside(self, key: StageKey, manifest: bytes | None) -> str | None:
        folder, target = self.root / key.stage / key.digest, self.root / aside(key)
        if not os.path.lexists(folder):
            return None
        try:
            now = self.manifest(key.stage, key.digest)
        except FileNotFoundError:
            now = None
        if now != manifest:  # moved away and rebuilt by another process
            return None
        target.parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):
            os.rename(folder, target)
            return str(target)
        return None

    def sizes(self, artifact: Artifact) -> dict[str, int]:
        found = {}
        for name in artifact.files:
            path = artifact.path / name
            with suppress(FileNotFoundError):  # moved away meanwhile
                if path.is_file():
                    found[name] = path.stat().st_size
        return found

    def have(self, artifact: Artifact, name: str, *, verify: bool = False) -> None:
        if not verify:
            return
        try:
            check_contents(name, artifact.path / name, artifact.files[name])
        except FileNotFoundError as error:
            if not self.root.exists():
                raise
            raise DamagedArtifact(f"{name} is missing") from error

    def workspace(self, key: StageKey) -> Path:
        return self.retry(lambda: self.local.workspace(key))

    @patiently
    def checkpoints(self, key: StageKey) -> Path:
        folder = self.root / "checkpoints" / key.stage / key.digest
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def save_checkpoints(self, key: StageKey) -> None:
        """They are in the store."""

    def remove_checkpoints(self, key: StageKey) -> None:
        shutil.rmtree(self.root / "checkpoints" / key.stage / key.digest, ignore_errors=True)

    @patiently
    def _folders(self, below: str = "") -> list[str]:
        self.root.stat()  # raises where it is away
        return sorted(item.name for item in _children(self.root / below) if item.is_dir())

    def _now(self) -> float:
        """By the file system's clock, which also stamps the files: hosts' clocks may differ."""
        clock = self.root / "clock"
        try:
            clock.touch()
        except PermissionError:  # it is another user's
            mine = self.root / "tmp" / f"write-{secrets.token_hex(8)}"
            mine.touch()
            os.replace(mine, clock)
        return clock.stat().st_mtime


def _children(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as items:
        return list(items)
    return []
