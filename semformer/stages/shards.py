"""What a stage makes image by image, in files of some images each: a run that was killed goes on at the next.

Label maps are in zips (`data.label_maps`), tensors in safetensors files that list the ids of their images.
"""

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from semformer.data.label_maps import LabelMaps, is_whole, write_label_maps
from semformer.data.pack import Packed
from semformer.errors import UserError
from semformer.stages.context import Context, Progress
from semformer.store import Artifact
from semformer.store.storage import PARTIAL
from semformer.threads import in_order

SHARD = 256
"""Images per file."""
TOGETHER = 8
"""Images of one size that go through a network together, at most."""
PIXELS_TOGETHER = TOGETHER * 640**2
"""What they have together, at most, where it is not a single image."""
T = TypeVar("T")


def write_tensors(path: Path, tensors: dict[str, Tensor], ids: list[str]) -> None:
    """Tensors named "ID/part" of these images, for `Tensors` to read."""
    save_file(tensors, path, {"ids": json.dumps(ids)})


def tensors_are_whole(path: Path) -> bool:
    """Whether a file of `write_tensors` was written to its end."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


class Tensors:
    """What `write_tensors` has written into an artifact, by image id; threads may read it at once."""

    def __init__(self, artifact: Artifact, prefix: str = ""):
        """prefix: how the names of the files begin."""
        self.path = artifact.path
        self._file_of: dict[str, Any] = {}
        for name in sorted(name for name in artifact.files if name.startswith(prefix)):
            file = safe_open(artifact.file(name), framework="pt")
            self._file_of |= dict.fromkeys(json.loads(file.metadata()["ids"]), file)

    def __iter__(self) -> Iterator[str]:
        """The ids, as they were written."""
        return iter(self._file_of)

    def read(self, image_id: str, *parts: str) -> list[Tensor]:
        """Raises UserError where there are none."""
        if image_id not in self._file_of:
            raise UserError(f"{self.path} holds no maps of {image_id}")
        return [self._file_of[image_id].get_tensor(f"{image_id}/{part}") for part in parts]


def label_maps_in(artifact: Artifact) -> LabelMaps:
    return LabelMaps([artifact.file(name) for name in sorted(artifact.files)])


def of_one_size(data: Packed, rows: Sequence[int]) -> Iterator[list[int]]:
    """The rows of a split in groups of images of one size, of at most `TOGETHER` and `PIXELS_TOGETHER`."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for i in rows:
        group = by_size.setdefault(tuple(data.sizes[i]), [])
        group.append(i)
        if len(group) == TOGETHER or (len(group) + 1) * data.sizes[i].prod() > PIXELS_TOGETHER:
            yield by_size.pop(tuple(data.sizes[i]))
    yield from by_size.values()


def make_label_maps(
    stage: str, data: Packed, ctx: Context, make: Callable[[int], Mapping[str, np.ndarray]]
) -> LabelMaps:
    """`make_shards` of zips of the label maps, by their names, that `make` returns of an image."""

    def of_rows(rows: list[int]) -> list[tuple[str, np.ndarray]]:
        return [named for i in rows for named in make(i).items()]

    def alone(rows: range) -> Iterator[list[int]]:
        return ([i] for i in rows)

    make_shards(stage, data, ctx, "{:05d}.zip", of_rows, write_label_maps, is_whole, groups=alone)
    return LabelMaps(sorted(ctx.out.glob("*.zip")))


def make_shards(
    stage: str,
    data: Packed,
    ctx: Context,
    files: str,
    make: Callable[[list[int]], list[T]],
    write: Callable[[Path, Iterator[T]], None],
    is_whole: Callable[[Path], bool],
    *,
    groups: Callable[[range], Iterable[list[int]]],
) -> None:
    """Makes `files`, such as "{:05d}.zip", in `ctx.out` of what `make` returns of groups of images: as many at once as
    torch has threads, each by one.

    `write` makes a file of that; `is_whole` tells whether one of an earlier run, which has been killed, is of use.
    """
    started, found, made = time.monotonic(), 0, 0
    n_threads = torch.get_num_threads()

    def results(rows: range) -> Iterator[T]:
        nonlocal made
        for group, some in in_order(threads, lambda group: (group, make(group)), groups(rows), ahead=2 * n_threads):
            yield from some
            made += len(group)
            done, rate = found + made, made / (time.monotonic() - started)
            left = (len(data) - done) / rate
            ctx.progress(Progress(stage, done, len(data), images_per_second=rate, seconds_left=left))

    with _one_each(), ThreadPoolExecutor(n_threads) as threads:
        for number, rows in enumerate(data.batches(SHARD)):
            path = ctx.checkpoints / files.format(number)
            if path.exists() and is_whole(path):
                found += len(rows)
            else:
                partial = path.with_name(f"{secrets.token_hex(4)}{PARTIAL}")
                try:
                    write(partial, results(rows))
                    os.replace(partial, path)
                finally:
                    partial.unlink(missing_ok=True)
                ctx.saved()
            ctx.check()
            shutil.copyfile(path, ctx.out / path.name)


@contextmanager
def _one_each() -> Iterator[None]:
    """Threads that start now compute with themselves alone, and do not start as many again."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
