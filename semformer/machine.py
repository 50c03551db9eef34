"""What this machine need not make, fetch or find out twice."""

import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

STILL = 2.0
"""Seconds for which files must be unchanged: within them, some file systems do not tell a second change."""


def cache_folder() -> Path:
    """$SEMFORMER_CACHE, or ~/.cache/semformer; for who has no home, in the folder of temporary files."""
    try:
        return Path(os.environ.get("SEMFORMER_CACHE") or "~/.cache/semformer").expanduser()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"semformer-{os.getuid()}"


class Note:
    """What reading files has shown, kept until one of them changes: by their paths, inodes, sizes and times as they are
    now, so that it must be made before they are read. Raises OSError for a file that is not there."""

    def __init__(self, files: Sequence[Path], about: str):
        seen = [os.stat(path) for path in files]
        stamps = [
            f"{path.absolute()} {s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}"
            for path, s in zip(files, seen, strict=True)
        ]
        name = hashlib.sha256("\n".join((about, *stamps)).encode()).hexdigest()
        self.path = cache_folder() / "notes" / name
        self._is_still = max(s.st_ctime for s in seen) < time.time() - STILL

    def read(self) -> str | None:
        with suppress(OSError):
            return self.path.read_text() or None
        return None

    def write(self, text: str) -> None:
        """Where it can be kept, and where none of the files had been written just before."""
        if not self._is_still:
            return
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(f".{secrets.token_hex(4)}")
            partial.write_text(text)
            partial.replace(self.path)
