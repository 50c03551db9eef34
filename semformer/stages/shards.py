"""What a stage makes image by image, in files of some images each: a run that was killed goes on at the next."""

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from semformer.data.pack import Packed
from semformer.stages.context import Context, Progress
from semformer.store.storage import PARTIAL
from semformer.threads import in_order

SHARD = 256
"""Images per file."""
T = TypeVar("T")


def alone(rows: range) -> Iterator[list[int]]:
    return ([i] for i in rows)


def make_shards(
    stage: str,
    data: Packed,
    ctx: Context,
    suffix: str,
    make: Callable[[list[int]], list[T]],
    write: Callable[[Path, Iterator[T]], None],
    is_whole: Callable[[Path], bool],
    *,
    groups: Callable[[range], Iterable[list[int]]] = alone,
) -> None:
    """Makes files "00000" + suffix of `ctx.out` of what `make` returns of groups of images, by all threads of torch.

    `write` makes a file of that; `is_whole` tells whether one of an earlier run, which has been killed, is of use.
    """
    started, done, first = time.monotonic(), 0, 0
    n_threads = torch.get_num_threads()

    def results(rows: range) -> Iterator[T]:
        nonlocal done
        for group, some in in_order(threads, lambda group: (group, make(group)), groups(rows), ahead=2 * n_threads):
            yield from some
            done += len(group)
            rate = (done - first) / (time.monotonic() - started)
            left = (len(data) - done) / rate
            ctx.progress(Progress(stage, done, len(data), images_per_second=rate, seconds_left=left))

    with ThreadPoolExecutor(n_threads) as threads:
        for number, rows in enumerate(data.batches(SHARD)):
            path = ctx.checkpoints / f"{number:05d}{suffix}"
            if path.exists() and is_whole(path):
                done = first = first + len(rows)
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
