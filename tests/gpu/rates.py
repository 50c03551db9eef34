"""How fast the stages are on a device, and what all tables would cost at these rates."""

import importlib.util
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from semformer import flops, memory
from semformer.config import Config, load_config
from semformer.data.augment import caae_crops
from semformer.data.pack import Packed
from semformer.flops import Images, Work
from semformer.inference import STRIDE, Maps, multi_scale_maps
from semformer.precision import determinism
from semformer.stages import affinity_labels, segmentation, walk
from semformer.stages.shards import TOGETHER
from semformer.stages.training import Step, build_optimizer, compiled
from semformer.store import Store
from tests.benchmarks.bench_crf import make_photograph
from tests.benchmarks.bench_loading import HEIGHT, WIDTH, host_rate, make_photographs
from tests.devkits import paper_splits
from tests.gpu.checks import CROPS, gradients, loader, network

K = 21
TRAIN, EVALUATED, CLASSES = 10_582, 1_464, 2.5
"""Images of VOC's trainaug and train, and how many classes one shows, with the background."""
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "A10": 125.0, "L40": 181.0, "L4": 121.0, "V100": 125.0}
"""Dense matrix products in bfloat16 (V100: float16), in TFLOP/s, as their maker tells."""
PRETRAINED = {"caae": "encoder", "segmentor": "backbone", "affinity": "features", "deeplab": "features"}
"""The part of a network that has pretrained weights."""
PROFILED = 5
"""Steps of which the time that the GPU is busy is measured."""


@dataclass(frozen=True)
class Rate:
    images_per_second: float
    flops_per_image: float
    busy: float | None
    """Share of the time in which the GPU is at work."""
    peak_bytes: int
    labels_per_image: float = 0.0
    """`Work.labels` of CRFs."""

    @property
    def tflops(self) -> float:
        return self.images_per_second * self.flops_per_image / 1e12

    @property
    def labels_per_second(self) -> float:
        return self.images_per_second * self.labels_per_image


def report(
    preset: str, device: torch.device, folder: Path, seconds: float, photographs: int, *, compiled_too: bool
) -> Iterator[str]:
    """Lines of Markdown."""
    off = {f"{stage}.pretrained": False for stage in CROPS}
    config = load_config(preset, off)
    data = make_photographs(folder, photographs)
    peak = next((v for name, v in PEAKS.items() if device.type == "cuda" and name in memory.peak(device)["name"]), None)
    yield (
        f"\nPreset {preset}, {config.precision}, {photographs} photographs of {WIDTH}x{HEIGHT}:\n\n"
        "| what | images/s | TFLOP/s | of the peak (MFU) | CRF: 10^9 labels/s | GPU busy | memory |\n"
        "|---|---:|---:|---:|---:|---:|---:|"
    )
    measured = {}
    what = {stage: (stage, config) for stage in RATES}
    if compiled_too:
        on = load_config(preset, off | {f"{stage}.compile": True for stage in CROPS})
        what |= {f"{stage}, compiled": (stage, on) for stage in CROPS}
    for name, (stage, of_stage) in what.items():
        with determinism(device):
            rate = measured[name] = RATES[stage](of_stage, data, device, seconds)
        tflops = f"{rate.tflops:.3g}" if rate.tflops else ""
        mfu = f"{100 * rate.tflops / peak:.0f} %" if peak and rate.tflops else ""
        labels = f"{rate.labels_per_second / 1e9:.3g}" if rate.labels_per_image else ""
        busy = "" if rate.busy is None else f"{100 * rate.busy:.0f} %"
        gib = rate.peak_bytes / 2**30
        images = f"{rate.images_per_second:.{1 if rate.images_per_second >= 10 else 3}f}"
        yield f"| {name} | {images} | {tflops} | {mfu} | {labels} | {busy} | {gib:.1f} GiB |"
    for stage in CROPS:
        yield f"| {stage}, its crops alone | {_data_rate(stage, config, data, device, seconds):.0f} | | | | | |"
    one_core = host_rate(data, lambda epoch: caae_crops(data.sizes, config.caae, seed=0, epoch=epoch))
    yield f"| the host's share of a CAAE crop, one core | {one_core:.0f} | | | | | |"
    yield "\n" + (
        price(measured, folder) if preset == "paper" else "All tables are priced at the rates of preset paper."
    )


def _training_rate(stage: str, config: Config, data: Packed, device: torch.device, seconds: float) -> Rate:
    options, batches = getattr(config, stage), loader(stage, config, data, device)
    model, guide = network(stage, config, K, device)
    if guide:
        guide.embed = compiled(guide.embed, options)
    trained = compiled(model, options)
    step = Step(
        stage,
        build_optimizer(model, options.optimizer, getattr(model, PRETRAINED[stage])),
        lambda batch, generator, pieces: gradients(stage, trained, guide, config, batch),
        config.precision,
        most_pieces=1,
    )
    generator = torch.Generator(device)

    def steps() -> Iterator[int]:
        for epoch in range(10**6):
            for batch in batches.epoch(epoch):
                step(batch, generator)
                yield len(batch)

    images = Images(len(data), WIDTH, HEIGHT, float(data.labels.sum(axis=1).mean()), K)
    work = flops.stage_work(stage, config, images)
    of_image = Work(work.flops / (work.passes * batches.batch_size))
    warm = 2 * len(batches) if options.compile else 3  # each number of pairs is compiled once
    return _rate(steps(), of_image, device, seconds, warm)


def _cams_rate(config: Config, data: Packed, device: torch.device, seconds: float) -> Rate:
    model = network("segmentor", config, K, device)[0].eval()

    def make_maps(rows: range) -> None:
        images, classes = [data.pixels(i) for i in rows], [data.objects(i) for i in rows]
        multi_scale_maps(model, images, classes, config.cams, precision=config.precision)

    return _once_rate("cams", config, _together(data, make_maps), device, seconds)


