"""Small keys, and artifacts that are built at once, for the tests of the store."""

import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from semformer.keys import StageKey
from semformer.store import Artifact, Store
from semformer.store.folder import Folder
from semformer.store.reasons import reasons

SPEC = {
    "stage": "caae",
    "version": 1,
    "params": {"decoder_depth": 8, "merge": "sum", "lr": 0.1},
    "inputs": {},
    "data": {"train": "d0"},
    "seed": 0,
}


def caae(**params) -> StageKey:
    return StageKey("caae", {**SPEC, "params": {**SPEC["params"], **params}})


def segmentor(source: StageKey, *, sigma: float = 0.1, **changes) -> StageKey:
    spec = {"stage": "segmentor", "version": 1, "params": {"sigma": sigma}, "inputs": {"caae": source.digest}}
    return StageKey("segmentor", {**spec, "data": {"train": "d0"}, "seed": 0, **changes})


def build(store: Store, key: StageKey, make, wait=None):
    """The artifact of `key`: make(workspace, checkpoints, lease) makes it where it is not there."""

    def make_here(workspace, lease):
        info = make(workspace, store.checkpoints(key), lease)
        lease.check()
        return info

    return store.find_or_make(key, make_here, wait=wait)[0]


def make_weights(workspace: Path, checkpoints: Path, lease) -> dict:
    (workspace / "maps").mkdir()
    (workspace / "maps" / "0.bin").write_bytes(bytes(range(256)) * 40)
    (workspace / "weights.bin").write_bytes(b"weights" * 1000)
    return {"seconds": 1.5, "metrics": {"caae/val/loss": 0.25}}


def publish(store: Store, key: StageKey, **info) -> Artifact:
    """An artifact with one small file."""
    workspace = store.workspace(key)
    (workspace / "weights.bin").write_bytes(b"weights")
    return store.publish(key, workspace, info)


def why(store: Store, key: StageKey) -> str:
    return reasons(store, [key])[key]


def outputs(processes: list[subprocess.Popen]) -> list[list[str]]:
    texts = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return texts


def eventually(condition, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
    return result


def visible(store: Store) -> list[str]:
    return [str(artifact.key) for artifact in store.artifacts()]


def damage(artifact: Artifact, change: Callable[[Path], None], scratch: Path) -> None:
    """Change the files of a published artifact where the store keeps them, by change(folder)."""
    store = artifact.have.__self__
    if isinstance(store.storage, Folder):
        change(artifact.path)
        return
    place = artifact.path.relative_to(store.root).as_posix()
    manifest = f"manifests/{artifact.key.stage}/{artifact.key.digest}.json"
    names = {"manifest.json": manifest} | {name: f"{place}/{name}" for name in artifact.files}
    for name, object_name in names.items():
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        store.storage.download(object_name, scratch / name)
    change(scratch)
    for name, object_name in names.items():
        store.storage.remove(object_name)
        if (scratch / name).exists():
            store.storage.upload(scratch / name, object_name)
    shutil.rmtree(artifact.path, ignore_errors=True)


def fill(disk: Path) -> Path:
    """Write until nothing more fits; returns the file to remove."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass
    return path


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "weights.bin").read_bytes())
    content[1234] ^= 4
    (folder / "weights.bin").write_bytes(content)
