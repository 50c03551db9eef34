"""The training loop of all networks: poly schedule, divergence guard, progress, checkpoints.

A run that resumes from a checkpoint ends with the same weights as one that was never interrupted: every random number
is drawn from (seed, epoch, index of the image) or (seed, epoch), so no generator's state has to be saved.
"""

import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from semformer import memory
from semformer.config import OptimizerConfig, TrainingConfig
from semformer.data.loading import Batch, Loader
from semformer.data.pack import Packed
from semformer.errors import UserError, first_line
from semformer.precision import autocast
from semformer.stages.context import Context, Progress
from semformer.store.storage import PARTIAL
from semformer.weights import load_state

log = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable)
Gradients = Callable[[Batch, torch.Generator, int], dict[str, Tensor]]
"""gradients(batch, generator, pieces): adds the gradients of the batch's loss to those of the parameters, taking the
batch through the networks in so many pieces where memory is short, and returns the named terms, detached; "total" is
the loss."""
DIVERGED = 1e4
"""A loss of this size is no loss any more: similarities give at most about 20, a reconstruction starts near 1. And a
weight of it is none."""


class TrainingDiverged(UserError):
    """The loss became NaN, infinite or absurdly large; training it again ends the same."""


def train(
    model: nn.Module,
    *,
    stage: str,
    config: TrainingConfig,
    loader: Loader,
    gradients: Gradients,
    pretrained: nn.Module | None = None,
    precision: str,
    seed: int,
    ctx: Context,
    score: Callable[[Packed], dict[str, float]] = lambda split: {},
) -> dict[str, list[float]]:
    """Train `model` in place; returns the mean of every loss term per epoch.

    `pretrained` is the part of the model with pretrained weights (it learns more slowly), or None. `score`
    measures the model on `ctx.selection`, where there is one, by one named value after each epoch; the weights are in
    the end those of the (first) epoch with the highest. Where a batch does not fit into memory it is taken in pieces
    from then on, which changes the result by rounding only; not where BatchNorms learn, which look at the whole batch.
    Raises TrainingDiverged, what `ctx.check` raises, and torch's error where not even the smallest pieces fit into
    memory.
    """
    optimizer = build_optimizer(model, config.optimizer, pretrained)
    with Checkpoint(ctx.checkpoints, ctx.saved) as checkpoint:
        best = Best(checkpoint) if ctx.selection else None
        history = checkpoint.load(model, optimizer)
        first_epoch = len(history.get("total", []))
        meter = Meter(stage, config.epochs, loader, first_epoch, ctx)
        pieces = most_pieces(model, loader.batch_size)
        step = Step(stage, optimizer, gradients, precision, most_pieces=pieces)
        for epoch in range(first_epoch, config.epochs):
            generator = torch.Generator(ctx.device).manual_seed(seed * 100_003 + epoch)
            model.train()
            meter.start(epoch)
            for batch in loader.epoch(epoch):
                factor = lr_factor(meter.done, meter.total, config.optimizer)
                set_rates(optimizer, factor)
                meter.add(step(batch, generator), step.note)
            means = meter.end()
            check_weights(model, stage, epoch)
            values = means | {"lr": config.optimizer.lr * factor, "pieces": step.pieces}
            if best and ctx.selection:
                values |= best.keep(model, score(ctx.selection), history)
            history = {name: [*history.get(name, []), value] for name, value in values.items()}
            checkpoint.save(model, optimizer, history, last=epoch + 1 == config.epochs)
            meter.report(values, end_of_epoch=True)
            ctx.check()
        if best:
            best.restore(model)
    return history


def most_pieces(model: nn.Module, batch_size: int) -> int:
    """Into how many a batch may be divided: none where BatchNorms take its mean."""
    model.train()
    learns = any(isinstance(module, nn.BatchNorm2d) and module.training for module in model.modules())
    return 1 if learns else batch_size


