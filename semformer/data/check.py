"""Looks at every file of a VOC devkit: `semformer data check DIR`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semformer.data.voc import VOC_CLASSES, VOC_COUNTS, open_devkit, read_image, read_labels, read_mask
from semformer.errors import UserError


@dataclass(frozen=True)
class Findings:
    """What `check_devkit` found: `lines` tell what there is, `problems` what is wrong, if anything."""

    lines: list[str]
    problems: list[str]


def check_devkit(root: str | Path, progress: Callable[[int, int], None] | None = None) -> Findings:
    """Look at every file of the splits train, val and trainaug.

    Decodes each image, parses each annotation, and reads each mask (size, values). Goes on after a problem;
    each kind of problem is counted and its first case told. progress(done, total) is called after each image.
    Raises UserError only where `open_devkit` does.
    """
    devkit = open_devkit(root)
    is_voc = devkit.classes[1:] == VOC_CLASSES
    lines = [f"{devkit.folder}: {len(devkit.classes) - 1} object classes: {', '.join(devkit.classes[1:])}"]
    problems: list[str] = []
    mask_paths: dict[str, set[Path]] = {}
    for name, voc_count in VOC_COUNTS.items():
        try:
            ids = devkit.ids(name)
        except UserError as error:
            if name in devkit.split_names:
                problems.append(str(error))
            else:
                lines.append(f"{name}: absent")
            continue
        line = f"{name}: {len(ids):,} images"
        if is_voc:
            line += f" (VOC 2012 has {voc_count:,}"
            line += "; the paper prints 10,528)" if name == "trainaug" else ")"
            if len(ids) != voc_count:
                problems.append(f"{name} has {len(ids):,} images, VOC 2012 has {voc_count:,}")
        lines.append(line)
        for image_id in ids:
            mask_paths.setdefault(image_id, set()).add(devkit.mask_path(image_id, name))
    if not mask_paths:
        problems.append(f"{devkit.folder} has none of the splits {', '.join(VOC_COUNTS)}")

    failures: dict[str, list[str]] = {}
    images_of_class, without = np.zeros(len(devkit.classes), dtype=np.int64), 0

    def look(what: str, path: Path, read: Callable[..., Any], *args: Any) -> Any:
        try:
            return read(path, *args)
        except UserError as error:
            kind = f"{what} unusable" if path.is_file() else f"{what} missing"
            failures.setdefault(kind, []).append(str(error))
            return None

    for done, (image_id, paths) in enumerate(mask_paths.items(), start=1):
        image_path = devkit.folder / "JPEGImages" / f"{image_id}.jpg"
        image = look("image", image_path, read_image)
        labels = look("annotation", devkit.folder / "Annotations" / f"{image_id}.xml", read_labels, devkit.classes)
        if labels is not None:
            images_of_class += labels.astype(np.int64)
            without += not labels[1:].any()
        for path in sorted(paths):
            if image is not None or not path.is_file():
                look("mask", path, read_mask, image_path, len(devkit.classes))
        if progress is not None:
            progress(done, len(mask_paths))
    per_class = zip(devkit.classes[1:], images_of_class[1:], strict=True)
    lines.append("images of each class: " + ", ".join(f"{name} {count:,}" for name, count in per_class))
    if without:
        lines.append(f"images without an object: {without:,}")
    problems += [f"{kind}: {len(texts):,}; the first: {texts[0]}" for kind, texts in sorted(failures.items())]
    return Findings(lines, problems)
