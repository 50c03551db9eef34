"""The folder on this machine in which stages are worked on: a store's own, or the cache of one in a bucket."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from semformer.errors import UserError
from semformer.keys import StageKey
from semformer.store.processes import is_alive, machine

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@dataclass(frozen=True)
class Local:
    """A folder; where it is full or forbidden, errors of class `fault` tell what to do.

    root/tmp/   workspaces of processes at work
    """

    root: Path
    called: str
    """What people call it, as "the store"."""
    instead: str
    """What they may choose in its place."""
    fault: type[UserError]

    def open(self, *folders: str) -> None:
        """Make it, with these folders in it, and remove the workspaces of processes that died on this host.

        Raises `fault` where it cannot be made or written.
        """
        try:
            for name in ("tmp", *folders):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            probe = self.root / "tmp" / f"probe-{secrets.token_hex(8)}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise self.fault(
                f"cannot use {self.root} as {self.called}: {error.strerror or error}. "
                f"Make it a writable folder with free space, or choose {self.instead}."
            ) from error
        for folder in (self.root / "tmp").iterdir():
            if (pid := worker(folder.name)) and not is_alive(pid):
                shutil.rmtree(folder, ignore_errors=True)

    def workspace(self, key: StageKey) -> Path:
        """A fresh folder to work on `key` in."""
        folder = self.root / "tmp" / f"{key.stage}-{key.short}.{machine()}.{os.getpid()}.{secrets.token_hex(4)}"
        folder.mkdir()
        return folder

    @contextmanager
    def writing(self, key: StageKey, workspace: Path) -> Iterator[None]:
        """Wraps what fills a workspace: any failure removes it, and is told as `errors` does."""
        try:
            yield
        except BaseException as error:
            written = sum(p.stat().st_size for p in workspace.rglob("*") if p.is_file())
            shutil.rmtree(workspace, ignore_errors=True)
            if cause := self._cause(error):
                raise self._explain(cause, f"writing {key}", written) from error
            raise

    @contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Turns a full disk, or one that may not be written, into `fault`."""
        try:
            yield
        except OSError as error:
            if cause := self._cause(error):
                raise self._explain(cause, doing) from error
            raise

    def _cause(self, error: BaseException) -> OSError | None:
        """The full disk or missing permission behind `error`, unless it is about a file outside this folder."""
        if isinstance(error, UserError):
            return None
        if not isinstance(error, OSError) or error.errno is None:
            if told := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors
                error = OSError(int(told[1]), os.strerror(int(told[1])))
            else:  # torch.save into an open file raises a RuntimeError in the context of the true one
                behind = error.__cause__ or error.__context__
                return self._cause(behind) if behind else None
        inside = error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(self.root)
        return error if inside and error.errno in FULL | FORBIDDEN else None

    def _explain(self, cause: OSError, doing: str, written: int = 0) -> UserError:
        free = shutil.disk_usage(self.root).free
        size = f" (which takes at least {written / 1e6:.1f} MB)" if written else ""
        advice = (
            f"{free / 1e6:.1f} MB are free there now: free more (or raise the quota or the file-size limit)"
            if cause.errno in FULL
            else "Make the folder readable and writable"
        )
        return self.fault(
            f"{doing}{size} failed in {self.called} {self.root}: {cause.strerror}. {advice}, or choose {self.instead}; "
            "then run again. Published stages stay, an unfinished one resumes from its checkpoints."
        )


def worker(workspace: str) -> int | None:
    """The process of this `machine` that made a workspace, by its name; None where another machine did, or nobody."""
    _, *owner = workspace.split(".")
    return int(owner[1]) if len(owner) == 3 and owner[0] == machine() else None