class Step:
    """One step of the optimiser on a batch. `pieces`: in how many it is taken; `note`, for people, why."""

    def __init__(
        self, stage: str, optimizer: torch.optim.Optimizer, gradients: Gradients, precision: str, *, most_pieces: int
    ):
        self.stage, self.optimizer, self.gradients, self.precision = stage, optimizer, gradients, precision
        self.most_pieces, self.pieces, self.note = most_pieces, 1, ""

    def __call__(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The batch's terms."""
        drawn = generator.get_state()
        while (terms := self._backward(batch, generator)) is None:
            self.pieces = min(2 * self.pieces, self.most_pieces)
            self.note = f"batches are taken in {self.pieces} pieces: they do not fit into memory"
            log.warning("%s: %s", self.stage, self.note)
            generator.set_state(drawn)
        self.optimizer.step()
        return terms

    def _backward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor] | None:
        """None where memory has run out and the pieces can be made smaller."""
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with autocast(batch.images.device, self.precision):
                return self.gradients(batch, generator, self.pieces)
        except (RuntimeError, MemoryError) as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise UserError(
                    f"torch.compile does not work here ({first_line(error)}). Set {self.stage}.compile=false."
                ) from error
            if self.pieces == self.most_pieces or not memory.is_exhausted(error):
                raise
        return None  # not inside `except`: the error keeps the graph alive


class Meter:
    """Sums the terms of an epoch and reports progress. Reads a step's terms while the device is at the next one."""

    def __init__(self, stage: str, epochs: int, loader: Loader, first_epoch: int, ctx: Context):
        self.stage, self.epochs, self.loader, self.ctx = stage, epochs, loader, ctx
        self.total = epochs * len(loader)
        self.first = self.done = first_epoch * len(loader)
        self.epoch, self.note = first_epoch, ""
        self.sums: dict[str, float] = {}
        self._pending: tuple[dict[str, Tensor], Tensor, torch.cuda.Event | None] | None = None
        self._started = time.monotonic()

    def start(self, epoch: int) -> None:
        self.epoch, self.sums = epoch, {}

    def add(self, terms: dict[str, Tensor], note: str) -> None:
        """The terms of the step after `done`. Raises TrainingDiverged for those of the step before."""
        self.note = note
        there = torch.stack([term.float() for term in terms.values()]).to("cpu", non_blocking=True)
        arrived = torch.cuda.current_stream().record_event() if self.ctx.device.type == "cuda" else None
        self._read()
        self._pending = terms, there, arrived
        self.done += 1

    def end(self) -> dict[str, float]:
        """The means over the epoch, and what it took."""
        self._read()
        means = {name: value / len(self.loader) for name, value in self.sums.items()}
        means["images_per_second"] = self._rate()
        if self.ctx.device.type == "cuda":
            means["gpu_memory"] = memory.peak(self.ctx.device)["peak_bytes"]
        return means

    def report(self, values: dict[str, float], *, end_of_epoch: bool = False) -> None:
        rate = self._rate()
        left = (self.total - self.done) * self.loader.batch_size / rate
        told = Progress(
            stage=self.stage,
            done=self.done,
            total=self.total,
            epoch=self.epoch + 1,
            epochs=self.epochs,
            values=values,
            images_per_second=rate,
            seconds_left=left,
            end_of_epoch=end_of_epoch,
            note=self.note,
        )
        self.ctx.progress(told)

    def _rate(self) -> float:
        return (self.done - self.first) * self.loader.batch_size / (time.monotonic() - self._started)

    def _read(self) -> None:
        """The terms of the last step that was added."""
        if self._pending is None:
            return
        terms, there, arrived = self._pending
        self._pending = None
        if arrived:
            arrived.synchronize()
        values = dict(zip(terms, there.tolist(), strict=True))
        if not abs(values["total"]) < DIVERGED:
            told = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            step = self.done - self.epoch * len(self.loader)
            raise TrainingDiverged(
                f"{self.stage}: the loss diverged in epoch {self.epoch + 1}, step {step} ({told}). "
                f"Try a smaller {self.stage}.optimizer.lr."
            )
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.report(values)


def check_weights(model: nn.Module, stage: str, epoch: int) -> None:
    """Raises TrainingDiverged: the loss of an epoch's last step does not tell what became of the weights after it."""
    largest = torch.stack([weight.detach().abs().max() for weight in model.parameters()]).max().item()
    if not largest < DIVERGED:
        raise TrainingDiverged(
            f"{stage}: the weights diverged in epoch {epoch + 1} (one is {largest:.4g}). "
            f"Try a smaller {stage}.optimizer.lr."
        )


def compiled(function: F, config: TrainingConfig) -> F:
    """A network or a function of one, for steps of few sizes; compiled if the config says so, with the same parameters.

    What is not a step (maps of all sizes, say) takes the network as it was.
    """
    return cast(F, torch.compile(function, dynamic=False)) if config.compile else function


