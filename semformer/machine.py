"""What this machine need not make, fetch or find out twice."""

import hashlib
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

STILL = 2.0
"""Seconds for which files must be unchanged: within them, some file systems do not tell a second change."""


def cache_folder() -> Path:
    """$SEMFORMER_CACHE, or ~/.cache/semformer."""
    return Path(os.environ.get("SEMFORMER_CACHE") or "~/.cache/semformer").expanduser()


def remembered(files: Sequence[Path], about: str) -> str | None:
    """What `remember` was told, unless the path, inode, size or time of one has changed. Raises OSError without one."""
    note, _ = _note(files, about)
    with suppress(OSError):
        return note.read_text()
    return None


def remember(files: Sequence[Path], about: str, text: str) -> None:
    """Keep what reading all these files has shown, where it can be kept, and they were not written just now."""
    note, newest = _note(files, about)
    if newest > time.time() - STILL:
        return
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_suffix(f".{secrets.token_hex(4)}")
        partial.write_text(text)
        partial.replace(note)


def _note(files: Sequence[Path], about: str) -> tuple[Path, float]:
    """Where it is kept, and when the newest of the files was written."""
    seen = [os.stat(path) for path in files]
    stamps = [f"{p.absolute()} {s.st_ino} {s.st_size} {s.st_mtime_ns}" for p, s in zip(files, seen, strict=True)]
    name = hashlib.sha256("\n".join((about, *stamps)).encode()).hexdigest()
    return cache_folder() / "notes" / name, max(s.st_mtime for s in seen)
