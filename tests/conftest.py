"""What all tests share."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden():
    """golden("caae") -> arrays of $GOLDEN_DIR/caae.npz (default: the copies beside the tests)."""
    folder = Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden"))
    return lambda name: dict(np.load(folder / f"{name}.npz"))