def lr_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """Poly decay (1 - step / steps)^power, after a linear warm-up."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return warmup * (1 - step / steps) ** config.power


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """The learning rates of the next step, as a share of those that the groups began with."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def build_optimizer(model: nn.Module, config: OptimizerConfig, pretrained: nn.Module | None) -> torch.optim.Optimizer:
    """Four groups: pretrained / new, weights / biases, as `OptimizerConfig` tells them apart."""
    known = {id(parameter) for parameter in pretrained.parameters()} if pretrained else set()
    kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds.setdefault((id(parameter) in known, "weight" not in name), []).append(parameter)
    groups = []
    for (old, bias), parameters in kinds.items():
        lr = config.lr * (1 if old else config.new_multiplier) * (config.bias_multiplier if bias else 1)
        decay = 0.0 if bias and not config.decays_biases else config.weight_decay
        groups.append({"params": parameters, "lr": lr, "initial_lr": lr, "weight_decay": decay})
    fused = next(model.parameters()).is_cuda
    if config.name == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0, fused=fused)
    return torch.optim.AdamW(groups, fused=fused)


def write_whole(tensors: dict[str, Tensor], path: Path, **metadata: str) -> None:
    """Write a safetensors file so that nobody sees a part of it, not even of one that two processes write at once."""
    partial = path.with_suffix(f".{secrets.token_hex(4)}{PARTIAL}")
    try:
        save_file(tensors, partial, metadata=metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


QUICK = 1.0
"""Seconds that a checkpoint may take without more ado; one that takes longer is written beside the training."""
SHARE, LONGEST = 20, 120.0
"""Such a one is written at most this share (1 / SHARE) of the time, but after so many seconds at the latest."""


class Checkpoint:
    """Model, optimiser and history after a finished epoch, in one safetensors file. `saved` is called when it is there.

    As a context manager it waits for what is being written.
    """

    def __init__(self, folder: Path, saved: Callable[[], None] = lambda: None):
        self.path, self.saved = folder / "checkpoint.safetensors", saved
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[float] | None = None
        self._next = 0.0

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown()

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, history: dict[str, list[float]], *, last: bool = False
    ) -> None:
        """Once an epoch, or less often where it takes long. Raises what went wrong with the one before."""
        if self._writing and not self._writing.done() and not last:
            return
        if self._writing:
            seconds, self._writing = self._writing.result(), None
            self._next = time.monotonic() + (min(SHARE * seconds, LONGEST) if seconds > QUICK else 0.0)
        if time.monotonic() < self._next and not last:
            return
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        for index, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in slots.items() if value is not None}
        copies = {name: value.detach().to("cpu", non_blocking=True, copy=True) for name, value in tensors.items()}
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._writing = self._writer.submit(self._write, copies, json.dumps(history))
        wait([self._writing], timeout=None if last else QUICK)
        if self._writing.done():
            self._writing.result()

    def _write(self, tensors: dict[str, Tensor], history: str) -> float:
        """Returns the seconds it took."""
        started = time.monotonic()
        write_whole({name: value.contiguous() for name, value in tensors.items()}, self.path, history=history)
        self.saved()
        return time.monotonic() - started

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[float]]:
        """Restores both in place and returns the history: empty where there is no usable checkpoint."""
        if not self.path.exists():
            return {}
        try:
            with safe_open(self.path, framework="pt") as file:
                history = json.loads(file.metadata()["history"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            log.warning("starting again: the checkpoint %s cannot be read (%s)", self.path, error)
            return {}
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, slot = name.split(".")
                slots.setdefault(int(index), {})[slot] = value
        model.load_state_dict({n.removeprefix("model."): v for n, v in tensors.items() if n.startswith("model.")})
        optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
        return history


class Best:
    """The weights of the epoch that scored highest, beside a checkpoint. Where they cannot be read any more, the
    checkpoint goes, and the training starts again."""

    def __init__(self, checkpoint: Checkpoint):
        self.path = checkpoint.path.with_name("best.safetensors")
        if checkpoint.path.exists():
            try:
                load_file(self.path)
            except (SafetensorError, OSError) as error:
                log.warning("starting again: the weights %s cannot be read (%s)", self.path, error)
                checkpoint.path.unlink()

    def keep(self, model: nn.Module, scored: dict[str, float], history: dict[str, list[float]]) -> dict[str, float]:
        """What was `scored`, by one name; writes the weights if it is more than all before it."""
        ((name, value),) = scored.items()
        if value > max(history.get(name, []), default=-math.inf):
            write_whole(model.state_dict(), self.path)
        return scored

    def restore(self, model: nn.Module) -> None:
        load_state(model, load_file(self.path), str(self.path))
