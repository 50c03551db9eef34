"""What must hold on any device: check(device, folder) returns a remark, raises Skipped, or fails."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from semformer import pipeline
from semformer.config import Config, load_config
from semformer.data.augment import caae_crops, segmentor_crops
from semformer.data.loading import Batch, Loader
from semformer.data.pack import Packed
from semformer.data.shapes import make_shapes
from semformer.data.voc import open_devkit
from semformer.models.affinity import STRIDES
from semformer.precision import autocast
from semformer.stages import affinity, caae, deeplab, segmentor
from semformer.stages.pack import packed
from semformer.store import Store

CROPS = {"caae": caae_crops, "segmentor": segmentor_crops, "affinity": segmentor_crops, "deeplab": segmentor_crops}
"""Of the stages that train."""


class Skipped(Exception):
    """A check that cannot be made here, and why."""


class Stop(Exception):
    """An interruption."""


def run(config: Config, data: Path, store: Store, device: torch.device, progress=lambda told: None, until="evaluate"):
    opened = pipeline.open_data(config, data)
    runs = pipeline.run(config, opened, store, device=device, progress=progress, until=until)
    return {one.stage: one.artifact for one in runs}


def tensors(artifact) -> dict[str, torch.Tensor]:
    names = [name for name in sorted(artifact.files) if name.endswith(".safetensors")]
    return {f"{name}:{key}": value for name in names for key, value in load_file(artifact.file(name)).items()}


def differing(ours, theirs) -> list[str]:
    ours, theirs = tensors(ours), tensors(theirs)
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def shapes(folder: Path) -> Path:
    return make_shapes(folder / "shapes", train=16, val=6, size=48)


def whole_pipeline(device: torch.device, folder: Path) -> str:
    config = load_config("micro")
    ends = pipeline.ends(config, "deeplab")
    artifacts = run(config, shapes(folder), Store(folder / "store"), device, until=ends)
    peak = max(artifact.info["memory"]["peak_bytes"] for artifact in artifacts.values())
    scores = {name: value for end in ends for name, value in artifacts[end].info["metrics"].items()}
    told = ", ".join(f"{name} {scores[name]:.1f}" for name in ("cam/val/miou", "pseudo/train/miou", "seg/val/miou"))
    return f"{told}, peak {peak / 2**20:.0f} MiB"


def resume(device: torch.device, folder: Path) -> str:
    """An interrupted training ends with the same bits as one that was not."""
    short = {"deeplab.supervised": True, "affinity_labels.crf.iterations": 0}
    config, data = load_config("micro", short | {f"{stage}.epochs": 2 for stage in CROPS}), shapes(folder)
    whole, parts = Store(folder / "whole"), Store(folder / "parts")
    expected = run(config, data, whole, device, until=tuple(CROPS))
    for stage in CROPS:

        def stop(told, stage=stage) -> None:
            if (told.stage, told.epoch) == (stage, 2):
                raise Stop

        try:
            run(config, data, parts, device, stop, until=stage)
        except Stop:
            ours = run(config, data, parts, device, until=stage)[stage]
        else:
            raise AssertionError("nothing was interrupted")
        assert not (wrong := differing(ours, expected[stage])), f"{stage}: {len(wrong)} tensors differ: {wrong[:3]}"
    return "bit-equal"


def bfloat16(device: torch.device, folder: Path) -> str:
    """Losses and gradients of a step, against float32."""
    told = []
    for stage in CROPS:
        terms = {precision: _step(stage, device, folder, precision) for precision in ("float32", "bfloat16")}
        (loss, gradient), (rough_loss, rough_gradient) = terms["float32"], terms["bfloat16"]
        cosine = torch.nn.functional.cosine_similarity(gradient, rough_gradient, dim=0).item()
        assert abs(rough_loss - loss) < 0.05 * abs(loss), f"{stage}: loss {rough_loss:.4f}, in float32 {loss:.4f}"
        assert cosine > 0.95, f"{stage}: the gradients' cosine is {cosine:.3f}"
        told.append(f"{stage}: loss {rough_loss:.3f} / {loss:.3f}, cosine of gradients {cosine:.4f}")
    return "; ".join(told)


def _step(stage: str, device: torch.device, folder: Path, precision: str) -> tuple[float, torch.Tensor]:
    config = load_config("micro")
    data = packed(open_devkit(shapes(folder)).split("train"), ["images"], Store(folder / "store"))
    torch.manual_seed(0)
    model, guide = network(stage, config, len(data.classes), device)
    batch = next(loader(stage, config, data, device).epoch(0))
    with autocast(device, precision):
        terms = gradients(stage, model, guide, config, batch)
    gradient = torch.cat([p.grad.float().flatten().cpu() for p in model.parameters() if p.grad is not None])
    return terms["total"].item(), gradient


def network(stage: str, config: Config, K: int, device: torch.device):
    """The untrained network of a stage that trains, and the CAAE that guides it (None: none does)."""
    if stage == "caae":
        return caae.build(config.caae, n_classes=K).to(device), None
    if stage == "affinity":
        return affinity.build(config.affinity).to(device), None
    if stage == "deeplab":
        return deeplab.build(config.deeplab, n_classes=K).to(device), None
    guide = caae.build(config.caae, n_classes=K).to(device).eval().requires_grad_(False)
    return segmentor.build(config.segmentor, n_classes=K, class_dim=config.caae.class_dim).to(device), guide


def loader(stage: str, config: Config, data: Packed, device: torch.device) -> Loader:
    """The batches of a stage that trains; label maps are stripes, of the background and each class of the image."""
    options = getattr(config, stage)
    sides = {"affinity": config.affinity.image_size // STRIDES[config.affinity.variant], "deeplab": options.image_size}

    def stripes(i: int) -> np.ndarray:
        classes, (H, W) = np.array([0, *data.objects(i)], dtype=np.uint8), data.sizes[i]
        return np.broadcast_to(classes[np.arange(W) * len(classes) // W], (H, W))

    label_map, side = (stripes, sides[stage]) if stage in sides else (None, 0)
    return Loader(data, CROPS[stage], options, seed=0, device=device, label_map=label_map, label_side=side)


def gradients(stage: str, model, guide, config: Config, batch: Batch) -> dict[str, torch.Tensor]:
    if stage == "caae":
        return caae.gradients(model, batch)
    if stage == "affinity":
        return affinity.gradients(model, batch, config.affinity)
    if stage == "deeplab":
        return deeplab.gradients(model, batch)
    generator = torch.Generator(batch.images.device).manual_seed(0)
    return segmentor.gradients(model, guide, config.segmentor, batch, generator, caae_size=config.caae.image_size)


def out_of_memory(device: torch.device, folder: Path) -> str:
    """With so little memory that a batch does not fit, it is taken in pieces, and training goes on."""
    if device.type != "cuda":
        raise Skipped("needs a GPU, whose memory can be limited; the tests limit a process's")
    changes = {"image_size": 256, "class_dim": 256, "batch_size": 16, "epochs": 1}
    config = load_config("micro", {f"caae.{name}": value for name, value in changes.items()})
    data, total = shapes(folder), torch.cuda.get_device_properties(device).total_memory
    peak = run(config, data, Store(folder / "whole"), device, until="caae")["caae"].info["memory"]["peak_bytes"]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.6 * peak / total, device)
    try:
        history = run(config, data, Store(folder / "parts"), device, until="caae")["caae"].info["history"]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert history["pieces"][-1] > 1, "it was not short of memory"
    return f"{0.6 * peak / 2**20:.0f} MiB, where {peak / 2**20:.0f} are needed: {history['pieces'][-1]:.0f} pieces"


def maps_alone(device: torch.device, folder: Path) -> str:
    """Maps that a process makes after training are those that another makes of the same network."""
    data = shapes(folder)
    ours = run(load_config("micro"), data, Store(folder / "store"), device, until="cams")["cams"]
    code = f"""
