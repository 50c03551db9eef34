"""Files that were fetched from afar, of which the least recently used go."""

import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from semformer.keys import RESERVED
from semformer.store.artifact import sha256

IN_USE = 600.0
"""Seconds after its last use during which a file stays, whatever the limit."""
SLACK = 0.01
"""Of the limit, that a process may add before it looks at all files again."""


class Cache:
    """The artifacts' files in a folder, for which there is room for `limit` bytes."""

    def __init__(self, root: Path, limit: float):
        self.root, self.limit = root, limit
        self._added = limit  # bytes since all files were looked at; at first, reason enough to look

    def has(self, path: Path, told: Mapping[str, Any], *, verify: bool) -> bool:
        """Whether a file is there, and with `verify` as it was `told`; it is used now."""
        try:
            if path.stat().st_size != told["size"] or (verify and sha256(path) != told["sha256"]):
                return False
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def added(self, paths: Iterable[Path]) -> None:
        """Notes new files; what has not been used for longest goes, but for what was in the last IN_USE seconds."""
        for path in paths:
            os.utime(path)
            self._added += path.stat().st_size
        if self._added < SLACK * self.limit:
            return
        self._added = 0
        files = sorted(self._files())
        excess = sum(size for _, size, _ in files) - self.limit
        for used, size, path in files:
            if excess <= 0 or time.time() - used < IN_USE:
                return
            path.unlink(missing_ok=True)
            excess -= size

    def _files(self) -> Iterable[tuple[float, int, Path]]:
        """When each was used last, its size and path."""
        for stage in self.root.iterdir():
            if stage.name in RESERVED or not stage.is_dir():
                continue
            for path in stage.rglob("*"):
                with suppress(FileNotFoundError):
                    if path.is_file():
                        state = path.stat()
                        yield state.st_mtime, state.st_size, path
