"""The training loop of both networks: poly schedule, micro-batches, divergence guard, progress, epoch checkpoints.

A run that resumes from an epoch checkpoint ends with the same weights as one that was never interrupted: every random
number is drawn from (seed, epoch, index of the image) or (seed, epoch), so no generator's state has to be saved.
"""

import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from semformer import memory
from semformer.config import NetworkConfig, OptimizerConfig
from semformer.errors import UserError
from semformer.precision import autocast
from semformer.stages.context import Context, Progress

log = logging.getLogger(__name__)
Loss = Callable[[list[Tensor], torch.Generator, slice], dict[str, Tensor]]
"""loss(batch, generator, part) -> named terms, of which "total" is minimised: the share that the images in `part` have
in those of the batch. What it draws from `generator` it draws for the whole batch."""
DIVERGED = 1e4
"""A loss of this size is no loss any more: similarities give at most about 20, a reconstruction starts near 1."""


class TrainingDiverged(UserError):
    """The loss became NaN, infinite or absurdly large; training it again ends the same."""


class Crops(Dataset):
    """sample(index, generator) for items (epoch, index)."""

    def __init__(self, sample: Callable[[int, np.random.Generator], tuple], seed: int):
        self.sample, self.seed = sample, seed

    def __getitem__(self, item: tuple[int, int]) -> tuple:
        epoch, index = item
        return self.sample(index, np.random.default_rng([self.seed, epoch, index]))


class EpochSampler(Sampler):
    """(epoch, index) in an order that depends on seed and epoch alone."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed, self.epoch = n, seed, 0

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        return ((self.epoch, int(index)) for index in order)


def train(
    model: nn.Module,
    *,
    stage: str,
    config: NetworkConfig,
    n_images: int,
    sample: Callable[[int, np.random.Generator], tuple],
    loss: Loss,
    pretrained: nn.Module | None,
    precision: str,
    seed: int,
    ctx: Context,
    after_epoch: Callable[[int], dict[str, float]] | None = None,
) -> dict[str, list[float]]:
    """Train `model` in place; returns the mean of every loss term per epoch.

    sample(index, rng) makes one training sample. `pretrained` is the part of the model with pretrained weights (it
    learns more slowly), or None. `after_epoch(epoch)` may measure more values. Where a batch does not fit into memory
    it is passed in parts ("micro_batch" images at a time) from then on, which changes the result by rounding only.
    Raises TrainingDiverged, what `ctx.check` raises, and torch's error where not even one image fits into memory.
    """
    sampler, batch_size = EpochSampler(n_images, seed), min(config.batch_size, n_images)
    loader = DataLoader(
        Crops(sample, seed),
        batch_size=batch_size,
        sampler=sampler,
        drop_last=True,
        num_workers=ctx.workers,
        multiprocessing_context="fork" if ctx.workers else None,
        pin_memory=ctx.device.type == "cuda",
    )
    if ctx.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    optimizer = build_optimizer(model, config.optimizer, pretrained)
    checkpoint = Checkpoint(ctx.checkpoints)
    history = checkpoint.load(model, optimizer)
    first_epoch = len(history.get("total", []))
    steps = config.epochs * len(loader)
    micro_batch, note = batch_size, ""
    started = time.monotonic()
    for epoch in range(first_epoch, config.epochs):
        sampler.epoch = epoch
        generator = torch.Generator(ctx.device).manual_seed(seed * 100_003 + epoch)
        model.train()
        sums: dict[str, float] = {}
        for step, batch in enumerate(loader):
            done = epoch * len(loader) + step
            factor = lr_factor(done, steps, config.optimizer)
            set_rates(optimizer, factor)
            batch = [part.to(ctx.device, non_blocking=True) for part in batch]
            while (values := backward(loss, batch, generator, optimizer, micro_batch, precision)) is None:
                too_many, micro_batch = micro_batch, (micro_batch + 1) // 2
                note = f"{micro_batch} images at a time: {too_many} do not fit into memory"
                log.warning("%s: %s", stage, note)
            if not abs(values["total"]) < DIVERGED:
                told = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
                raise TrainingDiverged(
                    f"{stage}: the loss diverged in epoch {epoch + 1}, step {step + 1} ({told}). "
                    f"Try a smaller {stage}.optimizer.lr."
                )
            optimizer.step()
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value / len(loader)
            elapsed, here = time.monotonic() - started, done + 1 - first_epoch * len(loader)
            report = Progress(
                stage=stage,
                done=done + 1,
                total=steps,
                epoch=epoch + 1,
                epochs=config.epochs,
                values=values,
                images_per_second=here * batch_size / elapsed,
                seconds_left=(steps - done - 1) * elapsed / here,
                note=note,
            )
            ctx.progress(report)
        sums["lr"] = config.optimizer.lr * factor
        sums |= {"images_per_second": report.images_per_second, "micro_batch": micro_batch}
        if ctx.device.type == "cuda":
            sums["gpu_memory"] = memory.peak(ctx.device)["peak_bytes"]
        if after_epoch:
            sums |= after_epoch(epoch)
        history = {name: [*history.get(name, []), value] for name, value in sums.items()}
        checkpoint.save(model, optimizer, history)
        ctx.progress(replace(report, values=sums, end_of_epoch=True))
        ctx.check()
    return history


def backward(
    loss: Loss,
    batch: list[Tensor],
    generator: torch.Generator,
    optimizer: torch.optim.Optimizer,
    micro_batch: int,
    precision: str,
) -> dict[str, float] | None:
    """The gradients of a batch's loss, added up over parts of `micro_batch` images; returns the batch's terms.

    Returns None, with all as it was, if memory runs out and the parts can be made smaller.
    """
    optimizer.zero_grad(set_to_none=True)
    images = batch[0]
    drawn = generator.get_state()
    values: dict[str, float] = {}
    try:
        for first in range(0, len(images), micro_batch):
            generator.set_state(drawn)
            with autocast(images.device, precision):
                terms = loss(batch, generator, slice(first, first + micro_batch))
            terms["total"].backward()
            numbers = torch.stack([term.detach().float() for term in terms.values()]).tolist()
            values = {name: values.get(name, 0.0) + number for name, number in zip(terms, numbers, strict=True)}
        return values
    except (RuntimeError, MemoryError) as error:
        if micro_batch == 1 or not memory.is_exhausted(error):
            raise
    optimizer.zero_grad(set_to_none=True)
    generator.set_state(drawn)
    return None  # not inside `except`: the error keeps the graph alive


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
        decay = 0.0 if bias else config.weight_decay
        groups.append({"params": parameters, "lr": lr, "initial_lr": lr, "weight_decay": decay})
    if config.name == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0)
    return torch.optim.AdamW(groups)


def write_whole(tensors: dict[str, Tensor], path: Path, **metadata: str) -> None:
    """Write a safetensors file so that nobody sees a part of it, not even of one that two processes write at once."""
    partial = path.with_suffix(f".{secrets.token_hex(4)}.partial")
    try:
        save_file(tensors, partial, metadata=metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class Checkpoint:
    """Model, optimiser and history after the last finished epoch, in one safetensors file."""

    def __init__(self, folder: Path):
        self.path = folder / "checkpoint.safetensors"

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, history: dict[str, list[float]]) -> None:
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        for index, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in slots.items() if value is not None}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        write_whole(tensors, self.path, history=json.dumps(history))

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[float]]:
        """Restores both in place and returns the history: empty where there is no usable checkpoint."""
        if not self.path.exists():
            return {}
        try:
            with safe_open(self.path, framework="pt") as file:
                history = json.loads(file.metadata()["history"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
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
