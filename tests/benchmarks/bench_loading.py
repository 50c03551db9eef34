"""Training crops at preset paper, of 500x375 photographs, on one core: by Pillow from files, and from a pack.

The host's share is what is left to the CPU where a GPU makes the crops: drawing their parameters, and copying the
images into the memory that is sent to the GPU. `--json` ends with one object.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import functional as tvf

from semformer.config import load_config
from semformer.data.augment import Crops, caae_crops, make_crops, segmentor_crops
from semformer.data.loading import cut, pack_flat
from semformer.data.pack import Packed
from semformer.data.pixels import MEAN, STD
from semformer.data.voc import open_devkit
from semformer.stages.pack import packed
from semformer.store import Store

N, HEIGHT, WIDTH = 384, 375, 500
BATCH = 64
SECONDS = 4.0
OBJECTS = ["<object><name>cat</name></object>", "<object><name>sofa</name></object>"]
ADJUST = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)


def run() -> dict[str, float]:
    """Images per second of each way."""
    torch.set_num_threads(1)
    config = load_config("paper")
    with tempfile.TemporaryDirectory() as folder:
        data = make_photographs(Path(folder))
        sizes = data.sizes
        draws: dict[str, Callable[[int], Crops]] = {
            "caae": lambda epoch: caae_crops(sizes, config.caae, seed=0, epoch=epoch),
            "segmentor": lambda epoch: segmentor_crops(sizes, config.segmentor, seed=0, epoch=epoch),
        }
        rates = {"host_images_per_second_per_core": host_rate(data, draws["caae"])}
        for stage, draw in draws.items():
            crops = draw(0)
            images = [cut(data.pixels(i), crops, i) for i in range(N)]
            lumas = torch.from_numpy(data.luma)

            def ours(first: int, crops=crops, images=images, lumas=lumas) -> None:
                rows = np.arange(first, first + 8)
                make_crops([images[i] for i in rows], lumas[rows], crops, rows)

            def pillow(first: int, crops=crops) -> None:
                for i in range(first, first + 8):
                    pillow_crop(Image.open(data.image_path(i)).convert("RGB"), crops, i)

            rates[f"{stage}_crops_per_second_pillow"] = rate(pillow)
            rates[f"{stage}_crops_per_second"] = rate(ours)
    return {name: round(value, 1) for name, value in rates.items()}


def host_rate(data: Packed, draw: Callable[[int], Crops]) -> float:
    """A whole epoch at a time: its parameters are drawn at once."""
    size = min(BATCH, len(data))
    buffer = torch.ones(size * HEIGHT * WIDTH * 3, dtype=torch.uint8)
    done, epoch, started = 0, 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < SECONDS:
        crops = draw(epoch)
        order = np.random.default_rng(epoch).permutation(len(data))
        for rows in order[: len(order) // size * size].reshape(-1, size):
            parts = [cut(data.pixels(i), crops, i) for i in rows]
            pack_flat(parts, buffer[: sum(part.numel() for part in parts)])
            done += size
        epoch += 1
    return done / elapsed


def rate(make_eight: Callable[[int], None]) -> float:
    done, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < SECONDS:
        make_eight(done % N)
        done += 8
    return done / elapsed


def pillow_crop(image: Image.Image, crops: Crops, i: int) -> torch.Tensor:
    """The same crop from whole images of 8 bits, with every change of colour before it."""
    for kind in crops.order[i]:
        image = ADJUST[kind](image, float(crops.amounts[i, kind]))
    (H, W), (top, left, h, w) = crops.scaled[i], crops.box[i]
    resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[crops.resample]
    image = image.resize((W, H), resample).crop((left, top, left + w, top + h))
    image = image.resize(tuple(crops.shown[i][::-1]), resample)
    pixels = np.asarray(ImageOps.mirror(image) if crops.flip[i] else image, dtype=np.float32)
    canvas = torch.zeros(3, crops.size, crops.size)
    (y, x), (h, w) = crops.corner[i], crops.shown[i]
    normal = (pixels / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    canvas[:, y : y + h, x : x + w] = torch.from_numpy(normal).permute(2, 0, 1)
    return canvas


def make_photographs(folder: Path, count: int = N) -> Packed:
    """Smooth noise that compresses about as photographs do (some 50 kB each), with one or two objects."""
    voc = folder / "VOC2012"
    for part in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (voc / part).mkdir(parents=True)
    rng, ids = np.random.default_rng(0), [f"image_{i:04d}" for i in range(count)]
    for i, name in enumerate(ids):
        coarse = Image.fromarray(rng.integers(0, 256, (HEIGHT // 5, WIDTH // 5, 3), dtype=np.uint8))
        coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(voc / "JPEGImages" / f"{name}.jpg", quality=90)
        (voc / "Annotations" / f"{name}.xml").write_text(f"<annotation>{''.join(OBJECTS[: 1 + i % 2])}</annotation>")
    (voc / "ImageSets" / "Segmentation" / "train.txt").write_text("\n".join(ids))
    return packed(open_devkit(folder).split("train"), ["images"], Store(folder / "store"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options, rates = parser.parse_args(arguments), run()
    for stage, name in (("caae", "CAAE crops"), ("segmentor", "segmentation crops")):
        before, after = rates[f"{stage}_crops_per_second_pillow"], rates[f"{stage}_crops_per_second"]
        print(f"| {name} | {before:.1f} images/s | {after:.1f} images/s | {after / before:.1f}x |")
    print(f"| host's share, with a GPU | | {rates['host_images_per_second_per_core']:.0f} images/s | |")
    if options.json:
        print(json.dumps(rates))


if __name__ == "__main__":
    main()