def _walk_rate(config: Config, data: Packed, device: torch.device, seconds: float) -> Rate:
    model = network("affinity", config, K, device)[0].eval()

    def make_steps(rows: range) -> None:
        walk.walk(model, [data.pixels(i) for i in rows], [_maps(data.objects(i)) for i in rows], config)

    return _once_rate("walk", config, _together(data, make_steps), device, seconds)


def _crf_rate(config: Config, data: Packed, device: torch.device, seconds: float) -> Rate:
    image, maps = make_photograph().permute(1, 2, 0).numpy(), _maps(np.array([1, 2]))

    def steps() -> Iterator[int]:
        while True:
            affinity_labels.confident(maps, image, config.affinity_labels, device)
            yield 1

    return _once_rate("affinity_labels", config, steps(), device, seconds, classes=3)


def _segmentation_rate(config: Config, data: Packed, device: torch.device, seconds: float) -> Rate:
    model, image = network("deeplab", config, K, device)[0].eval(), make_photograph().permute(1, 2, 0).numpy()

    def steps() -> Iterator[int]:
        while True:
            segmentation.segment(model, image, config.segmentation, config.precision)
            yield 1

    return _once_rate("segmentation", config, steps(), device, seconds)


def _maps(classes: np.ndarray) -> Maps:
    """Noise."""
    strided = torch.rand(len(classes), math.ceil(HEIGHT / STRIDE), math.ceil(WIDTH / STRIDE))
    return Maps(classes, strided, F.interpolate(strided[None], (HEIGHT, WIDTH), mode="bilinear")[0])


def _together(data: Packed, compute: Callable[[range], None]) -> Iterator[int]:
    while True:
        for first in range(0, len(data) - TOGETHER + 1, TOGETHER):
            compute(range(first, first + TOGETHER))
            yield TOGETHER


def _once_rate(
    stage: str, config: Config, steps: Iterator[int], device: torch.device, seconds: float, classes: float = CLASSES
) -> Rate:
    """Of a stage that goes through its images once; a GPU loads its kernels before."""
    work = flops.stage_work(stage, config, Images(EVALUATED, WIDTH, HEIGHT, classes, K))
    of_image = Work(work.flops / EVALUATED, labels=work.labels / EVALUATED)
    return _rate(steps, of_image, device, seconds, warm=int(device.type == "cuda"))


def _rate(steps: Iterator[int], of_image: Work, device: torch.device, seconds: float, warm: int = 3) -> Rate:
    memory.reset_peak(device)
    for _ in range(warm):  # what is made once
        next(steps)
    _wait(device)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        done += next(steps)
    _wait(device)
    images_per_second = done / (time.perf_counter() - started)
    busy = _busy(steps, device) if device.type == "cuda" else None
    return Rate(images_per_second, of_image.flops, busy, memory.peak(device)["peak_bytes"], of_image.labels)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _busy(steps: Iterator[int], device: torch.device) -> float:
    """The share of the time of some steps in which at least one kernel runs."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        started = time.perf_counter()
        for _ in range(PROFILED):
            next(steps)
        _wait(device)
        elapsed = 1e6 * (time.perf_counter() - started)
    kernels = [e.time_range for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy, until = 0.0, 0.0
    for one in sorted(kernels, key=lambda kernel: kernel.start):
        busy += max(0.0, one.end - max(one.start, until))
        until = max(until, one.end)
    return min(1.0, busy / elapsed)


def _data_rate(stage: str, config: Config, data: Packed, device: torch.device, seconds: float) -> float:
    batches = loader(stage, config, data, device)
    done, epoch, started = 0, 0, time.perf_counter()
    while time.perf_counter() - started < seconds / 2:
        for batch in batches.epoch(epoch):
            done += len(batch)
        epoch += 1
    _wait(device)
    return done / (time.perf_counter() - started)


def price(measured: dict[str, Rate], folder: Path) -> str:
    """Of all tables of the paper on VOC, each distinct stage once."""
    if importlib.util.find_spec("yaml") is None:
        return "The price of all tables needs PyYAML, which is not installed."
    from sweeps.plan.table import load_all_tables
    from sweeps.plan.trials import distinct_stages, make_plan

    tables = load_all_tables()
    data = paper_splits(folder / "devkit")
    plan = make_plan(tables, "paper", {}, (0,), data, Store(folder / "plan"))
    splits = {"cams": Images(EVALUATED, WIDTH, HEIGHT, CLASSES, K)}
    train = Images(TRAIN, WIDTH, HEIGHT, CLASSES, K)
    configs = {key.digest: trial.config for trial in plan.trials for key in trial.keys.values()}
    hours: dict[str, float] = defaultdict(float)
    for key in distinct_stages(plan.trials):
        if key.stage in measured:
            work = flops.stage_work(key.stage, configs[key.digest], splits.get(key.stage, train)).flops
            hours[key.stage] += work / (measured[key.stage].tflops * 1e12) / 3600
    told = ", ".join(f"{stage} {value:.2f}" for stage, value in hours.items())
    total = sum(hours.values())
    return f"All {len(tables)} tables, preset paper, at these rates: {total:.1f} GPU-hours ({told})."


RATES: dict[str, Callable[[Config, Packed, torch.device, float], Rate]] = {
    "caae": partial(_training_rate, "caae"),
    "segmentor": partial(_training_rate, "segmentor"),
    "cams": _cams_rate,
    "affinity_labels": _crf_rate,
    "affinity": partial(_training_rate, "affinity"),
    "walk": _walk_rate,
    "deeplab": partial(_training_rate, "deeplab"),
    "segmentation": _segmentation_rate,
}
