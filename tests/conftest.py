"""What all tests share."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from semformer.store import Store

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden():
    """golden("caae") -> arrays of $GOLDEN_DIR/caae.npz (default: the copies beside the tests)."""
    folder = Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden"))
    return lambda name: dict(np.load(folder / f"{name}.npz"))


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store", heartbeat=0.05, expiry=20)


@pytest.fixture
def start():
    """Start a Python process that runs the given code with the names below and `root`, `key` at hand."""
    head = """
import os
import time
from pathlib import Path
from semformer.errors import UserError
from semformer.leases import LeaseLost
from semformer.store import Store
from tests.artifacts import build, caae, eventually, make_weights
key = caae()
"""
    processes = []

    def start(root: Path, code: str) -> subprocess.Popen:
        command = [sys.executable, "-c", f"{head}root = Path({str(root)!r})\n{code}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        processes.append(subprocess.Popen(command, text=True, stdout=subprocess.PIPE, env=environment))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()
