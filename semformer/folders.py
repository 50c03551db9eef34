"""Where this machine keeps what it need not make or fetch twice."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$SEMFORMER_CACHE, or ~/.cache/semformer."""
    return Path(os.environ.get("SEMFORMER_CACHE") or "~/.cache/semformer").expanduser()