import shutil, torch
from pathlib import Path
from semformer.config import load_config
from semformer.store import Store
from tests.gpu.checks import run
folder = Path({str(folder)!r})
shutil.copytree(folder / "store" / "segmentor", folder / "other" / "segmentor")
run(load_config("micro"), Path({str(data)!r}), Store(folder / "other"), torch.device({str(device)!r}), until="cams")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    other = Store(folder / "other").find(ours.key)
    assert other is not None
    assert not (wrong := differing(ours, other)), f"{len(wrong)} maps differ: {wrong[:3]}"
    return "bit-equal"


def sweep(device: torch.device, folder: Path) -> str:
    """Four trials at once, a quarter of the GPU each (on a CPU, two: a core each)."""
    if importlib.util.find_spec("ray") is None:
        raise Skipped("Ray is not installed")
    share = ["--gpus-per-trial", "0.25"] if device.type == "cuda" else []
    places = ["--store", str(folder / "store"), "--sweeps", str(folder / "sweeps")]
    server = ["--tracking-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    table = ["run", "table07", "--preset", "micro", "--data", str(shapes(folder))]
    command = [sys.executable, "-m", "sweeps.cli", *table, *share, *places, *server]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    made = sum(artifact.key.stage == "evaluate" for artifact in Store(folder / "store").artifacts())
    assert made == 4, f"{made} of 4 trials"
    return f"{made} trials"


CHECKS: dict[str, Callable[[torch.device, Path], str]] = {
    "the pipeline until deeplab, preset micro": whole_pipeline,
    "an interrupted training resumes, and ends with the same bits": resume,
    "a step in bfloat16 is near one in float32": bfloat16,
    "a batch that does not fit into memory is taken in pieces": out_of_memory,
    "maps are the same with and without training before them": maps_alone,
    "four trials of a real sweep share the device": sweep,
}
