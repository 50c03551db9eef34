"""What a stage is given besides its config and inputs: nothing in here may change a result."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from semformer.config import Settings
from semformer.data.pack import Packed
from semformer.errors import UserError
from semformer.store import Lease, Store


@dataclass(frozen=True)
class Progress:
    """One report of a stage at work: `done` of `total` steps, and what it measures."""

    stage: str
    done: int
    total: int
    epoch: int = 0
    epochs: int = 0
    values: Mapping[str, float] = field(default_factory=dict)
    images_per_second: float = 0.0
    seconds_left: float = float("nan")
    end_of_epoch: bool = False
    note: str = ""
    """What people should know of how the stage runs."""
    probe: Mapping[str, float] = field(default_factory=dict)
    """What `Context.probe` measured at the end of the epoch."""

    @classmethod
    def of_images(cls, stage: str, done: int, total: int, started: float, note: str = "") -> Self:
        """Of a stage that goes through its images once, since `started` (`time.monotonic`)."""
        rate = done / (time.monotonic() - started)
        return cls(stage, done, total, images_per_second=rate, seconds_left=(total - done) / rate, note=note)


@dataclass(frozen=True)
class Context:
    """device, progress callback, and folders: `out` for what the stage makes, `checkpoints` to resume from.

    `probe` measures a segmentation network after each of its epochs; its scores are reported, and kept nowhere.
    `check` raises when the stage must stop (its lease was taken over); it is called between epochs or shards. `saved`
    is called, in any thread, when there is something new in `checkpoints`. `have_read` raises UserError if the
    files that a stage with these options has just read are not those of its key: before it trains, as checkpoints would
    outlive the error. `selection` is the split by which the stage chooses the epoch that it keeps, if it does.
    """

    device: torch.device
    progress: Callable[[Progress], None]
    out: Path
    checkpoints: Path
    check: Callable[[], None] = lambda: None
    saved: Callable[[], None] = lambda: None
    have_read: Callable[[Settings], None] = lambda options: None
    probe: Callable[[Any], Mapping[str, float]] | None = None
    selection: Packed | None = None

    @classmethod
    def of(
        cls,
        store: Store,
        lease: Lease,
        out: Path,
        device: torch.device,
        progress: Callable[[Progress], None],
        **rest: Any,
    ) -> Self:
        """Of what is made under a lease: who has lost it saves no more checkpoints."""

        def saved() -> None:
            lease.check()
            store.save_checkpoints(lease.key)

        def have_read(options: Settings) -> None:
            with suppress(UserError):  # of a file that is gone
                if options.key_parameters() == lease.key.spec["params"]:
                    return
            raise UserError(f"{' or '.join(options.files)} has changed since this run began: start it again")

        checkpoints = store.checkpoints(lease.key)
        return cls(device, progress, out, checkpoints, check=lease.check, saved=saved, have_read=have_read, **rest)
