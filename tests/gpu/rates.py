"""How fast the stages are on a device, and what all tables would cost at these rates."""

import importlib.util
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from semformer import flops, memory
from semformer.config import Config, load_config
from semformer.data.augment import caae_crops
from semformer.data.loading import Loader
from semformer.data.pack import Packed
from semformer.flops import Images
from semformer.inference import multi_scale_maps
from semformer.precision import determinism
from semformer.stages import caae, segmentor
from semformer.stages.cams import TOGETHER
from semformer.stages.training import Step, build_optimizer, compiled
from semformer.store import Store
from tests.benchmarks.bench_loading import HEIGHT, WIDTH, host_rate, make_photographs
from tests.devkits import paper_splits
from tests.gpu.checks import CROPS, gradients

K = 21
TRAIN, EVALUATED, CLASSES = 10_582, 1_464, 2.5
"""Images of VOC's trainaug and train, and how many classes one shows, with the background."""
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "A10": 125.0, "L40": 181.0, "L4": 121.0, "V100": 125.0}
"""Dense matrix products in bfloat16 (V100: float16), in TFLOP/s, as their maker tells."""
PROFILED = 5
"""Steps of which the time that the GPU is busy is measured."""


@dataclass(frozen=True)
class Rate:
    images_per_second: float
    flops_per_image: float
    busy: float | None
    """Share of the time in which the GPU is at work."""
    peak_bytes: int

    @property
    def tflops(self) -> float:
        return self.images_per_second * self.flops_per_image / 1e12


def report(
    preset: str, device: torch.device, folder: Path, seconds: float, photographs: int, *, compiled_too: bool
) -> Iterator[str]:
    """Lines of Markdown."""
    off = {f"{stage}.pretrained": False for stage in ("caae", "segmentor")}
    config = load_config(preset, off)
    data = make_photographs(folder, photographs)
    peak = next((v for name, v in PEAKS.items() if device.type == "cuda" and name in memory.peak(device)["name"]), None)
    yield (
        f"\nPreset {preset}, {config.precision}, {photographs} photographs of {WIDTH}x{HEIGHT}:\n\n"
        "| what | images/s | TFLOP/s | of the peak (MFU) | GPU busy | memory |\n|---|---:|---:|---:|---:|---:|"
    )
    measured = {}
    what = {stage: (stage, config) for stage in RATES}
    if compiled_too:
        on = load_config(preset, off | {f"{stage}.compile": True for stage in CROPS})
        what |= {f"{stage}, compiled": (stage, on) for stage in CROPS}
    for name, (stage, of_stage) in what.items():
        with determinism(device):
            rate = measured[name] = RATES[stage](of_stage, data, device, seconds)
        mfu = "" if peak is None else f"{100 * rate.tflops / peak:.0f} %"
        busy = "" if rate.busy is None else f"{100 * rate.busy:.0f} %"
        gib = rate.peak_bytes / 2**30
        yield f"| {name} | {rate.images_per_second:.1f} | {rate.tflops:.3g} | {mfu} | {busy} | {gib:.1f} GiB |"
    for stage in CROPS:
        yield f"| {stage}, its crops alone | {_data_rate(stage, config, data, device, seconds):.0f} | | | | |"
    one_core = host_rate(data, lambda epoch: caae_crops(data.sizes, config.caae, seed=0, epoch=epoch))
    yield f"| the host's share of a CAAE crop, one core | {one_core:.0f} | | | | |"
    yield "\n" + (
        price(measured, folder) if preset == "paper" else "All tables are priced at the rates of preset paper."
    )


def _caae_rate(config: Config, data: Packed, device: torch.device, seconds: float) -> Rate:
    model = caae.build(config.caae, n_classes=K).to(device)
    work = flops.caae_training(config.caae, K)
    network = compiled(model, config.caae)
    return _training_rate("caae", network, network, model.encoder, config, data, work, device, seconds)


def _segmentor_rate(config: Config, data: Packed, device: torch.device, seconds: float) -> Rate:
    guide = caae.build(config.caae, n_classes=K).to(device).eval().requires_grad_(False)
    model = segmentor.build(config.segmentor, n_classes=K, class_dim=config.caae.class_dim).to(device)
    work = flops.segmentor_training(config.segmentor, config.caae, K, float(data.labels.sum(axis=1).mean()))
    guide.embed = compiled(guide.embed, config.segmentor)  # type: ignore[method-assign]
    network, backbone = compiled(model, config.segmentor), model.backbone
    return _training_rate("segmentor", network, guide, backbone, config, data, work, device, seconds)


def _training_rate(
    stage: str,
    model: Any,
    guide: Any,
    pretrained: torch.nn.Module,
    config: Config,
    data: Packed,
    work: float,
    device: torch.device,
    seconds: float,
) -> Rate:
    options = getattr(config, stage)
    loader = Loader(data, CROPS[stage], options, seed=0, device=device)
    step = Step(
        stage,
        build_optimizer(model, options.optimizer, pretrained),
        lambda batch, generator, pieces: gradients(stage, model, guide, config, batch),
        config.precision,
        most_pieces=1,
    )
    generator = torch.Generator(device)

    def steps() -> Iterator[int]:
        for epoch in range(10**6):
            for batch in loader.epoch(epoch):
                step(batch, generator)
                yield len(batch)

    warm = 2 * len(loader) if options.compile else 3  # each number of pairs is compiled once
    return _rate(steps(), work, device, seconds, warm)


def _cams_rate(config: Config, data: Packed, device: torch.device, seconds: float) -> Rate:
    model = segmentor.build(config.segmentor, n_classes=K, class_dim=config.caae.class_dim).to(device).eval()
    images = Images(EVALUATED, WIDTH, HEIGHT, CLASSES, K)

    def steps() -> Iterator[int]:
        while True:
            for first in range(0, len(data) - TOGETHER + 1, TOGETHER):
                rows = range(first, first + TOGETHER)
                images, classes = [data.pixels(i) for i in rows], [data.objects(i) for i in rows]
                multi_scale_maps(model, images, classes, config.cams, precision=config.precision)
                yield TOGETHER

    return _rate(steps(), flops.stage_work("cams", config, images).flops / EVALUATED, device, seconds)


def _rate(steps: Iterator[int], work: float, device: torch.device, seconds: float, warm: int = 3) -> Rate:
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
    return Rate(images_per_second, work, busy, memory.peak(device)["peak_bytes"])


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
    loader = Loader(data, CROPS[stage], getattr(config, stage), seed=0, device=device)
    done, epoch, started = 0, 0, time.perf_counter()
    while time.perf_counter() - started < seconds / 2:
        for batch in loader.epoch(epoch):
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
    "caae": _caae_rate,
    "segmentor": _segmentor_rate,
    "cams": _cams_rate,
}
