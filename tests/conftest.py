"""What all tests share."""

import functools
import gc
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from semformer import pipeline
from semformer.config import load_config
from semformer.data.shapes import make_shapes
from semformer.stages import training
from semformer.store import Store, open_store
from sweeps.search.search import Search
from tests.devkits import paper_splits
from tests.pipelines import run
from tests.records import Recorded, make_folder
from tests.searches import open_search
from tests.servers import S3Server

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)
os.environ |= {"RAY_worker_niceness": "0"}  # else the trials of one test starve beside the other tests


def pytest_sessionstart(session):
    """What the process has cached is not of this session: a mutation run forks one in which tests have run."""
    for one in gc.get_objects():
        if type(one) is functools._lru_cache_wrapper and str(one.__module__).startswith("semformer"):
            one.cache_clear()


def pytest_collection_modifyitems(items):
    """A long file first: by its name it would be the last one, beside which nothing is left to do."""
    items.sort(key=lambda item: item.path.name != "test_sweep.py")


@pytest.fixture(scope="session")
def golden():
    """golden("caae") -> arrays of $GOLDEN_DIR/caae.npz (default: the copies beside the tests)."""
    folder = Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden"))
    return lambda name: dict(np.load(folder / f"{name}.npz"))


@pytest.fixture(autouse=True)
def every_epoch_is_saved(monkeypatch):
    """Also on a busy machine, where writing a checkpoint takes so long that the next would be left out."""
    monkeypatch.setattr(training, "QUICK", 60.0)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store", heartbeat=0.05, expiry=20)


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """The folder of sweeps that are recorded by hand, with a store that holds all their stages."""
    folder = tmp_path_factory.mktemp("records")
    make_folder(folder)
    return folder


@pytest.fixture
def recorded(records, request) -> Recorded:
    """A sweep of this test's own, in an MLflow database that the tests of a file share."""
    return Recorded(records, request.node.name)


def small_shapes(folder: Path) -> Path:
    return make_shapes(folder, train=16, val=6, size=48)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """The embedded data set, small."""
    return small_shapes(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture
def search(shapes, store, tmp_path) -> Iterator[Callable[..., Search]]:
    """search(axes...) on a study in an sqlite file of this test."""
    opened = []

    def search(*axes: str, **options) -> Search:
        opened.append(open_search(shapes, store, tmp_path / "studies.db", *axes, **options))
        return opened[-1]

    yield search
    for one in opened:
        one.close()


@pytest.fixture(scope="session")
def devkit(tmp_path_factory) -> Path:
    return paper_splits(tmp_path_factory.mktemp("voc"))


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    """A store in which the micro pipeline has run once, and what happened to each stage."""
    store = Store(tmp_path_factory.mktemp("finished") / "store")
    return store, run(load_config("micro"), shapes, store)


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """A store in which all stages have run once in preset micro, on the images of `shapes`; what happened to each."""
    folder = tmp_path_factory.mktemp("chain")
    store, until = Store(folder / "store"), [stage.name for stage in pipeline.STAGES]
    return store, run(load_config("micro"), small_shapes(folder / "shapes"), store, until=until)


@pytest.fixture(scope="module")
def split(shapes):
    """The images that networks of preset micro learn from."""
    return pipeline.open_data(load_config("micro"), shapes)["train"]


@pytest.fixture(scope="session")
def s3_server():
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch, tmp_path) -> str:
    """The location of an empty place for a store in a bucket, reached by the environment as a user would set it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("SEMFORMER_CACHE", str(tmp_path / "cache"))
    return f"s3://tests/{secrets.token_hex(4)}/store"


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of one megabyte. Skips the test where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(params=["folder", "bucket"])
def either(request, tmp_path) -> Store:
    """A store in a folder, and the same test again with one in a bucket."""
    location = tmp_path / "store" if request.param == "folder" else request.getfixturevalue("bucket")
    return open_store(location, heartbeat=0.5, expiry=20)


@pytest.fixture
def start():
    """Start a Python process that runs the given code with the names below and `root`, `key` at hand."""
    head = """
import os
import time
from pathlib import Path
from semformer.errors import StoreError, UserError
from semformer.store import Store, open_store
from semformer.store.leases import LeaseLost
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
